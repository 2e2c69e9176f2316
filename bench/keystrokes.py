"""What typing feels like: from a key until it is on the screen, alone and beside many who are busy.

Both ways in are measured: the terminal in a browser (its WebSocket, as the page speaks it) and ssh with a terminal
through `orion connect`. The busy ones have terminals of browsers in which a program prints all the time; who reads
them is a process of its own, so that the typist never waits for its own reader.
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
from bench.sessions import as_its_renter, key_pair, rent, through_the_door
from bench.stack import ROOT, BenchStack, running

RENTALS = 6
BUSY = 50
LINES_A_SECOND, LINE_BYTES = 20, 500
"""Of each busy one: half a megabyte in a thousand pieces a second for all, as of 50 who follow a build."""
PRINTS = f"""exec python3 -c 'import time
while True: print("x" * {LINE_BYTES - 2}, flush=True); time.sleep({1 / LINES_A_SECOND})'
"""
PAUSE_S = 0.03
"""Between two keys: faster than anybody types."""
ANSWERS_S = 20.0
SUBPROTOCOL = Subprotocol("orion.terminal")
READY = "READY"


def measure(keys: int) -> Result:
    result = Result("keystrokes", f"From a key to the screen, alone and beside {BUSY} busy sessions")
    with running(3, {"ORION_SLOTS": "4"}) as stack, stack.caller() as door:
        key = key_pair(stack.folder)
        rentals = [rent(door, key.with_suffix(".pub").read_text().strip()) for _ in range(RENTALS)]
        with _page(stack, door, rentals[0]) as page, ssh_typist(stack, door, rentals[1], str(key)) as ssh:
            alone = {"a browser's terminal": echoes(page, keys), "ssh through the door": echoes(ssh, keys)}
            with busy_terminals(stack, rentals):
                busy = {"a browser's terminal": echoes(page, keys), "ssh through the door": echoes(ssh, keys)}
                # The proxy has closed a connection on which nothing was asked for so long.
                with stack.caller() as asking:
                    asked = [_status_s(asking) for _ in range(100)]
        for way, seconds in alone.items():
            result.times(f"{way}, alone", seconds)
        for way, seconds in busy.items():
            result.times(f"{way}, beside {BUSY}", seconds)
            result.at_most(f"{way} beside {BUSY}, p99", 1000 * percentile(seconds, 0.99), 30, " ms")
        result.times(f"GET /api/status, beside {BUSY}", asked)
        with stack.caller() as asking:
            doubted = doubts(asking)
        result.details["doubted"] = doubted
        result.at_most("workers that were doubted meanwhile", len(doubted), 0)
    return result


class Typist:
    """Somebody at a terminal. `type` gives one byte, `read` takes what came within so many seconds."""

    def __init__(self, type_: Callable[[bytes], None], read: Callable[[float], bytes]) -> None:
        self.type, self.read = type_, read

    def until(self, awaited: bytes) -> None:
        deadline, seen = time.monotonic() + ANSWERS_S, b""
        while awaited not in seen:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise RuntimeError(f"{awaited!r} was not on the screen within {ANSWERS_S:g} s, but {seen[-200:]!r}")
            seen += self.read(left_s)


def echoes(typist: Typist, keys: int) -> list[float]:
    """Return the seconds from each key to its echo.

    The rental's `cat` prints nothing before a line ends, so what comes is the terminal's echo."""
    letters = itertools.cycle(b"abcdefghij")
    found = []
    for number in range(keys):
        letter = bytes([next(letters)])
        began = time.perf_counter()
        typist.type(letter)
        typist.until(letter)
        found.append(time.perf_counter() - began)
        if number % 50 == 49:  # a terminal's line has an end
            typist.type(b"\x15")
            time.sleep(0.2)
            typist.read(0)
        time.sleep(PAUSE_S)
    return found


@contextmanager
def _page(stack: BenchStack, door: Caller, rental: dict[str, Any]) -> Iterator[Typist]:
    address, subprotocols = _terminal(stack, door, rental)
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
def ssh_typist(stack: BenchStack, door: Caller, rental: dict[str, Any], key: str) -> Iterator[Typist]:
    """Open a terminal by ssh, as on a renter's machine, here on the host."""
    authority = door.must("GET", "/api/ssh-authority").body["known_hosts"]
    token = stack.folder / "token"
    token.touch(mode=0o600)
    token.write_text(stack.token)
    through = through_the_door(sys.executable, rental["id"], authority)
    to = f"{rental['username']}@{rental['id']}.orion"
    command = ["ssh", "-tt", *as_its_renter(key), *through, to, f"echo {READY}; exec cat"]
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


def _terminal(stack: BenchStack, door: Caller, rental: dict[str, Any]) -> tuple[str, list[Subprotocol]]:
    path = f"/api/rentals/{rental['id']}/terminal"
    ticket = door.must("POST", path).body["ticket"]
    return f"ws://127.0.0.1:{stack.http_port}{path}", [SUBPROTOCOL, Subprotocol(ticket)]


@contextmanager
def busy_terminals(stack: BenchStack, rentals: list[dict[str, Any]]) -> Iterator[None]:
    """Keep BUSY terminals of browsers open, in which a program prints all the time, and read them."""
    asked = {"port": stack.http_port, "token": stack.token, "rentals": rentals}
    command = [sys.executable, "-m", "bench.keystrokes"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdin and process.stdout:  # both are pipes
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
                if process.stdout.readline().strip() != READY:
                    raise RuntimeError("the busy sessions ended before they were busy")
                yield
                if process.poll() is not None:
                    raise RuntimeError("the busy sessions ended while they were to be busy")
        finally:
            process.kill()


async def _be_busy(port: int, token: str, rentals: list[dict[str, Any]]) -> None:
    """One after the other: a worker's sshd takes only so many who have not logged in yet."""
    pages = []
    with Caller("127.0.0.1", port, token) as door:
        for number in range(BUSY):
            path = f"/api/rentals/{rentals[number % len(rentals)]['id']}/terminal"
            ticket = Subprotocol(door.must("POST", path).body["ticket"])
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
    asked = False
    async for message in page:
        if isinstance(message, str):
            continue
        await page.send(json.dumps({"ack": len(message)}))
        if not asked and b"$ " in message:
            asked = True
            await page.send(PRINTS.encode())
        if asked and b"x" * 100 in message:
            shown.set()


def _status_s(door: Caller) -> float:
    time.sleep(PAUSE_S)
    return door.must("GET", "/api/status").seconds


def doubts(door: Caller) -> list[dict[str, Any]]:
    """Return the events of workers that were suspected or declared down since this platform began."""
    found: list[dict[str, Any]] = []
    after = 0
    while events := door.must("GET", f"/api/events?after={after}&limit=100").body["items"]:
        found += [event for event in events if event["kind"] in {"worker.became_suspect", "worker.became_down"}]
        after = events[-1]["id"]
    return found


if __name__ == "__main__":
    asyncio.run(_be_busy(**json.loads(sys.stdin.readline())))
