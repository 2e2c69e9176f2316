"""JSON messages in lines over a stream: in any parts, too long, broken, and at the end of the stream."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from orion.manager.channel import (
    MAX_LINE_BYTES,
    AsyncChannel,
    BlockingChannel,
    BrokenLine,
    ChannelError,
    CutShort,
    Lines,
    LineTooLong,
    SelectorChannel,
    decode,
    decode_as,
    encode,
)


class Inner(BaseModel):
    number: int


class Outer(BaseModel):
    inner: Inner
    text: str = ""


def test_a_message_is_one_line_of_json() -> None:
    assert encode(Outer(inner=Inner(number=1), text="é\n")) == '{"inner":{"number":1},"text":"é\\n"}\n'.encode()
    assert encode({"id": 1, "text": "é\n"}) == b'{"id": 1, "text": "\\u00e9\\n"}\n'


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b""))), st.integers(1, 50))
def test_lines_are_the_same_in_whatever_parts_they_arrive(written: list[bytes], size: int) -> None:
    stream = b"".join(line + b"\n" for line in written)
    lines = Lines()
    parts = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert [line for part in parts for line in lines.feed(part)] == written
    lines.end()


def test_a_line_may_be_as_long_as_is_allowed_and_no_longer() -> None:
    assert Lines(5).feed(b"12345\n") == [b"12345"]
    for parts in ([b"123456\n"], [b"123", b"456"], [b"1\n123456"], [b"1\n123456\n"]):
        lines = Lines(5)
        *before, last = parts
        for part in before:
            lines.feed(part)
        with pytest.raises(LineTooLong, match="longer than 5 bytes"):
            lines.feed(last)


def test_several_lines_may_together_exceed_the_limit_of_one() -> None:
    assert Lines(3).feed(b"123\n123\n12") == [b"123", b"123"]


def test_lines_of_trusted_processes_may_have_any_length() -> None:
    lines = Lines(max_line_bytes=None)
    assert lines.feed(b"x" * (MAX_LINE_BYTES + 1)) == []
    assert len(lines.feed(b"\n")[0]) == MAX_LINE_BYTES + 1


def test_a_stream_that_ends_within_a_line_is_cut_short() -> None:
    lines = Lines()
    lines.feed(b'{}\n{"id"')
    with pytest.raises(CutShort):
        lines.end()


@pytest.mark.parametrize("line", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"null", b"1"])
def test_a_line_that_is_no_json_object_is_broken(line: bytes) -> None:
    with pytest.raises(BrokenLine, match=r"not valid JSON|not a JSON object"):
        decode(line)
    with pytest.raises(BrokenLine) as found:
        decode_as(Outer, line)
    assert found.value.field == ""


def test_a_broken_line_names_the_field_and_not_its_value() -> None:
    with pytest.raises(BrokenLine) as found:
        decode_as(Outer, b'{"inner": {"number": "a secret"}}')
    assert found.value.field == "inner.number"
    assert str(found.value).startswith("inner.number: Input should be a valid integer")
    assert "secret" not in str(found.value)


class Loop:
    """A selector with one channel, and the messages that came over it."""

    def __init__(self, folder: ExitStack, reading: Any, writing: Any) -> None:
        self.selector = folder.enter_context(selectors.DefaultSelector())
        self.lines: list[bytes] = []
        self.ends: list[Exception | None] = []
        self.channel = SelectorChannel(
            selector=self.selector,
            reading=reading,
            writing=writing,
            take=self.take,
            ended=lambda _, end: self.ends.append(end),
        )

    def take(self, channel: SelectorChannel, line: bytes) -> None:
        self.lines.append(line)
        if line == b"refuse":
            raise BrokenLine("not wanted")
        if line == b"close":
            channel.close()

    def turn(self) -> None:
        for key, ready in self.selector.select(0.01):
            key.data(ready)

    def until(self, reached: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline, "the condition was not reached within 60 s"
            self.turn()


@pytest.fixture
def folder() -> Iterator[ExitStack]:
    with ExitStack() as folder:
        yield folder


@pytest.fixture
def pair(folder: ExitStack) -> tuple[Loop, socket.socket]:
    """Return a channel over a socket, and the other end."""
    ours, theirs = (folder.enter_context(end) for end in socket.socketpair())
    ours.setblocking(False)
    theirs.settimeout(60)
    return Loop(folder, ours, ours), theirs


def test_a_channel_takes_lines_until_the_other_end_closes(pair: tuple[Loop, socket.socket]) -> None:
    loop, other = pair
    other.sendall(b"one\ntw")
    loop.until(lambda: loop.lines)
    other.sendall(b"o\nthree\nhalf")
    other.close()
    loop.until(lambda: loop.ends)
    assert loop.lines == [b"one", b"two", b"three"]
    assert loop.ends == [None]
    assert not loop.selector.get_map()


def test_a_message_larger_than_what_can_be_written_at_once_arrives_whole(pair: tuple[Loop, socket.socket]) -> None:
    loop, other = pair
    loop.channel.send({"text": "-" * (4 << 20)})
    loop.channel.send({"text": "y"})
    other.setblocking(False)
    received = bytearray()

    def arrived() -> bool:
        with suppress(BlockingIOError):
            received.extend(other.recv(1 << 16))
        return received.endswith(b'{"text": "y"}\n')

    loop.until(arrived)
    assert received.count(b"-") == 4 << 20
    other.sendall(b"still heard\n")
    loop.until(lambda: loop.lines == [b"still heard"])


@pytest.mark.parametrize(
    ("sent", "error"), [(b"x" * (MAX_LINE_BYTES + 1), LineTooLong), (b"first\nrefuse\nthird\n", BrokenLine)]
)
def test_an_invalid_message_ends_a_channel_once(
    pair: tuple[Loop, socket.socket], sent: bytes, error: type[ChannelError]
) -> None:
    loop, other = pair
    other.setblocking(False)
    unsent = bytearray(sent)

    def over() -> bool:
        if unsent:
            with suppress(BlockingIOError):
                del unsent[: other.send(unsent)]
        return bool(loop.ends)

    loop.until(over)
    assert [type(end) for end in loop.ends] == [error]
    assert b"third" not in loop.lines
    loop.channel.drain()
    loop.channel.send({})
    assert len(loop.ends) == 1


def test_a_channel_that_is_closed_meanwhile_takes_nothing_more(pair: tuple[Loop, socket.socket]) -> None:
    loop, other = pair
    other.sendall(b"one\nclose\nthree\n")
    loop.until(lambda: len(loop.lines) == 2)
    loop.turn()
    loop.channel.send({})
    assert loop.lines == [b"one", b"close"]
    assert loop.ends == []
    assert other.recv(10) == b"", "its socket is closed"


def test_messages_that_arrived_before_a_failed_write_can_still_be_read(folder: ExitStack) -> None:
    """The channel has two pipes, as to a program, which wrote something and reads nothing more."""
    (reading, theirs), (others, writing) = os.pipe(), os.pipe()
    for descriptor in (reading, writing):
        os.set_blocking(descriptor, False)
    loop = Loop(folder, os.fdopen(reading, "rb"), os.fdopen(writing, "wb"))
    os.write(theirs, b"last\n")
    os.close(others)
    loop.channel.send({})
    assert [type(end) for end in loop.ends] == [BrokenPipeError]
    loop.channel.drain()
    assert loop.lines == [b"last"]
    os.close(theirs)
    loop.channel.close()
    assert len(loop.ends) == 1


def test_an_event_of_a_closed_channel_is_not_given_to_the_next_one_of_its_descriptor(
    pair: tuple[Loop, socket.socket], folder: ExitStack
) -> None:
    loop, other = pair
    other.sendall(b"late\n")
    ((key, ready),) = loop.selector.select(60)
    loop.channel.close()
    ours, theirs = (folder.enter_context(end) for end in socket.socketpair())
    assert key.fd in (ours.fileno(), theirs.fileno())
    key.data(ready)
    assert loop.lines == []


def test_a_blocking_end_sends_and_receives() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first, second = BlockingChannel(ours), BlockingChannel(theirs)
        first.send({"id": 1})
        first.send(Outer(inner=Inner(number=2)))
        assert second.receive() == b'{"id": 1}'
        assert second.receive() == b'{"inner":{"number":2},"text":""}'
        ours.shutdown(socket.SHUT_WR)
        assert second.receive() is None
        theirs.sendall(b"half")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(CutShort):
            first.receive()


async def all_of(channel: AsyncChannel) -> list[bytes]:
    lines = []
    while (line := await channel.receive()) is not None:
        lines.append(line)
    return lines


async def test_an_end_in_asyncio_sends_and_receives(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = AsyncChannel(reader, writer)
        while (line := await there.receive()) is not None:
            await there.send({"heard": decode(line)})
            await there.send({"text": "x" * 200_000})
        there.close()

    path = tmp_path / "socket"
    async with await asyncio.start_unix_server(answer, path):
        here = await AsyncChannel.connect(path)
        await here.send({"id": 1})
        assert await here.receive() == b'{"heard": {"id": 1}}'
        assert len(await here.receive() or b"") == 200_012
        here.close()
        await here.wait_closed()
        short = await AsyncChannel.connect(path, 1000)
        await short.send({"id": 1})
        with pytest.raises(LineTooLong):
            await all_of(short)
        short.close()
        await short.wait_closed()


async def test_an_end_in_asyncio_says_when_the_other_end_closes_and_when_it_does_so_within_a_line(
    tmp_path: Path,
) -> None:
    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(3))
        writer.close()

    path = tmp_path / "socket"
    async with await asyncio.start_unix_server(end, path):
        for sent, error in ((b"{}\n", None), (b"{}.", CutShort)):
            reader, writer = await asyncio.open_unix_connection(path)
            channel = AsyncChannel(reader, writer)
            writer.write(sent)
            if error:
                with pytest.raises(error):
                    await channel.receive()
            else:
                assert await channel.receive() == b"{}"
                assert await channel.receive() is None
            channel.close()
