"""Tokens"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field

from orion_worker.web.refusals import PortRefusal

TOKEN_HEADER = b"x-orion-pass"
END_HEADER = b"x-orion-end"
OWN_HEADERS = b"x-orion-"
"""No header of a client that is called so is passed on, either."""
_TOKEN = re.compile(
    r"([a-z0-9-]{1,64}) ([1-9][0-9]{0,17}) ([1-9][0-9]{3,4})"
    r" (public|[a-z]{5,6}\.[a-z0-9-]{1,64}\.[0-9a-f]{16}) ([1-9][0-9]{0,17}) (0|[1-9][0-9]{0,14}) ([0-9a-f]{64})"
)
END_MESSAGE = re.compile(r"([1-9][0-9]{0,17}) ([0-9a-f]{64})")


@dataclass(frozen=True)
class PortToken:
    rental_id: str
    epoch: int
    port: int
    grant: str = field(default="public", compare=False)
    number: int = field(default=1, compare=False)
    """Passes and messages of what has ended have rising numbers."""
    left_ms: int = field(default=0, compare=False)
    """0: it does not end by itself."""

    @property
    def text(self) -> str:
        return f"{self.rental_id} {self.epoch} {self.port} {self.grant} {self.number} {self.left_ms}"

    @property
    def opened_by(self) -> str:
        """As the manager names what has ended."""
        return f"{self.rental_id} {self.port} {self.grant}"


def signature(session_id: str, token: PortToken) -> str:
    """As src/orion/manager/gateway/port_keys.py makes it."""
    return hmac.new(session_id.encode(), token.text.encode(), hashlib.sha256).hexdigest()


def end_signature(session_id: str, number: int, lines: bytes) -> str:
    """As src/orion/manager/gateway/port_connections.py makes it."""
    return hmac.new(session_id.encode(), b"end %d " % number + lines, hashlib.sha256).hexdigest()


def token_from(text: str, session_id: str) -> PortToken:
    """The token that a pass opens. Raises PortRefusal for one that this worker's session did not sign."""
    match = _TOKEN.fullmatch(text)
    if not match or not session_id:
        raise PortRefusal(403, "no_pass", "this door is for the platform's proxy alone")
    token = PortToken(match[1], int(match[2]), int(match[3]), match[4], int(match[5]), int(match[6]))
    if not hmac.compare_digest(signature(session_id, token), match[7]):
        raise PortRefusal(403, "no_pass", "this door is for the platform's proxy alone")
    return token


def take_token(head: bytes) -> tuple[str, bytes]:
    """Return the token in the head of a request, and the head without the platform's own headers.

    Raise PortRefusal unless there is exactly one token.
    """
    lines = head.split(b"\r\n")
    passes = [line for line in lines[1:] if line.partition(b":")[0].strip().lower() == TOKEN_HEADER]
    if len(passes) != 1:
        raise PortRefusal(403, "no_pass", "this door is for the platform's proxy alone")
    text = passes[0].partition(b":")[2].strip().decode("latin-1")
    return text, b"\r\n".join(line for line in lines if not line.lower().startswith(OWN_HEADERS))


def header(head: bytes, name: bytes) -> str:
    """Return the value of a header; empty unless it is there once."""
    found = [line.partition(b":")[2] for line in head.split(b"\r\n")[1:] if line.partition(b":")[0].lower() == name]
    return found[0].strip().decode("latin-1") if len(found) == 1 else ""
