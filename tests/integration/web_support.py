"""The port proxy of a fake worker, with a renter's server behind it, both on this machine: see platform_support.py."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orion_worker.records import RentalRecord, RentalRecords
from orion_worker.web.active_rentals import RunningRentals
from orion_worker.web.listeners import PortTarget, listeners, target_of
from orion_worker.web.port_proxy import PortProxy
from platform_support import Platform

from orion.manager.api.web_ports import COOKIE

TOO_FREE = (
    *("Set-Cookie: a=b; Path=/; Domain=example", "Set-Cookie: orion_port=c", 'Clear-Site-Data: "*"', "NEL: {}"),
    *("Strict-Transport-Security: max-age=9", 'Alt-Svc: h3=":1"', "Report-To: {}", "X-Request-ID: mine"),
    *("Content-Security-Policy: sandbox allow-same-origin", "Referrer-Policy: unsafe-url", "Accept-CH: DPR"),
    *("X-Orion-Manager: unreachable", "Access-Control-Allow-Credentials: true", "Cross-Origin-Resource-Policy: x"),
)
SLOP = (
    b"\n\n",
    b"x",
    b"HTTP/1.1 100 Continue\r\n\r\n<",
    b"HTTP/1.1 103 Early\r\n\r\n<",
    b"HTTP/1.1 101 x\r\n\r\n",
    b"HTTP/2 200\r\n",
)
"""Beginnings of an answer that Nginx passes on unchanged, and after which a browser finds another answer."""
SECRETS = (
    "/.web/way",
    "/.web/refused.json",
    "/.web/unserved",
    "/api/events",
    "/terminal/index.html",
    "/.problem/internal",
)
"""The internal paths to which a renter's X-Accel-Redirect might lead."""


class RenterServer:
    """A renter's web server: it reflects requests, sends forbidden answers, and streams."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.port = 0
        self.goes_on = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            await self._answer(head, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = head.split()[1].decode().partition("?")[0]
        scripted = _scripted(path)
        if scripted == b"\0":
            pass  # the connection closes
        elif scripted:
            writer.write(scripted)
        elif path == "/stream":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\none\n")
            await self.goes_on.wait()
            writer.write(b"two\n")
        elif path == "/wait":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await reader.read()
        elif path == "/knows":
            prefix = head.decode().partition("X-Forwarded-Prefix: ")[2].partition("\r\n")[0]
            writer.write(_reply("302 Found", f"Location: {prefix}/login"))
        elif path == "/upload":
            size = 0
            while size < int(head.lower().partition(b"content-length: ")[2].split()[0]):
                size += len(await reader.read(1 << 16))
            writer.write(_reply("200 OK", body=str(size)))
        elif b"upgrade: websocket" in head.lower():
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
            while part := await reader.read(100):
                writer.write(part)
        else:
            lines = head.decode("latin-1").split("\r\n")
            headers = [line.partition(": ")[::2] for line in lines[1:] if line]
            writer.write(_reply("200 OK", body=json.dumps({"line": lines[0], "headers": headers})))
        await writer.drain()


def _scripted(path: str) -> bytes:
    """Return the scripted answer of a path; empty if there is none."""
    kind, _, number = path[1:].partition("/")
    if kind == "accel":
        return _reply("200 OK", f"X-Accel-Redirect: {SECRETS[int(number)]}", "X-Accel-Buffering: yes", body="its own")
    if kind == "slop":
        return SLOP[int(number)] + _reply("200 OK", "Content-Type: text/html", body="<script>")
    if kind == "status":
        return _reply(f"{number} Whatever", body="as the renter says")
    if kind == "cookie":
        return _reply("200 OK", f"Set-Cookie: a={'b' * (int(number) << 10)}; Path=/", body="its own")
    fixed = {
        "hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + _reply("200 OK", body="its own"),
        "malformed": b"HTTP/1.1 200 OK\r\nA\0: b\r\n\r\n",
        "silence": b"\0",
        "free": _reply("200 OK", *TOO_FREE),
        "redirect": _reply("302 Found", "Location: /login?a=b"),
        "twice": _reply("200 OK", body="first") + _reply("200 OK", body="second"),
    }
    return fixed.get(kind, b"")


def _reply(status: str, *lines: str, body: str = "") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *lines]
    return ("\r\n".join([*head, "", ""]) + body).encode()


class MadeUpWorker:
    """A fake worker, whose port proxy accepts the real proxy's requests with access tokens of the real manager."""

    def __init__(self, platform: Platform, root: Path) -> None:
        self.address = f"{platform.proxy.network}.1"
        self._platform = platform
        self._root = root
        self.records = RentalRecords(root / "var/lib/orion/rentals")
        (root / "run/orion").mkdir(parents=True)
        self.renter = RenterServer()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def holds(self, rental_id: str, epoch: int = 1) -> None:
        (self._root / "run/orion/session").write_text(self._platform.session)
        self.records.save(
            RentalRecord(rental_id=rental_id, username=f"r-{rental_id}", uid=os.getuid(), epoch=epoch, activated=True)
        )

    def goes_on(self) -> None:
        self._loop.call_soon_threadsafe(self.renter.goes_on.set)

    async def _begin(self) -> None:
        server = await asyncio.start_server(self.renter.serve, "127.0.0.1", 0)
        self.renter.port = server.sockets[0].getsockname()[1]
        self.port_proxy = PortProxy(
            rentals=RunningRentals(self._root),
            peers=frozenset({f"{self._platform.proxy.network}.2"}),
            look=self._target,
            managers=frozenset({_comes_from(self.address)}),
        )
        self._listener = socket.create_server((self.address, 80))
        self._serving = (server, asyncio.create_task(self.port_proxy.serve(self._listener)))

    def _target(self, uid: int, port: int) -> PortTarget | None:
        """Return the listener of the renter's server; no other port of this machine is a renter's."""
        if port != self.renter.port:
            return None
        return target_of(listeners(Path("/proc/net/tcp").read_text()), uid, port)

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result(60)

    async def _end(self) -> None:
        server, serving = self._serving
        server.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._listener.close()


@contextmanager
def made_up_worker(platform: Platform, root: Path) -> Iterator[MadeUpWorker]:
    worker = MadeUpWorker(platform, root)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def our_cookie(key: str) -> str:
    return f"{COOKIE}={key}"


def _comes_from(address: str) -> str:
    """Return the address from which this machine connects, as the peer sees it: Docker may translate it."""
    with socket.create_server((address, 0)) as listening, socket.create_connection(listening.getsockname()):
        accepted, peer = listening.accept()
        accepted.close()
        return str(peer[0])
