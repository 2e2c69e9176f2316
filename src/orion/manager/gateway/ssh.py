"""The bytes of one SSH connection, relayed between a WebSocket and a worker's sshd.

Nothing is decrypted here: the renter's own ssh verifies the worker's host key, and logs in, through the relay.

    stream = await connect(host)         # raises WorkerUnreachable: answer with a problem, nothing is accepted yet
    relayed = await relay(websocket, stream)
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from orion.manager.engine.port import Host

CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 64 * 1024
MAX_FRAME_BYTES = 1 << 20
STALLED_AFTER_S = 120
"""A worker that takes nothing for so long, or whose machine is gone, ends the relay. Longer than a takeover."""

NORMAL, UNSUPPORTED, TOO_BIG, BROKEN = 1000, 1003, 1009, 1011


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
            reader, writer = await asyncio.open_connection(host.address, host.port, limit=READ_BYTES)
    except OSError as error:
        raise WorkerUnreachable(f"the worker does not answer on its SSH port: {_reason(error)}") from error
    _tune(writer.get_extra_info("socket"))
    return SshStream(reader, writer)


async def relay(websocket: WebSocket, stream: SshStream) -> Relayed:
    """Accept the WebSocket and carry bytes both ways until either side ends. Both are closed when it returns."""
    try:
        await websocket.accept()
        ending = await _first_ending(websocket, stream)
        await _close(websocket, ending)
    except WebSocketDisconnect as gone:
        ending = Ending(gone.code, gone.reason or "")
    finally:
        stream.close()
    return Relayed(stream.to_worker, stream.to_client, ending.code, ending.reason)


async def _first_ending(websocket: WebSocket, stream: SshStream) -> Ending:
    """Of the two directions; the other is then ended as well, whatever happens here."""
    pumps = [asyncio.create_task(pump(websocket, stream)) for pump in (_to_client, _to_worker)]
    try:
        done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
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
    with suppress(RuntimeError, WebSocketDisconnect):  # it left in this moment
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
