"""The expiry loop: begins the end of rentals whose time is over."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from orion.manager.domain.expiry import WallClock, expire
from orion.manager.loops.timer import Loop
from orion.manager.store.port import DUE_AT_ONCE, Ledger

log = structlog.get_logger()

INTERVAL_S = 1.0


class ExpiryLoop:
    def __init__(
        self, ledger: Ledger, monotonic: Callable[[], float], wall: Callable[[], float], on_expiry: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._monotonic = monotonic
        self._wall = wall
        self._on_expiry = on_expiry
        self._clock = WallClock(wall() - monotonic())
        self.loop = Loop("expiry", INTERVAL_S, self.round)

    async def round(self) -> None:
        wall = self._wall()
        before, self._clock = self._clock, self._clock.observe(wall, self._monotonic())
        if before.believed and not self._clock.believed:
            log.warning("the wall clock jumped: nothing expires until it has gone evenly for a while")
        steps = expire(await self._ledger.due(wall), wall, self._clock)
        if steps:
            await self._ledger.apply(steps)
            self._on_expiry()
        if len(steps) == DUE_AT_ONCE:
            self.loop.hint()
