"""The contents and the lifetime of a worker's host certificate.

A renter's ssh verifies a worker by the name of the rental, which only a certificate with that name can prove. So a
certificate names the rentals that are placed on the worker when it is signed, and lasts for an hour. A former worker
cannot use the rest of that hour: the relay connects renters to the current worker only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from orion.manager.domain.states import PlacementState, RentalState

LIFETIME_S = 3600.0
BACKDATED_S = 24 * 3600.0
"""Seconds by which a certificate begins before it is signed, because a client's clock may be late."""
AHEAD_S = 60.0
"""Seconds: a certificate that lasts longer than its lifetime and this was signed while the clock was ahead."""
FRESH_S = 900.0
"""Seconds: a certificate that ends sooner is renewed when a renter connects."""
MAX_NAMES = 256
"""The principals of a certificate at most: OpenSSH reads none with more (SSHKEY_CERT_MAX_PRINCIPALS)."""
CURRENT = frozenset({PlacementState.PREPARING, PlacementState.RUNNING})
NAMED = frozenset({RentalState.PROVISIONING, RentalState.ACTIVE, RentalState.MIGRATING})
"""States of rentals that a certificate may name, if their placement of the current epoch is CURRENT."""


class NothingToSign(ValueError):
    """There is no rental to name, and a certificate without principals would be good for every name."""


def host_name(rental_id: str) -> str:
    """Return the principal of a host certificate, which is the host's name for ssh (HostKeyAlias).

    The domain `orion` is part of it, so the line by which clients trust the authority is good for no other host.
    """
    return f"{rental_id}.orion"


def principal_of(rental_id: str, epoch: int) -> str:
    """Return the principal of a renter's certificate: it is good for this epoch of the rental only."""
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
        """Return whether the certificate proves a worker with `host_keys` to the renter for `for_s` seconds."""
        same = rental_id in self.rental_ids and tuple(host_keys) == self.host_keys
        return same and for_s <= self.valid_until - now <= LIFETIME_S + AHEAD_S
