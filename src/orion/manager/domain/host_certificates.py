"""What a worker's host certificate says, and for how long one may be counted on.

A renter's ssh verifies a worker by the name of its own rental, which only a certificate that names it can prove.
So what is signed is exactly what is placed on that worker at that moment, and it is over soon. Who is sent there is
decided by the relay, which knows the one current worker: the hour in which a former worker can still show a valid
certificate is of no use to it, because nobody is brought to it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from orion.manager.domain.states import PlacementState, RentalState

LIFETIME_S = 3600.0
BACKDATED_S = 24 * 3600.0
"""A client's clock may be late by so much: nobody can use a certificate before it is signed, whenever it begins."""
AHEAD_S = 60.0
"""A certificate that lasts longer than its lifetime by more than this was signed while the clock was ahead."""
FRESH_S = 900.0
"""One that is good for less is renewed when somebody is let in by it."""
MAX_NAMES = 256
"""OpenSSH reads no certificate with more principals (SSHKEY_CERT_MAX_PRINCIPALS)."""
CURRENT = frozenset({PlacementState.PREPARING, PlacementState.RUNNING})
NAMED = frozenset({RentalState.PROVISIONING, RentalState.ACTIVE, RentalState.MIGRATING})
"""Rentals that a certificate may name, where their placement of the current epoch is CURRENT."""
USER_LIFETIME_S = 3600
"""A renter's certificate lasts for so long at most."""


class NothingToSign(ValueError):
    """A certificate without principals would be good for every name."""


def host_name(rental_id: str) -> str:
    """The principal of a host certificate and what ssh takes for the host's name (HostKeyAlias).

    The rental's id, in a domain of our own: so the one line by which clients trust us vouches for no other host.
    """
    return f"{rental_id}.orion"


def principal_of(rental_id: str, epoch: int) -> str:
    """Of a renter's certificate: it opens this rental, as it is now, and nothing that comes after."""
    return f"{rental_id}-{epoch}"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A host certificate. `valid_until`: UTC seconds."""

    serial: int
    line: str
    rental_ids: frozenset[str]
    host_keys: tuple[str, ...]
    valid_until: float

    def serves(self, rental_id: str, host_keys: Collection[str], now: float, for_s: float) -> bool:
        """Whether a renter of this rental recognises that worker by it for so long."""
        same = rental_id in self.rental_ids and tuple(host_keys) == self.host_keys
        return same and for_s <= self.valid_until - now <= LIFETIME_S + AHEAD_S
