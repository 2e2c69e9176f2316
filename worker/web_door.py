#!/usr/bin/python3 -Es
"""Carries what the proxy brings for a rental's web port to the rental's own process, and to nothing else.

    web_door.py PROXY_ADDRESS APP_ADDRESS          the listening socket is its stdin

A process of its own, so that no byte of a renter takes the agent's time; the agent starts it, again where it dies, and
keeps the socket. It is root, to read who is here, without any of root's capabilities.

The proxy sends one request on each connection, with a pass that the manager made for it: rental, epoch, port, what
opens it (a token, or that the port is public), a number and for how long, signed with the secret of this worker's
session. What is checked, in this order: the peer is the proxy; the pass is the
manager's; the rental is here at this very epoch, let in, and not frozen; whatever listens on the port is a socket of
the rental's uid, before the connection to it and after. Then bytes are passed on, both ways, as they are. A connection
ends as soon as the rental's right to run here does, when the time in its pass is over, and when the manager says that
what opened it has ended (src/orion/manager/gateway/web_ends.py).

What it cannot carry it answers itself, in words for people or for programs.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import hmac
import html
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freezing import Freezer
from ledger import Ledger, Record
from listeners import Reached, reach
from socket_diag import listening

HEADER = b"x-orion-pass"
END = b"x-orion-end"
OURS = b"x-orion-"
"""No header of a client that is called so is passed on, either."""
LARGEST_HEAD_BYTES = 96 << 10
LARGEST_ANSWER_HEAD_BYTES = 30 << 10
"""The proxy reads 32 KB (proxy_buffer_size in web_port.conf), this door's own mark included."""
HEAD_WITHIN_S = 5.0
CONNECT_WITHIN_S = 5.0
LINGER_S = 2.0
"""So long is read what was sent and is not wanted: a connection that is closed over it would take the answer along."""
LOOK_EVERY_S = 0.2
READ_BYTES = 64 << 10
LONGEST_STATUS_BYTES = 1000
_STATUS = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}( [^\r\n\0]*)?\r?\n")
_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)")
"""A status that only precedes the answer (RFC 9110, 15.2), such as 103 Early Hints; 101 is an answer itself."""
MOST_INTERIM = 20
_EMPTY_LINE = re.compile(rb"\n\r?\n")
MARK = b"X-Orion-Door: 1\r\n"
"""In each answer, so that the proxy can tell one that it has read from what it could not read (web_port.js there)."""
ENOUGH, ENOUGH_EACH = 200, 10
"""Connections to the web ports of a worker, which its slots share, and those that each has however many there are."""
MOST_OF_ALL = 500
"""Connections of all rentals together, where there are more than 50 slots."""
NICENESS = 5
_PASS = re.compile(
    r"([a-z0-9-]{1,64}) ([1-9][0-9]{0,17}) ([1-9][0-9]{3,4})"
    r" (public|[a-z]{5,6}\.[a-z0-9-]{1,64}\.[0-9a-f]{16}) ([1-9][0-9]{0,17}) (0|[1-9][0-9]{0,14}) ([0-9a-f]{64})"
)
_END = re.compile(r"([1-9][0-9]{0,17}) ([0-9a-f]{64})")
LARGEST_END_BYTES = 256 << 10
REMEMBERED_S = 120.0
"""What has ended is known for so long. A pass comes within a minute: for no longer the proxy tries to connect."""
_TITLES = {400: "Bad Request", 403: "Forbidden", 502: "Bad Gateway", 503: "Service Unavailable"}


class Refusal(Exception):
    """Why nothing is carried, as whoever asked will read it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Way:
    rental_id: str
    epoch: int
    port: int
    grant: str = field(default="public", compare=False)
    number: int = field(default=1, compare=False)
    """Passes and messages of what has ended have rising numbers."""
    left_ms: int = field(default=0, compare=False)
    """0: it does not end by itself."""

    @property
    def told(self) -> str:
        return f"{self.rental_id} {self.epoch} {self.port} {self.grant} {self.number} {self.left_ms}"

    @property
    def opened_by(self) -> str:
        """As the manager names what has ended."""
        return f"{self.rental_id} {self.port} {self.grant}"


def signature(session_id: str, way: Way) -> str:
    """As src/orion/manager/gateway/ways.py makes it."""
    return hmac.new(session_id.encode(), way.told.encode(), hashlib.sha256).hexdigest()


def end_signature(session_id: str, number: int, lines: bytes) -> str:
    """As src/orion/manager/gateway/web_ends.py makes it."""
    return hmac.new(session_id.encode(), b"end %d " % number + lines, hashlib.sha256).hexdigest()


def opened(told: str, session_id: str) -> Way:
    """The way that a pass opens. Raises Refusal for one that this worker's session did not sign."""
    match = _PASS.fullmatch(told)
    if not match or not session_id:
        raise Refusal(403, "no_pass", "this door is for the platform's proxy alone")
    way = Way(match[1], int(match[2]), int(match[3]), match[4], int(match[5]), int(match[6]))
    if not hmac.compare_digest(signature(session_id, way), match[7]):
        raise Refusal(403, "no_pass", "this door is for the platform's proxy alone")
    return way


def take_pass(head: bytes) -> tuple[str, bytes]:
    """The pass in the head of a request, and the head without it and its like. Raises Refusal unless there is one."""
    lines = head.split(b"\r\n")
    passes = [line for line in lines[1:] if line.partition(b":")[0].strip().lower() == HEADER]
    if len(passes) != 1:
        raise Refusal(403, "no_pass", "this door is for the platform's proxy alone")
    told = passes[0].partition(b":")[2].strip().decode("latin-1")
    return told, b"\r\n".join(line for line in lines if not line.lower().startswith(OURS))


def header(head: bytes, name: bytes) -> str:
    """Return the value of a header; empty unless it is there once."""
    found = [line.partition(b":")[2] for line in head.split(b"\r\n")[1:] if line.partition(b":")[0].lower() == name]
    return found[0].strip().decode("latin-1") if len(found) == 1 else ""


def wants_html(head: bytes) -> bool:
    return any(line.lower().startswith(b"accept:") and b"text/html" in line.lower() for line in head.split(b"\r\n"))


def answer(refusal: Refusal, as_html: bool) -> bytes:
    title, detail = _TITLES[refusal.status], str(refusal)
    if as_html:
        kind = "text/html; charset=utf-8"
        body = f"<!doctype html><title>{title}</title><h1>{title}</h1><p>{html.escape(detail)}</p>\n"
    else:
        kind = "application/problem+json"
        problem = {"type": "about:blank", "title": title, "status": refusal.status, "code": refusal.code}
        body = json.dumps(problem | {"detail": detail})
    lines = [
        f"HTTP/1.1 {refusal.status} {title}",
        MARK.decode().strip(),
        "Cache-Control: no-store",
        "Connection: close",
    ]
    lines += [f"Content-Type: {kind}", f"Content-Length: {len(body.encode())}"]
    lines += ["Retry-After: 2"] if refusal.status == 503 else []
    return ("\r\n".join([*lines, "", ""]) + body).encode()


class Tenants:
    """Who is here and may run, by what the agent and orion-rental keep. `root` is another directory in tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._ledger = Ledger(root / "var/lib/orion/rentals")
        self._freezer = Freezer(root)
        self._session = root / "run/orion/session"

    def session_id(self) -> str:
        try:
            return self._session.read_text()
        except FileNotFoundError:
            return ""

    def find(self, way: Way) -> Record:
        """Raises Refusal unless it may run here at that epoch."""
        record = self._ledger.living(way.rental_id)
        if record is None or record.epoch != way.epoch or record.ending or not record.let_in:
            raise Refusal(503, "not_here", "the rental is not here, or not any more: try again in a moment")
        if self._freezer.is_frozen(way.rental_id) or not self._freezer.has_lease:
            raise Refusal(503, "frozen", "the rental stands still at present: try again in a moment")
        return record


def look_at_port(uid: int, port: int) -> Reached | None:
    return reach(listening(), uid, port)


class WebDoor:
    """`look` is given a uid and a port; `managers` are the addresses that may say what has ended.

    `slots`: how many rentals the worker may have; each has its share of the connections, so that none takes another's.
    """

    def __init__(
        self,
        tenants: Tenants,
        peers: frozenset[str],
        look: Callable[[int, int], Reached | None] = look_at_port,
        managers: frozenset[str] = frozenset(),
        slots: int = 1,
    ) -> None:
        self._tenants = tenants
        self._peers = peers
        self._look = look
        self._managers = managers
        self._most_of_a_rental = max(ENOUGH_EACH, ENOUGH // slots)
        self._carried: dict[asyncio.Task[None], Way] = {}
        self._ended: dict[str, tuple[int, float]] = {}
        """What has ended, as the manager names it: up to which number, and until when that is remembered."""

    async def serve(self, listener: socket.socket) -> None:
        """For ever."""
        server = await asyncio.start_server(self._admit, sock=listener, limit=READ_BYTES)
        async with server:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                self.look_again()

    def look_again(self) -> None:
        """End what is carried for whoever may not run here any more."""
        for way in set(self._carried.values()):
            try:
                self._tenants.find(way)
            except Refusal:
                for task, its in self._carried.items():
                    if its == way:
                        task.cancel()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if not peer or peer[0] not in self._peers | self._managers:
            writer.transport.abort()
            return
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        head = b""
        try:
            async with asyncio.timeout(HEAD_WITHIN_S):
                head = await _head(reader)
            if peer[0] in self._managers and (told := header(head, END)):
                await self._hear(reader, writer, told, head)
                return
            if peer[0] not in self._peers:
                raise Refusal(403, "no_pass", "this door is for the platform's proxy alone")
            told, rest = take_pass(head)
            await self._carry(reader, writer, opened(told, self._tenants.session_id()), rest)
        except Refusal as refusal:
            with suppress(OSError):
                writer.write(answer(refusal, wants_html(head)))
                writer.write_eof()
                await _linger(reader)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # it has hung up, or says nothing
        finally:
            writer.close()

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, told: str, head: bytes) -> None:
        """End what the manager says is over, and answer with what is open then."""
        match, size = _END.fullmatch(told), header(head, b"content-length")
        if not match or not re.fullmatch(r"[0-9]{1,9}", size) or int(size) > LARGEST_END_BYTES:
            raise Refusal(400, "no_end", "this does not say what has ended")
        async with asyncio.timeout(HEAD_WITHIN_S):
            lines = await reader.readexactly(int(size))
        session_id, number = self._tenants.session_id(), int(match[1])
        if not session_id or not hmac.compare_digest(end_signature(session_id, number, lines), match[2]):
            raise Refusal(403, "no_end", "this is not of the manager of this session")
        self.end(lines.decode("latin-1").splitlines(), number)
        is_open = "\n".join(sorted({way.opened_by for way in self._carried.values()})).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(is_open) + is_open)
        with suppress(OSError):
            await writer.drain()

    def end(self, lines: list[str], number: int) -> None:
        """End what was opened by a pass with a lower number and one of these: `RENTAL PORT GRANT`, or `* * GRANT`."""
        now = time.monotonic()
        self._ended = {line: known for line, known in self._ended.items() if known[1] > now}
        self._ended |= dict.fromkeys(lines, (number, now + REMEMBERED_S))
        for task, way in list(self._carried.items()):
            if self._has_ended(way):
                del self._carried[task]
                task.cancel()

    def _has_ended(self, way: Way) -> bool:
        known = (self._ended.get(line) for line in (way.opened_by, f"* * {way.grant}"))
        return any(way.number < found[0] for found in known if found)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way, head: bytes) -> None:
        if sum(other.rental_id == way.rental_id for other in self._carried.values()) >= self._most_of_a_rental:
            detail = (
                f"the web ports of this rental have {self._most_of_a_rental} connections open, and may have no more"
            )
            raise Refusal(503, "too_many_connections", f"{detail}: close some, or try again in a moment")
        if len(self._carried) >= MOST_OF_ALL:
            detail = f"the worker of this rental carries {MOST_OF_ALL} connections to web ports, and no more"
            raise Refusal(503, "too_many_connections", f"{detail}: try again in a moment")
        if self._has_ended(way):
            raise Refusal(403, "ended", "what opened this port has ended: open it anew")
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        self._carried[task] = way
        ends = asyncio.get_running_loop().call_later(way.left_ms / 1000, task.cancel) if way.left_ms else None
        try:
            far_reader, far_writer = await self._connect(way)
            try:
                far_writer.write(head)
                await _both_ways(_pump(reader, far_writer), _pump_answer(far_reader, writer))
            finally:
                far_writer.close()
        except asyncio.CancelledError:
            writer.transport.abort()  # nothing more of it, not even what waits to be sent
            if task.uncancel():
                raise
        finally:
            if ends:
                ends.cancel()
            self._carried.pop(task, None)

    async def _connect(self, way: Way) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To a socket of the rental's own. Who takes a port in between is found by the second look."""
        uid = self._tenants.find(way).uid
        nobody = Refusal(502, "nothing_listens", f"nothing of this rental listens on port {way.port}: start it there")
        before = self._look(uid, way.port)
        if before is None:
            raise nobody
        for address in before.addresses:
            with suppress(OSError):  # TimeoutError is one
                async with asyncio.timeout(CONNECT_WITHIN_S):
                    reader, writer = await asyncio.open_connection(address, way.port, limit=READ_BYTES)
                    break
        else:
            detail = f"a process of this rental listens on port {way.port} and took no connection: look at it there"
            raise Refusal(502, "not_accepted", detail)
        after = self._look(uid, way.port)
        if after is None or not before.inodes <= after.inodes:
            writer.transport.abort()
            raise nobody
        return reader, writer


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Up to and with the empty line; what comes behind it stays."""
    head = b""
    while b"\r\n\r\n" not in head[-4:]:
        head += await reader.readuntil(b"\r\n")
        if len(head) > LARGEST_HEAD_BYTES:
            raise Refusal(400, "head_too_large", "the headers of the request are too large")
    return head


async def _both_ways(*ways: Coroutine[Any, Any, None]) -> None:
    """Until either ends. Raises the Refusal that one ends with."""
    pumps = [asyncio.create_task(way) for way in ways]
    try:
        done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in done:
            pump.result()
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on an answer whose head was read whole, with a mark. Raises Refusal for what is none.

    What precedes the answer (1xx) stays here: Nginx would take it for the whole answer, and the answer for something
    else. Nobody misses it: a hint is only a hint, and the proxy itself says when a body may come.
    """
    with suppress(OSError):
        head, rest = await _answer_head(reader, b"")
        for _ in range(MOST_INTERIM):
            if not _INTERIM.match(head):
                break
            head, rest = await _answer_head(reader, rest)
        else:
            raise Refusal(502, "no_http", f"what listens there sent {MOST_INTERIM} interim answers (1xx) and no other")
        status, end, fields = head.partition(b"\n")
        writer.write(status + end + MARK + fields + rest)
    await _pump(reader, writer)


async def _answer_head(reader: asyncio.StreamReader, came: bytes) -> tuple[bytes, bytes]:
    """Return the next head, up to and with its empty line, and what came behind it. Raises Refusal for what is none.

    `came` is what was read before.
    """
    looked = 0
    while True:
        status = came[: came.find(b"\n") + 1]
        if (status or len(came) > LONGEST_STATUS_BYTES) and not _STATUS.fullmatch(status):
            raise Refusal(502, "no_http", "what listens there does not answer in HTTP")
        end = _EMPTY_LINE.search(came, looked)
        if end and end.end() <= LARGEST_ANSWER_HEAD_BYTES:
            return came[: end.end()], came[end.end() :]
        if end or len(came) > LARGEST_ANSWER_HEAD_BYTES:
            detail = f"what listens there sends more than {LARGEST_ANSWER_HEAD_BYTES >> 10} KB of headers"
            raise Refusal(502, "answer_head_too_large", f"{detail}: it may set too many cookies, or too large ones")
        looked = max(0, len(came) - 2)
        part = await reader.read(READ_BYTES)
        if not part:
            raise _broken_off(came)
        came += part


def _broken_off(came: bytes) -> Refusal:
    """Return what is said of a connection that ended before the head of its answer did."""
    if not came:
        return Refusal(502, "no_answer", "what listens there closed the connection without an answer")
    if b"\n" not in came:
        return Refusal(502, "no_http", "what listens there does not answer in HTTP")
    return Refusal(502, "no_answer", "what listens there closed the connection amid the headers of its answer")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while part := await reader.read(READ_BYTES):
            writer.write(part)
            await writer.drain()


async def _linger(reader: asyncio.StreamReader) -> None:
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await reader.read(READ_BYTES):
                pass


def give_up_capabilities() -> None:
    """For good, as nothing is executed afterwards. capset(2), version 3: effective, permitted, inheritable, twice."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")


def main() -> int:
    if len(sys.argv) != 4:
        print("usage: web_door.py PROXY_ADDRESS APP_ADDRESS SLOTS < listening socket", file=sys.stderr)  # noqa: T201
        return 2
    give_up_capabilities()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    os.nice(NICENESS)
    gc.freeze()
    listener = socket.socket(fileno=os.dup(0))
    door = WebDoor(Tenants(), frozenset({sys.argv[1]}), managers=frozenset({sys.argv[2]}), slots=int(sys.argv[3]))
    asyncio.run(door.serve(listener))
    return 0


if __name__ == "__main__":
    sys.exit(main())
