"""Tokens"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field

from orion_worker.web.refusals import Refusal

HEADER = b"x-orion-pass"
END = b"x-orion-end"
OURS = b"x-orion-"
"""No header of a client that is called so is passed on, either."""
_PASS = re.compile(
    r"([a-z0-9-]{1,64}) ([1-9][0-9]{0,17}) ([1-9][0-9]{3,4})"
    r" (public|[a-z]{5,6}\.[a-z0-9-]{1,64}\.[0-9a-f]{16}) ([1-9][0-9]{0,17}) (0|[1-9][0-9]{0,14}) ([0-9a-f]{64})"
)
END_MESSAGE = re.compile(r"([1-9][0-9]{0,17}) ([0-9a-f]{64})")


@dataclass(frozen=True)
class Way:
    rental_id: str
    epoch: int
    port: int
    grant: str = field(default="public", compare=False)
    number: int = field(default=1, compare=False)
    """Passes and messages of what has ended have rising numbers."""
    left_ms: int = field(default=0, compare=False)
    """0: it does not end by itself."""

    @property
    def told(self) -> str:
        return f"{self.rental_id} {self.epoch} {self.port} {self.grant} {self.number} {self.left_ms}"

    @property
    def opened_by(self) -> str:
        """As the manager names what has ended."""
        return f"{self.rental_id} {self.port} {self.grant}"


def signature(session_id: str, way: Way) -> str:
    """As src/orion/manager/gateway/ways.py makes it."""
    return hmac.new(session_id.encode(), way.told.encode(), hashlib.sha256).hexdigest()


def end_signature(session_id: str, number: int, lines: bytes) -> str:
    """As src/orion/manager/gateway/web_ends.py makes it."""
    return hmac.new(session_id.encode(), b"end %d " % number + lines, hashlib.sha256).hexdigest()


def opened(told: str, session_id: str) -> Way:
    """The way that a pass opens. Raises Refusal for one that this worker's session did not sign."""
    match = _PASS.fullmatch(told)
    if not match or not session_id:
        raise Refusal(403, "no_pass", "this door is for the platform's proxy alone")
    way = Way(match[1], int(match[2]), int(match[3]), match[4], int(match[5]), int(match[6]))
    if not hmac.compare_digest(signature(session_id, way), match[7]):
        raise Refusal(403, "no_pass", "this door is for the platform's proxy alone")
    return way


def take_pass(head: bytes) -> tuple[str, bytes]:
    """The pass in the head of a request, and the head without it and its like. Raises Refusal unless there is one."""
    lines = head.split(b"\r\n")
    passes = [line for line in lines[1:] if line.partition(b":")[0].strip().lower() == HEADER]
    if len(passes) != 1:
        raise Refusal(403, "no_pass", "this door is for the platform's proxy alone")
    told = passes[0].partition(b":")[2].strip().decode("latin-1")
    return told, b"\r\n".join(line for line in lines if not line.lower().startswith(OURS))


def header(head: bytes, name: bytes) -> str:
    """Return the value of a header; empty unless it is there once."""
    found = [line.partition(b":")[2] for line in head.split(b"\r\n")[1:] if line.partition(b":")[0].lower() == name]
    return found[0].strip().decode("latin-1") if len(found) == 1 else ""
