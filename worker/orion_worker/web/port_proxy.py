"""The port proxy: it carries requests from the proxy to a rental's web port, to a process of that rental alone.

    orion-web PROXY_ADDRESS APP_ADDRESS SLOTS          the listening socket is its stdin

It is a process of its own, so that no byte of a renter takes the agent's time. The agent starts it, again when it dies,
and keeps the socket. It runs as root, to read the rental records, but without capabilities.

The proxy sends one request on each connection, with a token that the manager made for it (the header x-orion-pass, its
released name): rental, epoch, port, grant (an access token, or that the port is public), a number and the time that is
left, signed with the id of this worker's session. The checks, in this order: the peer is the proxy; the manager signed
the token; the rental is here at the token's epoch, activated, and not frozen; each socket that listens on the port
belongs to the rental's uid, before the connection to it and after. Then bytes are passed on unchanged in both
directions. A connection ends when the rental may no longer run here, when the time in its token is over, and when the
manager says that its grant has ended (src/orion/manager/gateway/port_connections.py).
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hmac
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from orion_worker.web import port_tokens
from orion_worker.web.active_rentals import RunningRentals
from orion_worker.web.listeners import PortTarget, target_of
from orion_worker.web.port_tokens import PortToken
from orion_worker.web.refusals import NOT_THE_PROXY, PortRefusal, refusal_response, wants_html
from orion_worker.web.responses import READ_BYTES, pump, pump_answer
from orion_worker.web.socket_diag import listening

LARGEST_HEAD_BYTES = 96 << 10
HEAD_WITHIN_S = 5.0
CONNECT_WITHIN_S = 5.0
LINGER_S = 2.0
"""Seconds for which the rest of a refused request is read: closing a socket with unread bytes would lose the answer."""
LOOK_EVERY_S = 0.2
ENOUGH, ENOUGH_EACH = 200, 10
"""The connections to web ports that the slots of a worker share, and the least that each slot has."""
MOST_OF_ALL = 500
"""The most connections of all rentals together; it counts for workers with more than 50 slots."""
NICENESS = 5
LARGEST_END_BYTES = 256 << 10
REMEMBERED_S = 120.0
"""Seconds for which an ended grant is remembered. A token arrives within a minute, the proxy's time to connect."""


def look_at_port(uid: int, port: int) -> PortTarget | None:
    """Return the target of a port of this uid, from the sockets that listen now."""
    return target_of(listening(), uid, port)


class PortProxy:
    """The server that carries requests to web ports.

    `look` returns the target of a uid and a port; `managers` are the addresses that may say which grants have ended.
    `slots`: the number of rentals that the worker may have; each may use its share of the connections.
    """

    def __init__(
        self,
        *,
        rentals: RunningRentals,
        peers: frozenset[str],
        look: Callable[[int, int], PortTarget | None] = look_at_port,
        managers: frozenset[str] = frozenset(),
        slots: int = 1,
    ) -> None:
        self._rentals = rentals
        self._peers = peers
        self._look = look
        self._managers = managers
        self._rental_limit = max(ENOUGH_EACH, ENOUGH // slots)
        self._carried: dict[asyncio.Task[None], PortToken] = {}
        self._ended: dict[str, tuple[int, float]] = {}
        """Ended grants, by the manager's name for them: the number below which tokens are void, and when to forget."""

    async def serve(self, listener: socket.socket) -> None:
        """Carry connections for ever."""
        async with await asyncio.start_server(self._accept, sock=listener, limit=READ_BYTES):
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                self.look_again()

    def look_again(self) -> None:
        """End the connections of rentals that may not run here any more."""
        for token in set(self._carried.values()):
            try:
                self._rentals.find(token)
            except PortRefusal:
                for task, other in self._carried.items():
                    if other == token:
                        task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if not peer or peer[0] not in self._peers | self._managers:
            writer.transport.abort()
            return
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        head = b""
        try:
            async with asyncio.timeout(HEAD_WITHIN_S):
                head = await _head(reader)
            if peer[0] in self._managers and (text := port_tokens.header(head, port_tokens.END_HEADER)):
                await self._take_end_message(reader, writer, text, head)
                return
            if peer[0] not in self._peers:
                raise PortRefusal(403, "no_pass", NOT_THE_PROXY)
            text, rest = port_tokens.take_token(head)
            await self._carry(reader, writer, port_tokens.token_from(text, self._rentals.session_id()), rest)
        except PortRefusal as refusal:
            with suppress(OSError):
                writer.write(refusal_response(refusal, wants_html(head)))
                writer.write_eof()
                await _linger(reader)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the peer closed the connection, or sent no whole head in time
        finally:
            writer.close()

    async def _take_end_message(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str, head: bytes
    ) -> None:
        """End the connections with the ended grants in a message of the manager, and answer with those still open."""
        match, size = port_tokens.END_MESSAGE.fullmatch(text), port_tokens.header(head, b"content-length")
        if not match or not re.fullmatch(r"[0-9]{1,9}", size) or int(size) > LARGEST_END_BYTES:
            raise PortRefusal(400, "no_end", "this does not name the grants that have ended")
        async with asyncio.timeout(HEAD_WITHIN_S):
            lines = await reader.readexactly(int(size))
        session_id, number = self._rentals.session_id(), int(match[1])
        if not session_id or not hmac.compare_digest(port_tokens.end_signature(session_id, number, lines), match[2]):
            raise PortRefusal(403, "no_end", "this is not signed by the manager of this session")
        self.end(lines.decode("latin-1").splitlines(), number)
        is_open = "\n".join(sorted({token.opened_by for token in self._carried.values()})).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(is_open) + is_open)
        with suppress(OSError):
            await writer.drain()

    def end(self, lines: list[str], number: int) -> None:
        """End the connections of tokens with a lower number and one of these: `RENTAL PORT GRANT`, or `* * GRANT`."""
        now = time.monotonic()
        self._ended = {line: known for line, known in self._ended.items() if known[1] > now}
        self._ended |= dict.fromkeys(lines, (number, now + REMEMBERED_S))
        for task, token in list(self._carried.items()):
            if self._has_ended(token):
                del self._carried[task]
                task.cancel()

    def _has_ended(self, token: PortToken) -> bool:
        known = (self._ended.get(line) for line in (token.opened_by, f"* * {token.grant}"))
        return any(token.number < found[0] for found in known if found)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: PortToken, head: bytes
    ) -> None:
        if sum(other.rental_id == token.rental_id for other in self._carried.values()) >= self._rental_limit:
            detail = f"the web ports of this rental have {self._rental_limit} connections open, and may have no more"
            raise PortRefusal(503, "too_many_connections", f"{detail}: close some, or try again in a moment")
        if len(self._carried) >= MOST_OF_ALL:
            detail = f"the worker of this rental carries {MOST_OF_ALL} connections to web ports, and no more"
            raise PortRefusal(503, "too_many_connections", f"{detail}: try again in a moment")
        if self._has_ended(token):
            raise PortRefusal(403, "ended", "the grant that opened this port has ended: open the port anew")
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        self._carried[task] = token
        ends = asyncio.get_running_loop().call_later(token.left_ms / 1000, task.cancel) if token.left_ms else None
        try:
            far_reader, far_writer = await self._connect(token)
            try:
                far_writer.write(head)
                await _until_one_ends(pump(reader, far_writer), pump_answer(far_reader, writer))
            finally:
                far_writer.close()
        except asyncio.CancelledError:
            writer.transport.abort()  # drop even the bytes that wait to be sent
            if task.uncancel():
                raise
        finally:
            if ends:
                ends.cancel()
            self._carried.pop(task, None)

    async def _connect(self, token: PortToken) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to a socket of the rental's own. Raise PortRefusal if there is none, or none that accepts.

        The second look finds a neighbour's process that took the port after the first one.
        """
        uid = self._rentals.find(token).uid
        detail = f"nothing of this rental listens on port {token.port}: start it there"
        nothing_listens = PortRefusal(502, "nothing_listens", detail)
        before = self._look(uid, token.port)
        if before is None:
            raise nothing_listens
        for address in before.addresses:
            with suppress(OSError):  # TimeoutError is one
                async with asyncio.timeout(CONNECT_WITHIN_S):
                    reader, writer = await asyncio.open_connection(address, token.port, limit=READ_BYTES)
                    break
        else:
            detail = f"a process of this rental listens on port {token.port} and took no connection: look at it there"
            raise PortRefusal(502, "not_accepted", detail)
        after = self._look(uid, token.port)
        if after is None or not before.inodes <= after.inodes:
            writer.transport.abort()
            raise nothing_listens
        return reader, writer


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Read the head of a request, with its empty line; the bytes behind it stay in the reader."""
    head = b""
    while b"\r\n\r\n" not in head[-4:]:
        head += await reader.readuntil(b"\r\n")
        if len(head) > LARGEST_HEAD_BYTES:
            raise PortRefusal(400, "head_too_large", "the headers of the request are too large")
    return head


async def _until_one_ends(*directions: Coroutine[Any, Any, None]) -> None:
    """Run these until either ends. Raise the PortRefusal that one ends with."""
    pumps = [asyncio.create_task(direction) for direction in directions]
    try:
        done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in done:
            pump.result()
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _linger(reader: asyncio.StreamReader) -> None:
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await reader.read(READ_BYTES):
                pass


def give_up_capabilities() -> None:
    """Give up all capabilities for good: no program is executed afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capset(2): effective, permitted, inheritable, twice
    if libc.capset(version_3, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")


def main() -> int:
    if len(sys.argv) != 4:
        print("usage: orion-web PROXY_ADDRESS APP_ADDRESS SLOTS < listening socket", file=sys.stderr)  # noqa: T201
        return 2
    give_up_capabilities()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    os.nice(NICENESS)
    gc.freeze()
    peers, managers = frozenset({sys.argv[1]}), frozenset({sys.argv[2]})
    proxy = PortProxy(rentals=RunningRentals(), peers=peers, managers=managers, slots=int(sys.argv[3]))
    asyncio.run(proxy.serve(socket.socket(fileno=os.dup(0))))
    return 0
