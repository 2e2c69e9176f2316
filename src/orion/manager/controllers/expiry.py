"""The expiry loop: it ends rentals whose time is over, and begins to count the time of those that have no end yet."""

from __future__ import annotations

from collections.abc import Callable

from orion.manager.controllers.loop import Loop
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.expiry import WallClock, count, expire
from orion.manager.store.port import DUE_AT_ONCE, StateStore

INTERVAL_S = 1.0
COUNT_EVERY = 60
"""The rounds after which rentals are looked for whose time is not counted yet, as long as the clock is believed."""


class ExpiryController:
    def __init__(
        self, *, state_store: StateStore, clock: TrustedClock, wall: Callable[[], float], on_expiry: Callable[[], None]
    ) -> None:
        self._ledger = state_store
        self._clock = clock
        self._wall = wall
        self._on_expiry = on_expiry
        self._uncounted_for = 0
        """The rounds for which nobody has looked."""
        self.loop = Loop("expiry", INTERVAL_S, self.round)

    async def round(self) -> None:
        clock, wall = await self._clock.look(), self._wall()
        await self._count(clock, wall)
        steps = expire(await self._ledger.due(wall), wall, clock)
        if steps:
            await self._ledger.apply(steps)
            self._on_expiry()
        if len(steps) == DUE_AT_ONCE:
            self.loop.hint()

    async def _count(self, clock: WallClock, wall: float) -> None:
        if not clock.believed:
            self._uncounted_for = 0  # they are looked for as soon as it is believed again
            return
        if self._uncounted_for == 0:
            await self._ledger.apply_each(count(await self._ledger.without_expiry(), wall, clock))
        self._uncounted_for = (self._uncounted_for + 1) % COUNT_EVERY
