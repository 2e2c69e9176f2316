"""Server-sent events as bytes come in (WHATWG HTML, 9.2.6), as far as our own server uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orion.errors import UnreadableReply

MAX_LINE_BYTES = 1 << 20


def messages(chunks: Iterable[bytes]) -> Iterator[str | None]:
    """The data of each message; None for each comment, so that the reader sees that time passes."""
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
    """Split at line feeds alone: str.splitlines would also cut at characters that JSON carries unescaped."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise UnreadableReply("the stream of events holds a line without an end")
        for line in whole:
            yield line.removesuffix(b"\r")
