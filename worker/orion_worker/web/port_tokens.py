"""The tokens with which the manager lets requests reach a web port, and its messages about grants that have ended."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field

from orion_worker.web.refusals import NOT_THE_PROXY, PortRefusal

TOKEN_HEADER = b"x-orion-pass"
END_HEADER = b"x-orion-end"
OWN_HEADERS = b"x-orion-"
"""The prefix of the platform's own headers; no header of a client with this prefix is passed on."""
_TOKEN = re.compile(
    r"([a-z0-9-]{1,64}) ([1-9][0-9]{0,17}) ([1-9][0-9]{3,4})"
    r" (public|[a-z]{5,6}\.[a-z0-9-]{1,64}\.[0-9a-f]{16}) ([1-9][0-9]{0,17}) (0|[1-9][0-9]{0,14}) ([0-9a-f]{64})"
)
END_MESSAGE = re.compile(r"([1-9][0-9]{0,17}) ([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class PortToken:
    """The right of one request to reach one port of one rental, at one epoch."""

    rental_id: str
    epoch: int
    port: int
    grant: str = field(default="public", compare=False)
    """The access token that opens the port, or `public`."""
    number: int = field(default=1, compare=False)
    """The number of the token, which only rises. Messages about ended grants are numbered in the same sequence."""
    left_ms: int = field(default=0, compare=False)
    """Milliseconds after which the connection ends; 0: never."""

    @property
    def text(self) -> str:
        """The signed part of the token."""
        return f"{self.rental_id} {self.epoch} {self.port} {self.grant} {self.number} {self.left_ms}"

    @property
    def opened_by(self) -> str:
        """The manager's name for the grant in a message about ended ones."""
        return f"{self.rental_id} {self.port} {self.grant}"


def signature(session_id: str, token: PortToken) -> str:
    """Return the signature of a token, as the manager's gateway/port_keys.py makes it."""
    return hmac.new(session_id.encode(), token.text.encode(), hashlib.sha256).hexdigest()


def end_signature(session_id: str, number: int, lines: bytes) -> str:
    """Return the signature of a message about ended grants, as the manager's gateway/port_connections.py makes it."""
    return hmac.new(session_id.encode(), b"end %d " % number + lines, hashlib.sha256).hexdigest()


def token_from(text: str, session_id: str) -> PortToken:
    """Return the token in the value of its header. Raise PortRefusal unless it is signed for this session."""
    match = _TOKEN.fullmatch(text)
    if not match or not session_id:
        raise PortRefusal(403, "no_pass", NOT_THE_PROXY)
    token = PortToken(
        rental_id=match[1],
        epoch=int(match[2]),
        port=int(match[3]),
        grant=match[4],
        number=int(match[5]),
        left_ms=int(match[6]),
    )
    if not hmac.compare_digest(signature(session_id, token), match[7]):
        raise PortRefusal(403, "no_pass", NOT_THE_PROXY)
    return token


def take_token(head: bytes) -> tuple[str, bytes]:
    """Return the token in the head of a request, and the head without the platform's own headers.

    Raise PortRefusal unless there is exactly one token.
    """
    lines = head.split(b"\r\n")
    tokens = [line for line in lines[1:] if line.partition(b":")[0].strip().lower() == TOKEN_HEADER]
    if len(tokens) != 1:
        raise PortRefusal(403, "no_pass", NOT_THE_PROXY)
    text = tokens[0].partition(b":")[2].strip().decode("latin-1")
    return text, b"\r\n".join(line for line in lines if not line.lower().startswith(OWN_HEADERS))


def header(head: bytes, name: bytes) -> str:
    """Return the value of a header; empty unless it is there once."""
    found = [line.partition(b":")[2] for line in head.split(b"\r\n")[1:] if line.partition(b":")[0].lower() == name]
    return found[0].strip().decode("latin-1") if len(found) == 1 else ""
