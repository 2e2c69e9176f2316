"""The two certificate authorities of the platform for SSH: one signs for workers, the other for renters.

There are two keys so that the right to certify hosts is not the right to certify log-ins. Both stay in the manager's
process; the engine and the snapshot service, which connect to workers, have neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import asyncssh

from orion.manager.domain.host_certificates import (
    BACKDATED_S,
    LIFETIME_S,
    MAX_NAMES,
    Issued,
    NothingToSign,
    host_name,
    principal_of,
)

ED25519 = "ssh-ed25519"


class Authority:
    """Signs certificates for workers and for renters."""

    def __init__(self, host_key: str, user_key: str, wall: Callable[[], float]) -> None:
        """Take private keys in OpenSSH's format. Raise asyncssh.KeyImportError if one is not valid."""
        self._hosts: Any = asyncssh.import_private_key(host_key)
        self._users: Any = asyncssh.import_private_key(user_key)
        self._wall = wall
        self._last_serial = 0

    @property
    def of_hosts(self) -> str:
        """The public key by which clients verify workers."""
        return _public(self._hosts)

    @property
    def of_users(self) -> str:
        """The public key by which workers verify renters."""
        return _public(self._users)

    def next_serial(self) -> int:
        """Return a serial number above all earlier ones, because workers keep the certificate with the highest."""
        self._last_serial = max(self._last_serial + 1, int(self._wall() * 1e6))
        return self._last_serial

    def host_certificate(
        self, serial: int, worker_id: str, host_keys: Sequence[str], rental_ids: Collection[str]
    ) -> Issued:
        """Return a certificate for an hour that names the worker as the host of these rentals.

        Raise NothingToSign if the worker has no rental or no key of the right kind.
        """
        named = sorted(rental_ids)[:MAX_NAMES]
        if not named:
            raise NothingToSign(f"nothing is placed on worker {worker_id}")
        key = next((key for key in host_keys if key.startswith(f"{ED25519} ")), None)
        if key is None:
            raise NothingToSign(f"worker {worker_id} has no host key of kind {ED25519}")
        try:
            public_key = asyncssh.import_public_key(key)
        except asyncssh.KeyImportError as error:
            raise NothingToSign(f"the host key of worker {worker_id} is not valid: {error}") from error
        now = self._wall()
        names = [host_name(rental_id) for rental_id in named]
        made = self._hosts.generate_host_certificate(
            public_key, worker_id, serial=serial, principals=names, **_validity(now, LIFETIME_S)
        )
        line, ids, until = _line(made), frozenset(named), now + LIFETIME_S
        return Issued(serial=serial, line=line, rental_ids=ids, host_keys=tuple(host_keys), valid_until=until)

    def user_certificate(
        self, public_key: str, rental_id: str, epoch: int, who: str, source: str, lasts_s: float
    ) -> tuple[str, float]:
        """Return the certificate, and when it expires in UTC seconds. `source`: the only address it is valid from."""
        validity = _validity(self._wall(), lasts_s)
        made = self._users.generate_user_certificate(
            asyncssh.import_public_key(public_key),
            f"{who} of {rental_id}",
            serial=self.next_serial(),
            principals=[principal_of(rental_id, epoch)],
            source_address=[source],
            permit_x11_forwarding=False,
            permit_agent_forwarding=False,
            permit_user_rc=False,
            **validity,
        )
        return _line(made), float(validity["valid_before"])


def _validity(now: float, lasts_s: float) -> dict[str, int]:
    return {"valid_after": int(now - BACKDATED_S), "valid_before": int(now + lasts_s)}


def _public(key: Any) -> str:
    return " ".join(key.export_public_key("openssh").decode().split()[:2])


def _line(certificate: Any) -> str:
    return " ".join(certificate.export_certificate("openssh").decode().split()[:2])
