"""The relay, between a real WebSocket client, a real server and a real TCP peer in the place of a worker's sshd."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as websocket_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from orion.manager.gateway.relay import MAX_FRAME_BYTES, SshStream, WorkerUnreachable, connect, relay
from orion.manager.ssh.port import Host

Sshd = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class RelayGateway:
    """Yield a server whose one route relays to `host`, and the connections that it relayed."""

    host: Host
    url: str = ""
    relayed: asyncio.Queue[SshStream] = field(default_factory=asyncio.Queue)
    over: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def route(self, websocket: WebSocket) -> None:
        try:
            stream = await connect(self.host, timeout_s=60)
        except WorkerUnreachable as error:
            await websocket.send_denial_response(PlainTextResponse(str(error), 502))
            return
        await relay(websocket, stream, self.over)
        self.relayed.put_nowait(stream)

    def client(self, connection: socket.socket | None = None) -> websocket_connect:
        return websocket_connect(self.url, compression=None, max_size=None, sock=connection)


@asynccontextmanager
async def gateway_to(sshd: Sshd) -> AsyncIterator[RelayGateway]:
    worker = await asyncio.start_server(_closing(sshd), "127.0.0.1", 0)
    async with serving(RelayGateway(_host(worker.sockets[0].getsockname()[1]))) as gateway:
        yield gateway
    worker.close()


@asynccontextmanager
async def serving(gateway: RelayGateway) -> AsyncIterator[RelayGateway]:
    listening = socket.create_server(("127.0.0.1", 0))
    app = Starlette(routes=[WebSocketRoute("/ssh", gateway.route)])
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", ws="websockets-sansio", ws_max_size=4 * MAX_FRAME_BYTES
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve([listening]))
    gateway.url = f"ws://127.0.0.1:{listening.getsockname()[1]}/ssh"
    try:
        yield gateway
    finally:
        server.should_exit = server.force_exit = True
        await running


def _host(port: int) -> Host:
    return Host(worker_id="w-abcdefgh", address="127.0.0.1", host_keys=("ssh-ed25519 AAAA",), port=port)


def _closing(sshd: Sshd) -> Sshd:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError):
                await sshd(reader, writer)
        finally:
            writer.close()

    return serve


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(65536):
        writer.write(part)
        await writer.drain()


async def received(client: ClientConnection, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        part = await client.recv()
        assert isinstance(part, bytes)
        content += part
    return bytes(content)


async def test_bytes_arrive_complete_and_in_order_in_both_directions_and_are_counted() -> None:
    content = os.urandom(3 << 20)
    frames = [content[start : start + 100_003] for start in range(0, len(content), 100_003)]

    async def send(client: ClientConnection) -> None:
        for frame in frames:
            await client.send(frame)

    async with gateway_to(echo) as gateway:
        async with gateway.client() as client:
            sending = asyncio.create_task(send(client))
            assert await received(client, len(content)) == content
            await sending
        relayed = await gateway.relayed.get()
    assert (relayed.to_worker, relayed.to_client) == (len(content), len(content))


async def test_when_sshd_closes_all_its_bytes_arrive_and_the_websocket_closes_normally() -> None:
    async def farewell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * 500_000)
        await writer.drain()

    async with gateway_to(farewell) as gateway, gateway.client() as client:
        assert len(await received(client, 500_000)) == 500_000
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == 1000
        assert (await gateway.relayed.get()).to_client == 500_000


async def test_when_the_client_closes_all_its_bytes_arrive_and_sshd_sees_the_end() -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        heard.set_result(await reader.read())

    async with gateway_to(listen) as gateway:
        async with gateway.client() as client:
            await client.send(b"y" * 500_000)
            await client.send(b"z")
        assert await heard == b"y" * 500_000 + b"z"
        assert (await gateway.relayed.get()).to_worker == 500_001


async def test_a_client_that_vanishes_ends_the_connection_to_the_worker() -> None:
    ended = asyncio.Event()

    async def wait_for_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        with suppress(ConnectionError):
            await reader.read()
        ended.set()

    async with gateway_to(wait_for_end) as gateway:
        async with gateway.client() as client:
            assert await client.recv() == b"hello"
            client.transport.abort()
        await ended.wait()
        await gateway.relayed.get()


async def test_the_relay_distinguishes_a_broken_connection_to_a_worker_from_a_closed_one() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # close with a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with gateway_to(reset) as gateway, gateway.client() as client:
        await client.send(b"!")
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == 1011
        assert client.close_reason == "the connection to the worker broke: Connection reset by peer"


async def test_a_worker_that_does_not_answer_is_refused_before_the_websocket_is_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    async with serving(RelayGateway(_host(port))) as gateway:
        with pytest.raises(InvalidStatus) as refused:
            async with gateway.client():
                pass
    assert refused.value.response.status_code == 502
    assert refused.value.response.body == b"the worker does not answer on its SSH port: Connection refused"


async def test_the_relay_fails_in_time_if_a_worker_accepts_no_connection() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(address)  # the queue of connections is full now
        with pytest.raises(WorkerUnreachable, match="no answer in time"):
            await connect(_host(address[1]), timeout_s=0.2)
        for caller in callers:
            caller.close()


@pytest.mark.parametrize(("frame", "code"), [("text", 1003), (b"x" * (MAX_FRAME_BYTES + 1), 1009)])
async def test_a_refused_message_closes_the_websocket_with_its_reason(frame: str | bytes, code: int) -> None:
    async with gateway_to(echo) as gateway, gateway.client() as client:
        await client.send(frame)
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == code
        assert client.close_reason
        assert (await gateway.relayed.get()).to_worker == 0


async def test_a_frame_of_a_gigabyte_is_refused_by_its_header() -> None:
    """Check that the gateway neither waits for the announced bytes nor allocates memory for them."""
    async with gateway_to(echo) as gateway, gateway.client() as client:
        head = b"\x82\xff" + (1 << 30).to_bytes(8, "big") + b"mask"
        client.transport.write(head)
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert client.close_code == 1009
        assert (await gateway.relayed.get()).to_worker == 0


async def test_the_limit_of_a_message_also_holds_for_many_frames() -> None:
    async with gateway_to(echo) as gateway, gateway.client() as client:
        part = b"x" * 65536
        with pytest.raises(ConnectionClosed):
            await client.send(part for _ in range(1 << 14))
        assert client.close_code == 1009
        assert (await gateway.relayed.get()).to_worker == 0


async def test_the_largest_frame_is_relayed() -> None:
    async with gateway_to(echo) as gateway, gateway.client() as client:
        await client.send(b"x" * MAX_FRAME_BYTES)
        assert len(await received(client, MAX_FRAME_BYTES)) == MAX_FRAME_BYTES


def small_buffer(gateway: RelayGateway) -> socket.socket:
    """Connect with a small buffer: otherwise the kernel may buffer many bytes for a client that reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    address = urlsplit(gateway.url)
    connection.connect((address.hostname, address.port))
    connection.setblocking(False)
    return connection


async def test_a_client_that_reads_nothing_blocks_the_worker_and_uses_little_memory() -> None:
    """Let the worker send more than all buffers hold, which succeeds only when the client reads.

    The kernel lets a receiver's buffer grow to tens of megabytes: hence a client whose buffer stays small.
    """
    offered = 96 << 20
    sent = 0
    stuck = asyncio.Event()

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        block = b"x" * 65536
        while sent < offered:
            writer.write(block)
            sent += len(block)
            try:
                await asyncio.wait_for(writer.drain(), 0.2)
            except TimeoutError:
                stuck.set()
                await writer.drain()
        stuck.set()

    async with gateway_to(pour) as gateway, gateway.client(small_buffer(gateway)) as client:
        await stuck.wait()
        assert sent < offered
        assert len(await received(client, offered)) == offered


async def test_a_cancelled_relay_closes_both_sides() -> None:
    greeted, ended = asyncio.Event(), asyncio.Event()

    async def wait_for_end(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        greeted.set()
        with suppress(ConnectionError):
            await reader.read()
        ended.set()

    async with gateway_to(wait_for_end) as gateway, gateway.client() as client:
        await client.send(b"!")
        await greeted.wait()
        before = asyncio.all_tasks()
        [route] = [task for task in before if "run_asgi" in repr(task.get_coro())]
        route.cancel()
        await ended.wait()
        with pytest.raises(ConnectionClosed):
            await client.recv()
