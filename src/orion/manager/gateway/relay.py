"""The relay of one SSH connection's bytes between a WebSocket and a worker's sshd.

It decrypts nothing: the renter's own ssh verifies the worker's host key and logs in through the relay.

    stream = await connect(host)         # raises WorkerUnreachable before the WebSocket is accepted
    ending = await relay(websocket, stream, over)      # `over` is a future; its result ends the relay
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from orion.manager.ssh.port import Host

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 256 * 1024
MAX_FRAME_BYTES = 1 << 20
STALLED_AFTER_S = 120
"""Seconds after which a worker that reads nothing, or whose machine is gone, ends the relay. Longer than a takeover."""

CLOSE_TIMEOUT_S = 5.0
"""Seconds for the close frame to be sent; the connection of a client that does not read is then cut."""
RETRY_REFUSED_FOR_S = 1.0
RETRY_AFTER_S = 0.02
"""Seconds between attempts: sshd refuses connections for some milliseconds while it loads a new certificate."""

NORMAL, UNSUPPORTED, TOO_BIG, BROKEN = 1000, 1003, 1009, 1011
LEFT_WORKER = 4001
"""Close code: the rental has left the worker; the reason says why."""
TOKEN_OVER = 4003
"""Close code: the token that opened the connection is over."""
NOTICE_HEADER = "X-Orion-Notice"
"""A header of an accepted handshake, for every user of the rental: why no snapshots are taken."""
REMARK_HEADER = "X-Orion-Remark"
"""A header of an accepted handshake, for a user who logs in; programs that copy files ignore it."""
LONGEST_REASON = 100
"""Bytes of a close frame's reason; the protocol allows 123."""


class WorkerUnreachable(Exception):
    """The worker does not answer on its SSH port."""


@dataclass(frozen=True)
class Ending:
    """The close code and the reason that were sent to a WebSocket's client or received from it."""

    code: int
    reason: str = ""


@dataclass(kw_only=True)
class SshStream:
    """A TCP connection to a worker's sshd, and the bytes that it carried."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    to_worker: int = 0
    to_client: int = 0


async def connect(host: Host, timeout_s: float = CONNECT_TIMEOUT_S) -> SshStream:
    """Connect to the worker's sshd. Raise WorkerUnreachable, whose message a client may see."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await _open(host)
    except OSError as error:
        raise WorkerUnreachable(f"the worker does not answer on its SSH port: {_reason(error)}") from error
    _tune(writer.get_extra_info("socket"))
    return SshStream(reader=reader, writer=writer)


async def _open(host: Host) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + RETRY_REFUSED_FOR_S
    while True:
        try:
            return await asyncio.open_connection(host.address, host.port, limit=READ_BYTES)
        except ConnectionRefusedError:
            if loop.time() >= give_up_at:
                raise
            await asyncio.sleep(RETRY_AFTER_S)


async def relay(
    websocket: WebSocket, stream: SshStream, over: asyncio.Future[Ending], headers: Mapping[str, str] | None = None
) -> Ending:
    """Accept the WebSocket with `headers`, relay bytes both ways, and return how one side or `over` ended the relay.

    Both connections are closed when this returns.
    """
    try:
        await websocket.accept(headers=[(name.encode(), value.encode()) for name, value in (headers or {}).items()])
        done = await run_until_first((_to_client(websocket, stream), _to_worker(websocket, stream)), over)
        # The session's own end counts also if the connections break at the same moment.
        ending: Ending = (over if over in done else done[0]).result()
        await close(websocket, ending)
        return ending
    except WebSocketDisconnect as gone:
        return Ending(gone.code, gone.reason or "")
    finally:
        stream.writer.close()  # after all written bytes are sent


async def run_until_first(
    parts: Iterable[Coroutine[Any, Any, Any]], *others: asyncio.Future[Any]
) -> list[asyncio.Future[Any]]:
    """Run the parts until one of them or of `others` is done, cancel the rest, and return those done, in this order."""
    running = [asyncio.create_task(part) for part in parts]
    waiting: list[asyncio.Future[Any]] = [*running, *others]
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return [one for one in waiting if one in done]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _to_client(websocket: WebSocket, stream: SshStream) -> Ending:
    """Carry bytes to the client. Sending waits while the client does not read, so at most one block is in memory."""
    try:
        while part := await stream.reader.read(READ_BYTES):
            await websocket.send_bytes(part)
            stream.to_client += len(part)
    except OSError as error:
        return Ending(BROKEN, f"the connection to the worker broke: {_reason(error)}")
    return Ending(NORMAL)


async def _to_worker(websocket: WebSocket, stream: SshStream) -> Ending:
    """Carry bytes to the worker. Draining waits while the worker does not read, so at most one frame is in memory."""
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
            await asyncio.Event().wait()  # the worker may have sent its reason: the other direction reads it and ends


async def open_unless(
    over: asyncio.Future[Any], opening: Coroutine[Any, Any, T], close: Callable[[T], None]
) -> T | None:
    """Return the result of `opening`, or None if `over` is done first; a result that comes later is closed."""

    def close_late(opened: asyncio.Task[T]) -> None:
        if not opened.cancelled() and opened.exception() is None:
            close(opened.result())

    task = asyncio.create_task(opening)
    wanted = False
    try:
        await asyncio.wait((task, over), return_when=asyncio.FIRST_COMPLETED)
        wanted = task.done()
        return task.result() if wanted else None
    finally:
        if not wanted:
            task.add_done_callback(close_late)
            task.cancel()


def shortened(reason: str) -> str:
    """Return as much of the reason as a close frame may hold."""
    return reason.encode()[:LONGEST_REASON].decode(errors="ignore")


async def close(websocket: WebSocket, ending: Ending, last_text: str = "") -> None:
    """Send `last_text` and a close frame; give up after CLOSE_TIMEOUT_S, so the client's connection is then cut."""
    if WebSocketState.DISCONNECTED in (websocket.client_state, websocket.application_state):
        return
    with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # the client may disconnect meanwhile
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            if last_text:
                await websocket.send_text(last_text)
            await websocket.close(ending.code, shortened(ending.reason))


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_AFTER_S * 1000)


def _reason(error: OSError) -> str:
    """Return the system's text of the error; asyncio's text has the worker's address, which clients must not see."""
    if isinstance(error, TimeoutError) or not error.errno:
        return "no answer in time"
    return os.strerror(error.errno)
