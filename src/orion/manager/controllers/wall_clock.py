"""The wall clock, which is either believed or doubted; while it is doubted, nothing is removed by it.

A manager that starts with a clock far from the expected time, or whose clock jumps, writes an event. Then no rental
expires, and no snapshot or idempotency key is removed, until the clock agrees again or an operator confirms it. Tokens
end meanwhile by the time that was last believed, continued by the machine's own clock, which cannot be set.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog

from orion.manager.domain.expiry import Mark, WallClock
from orion.manager.domain.steps import Event
from orion.manager.store import clock as marks
from orion.manager.store.database import Store, record

log = structlog.get_logger()

MARK_EVERY_S = 30.0
"""Seconds between two writes of the clock into the database, with which the next start compares."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CONFIRM = "orion admin confirm-clock"


def boot_time_s() -> float:
    """Return seconds since the machine started, by a clock that cannot be set and that counts suspended time too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> int:
    """Return a number of 31 bits for this start of the machine; 0 if it is unknown."""
    try:
        return int.from_bytes(hashlib.sha256(BOOT_ID.read_bytes()).digest()[:4], "big") >> 1
    except OSError:
        return 0


class TrustedClock:
    def __init__(
        self, *, now: Callable[[], float], wall: Callable[[], float], boot: int = 0, store: Store | None = None
    ) -> None:
        """`now`: seconds by a clock that cannot be set; `boot`: see `boot_id`. `store` None: nothing is written."""
        self._now = now
        self._wall = wall
        self._boot = boot
        self._store = store
        self._clock = WallClock(offset_s=wall() - now())
        self._was_believed = True
        """Whether the clock was believed according to the last event that was written."""
        self._marked_at = float("-inf")

    async def begin(self) -> None:
        """Compare the clock with the last mark and event in the database."""
        if self._store is None:
            return
        mark, last_event_at = await self._store.read(marks.last_known)
        self._clock = WallClock.at_start(self._wall(), self._now(), self._boot, mark, last_event_at)
        await self.look()

    async def look(self) -> WallClock:
        """Return the clock as it is now, and write an event if it has become believed or doubted."""
        believed = self._is_believed()
        if self._was_believed != believed:
            self._was_believed = believed
            kind = "manager.clock_believed" if believed else "manager.clock_doubted"
            await self._note(Event(kind=kind, actor="manager", reason=self.problem or "it agrees again"))
        elif believed and self._now() >= self._marked_at + MARK_EVERY_S:
            await self._write_mark()
        return self._clock

    async def confirm(self, actor: str) -> None:
        """Believe the clock as it is, because an operator says that it is right."""
        if self._is_believed():
            return
        reason = f"it is {self._difference()} the expected time, and right"
        self._clock, self._was_believed = self._clock.confirmed(), True
        await self._note(Event(kind="manager.clock_confirmed", actor=actor, reason=reason))
        await self._write_mark()

    @property
    def problem(self) -> str:
        """The reason why the clock is doubted, and what to do; empty while it is believed."""
        if self._is_believed():
            return ""
        shown = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        waits = "until it has gone evenly for five minutes" if self._clock.settles else f"until {CONFIRM}"
        which = f"it shows {shown}, {self._difference()} the expected time"
        return f"{which}: no rental expires, no snapshot is removed {waits}"

    def wall_of_removals(self) -> float:
        """Return the Unix seconds by which keys and snapshots have ended; minus infinity while the clock is doubted."""
        return self._wall() if self._is_believed() else float("-inf")

    def counts_from(self) -> float | None:
        """Return the Unix seconds from which a new rental's time is counted; None while the clock is doubted."""
        return self._wall() if self._is_believed() else None

    def wall_of_tokens(self) -> float:
        """Return the Unix seconds by which tokens end: the last believed time, continued by a clock that cannot be set.

        So an ended token stays ended, whatever the wall clock shows. The time for which the machine was off is missing
        until the clock is believed again.
        """
        return self._wall() if self._is_believed() else self._clock.as_believed(self._now())

    def _is_believed(self) -> bool:
        self._clock = self._clock.observe(self._wall(), self._now())
        return self._clock.believed

    def _difference(self) -> str:
        far_s = self._clock.far_s
        return f"{_span(abs(far_s))} {'ahead of' if far_s >= 0 else 'behind'}"

    async def _write_mark(self) -> None:
        if self._store is not None:
            self._marked_at = self._now()
            await self._store.write(marks.keep, Mark(self._wall(), self._now(), self._boot))

    async def _note(self, event: Event) -> None:
        log.warning("wall clock", kind=event.kind, reason=event.reason)
        if self._store is not None:
            await self._store.write(record, event)


def _span(seconds: float) -> str:
    for unit, length_s in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.1f} {unit}"
    return f"{seconds:.0f} seconds"
