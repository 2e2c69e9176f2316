"""The proxy guard over a real socket: which peers and requests it refuses, and how a reply is sent."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import get_contextvars
from structlog.testing import capture_logs
from uvicorn import Config
from uvicorn.server import ServerState

from orion.manager.api.proxy_guard import ProxyGuard, RejectedPeers, protocol_for

LOOPBACK = "127.0.0.1"
PIECES = [b"one", b"two", b"three" * 100_000]


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    pieces = PIECES if scope["path"] == "/stream" else PIECES[:1]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def answer_with_bound_id(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer with the request's id as a line of the log would have it."""
    body = f"bound:{get_contextvars()['request_id']};".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected(
    *peers: str, app: ASGIApp = answer
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = Config(app, log_config=None, access_log=False, lifespan="off")
    config.load()
    protocol, state = protocol_for(frozenset(peers)), ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: protocol(config=config, server_state=state, app_state={}), LOOPBACK, 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(LOOPBACK, server.sockets[0].getsockname()[1], limit=2**20)
        yield reader, writer
        writer.close()


def request(path: str, connection: str = "keep-alive") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n".encode()


async def test_the_connection_of_a_peer_that_is_not_the_proxy_is_closed_and_logged() -> None:
    with capture_logs() as logged:
        async with connected("192.0.2.1") as (reader, writer):
            writer.write(request("/"))
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 60)
    assert [(line["peer"], line["accepted"], line["connections"]) for line in logged] == [(LOOPBACK, "192.0.2.1", 1)]


async def test_lines_of_the_log_have_the_id_of_their_own_request() -> None:
    """The requests are pipelined over one connection; the second one has no id, and gets one."""
    guarded = ProxyGuard(answer_with_bound_id, secret=b"secret")
    first = b"GET / HTTP/1.1\r\nHost: x\r\nX-Orion-Proxy-Secret: secret\r\nX-Request-ID: 11112222\r\n\r\n"
    second = b"GET / HTTP/1.1\r\nHost: x\r\nX-Orion-Proxy-Secret: secret\r\nConnection: close\r\n\r\n"
    async with connected(LOOPBACK, app=guarded) as (reader, writer):
        writer.write(first + second)
        replies = await asyncio.wait_for(reader.read(-1), 60)
    bound, shown = re.findall(rb"bound:(.*?);", replies), re.findall(rb"x-request-id: (.*?)\r", replies)
    assert bound == shown
    assert bound[0] == b"11112222"
    assert re.fullmatch(rb"[0-9a-f]{32}", bound[1])
    assert "request_id" not in get_contextvars()


def test_closed_connections_cost_one_line_a_minute() -> None:
    rejected = RejectedPeers(frozenset({"192.0.2.1", LOOPBACK}))
    with capture_logs() as logged:
        for tenth in range(1201):
            rejected.note("192.0.2.7", tenth / 10)
    assert [line["connections"] for line in logged] == [1, 600, 600]


async def test_head_and_body_of_a_reply_are_sent_together() -> None:
    async with connected(LOOPBACK) as (reader, writer):
        for _ in range(3):
            writer.write(request("/"))
            whole = await asyncio.wait_for(reader.read(2**16), 60)
            assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
            assert whole.endswith(b"3\r\none\r\n0\r\n\r\n")


@pytest.mark.parametrize("path", ["/", "/stream"])
async def test_nothing_of_a_reply_is_lost_when_the_connection_ends_with_it(path: str) -> None:
    async with connected(LOOPBACK) as (reader, writer):
        writer.write(request(path, "close"))
        whole = await asyncio.wait_for(reader.read(), 60)
        pieces = PIECES if path == "/stream" else PIECES[:1]
        assert whole.partition(b"\r\n\r\n")[2] == b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "length_and_body",
    [b"Content-Length: 4\r\n\r\nbody", b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"],
    ids=["a length", "chunks"],
)
async def test_a_websocket_that_begins_with_a_body_is_refused_at_once(length_and_body: bytes) -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    async with connected(LOOPBACK) as (reader, writer):
        writer.write(request + length_and_body)
        assert_refused(await asyncio.wait_for(reader.read(), 60))


async def test_a_request_that_is_not_http_is_refused_as_a_problem() -> None:
    async with connected(LOOPBACK) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\x0bb\r\n\r\n")
        assert_refused(await asyncio.wait_for(reader.read(), 60))


def assert_refused(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"\r\ncontent-type: application/problem+json\r\n" in head + b"\r\n"
    assert json.loads(body)["code"] == "invalid_request"
