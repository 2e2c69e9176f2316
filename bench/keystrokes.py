"""The time from a key to its echo on the screen, alone and beside many busy sessions.

It is measured in the terminal of a browser (by the WebSocket of the page) and in ssh with a terminal through
`orion connect`. The busy sessions are terminals of browsers in which a program prints all the time. Another process
reads those, so that the measured session never waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from websockets.asyncio.client import connect as connect_async
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from bench.calls import Caller
from bench.figures import percentile
from bench.report import Result
from bench.sessions import key_pair, rent, renter_options, through_the_proxy
from bench.stack import ROOT, BenchStack, running

RENTALS = 6
BUSY = 50
LINES_A_SECOND, LINE_BYTES = 20, 500
"""The output of each busy session. All 50 print half a megabyte a second in a thousand pieces, as builds do."""
PRINTS = f"""exec python3 -c 'import time
while True: print("x" * {LINE_BYTES - 2}, flush=True); time.sleep({1 / LINES_A_SECOND})'
"""
PAUSE_S = 0.03
"""Seconds between two keys: faster than a person types."""
ANSWERS_S = 20.0
SUBPROTOCOL = Subprotocol("orion.terminal")
READY = "READY"


def measure(keys: int) -> Result:
    result = Result("keystrokes", f"From a key to the screen, alone and beside {BUSY} busy sessions")
    with running(3, {"ORION_SLOTS": "4"}) as stack, stack.caller() as proxy:
        key = key_pair(stack.folder)
        rentals = [rent(proxy, key.with_suffix(".pub").read_text().strip()) for _ in range(RENTALS)]
        with _page(stack, proxy, rentals[0]) as page, ssh_typist(stack, proxy, rentals[1], str(key)) as ssh:
            alone = {"a browser's terminal": echoes(page, keys), "ssh through the proxy": echoes(ssh, keys)}
            with busy_terminals(stack, rentals):
                busy = {"a browser's terminal": echoes(page, keys), "ssh through the proxy": echoes(ssh, keys)}
                # A new connection: the proxy has closed the first one, which was idle for long.
                with stack.caller() as caller:
                    status_s = [_status_s(caller) for _ in range(100)]
        for name, seconds in alone.items():
            result.times(f"{name}, alone", seconds)
        for name, seconds in busy.items():
            result.times(f"{name}, beside {BUSY}", seconds)
            result.at_most(f"{name} beside {BUSY}, p99", 1000 * percentile(seconds, 0.99), 30, " ms")
        result.times(f"GET /api/status, beside {BUSY}", status_s)
        with stack.caller() as caller:
            suspected = suspicions(caller)
        result.details["suspected"] = suspected
        result.at_most("workers that were suspected meanwhile", len(suspected), 0)
    return result


class Typist:
    """A terminal to type in. `type` sends one byte; `read` returns the bytes of the next seconds."""

    def __init__(self, type_: Callable[[bytes], None], read: Callable[[float], bytes]) -> None:
        self.type, self.read = type_, read

    def until(self, awaited: bytes) -> None:
        """Read until these bytes are on the screen. Raise RuntimeError if they are not in time."""
        deadline, seen = time.monotonic() + ANSWERS_S, b""
        while awaited not in seen:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise RuntimeError(
                    f"{awaited!r} was not on the screen within {ANSWERS_S:g} s; the screen ends with {seen[-200:]!r}"
                )
            seen += self.read(left_s)


def echoes(typist: Typist, keys: int) -> list[float]:
    """Return the seconds from each key to its echo.

    The rental's `cat` prints nothing before a line ends, so the terminal alone echoes."""
    letters = itertools.cycle(b"abcdefghij")
    found = []
    for number in range(keys):
        letter = bytes([next(letters)])
        began = time.perf_counter()
        typist.type(letter)
        typist.until(letter)
        found.append(time.perf_counter() - began)
        if number % 50 == 49:  # a terminal's line has a largest length
            typist.type(b"\x15")
            time.sleep(0.2)
            typist.read(0)
        time.sleep(PAUSE_S)
    return found


@contextmanager
def _page(stack: BenchStack, proxy: Caller, rental: dict[str, Any]) -> Iterator[Typist]:
    address, subprotocols = _terminal(stack, proxy, rental)
    with connect(address, subprotocols=subprotocols, compression=None) as page:
        typist = Typist(page.send, lambda within_s: _shown(page, within_s))
        typist.until(b"$ ")
        page.send(f"echo {READY[:3]}''{READY[3:]}; exec cat\n".encode())
        typist.until(READY.encode())
        yield typist


def _shown(page: ClientConnection, within_s: float) -> bytes:
    try:
        message = page.recv(within_s)
    except TimeoutError:
        return b""
    if isinstance(message, str):
        return b""
    page.send(json.dumps({"ack": len(message)}))
    return message


@contextmanager
def ssh_typist(stack: BenchStack, proxy: Caller, rental: dict[str, Any], key: str) -> Iterator[Typist]:
    """Open a terminal by ssh on this machine, as on a renter's."""
    authority = proxy.must("GET", "/api/ssh-authority").body["known_hosts"]
    token = stack.folder / "token"
    token.touch(mode=0o600)
    token.write_text(stack.token)
    through = through_the_proxy(sys.executable, rental["id"], authority)
    to = f"{rental['username']}@{rental['id']}.orion"
    command = ["ssh", "-tt", *renter_options(key), *through, to, f"echo {READY}; exec cat"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "ORION_URL": f"http://127.0.0.1:{stack.http_port}",
        "ORION_TOKEN_FILE": str(token),
    }
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        try:
            typist = Typist(lambda data: _write(process, data), lambda within_s: _read(process, within_s))
            typist.until(READY.encode())
            yield typist
        finally:
            process.terminate()


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    if process.stdin:  # a pipe
        process.stdin.write(data)


def _read(process: subprocess.Popen[bytes], within_s: float) -> bytes:
    if not process.stdout or not select.select([process.stdout], [], [], within_s)[0]:
        return b""
    return os.read(process.stdout.fileno(), 1 << 16)


def _terminal(stack: BenchStack, proxy: Caller, rental: dict[str, Any]) -> tuple[str, list[Subprotocol]]:
    path = f"/api/rentals/{rental['id']}/terminal"
    ticket = proxy.must("POST", path).body["ticket"]
    return f"ws://127.0.0.1:{stack.http_port}{path}", [SUBPROTOCOL, Subprotocol(ticket)]


@contextmanager
def busy_terminals(stack: BenchStack, rentals: list[dict[str, Any]]) -> Iterator[None]:
    """Keep BUSY terminals of browsers open and read them; a program prints in each all the time."""
    payload = {"port": stack.http_port, "token": stack.token, "rentals": rentals}
    command = [sys.executable, "-m", "bench.keystrokes"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdin and process.stdout:  # both are pipes
                process.stdin.write(json.dumps(payload) + "\n")
                process.stdin.flush()
                if process.stdout.readline().strip() != READY:
                    raise RuntimeError("the busy sessions ended before they were busy")
                yield
                if process.poll() is not None:
                    raise RuntimeError("the busy sessions ended while they were to be busy")
        finally:
            process.kill()


async def _be_busy(port: int, token: str, rentals: list[dict[str, Any]]) -> None:
    """Open the terminals one after the other: a worker's sshd limits connections that have not logged in yet."""
    pages = []
    with Caller("127.0.0.1", port, token) as proxy:
        for number in range(BUSY):
            path = f"/api/rentals/{rentals[number % len(rentals)]['id']}/terminal"
            ticket = Subprotocol(proxy.must("POST", path).body["ticket"])
            address = f"ws://127.0.0.1:{port}{path}"
            page = await connect_async(address, subprotocols=[SUBPROTOCOL, ticket], compression=None)
            shown = asyncio.Event()
            pages.append(asyncio.create_task(_follow(page, shown)))
            async with asyncio.timeout(ANSWERS_S):
                await shown.wait()
    print(READY, flush=True)
    await asyncio.wait(pages, return_when=asyncio.FIRST_COMPLETED)
    raise RuntimeError("a busy session ended")


async def _follow(page: Any, shown: asyncio.Event) -> None:
    begun = False
    async for message in page:
        if isinstance(message, str):
            continue
        await page.send(json.dumps({"ack": len(message)}))
        if not begun and b"$ " in message:
            begun = True
            await page.send(PRINTS.encode())
        if begun and b"x" * 100 in message:
            shown.set()


def _status_s(proxy: Caller) -> float:
    time.sleep(PAUSE_S)
    return proxy.must("GET", "/api/status").seconds


def suspicions(proxy: Caller) -> list[dict[str, Any]]:
    """Return the events of workers that were suspected or declared down since this platform began."""
    found: list[dict[str, Any]] = []
    after = 0
    while events := proxy.must("GET", f"/api/events?after={after}&limit=100").body["items"]:
        found += [event for event in events if event["kind"] in {"worker.became_suspect", "worker.became_down"}]
        after = events[-1]["id"]
    return found


if __name__ == "__main__":
    asyncio.run(_be_busy(**json.loads(sys.stdin.readline())))
