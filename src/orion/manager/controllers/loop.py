"""A loop that runs a round at an interval and on a hint, and outlives a round that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

log = structlog.get_logger()


class Loop:
    """A controller's loop. A hint only brings the next round forward, so a lost hint costs at most an interval."""

    def __init__(self, name: str, interval_s: float, round_once: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self._interval_s = interval_s
        self._round = round_once
        self._hinted = asyncio.Event()
        self.failures = 0
        """Rounds that failed since the last one that succeeded."""
        self.rounds = self.failed_rounds = 0
        """Rounds since the start that succeeded, and that failed."""
        self.seconds = self.late_s = 0.0
        """Seconds spent in rounds; seconds by which the last round without a hint was late."""

    def hint(self) -> None:
        """Let the next round begin at once."""
        self._hinted.set()

    async def run(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            began = now()
            try:
                await self._round()
                self.failures = 0
                self.rounds += 1
            except Exception:
                # The next round loads all state again, so only time is lost.
                self.failures += 1
                self.failed_rounds += 1
                log.exception("round failed", loop=self.name, failures=self.failures)
            self.seconds += now() - began
            await self._pause()

    async def _pause(self) -> None:
        timeout_s = self._interval_s * min(2**self.failures, 30) if self.failures else self._interval_s
        planned = asyncio.get_running_loop().time() + timeout_s
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._hinted.wait()
        self.late_s = max(0.0, asyncio.get_running_loop().time() - planned)
        self._hinted.clear()
