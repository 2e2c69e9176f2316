"""The expiry loop: begins the end of rentals whose time is over."""

from __future__ import annotations

from collections.abc import Callable

from orion.manager.domain.expiry import expire
from orion.manager.loops.clock import TrustedClock
from orion.manager.loops.timer import Loop
from orion.manager.store.port import DUE_AT_ONCE, Ledger

INTERVAL_S = 1.0


class ExpiryLoop:
    def __init__(
        self, ledger: Ledger, clock: TrustedClock, wall: Callable[[], float], on_expiry: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._wall = wall
        self._on_expiry = on_expiry
        self.loop = Loop("expiry", INTERVAL_S, self.round)

    async def round(self) -> None:
        clock, wall = await self._clock.look(), self._wall()
        steps = expire(await self._ledger.due(wall), wall, clock)
        if steps:
            await self._ledger.apply(steps)
            self._on_expiry()
        if len(steps) == DUE_AT_ONCE:
            self.loop.hint()
