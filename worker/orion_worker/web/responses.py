"""Passing on the answer of a renter's process: the head is checked and marked, the rest is passed on unchanged."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

from orion_worker.web.refusals import PROXY_MARK, PortRefusal

LARGEST_ANSWER_HEAD_BYTES = 30 << 10
"""The proxy reads heads of up to 32 KB (proxy_buffer_size in web_port.conf), with the mark that is added here."""
READ_BYTES = 64 << 10
LONGEST_STATUS_BYTES = 1000
_STATUS = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}( [^\r\n\0]*)?\r?\n")
_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)")
"""A status that only precedes the answer (RFC 9110, 15.2), such as 103 Early Hints; 101 is an answer itself."""
MOST_INTERIM = 20
_EMPTY_LINE = re.compile(rb"\n\r?\n")


async def pump_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on an answer, with a mark in its head. Raise PortRefusal if it is no answer of HTTP.

    Interim answers (1xx) are dropped: Nginx would take one for the whole answer, and would not understand what follows.
    No client needs them: hints are optional, and the proxy itself answers `Expect: 100-continue`.
    """
    with suppress(OSError):
        head, rest = await _answer_head(reader, b"")
        for _ in range(MOST_INTERIM):
            if not _INTERIM.match(head):
                break
            head, rest = await _answer_head(reader, rest)
        else:
            detail = f"what listens there sent {MOST_INTERIM} interim answers (1xx) and no other"
            raise PortRefusal(502, "no_http", detail)
        status, end, fields = head.partition(b"\n")
        writer.write(status + end + PROXY_MARK + fields + rest)
    await pump(reader, writer)


async def _answer_head(reader: asyncio.StreamReader, came: bytes) -> tuple[bytes, bytes]:
    """Return the next head, up to and with its empty line, and the bytes behind it. `came` was read before.

    Raise PortRefusal if it is no head of an HTTP answer.
    """
    looked = 0
    while True:
        status = came[: came.find(b"\n") + 1]
        if (status or len(came) > LONGEST_STATUS_BYTES) and not _STATUS.fullmatch(status):
            raise PortRefusal(502, "no_http", "what listens there does not answer in HTTP")
        end = _EMPTY_LINE.search(came, looked)
        if end and end.end() <= LARGEST_ANSWER_HEAD_BYTES:
            return came[: end.end()], came[end.end() :]
        if end or len(came) > LARGEST_ANSWER_HEAD_BYTES:
            detail = f"what listens there sends more than {LARGEST_ANSWER_HEAD_BYTES >> 10} KB of headers"
            raise PortRefusal(502, "answer_head_too_large", f"{detail}: it may set too many cookies, or too large ones")
        looked = max(0, len(came) - 2)
        part = await reader.read(READ_BYTES)
        if not part and came and b"\n" not in came:
            raise PortRefusal(502, "no_http", "what listens there does not answer in HTTP")
        if not part:
            when = "amid the headers of its answer" if came else "without an answer"
            raise PortRefusal(502, "no_answer", f"what listens there closed the connection {when}")
        came += part


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on bytes until either side ends."""
    with suppress(OSError):
        while part := await reader.read(READ_BYTES):
            writer.write(part)
            await writer.drain()
