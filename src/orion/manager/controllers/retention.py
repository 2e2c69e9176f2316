"""The retention controller: removes idempotency keys that have ended, and the oldest events in batches."""

from __future__ import annotations

from collections.abc import Callable

from orion.manager.controllers.loop import Loop
from orion.manager.store import events, rentals
from orion.manager.store.database import Store

INTERVAL_S = 60.0
MOST_BATCHES = 100
"""Batches of one round. The events that an earlier version has left may take several rounds."""


class RetentionController:
    def __init__(self, store: Store, kept: int, wall: Callable[[], float]) -> None:
        """`kept`: the number of events that stay; `wall` returns the Unix seconds by which keys have ended."""
        self._store = store
        self._kept = kept
        self._wall = wall
        self.loop = Loop("retention", INTERVAL_S, self.round)

    async def round(self) -> None:
        await self._store.write(rentals.forget_keys, self._wall())
        up_to = await self._store.read(events.too_old, self._kept)
        for _ in range(MOST_BATCHES):
            if not up_to or not await self._store.write(events.remove_batch, up_to, self._kept):
                return
