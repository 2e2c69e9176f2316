"""The bytes of one SSH connection, relayed between a WebSocket and a worker's sshd.

Nothing is decrypted here: the renter's own ssh verifies the worker's host key, and logs in, through the relay.

    stream = await connect(host)         # raises WorkerUnreachable: answer with a problem, nothing is accepted yet
    relayed = await relay(websocket, stream, over)     # `over`: a future that says how its time is over
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from orion.manager.ssh.port import Host

CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 256 * 1024
MAX_FRAME_BYTES = 1 << 20
STALLED_AFTER_S = 120
"""A worker that takes nothing for so long, or whose machine is gone, ends the relay. Longer than a takeover."""

CLOSE_TIMEOUT_S = 5.0
"""A client that takes nothing does not even take a close: then it is hung up on."""
REFUSED_FOR_S = 1.0
AGAIN_AFTER_S = 0.02
"""sshd takes no connection for some milliseconds while it takes a new certificate."""

NORMAL, UNSUPPORTED, TOO_BIG, BROKEN = 1000, 1003, 1009, 1011
MOVED = 4001
"""The rental is not on that worker any more; the reason says why."""
REVOKED = 4003
"""The token by which it was opened is not valid any more."""
NOTICE = "X-Orion-Notice"
"""A header of the answer to a client that is let through: what a person should know."""
REMARK = "X-Orion-Remark"
"""The same, of what can wait: for somebody who logs in, and not for a program that copies files."""
LONGEST_REASON = 100
"""Bytes: a close frame has room for 123."""


class WorkerUnreachable(Exception):
    """The worker does not answer on its SSH port."""


@dataclass(frozen=True)
class Relayed:
    """How it ended, with the close code that was sent or received, and how many bytes went each way."""

    to_worker: int
    to_client: int
    code: int
    reason: str


@dataclass(frozen=True)
class Ending:
    code: int
    reason: str = ""


@dataclass
class SshStream:
    """A TCP connection to a worker's sshd, with what it carried."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    to_worker: int = 0
    to_client: int = 0

    def close(self) -> None:
        """What was written still goes out."""
        self.writer.close()


async def connect(host: Host, timeout_s: float = CONNECT_TIMEOUT_S) -> SshStream:
    """To the worker's sshd. Raises WorkerUnreachable, whose message a client may see."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await _open(host)
    except OSError as error:
        raise WorkerUnreachable(f"the worker does not answer on its SSH port: {_reason(error)}") from error
    _tune(writer.get_extra_info("socket"))
    return SshStream(reader, writer)


async def _open(host: Host) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + REFUSED_FOR_S
    while True:
        try:
            return await asyncio.open_connection(host.address, host.port, limit=READ_BYTES)
        except ConnectionRefusedError:
            if loop.time() >= give_up_at:
                raise
            await asyncio.sleep(AGAIN_AFTER_S)


async def relay(
    websocket: WebSocket, stream: SshStream, over: asyncio.Future[Ending], headers: Mapping[str, str] | None = None
) -> Relayed:
    """Accept the WebSocket and carry bytes both ways until either side ends. Both are closed when it returns.

    `headers` go with the acceptance. It ends as well when `over` is done, by its result.
    """
    try:
        await websocket.accept(headers=[(name.encode(), value.encode()) for name, value in (headers or {}).items()])
        ending = await _first_ending(websocket, stream, over)
        await _close(websocket, ending)
    except WebSocketDisconnect as gone:
        ending = Ending(gone.code, gone.reason or "")
    finally:
        stream.close()
    return Relayed(stream.to_worker, stream.to_client, ending.code, ending.reason)


async def _first_ending(websocket: WebSocket, stream: SshStream, over: asyncio.Future[Ending]) -> Ending:
    """Of the two directions; the other is then ended as well, whatever happens here."""
    pumps = [asyncio.create_task(pump(websocket, stream)) for pump in (_to_client, _to_worker)]
    try:
        waiting: list[asyncio.Future[Any]] = [*pumps, over]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
    if over in done:
        told = over.result()
        return Ending(told.code, told.reason.encode()[:LONGEST_REASON].decode(errors="ignore"))
    return next(pump for pump in pumps if pump in done).result()


async def _to_client(websocket: WebSocket, stream: SshStream) -> Ending:
    """Sending waits while the client does not take what was sent, so no more is read than one block."""
    try:
        while part := await stream.reader.read(READ_BYTES):
            await websocket.send_bytes(part)
            stream.to_client += len(part)
    except OSError as error:
        return Ending(BROKEN, f"the connection to the worker broke: {_reason(error)}")
    return Ending(NORMAL)


async def _to_worker(websocket: WebSocket, stream: SshStream) -> Ending:
    """Draining waits while the worker does not take what was written, so no more is received than one frame."""
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return Ending(message.get("code", NORMAL), message.get("reason") or "")
        frame = message.get("bytes")
        if frame is None:
            return Ending(UNSUPPORTED, "only binary frames are relayed")
        if len(frame) > MAX_FRAME_BYTES:
            return Ending(TOO_BIG, f"a frame may hold {MAX_FRAME_BYTES} bytes")
        try:
            stream.writer.write(frame)
            await stream.writer.drain()
            stream.to_worker += len(frame)
        except OSError:
            await asyncio.Event().wait()  # the worker may have said why: the other direction reads it, and ends


async def _close(websocket: WebSocket, ending: Ending) -> None:
    if WebSocketState.DISCONNECTED in (websocket.client_state, websocket.application_state):
        return
    with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # it left in this moment
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await websocket.close(ending.code, ending.reason)


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_AFTER_S * 1000)


def _reason(error: OSError) -> str:
    """asyncio puts the address into its own text, which is nobody's business outside."""
    if isinstance(error, TimeoutError) or not error.errno:
        return "no answer in time"
    return os.strerror(error.errno)
