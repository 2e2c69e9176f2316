"""The client's side of a WebSocket against the frames of a WebSocket library."""

from __future__ import annotations

import random

import pytest
from websockets.frames import Frame, Opcode
from websockets.protocol import SERVER, State
from websockets.protocol import Protocol as Library

from orion.errors import UnreadableReply
from orion.ssh_client import frames

CONTENTS = [b"", b"x", b"y" * 125, b"z" * 126, bytes(range(256)) * 256, b"w" * 65536]


def library() -> Library:
    return Library(SERVER, state=State.OPEN, max_size=None)


@pytest.mark.parametrize("content", CONTENTS, ids=len)
def test_the_library_accepts_the_client_s_frames(content: bytes) -> None:
    server = library()
    server.receive_data(frames.frame(frames.BINARY, content))
    [received] = server.events_received()
    assert isinstance(received, Frame)
    assert (received.opcode, bytes(received.data)) == (Opcode.BINARY, content)


def test_no_two_frames_have_the_same_mask() -> None:
    assert frames.frame(frames.BINARY, b"same") != frames.frame(frames.BINARY, b"same")


def test_frames_of_the_library_arrive_in_any_pieces() -> None:
    server = library()
    for content in CONTENTS:
        server.send_binary(content)
    server.send_ping(b"are you there")
    server.send_close(4001, "its worker is down")
    sent = b"".join(server.data_to_send())
    chance = random.Random(5)  # noqa: S311 - to be played again
    for _ in range(20):
        incoming, rest, got = frames.Incoming(), sent, b""
        while rest:
            size = chance.choice((1, 2, 3, 9, 200, 100_000))
            got += b"".join(incoming.feed(rest[:size]))
            rest = rest[size:]
        assert got == b"".join(CONTENTS)
        assert incoming.closed == (4001, "its worker is down")
        server = library()
        server.receive_data(incoming.to_answer[0])
        [pong] = server.events_received()
        assert isinstance(pong, Frame)
        assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, b"are you there")


def test_a_message_in_several_frames_is_its_bytes() -> None:
    incoming = frames.Incoming()
    whole = Frame(Opcode.BINARY, b"one ", fin=False).serialize(mask=False)
    whole += Frame(Opcode.CONT, b"two").serialize(mask=False)
    assert b"".join(incoming.feed(whole)) == b"one two"


def test_a_long_frame_is_passed_on_as_it_comes() -> None:
    incoming = frames.Incoming()
    head = b"\x82\x7f" + (1 << 40).to_bytes(8, "big")
    assert list(incoming.feed(head + b"a" * 10)) == [b"a" * 10]
    assert list(incoming.feed(b"b" * 10)) == [b"b" * 10]


@pytest.mark.parametrize(
    "sent",
    [b"\x81\x02hi", b"\x83\x00", b"\xc2\x01x", b"\x82\x81maskx", b"\x89\x7e\x00\x80", b"\x8b\x7e\x00\x80" + b"x" * 128],
    ids=["text", "an unknown frame", "a reserved bit", "a mask", "a ping too long", "a pong too long"],
)
def test_an_unexpected_frame_is_refused(sent: bytes) -> None:
    with pytest.raises(UnreadableReply):
        list(frames.Incoming().feed(sent))


def test_the_answer_to_a_key_follows_the_standard() -> None:
    """The example is that of RFC 6455, 1.3."""
    assert frames.accept_of("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
