"""Messages between processes: one JSON object per line over a stream, in both directions.

`Lines` is the framing of all channels. There is one class of channel for each way to wait: `SelectorChannel` in a loop
of selectors, `BlockingChannel`, and `AsyncChannel` in a loop of asyncio.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    import asyncio

READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 20

Message = BaseModel | Mapping[str, Any]
M = TypeVar("M", bound=BaseModel)


class ChannelError(ValueError):
    """The other end sent an invalid message."""


class LineTooLong(ChannelError):
    """A line has more bytes than its reader allows."""


class CutShort(ChannelError):
    """The stream ended within a line."""


class BrokenLine(ChannelError):
    """A line is not a valid message of the expected kind."""

    def __init__(self, reason: str, field: str = "") -> None:
        """Take the dotted name of the first wrong field; empty if the line as a whole is wrong."""
        super().__init__(f"{field}: {reason}" if field else reason)
        self.reason = reason
        self.field = field


def encode(message: Message) -> bytes:
    text = message.model_dump_json() if isinstance(message, BaseModel) else json.dumps(message)
    return text.encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line. Raise BrokenLine if it holds none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BrokenLine("not valid JSON") from error
    if not isinstance(message, dict):
        raise BrokenLine("not a JSON object")
    return message


def decode_as(model: type[M], line: bytes) -> M:
    """Return the message in a line. Raise BrokenLine, which never quotes a value, if it is no such message."""
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        raise BrokenLine(first["msg"], ".".join(str(part) for part in first["loc"])) from error


class Lines:
    """Cuts a stream that arrives in parts into lines."""

    def __init__(self, max_line_bytes: int | None = MAX_LINE_BYTES) -> None:
        """Allow lines of any length if `max_line_bytes` is None, for streams between the manager's own processes."""
        self._max_line_bytes = max_line_bytes
        self._rest = bytearray()

    def feed(self, part: bytes) -> list[bytes]:
        """Return the lines that end in this part, without their line breaks. Raise LineTooLong for a longer one."""
        first, *others = part.split(b"\n")
        self._rest += first
        lines: list[bytes] = []
        if others:
            lines = [bytes(self._rest), *others[:-1]]
            self._rest = bytearray(others[-1])
        if self._max_line_bytes is not None and max(map(len, (*lines, self._rest))) > self._max_line_bytes:
            raise LineTooLong(f"a line is longer than {self._max_line_bytes} bytes")
        return lines

    def end(self) -> None:
        """Raise CutShort if the stream ended within a line."""
        if self._rest:
            raise CutShort("the stream ended within a line")


class Stream(Protocol):
    """A socket, or one end of a pipe."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class SelectorChannel:
    """A channel in a loop of selectors that calls the data of each ready key with its events.

    `take` is called with each line, and may raise BrokenLine. `ended` is called once if the channel ends without
    `close`: with ChannelError after an invalid message, with OSError if writing fails, and with None if the other end
    closes the stream. Neither is called after `close`. `reading` and `writing` are the same socket or two pipes, and
    non-blocking; `close` closes them.
    """

    def __init__(
        self,
        *,
        selector: selectors.BaseSelector,
        reading: Stream,
        writing: Stream,
        take: Callable[[SelectorChannel, bytes], None],
        ended: Callable[[SelectorChannel, Exception | None], None],
    ) -> None:
        self._selector = selector
        self._streams = (reading, writing)
        self._reading, self._writing = reading.fileno(), writing.fileno()
        self._take, self._ended = take, ended
        self._lines = Lines()
        self._outgoing = bytearray()
        self._open = self._readable = True
        self._registered: dict[int, int] = {}
        """The registered events, by descriptor."""
        self._register()

    def send(self, message: Message) -> None:
        """Write as much of the message as possible now; the loop writes the rest. Do nothing after the end."""
        if self._open:
            self._outgoing += encode(message)
            self._write()

    def drain(self) -> None:
        """Read all that can be read now, also after writing has failed."""
        while self._readable and self._read():
            pass

    def close(self) -> None:
        self._open = self._readable = False
        self._register()
        for stream in self._streams:
            with suppress(OSError):
                stream.close()

    def _serve(self, ready: int) -> None:
        # An earlier event of this round may have closed this channel, and its descriptor may be in use again.
        if self._open and ready & selectors.EVENT_WRITE:
            self._write()
        if self._open and ready & selectors.EVENT_READ:
            self._read()

    def _write(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._writing, self._outgoing)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(error)
            return
        self._register()

    def _read(self) -> bool:
        """Read once; return whether there may be more."""
        try:
            part = os.read(self._reading, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            part = b""  # the other end is gone
        error: ChannelError | None = None
        try:
            for line in self._lines.feed(part):
                self._take(self, line)
                if not self._readable:
                    return False
        except ChannelError as found:
            error = found
        self._readable = bool(part) and error is None
        if not self._readable:
            self._end(error)
        return self._readable

    def _end(self, error: Exception | None) -> None:
        if self._open:
            self._open = False
            self._register()
            self._ended(self, error)

    def _register(self) -> None:
        """Register the events that this channel waits for."""
        wanted = {self._reading: 0, self._writing: 0}
        if self._open:
            wanted[self._reading] |= selectors.EVENT_READ
            wanted[self._writing] |= selectors.EVENT_WRITE if self._outgoing else 0
        for descriptor, events in wanted.items():
            before, self._registered[descriptor] = self._registered.get(descriptor, 0), events
            if events and not before:
                self._selector.register(descriptor, events, self._serve)
            elif before and not events:
                self._selector.unregister(descriptor)
            elif events != before:
                self._selector.modify(descriptor, events, self._serve)


class BlockingChannel:
    """A channel that blocks. Its timeouts are those of the socket."""

    def __init__(self, connection: socket.socket, max_line_bytes: int | None = MAX_LINE_BYTES) -> None:
        self._connection = connection
        self._lines = Lines(max_line_bytes)
        self._received: deque[bytes] = deque()

    def receive(self) -> bytes | None:
        """Return the next line; None if the other end has closed. Raise ChannelError and the socket's own errors."""
        while not self._received:
            part = self._connection.recv(READ_BYTES)
            if not part:
                self._lines.end()
                return None
            self._received.extend(self._lines.feed(part))
        return self._received.popleft()

    def send(self, message: Message) -> None:
        self._connection.sendall(encode(message))


class AsyncChannel:
    """A channel in a loop of asyncio."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_line_bytes: int = MAX_LINE_BYTES
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._lines = Lines(max_line_bytes)
        self._received: deque[bytes] = deque()

    @classmethod
    async def connect(cls, socket_path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Self:
        """Return a channel to this Unix socket. Raise OSError if no process listens on it."""
        from asyncio import open_unix_connection  # noqa: PLC0415 - processes with other channels need no asyncio

        reader, writer = await open_unix_connection(socket_path)
        return cls(reader, writer, max_line_bytes)

    async def receive(self) -> bytes | None:
        """Return the next line; None if the other end has closed. Raise ChannelError and OSError."""
        while not self._received:
            part = await self._reader.read(READ_BYTES)
            if not part:
                self._lines.end()
                return None
            self._received.extend(self._lines.feed(part))
        return self._received.popleft()

    async def send(self, message: Message) -> None:
        """Send the message; raise ConnectionError if the other end has closed."""
        self._writer.write(encode(message))
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()

    async def wait_closed(self) -> None:
        with suppress(OSError):
            await self._writer.wait_closed()
