"""`python -m orion.connect RENTAL_ID`: stdin and stdout become one SSH connection to the rental's worker.

This is ssh's ProxyCommand: the bytes go through a WebSocket to the platform, which relays them to the worker's sshd.
It knows nothing of SSH and decides nothing: ssh itself verifies the worker's host key.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from orion import __version__, login
from orion.errors import InvalidInput, OrionError, UnreadableReply, no_reply, refusal
from orion.login import Login

OPEN_S = 20.0
CHUNK_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 1 << 20
AFTER_STDIN_S = 5.0
"""A WebSocket cannot be closed in one direction alone. When stdin has ended, what still comes is delivered until
the other side closes, or was silent for so long."""


def main() -> None:
    # As the child of ssh we share its terminal: Ctrl-C ends both, without a trace.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = 0
    try:
        account, rental_id = login.load(), _rental_id(sys.argv[1:])
        # Not asyncio.run: it waits for all threads, and one may be inside read(0), which nothing can interrupt.
        asyncio.new_event_loop().run_until_complete(relay(account, rental_id))
    except OrionError as error:
        status = error.exit_code
        print(f"orion: {_one_line(str(error))}", file=sys.stderr, flush=True)  # noqa: T201 - this is a program
    os._exit(status)  # for the same reason


async def relay(account: Login, rental_id: str) -> None:
    """Carry bytes both ways until one side ends."""
    address = "ws" + account.url.removeprefix("http") + f"/api/rentals/{rental_id}/ssh"
    # The argument must be absent for plain http.
    trust: dict[str, Any] = {"ssl": login.tls_context(account)} if address.startswith("wss:") else {}
    opening = connect(
        address,
        additional_headers={"Authorization": f"Bearer {account.token}"},
        user_agent_header=f"orion/{__version__}",
        proxy=login.proxy_for(account.url),
        compression=None,  # SSH's bytes are encrypted
        max_size=MAX_MESSAGE_BYTES,
        max_queue=4,
        open_timeout=OPEN_S,
        # Pings keep the connection alive in gateways on the way. No answer is no failure: a renter who stops
        # reading (Ctrl-S, a suspended ssh) also stops the reading of pongs. ssh has its own ServerAliveInterval.
        ping_interval=20,
        ping_timeout=None,
        close_timeout=1,
        **trust,
    )
    try:
        async with opening as socket:
            await _both_ways(socket)
    except InvalidStatus as error:
        reply = error.response
        raise refusal(reply.status_code, reply.headers, bytes(reply.body or b"")) from error
    except InvalidHandshake as error:
        raise UnreadableReply(f"{account.url} does not take connections to rentals: {error}") from error
    except OSError as error:
        raise no_reply(account.url, error) from error


async def _both_ways(socket: ClientConnection) -> None:
    heard = asyncio.Event()
    upload = asyncio.create_task(_upload(socket))
    download = asyncio.create_task(_download(socket, heard))
    await asyncio.wait({upload, download}, return_when=asyncio.FIRST_COMPLETED)
    while not download.done():
        heard.clear()
        sound = asyncio.create_task(heard.wait())
        await asyncio.wait({download, sound}, timeout=AFTER_STDIN_S, return_when=asyncio.FIRST_COMPLETED)
        sound.cancel()
        if not heard.is_set():
            break
    upload.cancel()
    if download.done():
        download.result()  # raises what went wrong
    download.cancel()


async def _upload(socket: ClientConnection) -> None:
    """Read only as fast as the socket takes it."""
    with suppress(ConnectionClosed):  # _download says why
        while chunk := await asyncio.to_thread(os.read, 0, CHUNK_BYTES):
            await socket.send(chunk)


async def _download(socket: ClientConnection, heard: asyncio.Event) -> None:
    """Take from the socket only as fast as stdout takes it."""
    try:
        async for message in socket:
            if isinstance(message, str):
                raise UnreadableReply("the platform sent text where the bytes of SSH should be")
            heard.set()
            await asyncio.to_thread(_write, message)
    except ConnectionClosed as error:
        reason = error.rcvd.reason if error.rcvd else ""
        raise OrionError(reason or "the connection to the rental was cut") from error
    except BrokenPipeError:
        socket.transport.abort()  # ssh has gone: nobody is left to close politely for


def _write(message: bytes) -> None:
    rest = memoryview(message)
    while rest:
        rest = rest[os.write(1, rest) :]


def _rental_id(arguments: list[str]) -> str:
    if len(arguments) != 1 or not re.fullmatch(r"[a-z0-9-]{1,64}", arguments[0]):
        raise InvalidInput("usage: python -m orion.connect RENTAL_ID")
    return arguments[0]


def _one_line(text: str) -> str:
    """The other side's words must not steer the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


if __name__ == "__main__":
    main()
