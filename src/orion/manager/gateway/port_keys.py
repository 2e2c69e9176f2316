"""Passes, which a worker's port proxy accepts, and keys, which a browser holds. Pure functions of their secrets.

A pass names its grant and the time that is left of it, so that a connection ends with the grant
(gateway/port_connections.py). It is signed with the secret of the worker's session, which changes with each
registration: a pass is worthless to any other worker, also to a later one at the same address.

A key is in the name of one token, whose validity and rights the manager checks at each request. The manager keeps
nothing of a key, so keys outlive a restart. A token that was replaced under the same id has another mark, and does not
validate the keys of the former one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field

LIFETIME_S = 8 * 3600.0
"""Seconds for which a key is valid: a working day."""
_KEY = re.compile(r"([A-Za-z0-9_-]{43})\.(([0-9a-f]{1,12})\.(client|admin)\.([a-z0-9-]{1,47})-([0-9a-f]{16}))")


@dataclass(frozen=True, kw_only=True)
class TokenReference:
    """The token in whose name a key opens a port."""

    role: str
    token_id: str
    mark: str
    ends_at: float = field(default=0.0, compare=False)
    """Unix seconds at which the key ends."""


def signed_pass(
    session_id: str, rental_id: str, epoch: int, port: int, grant: str, number: int, left_s: float | None
) -> str:
    """Return a pass as orion_worker/web/port_proxy.py reads it. `left_s` is None if its grant has no end."""
    left_ms = 0 if left_s is None else max(1, int(left_s * 1000))
    payload = f"{rental_id} {epoch} {port} {grant} {number} {left_ms}"
    return f"{payload} {hmac.new(session_id.encode(), payload.encode(), hashlib.sha256).hexdigest()}"


class PortKeys:
    def __init__(self, secret: str) -> None:
        self._secret = hmac.new(secret.encode(), b"keys of web ports", hashlib.sha256).digest()

    def make(self, rental_id: str, port: int, named: TokenReference, now: float) -> str:
        """Return a key that needs no escaping in a path or a cookie. `now` is Unix time."""
        payload = f"{int(now + LIFETIME_S):x}.{named.role}.{named.token_id}-{named.mark}"
        return f"{self._signature(rental_id, port, payload)}.{payload}"

    def read(self, key: str, rental_id: str, port: int, now: float) -> TokenReference | None:
        """Return the token that the key names, or None if the key is not for this port or is over."""
        match = _KEY.fullmatch(key)
        if not match or not hmac.compare_digest(match[1], self._signature(rental_id, port, match[2])):
            return None
        ends_at = int(match[3], 16)
        return (
            TokenReference(role=match[4], token_id=match[5], mark=match[6], ends_at=ends_at) if now < ends_at else None
        )

    def _signature(self, rental_id: str, port: int, payload: str) -> str:
        signed = f"{rental_id} {port} {payload}".encode()
        return base64.urlsafe_b64encode(hmac.digest(self._secret, signed, "sha256")).rstrip(b"=").decode()
