"""The terminal page as it is served: Chromium, the real proxy, the real gateway, and shells of this machine.

Only the workers are fake. The output of a shell comes from a program at a pseudo-terminal and is also given to tmux, so
that two terminals can be compared.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import pty
import secrets
import shutil
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect
from support.harness import PROXY_SECRET, Harness

from orion.manager.api.proxy_guard import SECRET_HEADER_BYTES
from orion.manager.ssh.port import Host, Shell, ShellLogin

WITHIN_S = 60
expect.set_options(timeout=WITHIN_S * 1000)
SHELL = ("setsid", "--ctty", "bash", "--noprofile", "--norc")


class PtyShell:
    """Implements `port.Shell` with a program of this machine."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.first_size = size
        self.output = b""
        self.cut = False
        """Whether the connection to the shell is lost."""
        self._ours, theirs = pty.openpty()
        self.resize(*size)
        environment = {**os.environ, "TERM": "xterm-256color", "PS1": "$ ", "LC_ALL": "C.UTF-8", "HISTFILE": ""}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self._program = subprocess.Popen(SHELL, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload]
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self._news = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._ours, self._news.set)

    async def read(self) -> bytes:
        while not self.cut:
            self._news.clear()
            try:
                part = os.read(self._ours, 32 << 10)
            except BlockingIOError:
                await self._news.wait()
                continue
            except OSError:  # no process writes to the terminal any more
                return b""
            self.output += part
            return part
        return b""

    async def write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._ours, data) :]
            except BlockingIOError:
                await asyncio.sleep(0.01)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    async def how_it_ended(self) -> str | None:
        return None if self.cut else f"the shell has ended with status {await asyncio.to_thread(self._program.wait)}"

    def lose(self) -> None:
        self.cut = True
        self._news.set()

    def close(self) -> None:
        if self._ours < 0:
            return
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        self._ours = -1
        with suppress(ProcessLookupError):
            os.killpg(self._program.pid, signal.SIGKILL)
        self._program.wait()


@dataclass
class PtyShells:
    """Implements `port.Shells`."""

    opened: list[PtyShell] = field(default_factory=list)

    async def open(self, host: Host, login: ShellLogin, size: tuple[int, int]) -> Shell:
        self.opened.append(PtyShell(size))
        return self.opened[-1]


@asynccontextmanager
async def served(harness: Harness, address: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PtyShells]:
    """Serve the harness behind the proxy, with shells of this machine in all of its rentals."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [pair for pair in scope["headers"] if pair[0] != SECRET_HEADER_BYTES]
        await harness.app({**scope, "headers": [*headers, (SECRET_HEADER_BYTES, PROXY_SECRET.encode())]}, receive, send)

    shells = PtyShells()
    monkeypatch.setattr(harness.shells, "open", shells.open)
    options = {"log_config": None, "lifespan": "off", "ws": "websockets-sansio", "ws_per_message_deflate": False}
    server = uvicorn.Server(uvicorn.Config(app, host=address, port=5000, **options))  # type: ignore[arg-type]
    running = asyncio.create_task(server.serve())
    try:
        yield shells
    finally:
        for shell in shells.opened:
            shell.close()
        server.should_exit = server.force_exit = True
        await running


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    if not program:
        pytest.fail("These tests need a browser: apt install chromium (scripts/test.sh does)", pytrace=False)
    async with async_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, as the tests do. The browser opens only pages of the platform.
        browser = await playwright.chromium.launch(executable_path=program, chromium_sandbox=os.geteuid() != 0)
        try:
            yield browser
        finally:
            await browser.close()


class Window:
    """A browser window with the page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        page.set_default_timeout(WITHIN_S * 1000)
        self._marks = itertools.count()
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    @property
    def context(self) -> BrowserContext:
        return self.page.context

    async def is_connected(self) -> None:
        await expect(self.page.locator("#status")).to_have_text("Connected")

    async def runs(self, line: str, awaited: str = "") -> None:
        await self.page.keyboard.type(line + "\n")
        if awaited:
            await self.shows(awaited)

    async def does(self, command: str) -> None:
        """Run a command on an empty screen, and wait until all that it prints is shown."""
        mark = next(self._marks)
        await self.runs(f"clear; {command}; echo ma''rk{mark}.", f"mark{mark}.")

    async def shows(self, text: str) -> None:
        await expect(self.page.locator(".xterm-rows")).to_contain_text(text)

    async def rows(self) -> list[str]:
        texts = await self.page.evaluate(
            "[...document.querySelectorAll('.xterm-rows > div')].map((one) => one.textContent)"
        )
        return [text.replace("\xa0", " ").rstrip() for text in texts]

    async def cursor(self) -> tuple[int, int]:
        """Return the column and the row of the cursor, from 0."""
        column, row = await self.page.evaluate(
            """(() => {
                const cursor = document.querySelector(".xterm-rows .xterm-cursor");
                const row = cursor.closest(".xterm-rows > div");
                let column = 0;
                for (let one = cursor.previousSibling; one; one = one.previousSibling) column += one.textContent.length;
                return [column, [...row.parentNode.children].indexOf(row)];
            })()"""
        )
        return column, row


async def eventually(what: str, look: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Wait until `look` returns the wanted value; on failure, show the difference."""
    deadline = asyncio.get_running_loop().time() + WITHIN_S
    seen = await look()
    for _ in range(10 * WITHIN_S):
        if seen == wanted or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.1)
        seen = await look()
    assert seen == wanted, f"{what}: {seen} is not {wanted}"


class Tmux:
    """Renders the output of a program with tmux."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = str(folder / f"tmux-{secrets.token_hex(4)}")

    def shows(self, output: bytes, columns: int, rows: int) -> tuple[list[str], tuple[int, int]]:
        """Return the rows of its screen, and the column and the row of its cursor."""
        printed = self._folder / "printed"
        printed.write_bytes(output)
        self._run("kill-server", check=False)
        script = f"stty raw -echo; cat '{printed}'; tmux -S '{self._socket}' wait-for -S printed; exec sleep 1000"
        start = ("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows))
        self._run("-u", *start, "sleep 1000", ";", "set", "-g", "status", "off")
        self._run("respawn-window", "-k", script)
        self._run("wait-for", "printed")
        column, row = self._run("display-message", "-p", "#{cursor_x} #{cursor_y}").split()
        screen = self._run("capture-pane", "-p", "-N").split("\n")
        self._run("kill-server", check=False)
        lines = [line.rstrip() for line in screen[:rows]]
        return lines + [""] * (rows - len(lines)), (int(column), int(row))

    def _run(self, *arguments: str, check: bool = True) -> str:
        command = ["tmux", "-S", self._socket, *arguments]
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        environment.pop("TMUX", None)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout
