"""A parser of server-sent events (WHATWG HTML, 9.2.6), reduced to what the platform sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orion.errors import UnreadableReply

MAX_LINE_BYTES = 1 << 20  # bytes of one line, at most


def messages(chunks: Iterable[bytes]) -> Iterator[str | None]:
    """Yield the data of each message, and None for each comment, so that the caller can watch the time."""
    data: list[str] = []
    for line in _lines(chunks):
        if line.startswith(b":"):
            yield None
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
        elif not line and data:
            yield "\n".join(data)
            data = []


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines, split at line feeds only: str.splitlines also splits at characters that JSON does not escape."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise UnreadableReply("the stream of events contains a line that is too long")
        for line in whole:
            yield line.removesuffix(b"\r")
