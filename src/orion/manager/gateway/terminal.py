"""A page with a terminal in it: one WebSocket, and the shells of its rental, one after the other.

Binary frames are the terminal's bytes, both ways. Text frames are JSON:

    {"resize": [columns, rows]}           from the page
    {"ack": n}                            from the page: n more bytes are on the screen
    {"took": n}                           to the page: the shell has taken n more bytes
    {"state": "connecting" | "connected" | "waiting" | "ended", "message": "..."}     to the page

The state "connected" also has the "name" of the rental, the "resume" key by which the page opens the terminal again
after a reload (tickets.py), and a "notice" where there is something to know of the rental's files. The first size
stands in the address: ?columns=132&rows=43.

Both directions are counted, and neither goes on while too much is unacknowledged. So a flood waits in the worker and
not in here or in the browser; and a paste waits in the page, so that the page's own acknowledgements never queue behind
it: with neither of the two, a program that echoes a large paste would wait for the page, and the page for the program.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from orion.manager.gateway.relay import CLOSE_TIMEOUT_S, LONGEST_REASON, TOO_BIG, UNSUPPORTED, Ending
from orion.manager.ssh.port import Shell

OVER, COME_AGAIN, TIME_OVER = 4000, 4001, 4002
"""Close codes: the rental has ended; a new ticket will do; nothing happened for long, or the day is over."""
MAX_FRAME_BYTES = 256 << 10
LONGEST_CONTROL = 100
"""Characters of a text frame."""
LARGEST_SIZE = 1000
"""Columns and rows."""
INPUT_BYTES = 256 << 10
"""Typed and not yet taken by the shell: what an honest page never reaches. Beyond it nothing more is received."""
TELL_BYTES = 16 << 10
"""Of what the shell took is told to the page at once; it has 64 KB on the way at most."""


@dataclass(frozen=True)
class Terms:
    """What each page gets."""

    idle_s: float = 1800.0
    total_s: float = 12 * 3600.0
    window_bytes: int = 512 << 10
    """On the way to the screen at most."""
    bytes_a_second: float = 8 << 20
    """To the screen: no eye reads faster, and the manager has others to serve."""
    burst_bytes: int = 256 << 10
    again_after_s: float = 1.0
    """Between attempts to reach a worker that does not answer."""


class TerminalPage:
    """The browser's end."""

    def __init__(
        self, websocket: WebSocket, terms: Terms, size: tuple[int, int] = (80, 24), open_for_s: float = 0.0
    ) -> None:
        """`open_for_s`: how long the terminal has been open before its page was reloaded."""
        self._websocket = websocket
        self._terms = terms
        self._loop = asyncio.get_running_loop()
        self._active_at = self._loop.time()
        self._began = self._active_at - open_for_s
        self.size = size
        self.resized = asyncio.Event()
        self.shown = self.taken = 0
        """Bytes of the present shell."""
        self._attached = False
        self._unacknowledged = 0
        self._acknowledged = asyncio.Event()
        self._free_at = -math.inf
        self._typed = bytearray()
        self._typed_more, self._typed_less = asyncio.Event(), asyncio.Event()
        self._untold = 0

    def attach(self, attached: bool) -> None:
        """To a new shell, or to none: what is typed then is meant for nobody."""
        self._attached = attached
        self.shown = self.taken = 0
        self._untold += len(self._typed)
        self._typed.clear()
        self._typed_less.set()

    async def tell(self, state: str, message: str, **more: str) -> None:
        await self._send(state=state, message=message, **more)

    async def show(self, part: bytes) -> None:
        """Returns when more may be shown."""
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
        while not self._typed:
            self._typed_more.clear()
            await self._typed_more.wait()
        data = bytes(self._typed)
        self._typed.clear()
        self._typed_less.set()
        return data

    async def took(self, count: int) -> None:
        self.taken += count
        self._untold += count
        if self._untold >= TELL_BYTES:
            told, self._untold = self._untold, 0
            await self._send(took=told)

    async def listen(self) -> Ending:
        """Until it leaves, or says what cannot be understood."""
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return Ending(message.get("code", 1005), message.get("reason") or "")
            data = message.get("bytes")
            if data is None:
                if not self._obey(message.get("text") or ""):
                    return Ending(UNSUPPORTED, "a text frame is no control that is known")
            elif len(data) > MAX_FRAME_BYTES:
                return Ending(TOO_BIG, f"a frame may hold {MAX_FRAME_BYTES} bytes")
            else:
                self._active_at = self._loop.time()
                await self._take(data)

    async def until_too_late(self) -> Ending:
        """The end of its time."""
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
        """With a last word. A page that takes nothing does not even take that: then it is hung up on."""
        if WebSocketState.DISCONNECTED in (self._websocket.client_state, self._websocket.application_state):
            return
        reason = ending.reason.encode()[:LONGEST_REASON].decode(errors="ignore")
        with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # it left in this moment
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.tell("ended", ending.reason)
                await self._websocket.close(ending.code, reason)

    async def _take(self, data: bytes) -> None:
        while self._attached and len(self._typed) >= INPUT_BYTES:
            self._typed_less.clear()
            await self._typed_less.wait()
        if self._attached:
            self._typed += data
            self._typed_more.set()
        else:
            self._untold += len(data)
            await self.took(0)

    def _obey(self, text: str) -> bool:
        """Whether it was a control."""
        try:
            asked = json.loads(text) if len(text) <= LONGEST_CONTROL else None
        except ValueError:
            return False
        match asked:
            case {"ack": int(count), **rest} if not rest and count > 0:
                self._unacknowledged = max(0, self._unacknowledged - count)
                self._acknowledged.set()
            case {"resize": [int(columns), int(rows)], **rest} if not rest and _is_a_size(columns, rows):
                self.size = (columns, rows)
                self.resized.set()
            case _:
                return False
        return True

    async def _send(self, **told: Any) -> None:
        await self._websocket.send_text(json.dumps(told))


async def serve(page: TerminalPage, visits: Coroutine[Any, Any, Ending]) -> Ending:
    """Until the page leaves, its time is over, or the visits to the rental's shells end. All is closed then."""
    running = [asyncio.create_task(part) for part in (page.listen(), page.until_too_late(), visits)]
    try:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        ending = next(task for task in running if task in done).result()
    except WebSocketDisconnect as gone:
        ending = Ending(gone.code, gone.reason or "")
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    await page.leave(ending)
    return ending


async def carry(page: TerminalPage, shell: Shell, over: asyncio.Future[Ending]) -> str | None:
    """Between the page and one shell, until that has ended: how. None: it is lost, or `over` is done."""
    running = [asyncio.create_task(part(page, shell)) for part in (_show, _type, _resize)]
    waiting: list[asyncio.Future[Any]] = [*running, over]
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done & set(running):
            task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return None if over.done() else await shell.how_it_ended()


async def _show(page: TerminalPage, shell: Shell) -> None:
    while part := await shell.read():
        await page.show(part)


async def _type(page: TerminalPage, shell: Shell) -> None:
    while True:
        data = await page.typed()
        await shell.write(data)
        await page.took(len(data))


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
