"""The client's side of a WebSocket (RFC 6455) as far as the relay needs it: binary messages as a stream of bytes.

A library does more, and takes longer to load than a whole SSH session takes to open. Nothing here reads or writes:
bytes go in and out. The content of a frame is passed on as it comes, so the largest frame needs no more memory than a
small one.
"""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Iterator
from hashlib import sha1

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
NORMAL = 1000
LONGEST_CONTROL = 125
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class ProtocolError(Exception):
    """What came is no WebSocket, or not ours."""


def new_key() -> str:
    return b2a_base64(os.urandom(16), newline=False).decode()


def accept_of(key: str) -> str:
    """What the server answers to this key."""
    return b2a_base64(sha1(key.encode() + _GUID).digest(), newline=False).decode()  # noqa: S324 - as the RFC says


def frame(opcode: int, content: bytes) -> bytes:
    """One whole frame, masked as a client must (with a new random mask each time)."""
    mask = os.urandom(4)
    size = len(content)
    if size <= LONGEST_CONTROL:
        length = bytes([0x80 | size])
    elif size < 1 << 16:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([0x80 | opcode]) + length + mask + _masked(content, mask)


def closing(code: int = NORMAL) -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big"))


class Incoming:
    """What the server sends. After its close frame `closed` is its code and its reason, and nothing comes any more."""

    def __init__(self) -> None:
        self._waiting = b""
        self._left = 0
        """Of the content of a data frame."""
        self.closed: tuple[int, str] | None = None
        self.to_answer: list[bytes] = []
        """Frames to be sent: what its pings ask for."""

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The bytes of the messages in it. Raises ProtocolError."""
        rest = self._waiting + received if self._waiting else received
        self._waiting = b""
        while rest and self.closed is None:
            if self._left:
                content, rest = rest[: self._left], rest[self._left :]
                self._left -= len(content)
                yield content
                continue
            header = _header(rest)
            if header is None:
                self._waiting = rest
                return
            opcode, begin, size = header
            if opcode in {BINARY, CONTINUATION}:
                rest, self._left = rest[begin:], size
            elif len(rest) < begin + size:
                self._waiting = rest
                return
            else:
                self._control(opcode, rest[begin : begin + size])
                rest = rest[begin + size :]

    def _control(self, opcode: int, content: bytes) -> None:
        if opcode == PING:
            self.to_answer.append(frame(PONG, content))
        elif opcode == CLOSE:
            code = int.from_bytes(content[:2], "big") if len(content) > 1 else NORMAL
            self.closed = code, content[2:].decode(errors="replace")
        elif opcode == TEXT:
            raise ProtocolError("the platform sent text where the bytes of SSH should be")
        elif opcode != PONG:
            raise ProtocolError("the platform sent what is no WebSocket frame")


def _header(begun: bytes) -> tuple[int, int, int] | None:
    """Opcode, where the content begins, its size; None while it is not whole."""
    if len(begun) < 2:
        return None
    opcode, size, begin = begun[0] & 0x0F, begun[1] & 0x7F, 2
    if begun[0] & 0x70 or begun[1] & 0x80:
        raise ProtocolError("the platform sent what is no WebSocket frame")
    if opcode == TEXT:
        return opcode, begin, 0
    if opcode >= CLOSE and size > LONGEST_CONTROL:
        raise ProtocolError("the platform sent what is no WebSocket frame")
    if size > LONGEST_CONTROL:
        more = 2 if size == 126 else 8
        begin += more
        if len(begun) < begin:
            return None
        size = int.from_bytes(begun[2:begin], "big")
    return opcode, begin, size


def _masked(content: bytes, mask: bytes) -> bytes:
    """By one operation on long numbers: in a loop over bytes it would take a hundred times as long."""
    size = len(content)
    whole = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(content, "big") ^ int.from_bytes(whole, "big")).to_bytes(size, "big")
