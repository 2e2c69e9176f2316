"""A browser's page with a terminal: one WebSocket, and the shells of its rental, one after the other.

Binary frames are the terminal's bytes, both ways. Text frames are JSON:

    {"resize": [columns, rows]}           from the page
    {"ack": n}                            from the page: n more bytes are on the screen
    {"took": n}                           to the page: the shell has taken n more bytes
    {"state": "connecting" | "connected" | "waiting" | "ended", "message": "..."}     to the page

The state "connected" also has the "name" of the rental, the "resume" key by which the page opens the terminal again
after a reload (tickets.py), and a "notice" if there is something to know of the rental's files. The first size is in
the address, so that the shell begins with it: ?columns=132&rows=43.

Both directions are counted, and each stops while too many bytes are unacknowledged. So a flood of output waits in the
worker, not in the manager or the browser, and a paste waits in the page, where it does not delay the acknowledgements.
Otherwise a program that echoes a large paste would wait for the page, and the page for the program.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from orion.manager.gateway.relay import TOO_BIG, UNSUPPORTED, Ending, close, run_until_first
from orion.manager.ssh.port import Shell

OVER, TRY_AGAIN, TIME_OVER = 4000, 4001, 4002
"""Close codes: the rental has ended; the page may try again with a new ticket; the terminal's time is over."""
MAX_FRAME_BYTES = 256 << 10
LONGEST_CONTROL = 100
"""Characters of a text frame."""
LARGEST_SIZE = 1000
"""The most columns, and the most rows."""
INPUT_BYTES = 256 << 10
"""Bytes of input that may wait for the shell; beyond it nothing is received. The platform's page never reaches it."""
REPORT_INPUT_BYTES = 16 << 10
"""Bytes of input after which the page is told that the shell has taken them; the page sends 64 KB ahead at most."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The limits of each page."""

    idle_s: float = 1800.0
    total_s: float = 12 * 3600.0
    window_bytes: int = 512 << 10
    """The most bytes of output that may be unacknowledged."""
    bytes_a_second: float = 8 << 20
    """The rate of output, limited because its decryption takes time of the process that answers heartbeats."""
    burst_bytes: int = 256 << 10
    again_after_s: float = 1.0
    """Seconds between attempts to reach a worker that does not answer."""


class TerminalPage:
    """The browser's end of a terminal."""

    def __init__(
        self, *, websocket: WebSocket, terms: Terms, size: tuple[int, int] = (80, 24), open_for_s: float = 0.0
    ) -> None:
        """`open_for_s` is the time for which the terminal was open before its page was reloaded."""
        self._websocket = websocket
        self._terms = terms
        self._loop = asyncio.get_running_loop()
        self._active_at = self._loop.time()
        self._began = self._active_at - open_for_s
        self.size = size
        self.resized = asyncio.Event()
        self.shown = self.taken = 0
        """Bytes of output and of input of the present shell."""
        self._attached = False
        self._unacknowledged = 0
        self._acknowledged = asyncio.Event()
        self._free_at = -math.inf
        self._typed = bytearray()
        self._typed_more, self._typed_less = asyncio.Event(), asyncio.Event()
        self._unreported = 0

    def attach(self, attached: bool) -> None:
        """Begin with a new shell, or with none; input that waits is dropped: it was meant for the former one."""
        self._attached = attached
        self.shown = self.taken = 0
        self._unreported += len(self._typed)
        self._typed.clear()
        self._typed_less.set()

    async def send_state(self, state: str, message: str, **more: str) -> None:
        await self._websocket.send_text(json.dumps({"state": state, "message": message, **more}))

    async def show(self, part: bytes) -> None:
        """Send output to the page, and return when more may be sent."""
        while self._unacknowledged and self._unacknowledged + len(part) > self._terms.window_bytes:
            self._acknowledged.clear()
            await self._acknowledged.wait()
        await self._websocket.send_bytes(part)
        self._unacknowledged += len(part)
        self.shown += len(part)
        self._active_at = now = self._loop.time()
        rate = self._terms.bytes_a_second
        self._free_at = max(self._free_at, now - self._terms.burst_bytes / rate) + len(part) / rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)

    async def typed(self) -> bytes:
        """Wait for input and return it."""
        while not self._typed:
            self._typed_more.clear()
            await self._typed_more.wait()
        data = bytes(self._typed)
        self._typed.clear()
        self._typed_less.set()
        return data

    async def note_taken(self, count: int) -> None:
        """Count input that the shell has taken, and tell the page when there is enough of it."""
        self.taken += count
        self._unreported += count
        if self._unreported >= REPORT_INPUT_BYTES:
            count, self._unreported = self._unreported, 0
            await self._websocket.send_text(json.dumps({"took": count}))

    async def listen(self) -> Ending:
        """Receive frames until the page disconnects or sends an invalid one; return the ending."""
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return Ending(message.get("code", 1005), message.get("reason") or "")
            data = message.get("bytes")
            if data is None:
                if not self._apply_control(message.get("text") or ""):
                    return Ending(UNSUPPORTED, "the text frame is not a known control message")
            elif len(data) > MAX_FRAME_BYTES:
                return Ending(TOO_BIG, f"a frame may hold {MAX_FRAME_BYTES} bytes")
            else:
                self._active_at = self._loop.time()
                await self._queue_input(data)

    async def wait_for_timeout(self) -> Ending:
        """Wait until the terminal was idle for too long or open for too long; return the ending."""
        terms = self._terms
        while True:
            now = self._loop.time()
            idle_s, left_s = self._active_at + terms.idle_s - now, self._began + terms.total_s - now
            if left_s <= 0:
                return Ending(TIME_OVER, f"a terminal stays open for {_period(terms.total_s)} at most")
            if idle_s <= 0:
                return Ending(TIME_OVER, f"nothing was typed or shown for {_period(terms.idle_s)}")
            await asyncio.sleep(min(idle_s, left_s))

    async def leave(self, ending: Ending) -> None:
        """Send the ending and close the WebSocket."""
        await close(self._websocket, ending, json.dumps({"state": "ended", "message": ending.reason}))

    async def _queue_input(self, data: bytes) -> None:
        while self._attached and len(self._typed) >= INPUT_BYTES:
            self._typed_less.clear()
            await self._typed_less.wait()
        if self._attached:
            self._typed += data
            self._typed_more.set()
        else:
            self._unreported += len(data)
            await self.note_taken(0)

    def _apply_control(self, text: str) -> bool:
        """Apply a control message. Return False if it is not one."""
        try:
            message = json.loads(text) if len(text) <= LONGEST_CONTROL else None
        except ValueError:
            return False
        match message:
            case {"ack": int(count), **rest} if not rest and count > 0:
                self._unacknowledged = max(0, self._unacknowledged - count)
                self._acknowledged.set()
            case {"resize": [int(columns), int(rows)], **rest} if not rest and _is_a_size(columns, rows):
                self.size = (columns, rows)
                self.resized.set()
            case _:
                return False
        return True


async def serve(page: TerminalPage, visits: Coroutine[Any, Any, Ending]) -> Ending:
    """Serve the page until it disconnects, its time is over, or `visits` to the rental's shells end; then close it."""
    try:
        done = await run_until_first((page.listen(), page.wait_for_timeout(), visits))
        ending: Ending = done[0].result()
    except WebSocketDisconnect as gone:
        ending = Ending(gone.code, gone.reason or "")
    await page.leave(ending)
    return ending


async def carry(page: TerminalPage, shell: Shell, over: asyncio.Future[Ending]) -> str | None:
    """Carry bytes between the page and one shell. Return how the shell ended; None if it is lost or `over` is done."""
    for done in await run_until_first([part(page, shell) for part in (_show, _type, _resize)], over):
        done.result()
    return None if over.done() else await shell.how_it_ended()


async def _show(page: TerminalPage, shell: Shell) -> None:
    while part := await shell.read():
        await page.show(part)


async def _type(page: TerminalPage, shell: Shell) -> None:
    while True:
        data = await page.typed()
        await shell.write(data)
        await page.note_taken(len(data))


async def _resize(page: TerminalPage, shell: Shell) -> None:
    while True:
        await page.resized.wait()
        page.resized.clear()
        shell.resize(*page.size)


def _is_a_size(columns: int, rows: int) -> bool:
    return 0 < columns <= LARGEST_SIZE and 0 < rows <= LARGEST_SIZE


def _period(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:g} h" if hours >= 1 else f"{minutes:g} min" if minutes >= 1 else f"{seconds:g} s"
