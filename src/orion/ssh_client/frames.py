"""The client's side of a WebSocket (RFC 6455), reduced to what `orion connect` needs: a stream of binary messages.

A WebSocket library takes longer to load than an SSH session takes to open. This module does no input or output, and
passes on the content of a frame as it comes, so a large frame needs no more memory than a small one.
"""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Iterator
from hashlib import sha1

from orion.errors import UnreadableReply

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
NORMAL = 1000  # the close code of a connection that ends as intended
LONGEST_CONTROL = 125  # bytes of content of a control frame, at most (RFC 6455, 5.5)
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def new_key() -> str:
    """Return a new value for the header Sec-WebSocket-Key."""
    return b2a_base64(os.urandom(16), newline=False).decode()


def accept_of(key: str) -> str:
    """Return the value of Sec-WebSocket-Accept with which a server answers this key."""
    return b2a_base64(sha1(key.encode() + _GUID).digest(), newline=False).decode()  # noqa: S324 - as the RFC says


def frame(opcode: int, content: bytes) -> bytes:
    """Return one whole frame with a new random mask, which a client must use."""
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
    """Return a close frame."""
    return frame(CLOSE, code.to_bytes(2, "big"))


class Incoming:
    """The parser of the server's frames."""

    def __init__(self) -> None:
        self._waiting = b""
        self._left = 0  # bytes that are still to come of the present data frame
        self.closed: tuple[int, str] | None = None  # code and reason of the server's close frame; None until it comes
        self.to_answer: list[bytes] = []  # frames to send in answer to the server's pings

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Yield the messages' bytes among those received. Raise UnreadableReply."""
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
            raise UnreadableReply("the platform sent text instead of SSH data")
        elif opcode != PONG:
            raise UnreadableReply("the platform sent an invalid WebSocket frame")


def _header(received: bytes) -> tuple[int, int, int] | None:
    """Return the opcode, where the content begins and its size, or None if the header is incomplete."""
    if len(received) < 2:
        return None
    opcode, size, begin = received[0] & 0x0F, received[1] & 0x7F, 2
    if received[0] & 0x70 or received[1] & 0x80:
        raise UnreadableReply("the platform sent an invalid WebSocket frame")
    if opcode == TEXT:
        return opcode, begin, 0
    if opcode >= CLOSE and size > LONGEST_CONTROL:
        raise UnreadableReply("the platform sent an invalid WebSocket frame")
    if size > LONGEST_CONTROL:
        more = 2 if size == 126 else 8
        begin += more
        if len(received) < begin:
            return None
        size = int.from_bytes(received[2:begin], "big")
    return opcode, begin, size


def _masked(content: bytes, mask: bytes) -> bytes:
    """Return the content XORed with the mask. One operation on long integers is a hundred times faster than a loop."""
    size = len(content)
    whole = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(content, "big") ^ int.from_bytes(whole, "big")).to_bytes(size, "big")
