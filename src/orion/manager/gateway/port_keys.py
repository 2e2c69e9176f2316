"""What opens a web port: passes, which a worker's door knows, and keys, which a browser holds for a while. Pure.

A pass is for one rental at one epoch, on one port. It says what opens that port, and for how long that is good, so that
a connection ends with it (gateway/port_connections.py). It is signed with the secret of the worker's session, which
that worker and the manager alone know, and which ends with each registration: so a pass for one worker, or for a former
one at its address, is worth nothing to another.

A key is for one rental and one port, in the name of one token; one that is made anew in its file is another. The key is
signed by the manager, and nothing of it is kept, so it outlives a restart. Whose token it is, and that this is still
valid and may open the rental, is asked at each request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field

LIFETIME_S = 8 * 3600.0
"""Of a key: a working day."""
_KEY = re.compile(r"([A-Za-z0-9_-]{43})\.(([0-9a-f]{1,12})\.(client|admin)\.([a-z0-9-]{1,47})-([0-9a-f]{16}))")


@dataclass(frozen=True)
class Named:
    """The token in whose name a key opens a port."""

    role: str
    token_id: str
    mark: str
    ends_at: float = field(default=0.0, compare=False)
    """Unix seconds at which the key ends."""


def signed_pass(
    session_id: str, rental_id: str, epoch: int, port: int, grant: str, number: int, left_s: float | None
) -> str:
    """Return a pass as orion_worker/web/port_proxy.py reads it. `left_s` None: its grant does not end by itself."""
    left_ms = 0 if left_s is None else max(1, int(left_s * 1000))
    told = f"{rental_id} {epoch} {port} {grant} {number} {left_ms}"
    return f"{told} {hmac.new(session_id.encode(), told.encode(), hashlib.sha256).hexdigest()}"


class PortKeys:
    def __init__(self, secret: str) -> None:
        self._secret = hmac.new(secret.encode(), b"keys of web ports", hashlib.sha256).digest()

    def make(self, rental_id: str, port: int, named: Named, now: float) -> str:
        """`now`: Unix time. Nothing in it needs to be escaped in a path or in a cookie."""
        told = f"{int(now + LIFETIME_S):x}.{named.role}.{named.token_id}-{named.mark}"
        return f"{self._signature(rental_id, port, told)}.{told}"

    def read(self, key: str, rental_id: str, port: int, now: float) -> Named | None:
        """None unless it was made for this port, and is not over."""
        match = _KEY.fullmatch(key)
        if not match or not hmac.compare_digest(match[1], self._signature(rental_id, port, match[2])):
            return None
        ends_at = int(match[3], 16)
        return Named(match[4], match[5], match[6], ends_at) if now < ends_at else None

    def _signature(self, rental_id: str, port: int, told: str) -> str:
        signed = f"{rental_id} {port} {told}".encode()
        return base64.urlsafe_b64encode(hmac.digest(self._secret, signed, "sha256")).rstrip(b"=").decode()
