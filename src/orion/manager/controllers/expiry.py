"""The expiry controller: ends rentals whose time is over, and gives an end to those that have none yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orion.manager.controllers.loop import Loop
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.expiry import WallClock, count, expire
from orion.manager.store.port import DUE_AT_ONCE, StateStore

INTERVAL_S = 1.0
COUNT_EVERY = 60
"""Rounds between two searches for rentals without an end, as long as the clock is believed."""


@dataclass(kw_only=True, eq=False)
class ExpiryController:
    state_store: StateStore
    clock: TrustedClock
    wall: Callable[[], float]
    on_expiry: Callable[[], None]

    def __post_init__(self) -> None:
        self._rounds_since_search = 0
        self.loop = Loop("expiry", INTERVAL_S, self.round)

    async def round(self) -> None:
        clock, wall = await self.clock.look(), self.wall()
        await self._count(clock, wall)
        steps = expire(await self.state_store.due(wall), wall, clock)
        if steps:
            await self.state_store.apply(steps)
            self.on_expiry()
        if len(steps) == DUE_AT_ONCE:
            self.loop.hint()

    async def _count(self, clock: WallClock, wall: float) -> None:
        if not clock.believed:
            self._rounds_since_search = 0  # the search is repeated as soon as the clock is believed again
            return
        if self._rounds_since_search == 0:
            await self.state_store.apply_each(count(await self.state_store.without_expiry(), wall, clock))
        self._rounds_since_search = (self._rounds_since_search + 1) % COUNT_EVERY
