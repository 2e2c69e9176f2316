"""HTTP/2 by hand: frames of a client that breaks the rules, which no library sends."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Sequence
from contextlib import suppress

from support.patience import PATIENCE_S

DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CANCEL = b"\0\0\0\x08"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
KNOWN_STATUSES = {0x88: b"200", 0x89: b"204", 0x8C: b"400", 0x8D: b"404", 0x8E: b"500"}
"""The statuses of HPACK's static table (RFC 7541, appendix A) by the first byte of a header block."""
Headers = Sequence[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(fields: Headers, stream: int = 1, ends: bool = False) -> bytes:
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
    return frame(HEADERS, END_HEADERS | (END_STREAM if ends else 0), stream, block)


def data(content: bytes, stream: int = 1, ends: bool = True) -> bytes:
    return frame(DATA, END_STREAM if ends else 0, stream, content)


def reset(stream: int = 1) -> bytes:
    return frame(RST_STREAM, 0, stream, CANCEL)


async def exchange(
    port: int, *frames: bytes, within_s: float = 1.0, is_answered: bool = False
) -> list[tuple[int, bytes, bytes]]:
    """Send frames, and return all answers that come in time: stream, status and body.

    `is_answered`: wait for a first answer, from which the time counts.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    got = b""
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(PATIENCE_S if is_answered else within_s) as limit:
            writer.write(PREFACE + frame(SETTINGS, 0, 0))
            got = await reader.read(65536)
            writer.write(frame(SETTINGS, ACK, 0) + b"".join(frames))
            while part := await reader.read(65536):
                got += part
                if is_answered and _answers(got):
                    limit.reschedule(asyncio.get_running_loop().time() + within_s)
                    is_answered = False
    writer.close()
    return _answers(got)


def _answers(got: bytes) -> list[tuple[int, bytes, bytes]]:
    statuses: list[tuple[int, bytes]] = []
    bodies: dict[int, bytes] = {}
    while len(got) >= 9 and len(got) >= 9 + int.from_bytes(got[:3]):
        length, kind, stream = int.from_bytes(got[:3]), got[3], int.from_bytes(got[5:9])
        payload, got = got[9 : 9 + length], got[9 + length :]
        if kind == HEADERS:
            statuses.append((stream, KNOWN_STATUSES.get(payload[0], payload[2:5])))
        elif kind == DATA:
            bodies[stream] = bodies.get(stream, b"") + payload
    return [(stream, status, bodies.get(stream, b"")) for stream, status in statuses]


def _text(text: str) -> bytes:
    """Return a text in the form of HPACK without Huffman coding."""
    plain = text.encode("latin-1")
    if len(plain) < 127:
        return bytes([len(plain)]) + plain
    rest, size = len(plain) - 127, b"\x7f"
    while rest >= 128:
        size += bytes([rest % 128 + 128])
        rest //= 128
    return size + bytes([rest]) + plain
