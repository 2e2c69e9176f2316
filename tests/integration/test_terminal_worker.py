"""A terminal in a browser, on a real worker: its sshd, its shell, and a WebSocket between two real ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import uvicorn
from rental_support import Rental, new_rental
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from support.builders import AUTHORITIES, host_key, private_key
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from worker_support import Worker, WorkerNetwork

from orion.manager.gateway.relay import NORMAL, Ending
from orion.manager.gateway.terminal import TerminalPage, Terms, carry, serve
from orion.manager.ssh.authority import Authority
from orion.manager.ssh.port import Host, ShellLogin, ShellUnreachable
from orion.manager.ssh.shell import SshShells

AUTHORITY = Authority(*AUTHORITIES, time.time)
CHUNK_BYTES, IN_FLIGHT_BYTES = 16 << 10, 64 << 10
"""As web/terminal/connection.js has them."""
WITHIN_S = 60


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy worker time: one that shakes hands late lets people in, and a shell that ends late is not lost."""
    monkeypatch.setattr("orion.manager.ssh.shell.OPEN_TIMEOUT_S", WITHIN_S)
    monkeypatch.setattr("orion.manager.ssh.shell.CLOSED_WITHIN_S", WITHIN_S)


@pytest.fixture(scope="module")
def rental(host: Worker, folder: Path) -> Iterator[Rental]:
    made = new_rental(host, folder)
    variables = made.variables | {"public_keys": [made.key.public], "user_authority": AUTHORITY.of_users}
    status, report = host.rental("run", **variables)
    assert status == 0, report
    yield made
    host.rental("purge", **made.variables)


@dataclass
class TerminalGateway:
    """Yield a server whose one route is a terminal of the rental."""

    shells: SshShells
    host: Host
    login: ShellLogin
    terms: Terms = field(default_factory=Terms)
    port: int = 0
    pages: list[TerminalPage] = field(default_factory=list)

    async def route(self, websocket: WebSocket) -> None:
        await websocket.accept("orion.terminal")
        page = TerminalPage(websocket=websocket, terms=self.terms)
        self.pages.append(page)
        await serve(page, self._visit(page))

    async def _visit(self, page: TerminalPage) -> Ending:
        shell = await self.shells.open(self.host, self.login, page.size)
        page.attach(True)
        await page.send_state("connected", "")
        try:
            how = await carry(page, shell, asyncio.get_running_loop().create_future())
        finally:
            shell.close()
        return Ending(NORMAL, how or "lost")

    @asynccontextmanager
    async def terminal(self) -> AsyncIterator[Browser]:
        url = f"ws://127.0.0.1:{self.port}/terminal"
        async with connect(url, subprotocols=["orion.terminal"], compression=None, max_size=None) as websocket:  # type: ignore[list-item]
            browser = Browser(websocket)
            listening = asyncio.create_task(browser.listen())
            try:
                async with asyncio.timeout(WITHIN_S):
                    await browser.is_told("connected")
                    yield browser
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)


class Browser:
    """The page without its screen: all output is shown at once."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket
        self._took = asyncio.Event()
        self._news = asyncio.Event()
        self._in_flight = 0
        self.screen = bytearray()
        self.shows = True
        """Whether it acknowledges."""
        self.said: list[dict[str, str]] = []

    async def listen(self) -> None:
        try:
            async for message in self._websocket:
                if isinstance(message, bytes):
                    self.screen += message
                    if self.shows:
                        await self._websocket.send(json.dumps({"ack": len(message)}))
                elif "took" in (sent := json.loads(message)):
                    self._in_flight -= sent["took"]
                    self._took.set()
                else:
                    self.said.append(sent)
                self._news.set()
        except ConnectionClosed:
            self._news.set()

    async def types(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            while self._in_flight >= IN_FLIGHT_BYTES:
                self._took.clear()
                await self._took.wait()
            chunk = data[start : start + CHUNK_BYTES]
            self._in_flight += len(chunk)
            await self._websocket.send(chunk)

    async def resizes(self, columns: int, rows: int) -> None:
        await self._websocket.send(json.dumps({"resize": [columns, rows]}))

    async def sees(self, text: bytes) -> bytes:
        """Up to and with this text, which is then off the screen."""
        while text not in self.screen:
            self._news.clear()
            await self._news.wait()
        end = self.screen.index(text) + len(text)
        seen = bytes(self.screen[:end])
        del self.screen[:end]
        return seen

    async def runs(self, command: str) -> str:
        """Return the output of a command, between two marks that are not in the typed text."""
        await self.types(f"echo be''gin; {command}; echo do''ne\n".encode())
        await self.sees(b"begin\r\n")
        return (await self.sees(b"done\r\n"))[: -len(b"done\r\n")].decode()

    async def reads_raw(self, size: int) -> bytes:
        while len(self.screen) < size:
            self._news.clear()
            await self._news.wait()
        return bytes(self.screen)

    async def is_told(self, state: str) -> str:
        while not any(each["state"] == state for each in self.said):
            self._news.clear()
            await self._news.wait()
        return next(each["message"] for each in self.said if each["state"] == state)


@asynccontextmanager
async def gateway_to(rental: Rental, network: WorkerNetwork) -> AsyncIterator[TerminalGateway]:
    place = Host(worker_id=rental.on.worker_id, address=rental.on.address, host_keys=rental.on.host_keys)
    login = ShellLogin(username=rental.username, rental_id=rental.rental_id, epoch=rental.epoch, who="alice")
    gateway = TerminalGateway(SshShells(AUTHORITY, network.gateway), place, login)
    listening = socket.create_server(("127.0.0.1", 0))
    gateway.port = listening.getsockname()[1]
    app = Starlette(routes=[WebSocketRoute("/terminal", gateway.route)])
    how = {"log_config": None, "lifespan": "off", "ws": "websockets-sansio", "ws_per_message_deflate": False}
    server = uvicorn.Server(uvicorn.Config(app, **how))  # type: ignore[arg-type]
    running = asyncio.create_task(server.serve([listening]))
    try:
        yield gateway
    finally:
        server.should_exit = server.force_exit = True
        await running


async def test_a_terminal_runs_the_renter_s_shell_and_has_the_size_of_the_page(
    rental: Rental, network: WorkerNetwork
) -> None:
    async with gateway_to(rental, network) as gateway, gateway.terminal() as browser:
        await browser.resizes(101, 37)
        assert await browser.runs("id -un; echo $TERM; locale charmap; tty | cut -c 1-8") == (
            f"{rental.username}\r\nxterm-256color\r\nUTF-8\r\n/dev/pts\r\n"
        )
        assert await browser.runs("stty size") == "37 101\r\n"
        await browser.resizes(64, 20)
        while await browser.runs("stty size") != "20 64\r\n":
            pass  # the message overtakes nothing, and needs a moment
        assert await browser.runs("echo 'é 漢字 🎉 ё'") == "é 漢字 🎉 ё\r\n"


async def test_every_byte_passes_into_and_out_of_the_terminal(rental: Rental, network: WorkerNetwork) -> None:
    content = os.urandom(2 << 20)
    async with gateway_to(rental, network) as gateway, gateway.terminal() as browser:
        await browser.types(b"stty raw -echo; echo re''ady; head -c %d > pasted; sha256sum < pasted\n" % len(content))
        await browser.sees(b"ready\n")
        await browser.types(content)
        assert await browser.sees(b"-\n") == hashlib.sha256(content).hexdigest().encode() + b"  -\n"
        await browser.types(b"stty sane; stty raw; clear; echo sh''ow; cat pasted\n")
        await browser.sees(b"show\n")
        assert (await browser.reads_raw(len(content)))[: len(content)] == content


async def test_a_large_paste_into_a_program_that_echoes_it_arrives_whole(
    rental: Rental, network: WorkerNetwork
) -> None:
    content = os.urandom(1 << 20)
    async with gateway_to(rental, network) as gateway, gateway.terminal() as browser:
        await browser.types(b"stty raw -echo; echo re''ady; head -c %d\n" % len(content))
        await browser.sees(b"ready\n")
        await browser.types(content)
        assert (await browser.reads_raw(len(content)))[: len(content)] == content


async def test_the_output_of_an_unread_terminal_waits_in_the_worker_and_others_continue(
    rental: Rental, network: WorkerNetwork
) -> None:
    async with (
        gateway_to(rental, network) as gateway,
        gateway.terminal() as flooded,
        gateway.terminal() as other,
    ):
        await other.runs("true")
        await flooded.runs("true")
        flooded.shows = False
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await flooded.types(b"yes\n")
        page = gateway.pages[0]
        while page.shown < gateway.terms.window_bytes - (64 << 10):
            await other.runs("true")
        for number in range(30):
            assert await other.runs(f"echo {number}") == f"{number}\r\n"
        assert page.shown <= gateway.terms.window_bytes + (1 << 10)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) << 10
        assert grown < 32 << 20, f"{grown} bytes more"


async def test_ctrl_c_ends_a_flood_of_output(rental: Rental, network: WorkerNetwork) -> None:
    async with gateway_to(rental, network) as gateway, gateway.terminal() as browser:
        await browser.types(b"yes\n")
        await browser.reads_raw(1 << 20)
        await browser.types(b"\x03")
        await browser.types(b"echo aft''er\n")
        await browser.sees(b"after\r\n")


@pytest.mark.parametrize(
    ("command", "words"), [("exit 3", "ended with status 3"), ("kill -KILL $$", "by the signal KILL")]
)
async def test_the_exit_status_of_the_shell_is_reported(
    rental: Rental, network: WorkerNetwork, command: str, words: str
) -> None:
    async with gateway_to(rental, network) as gateway, gateway.terminal() as browser:
        await browser.types(f"{command}\n".encode())
        assert words in await browser.is_told("ended")


async def test_a_terminal_is_refused_for_another_epoch_authority_or_address(
    rental: Rental, network: WorkerNetwork
) -> None:
    place = Host(worker_id=rental.on.worker_id, address=rental.on.address, host_keys=rental.on.host_keys)
    login = ShellLogin(username=rental.username, rental_id=rental.rental_id, epoch=rental.epoch, who="alice")
    another = Authority(private_key(), private_key(), time.time)
    tried = [
        (SshShells(AUTHORITY, network.gateway), replace(login, epoch=2)),
        (SshShells(AUTHORITY, network.gateway), replace(login, rental_id="abcdefghij")),
        (SshShells(AUTHORITY, network.gateway), replace(login, username="root")),
        (SshShells(AUTHORITY, "192.0.2.1"), login),
        (SshShells(another, network.gateway), login),
    ]
    for shells, renter in tried:
        with pytest.raises(ShellUnreachable, match="refuses every log-in"):
            await shells.open(place, renter, (80, 24))
    impostor = replace(place, host_keys=(host_key(1),))
    with pytest.raises(ShellUnreachable, match="another machine"):
        await SshShells(AUTHORITY, network.gateway).open(impostor, login, (80, 24))
    shell = await SshShells(AUTHORITY, network.gateway).open(place, login, (80, 24))
    assert await shell.read()
    shell.close()
