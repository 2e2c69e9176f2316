"""The retention loop: removes idempotency keys that are over, and the oldest events a batch at a time."""

from __future__ import annotations

from collections.abc import Callable

from orion.manager.controllers.loop import Loop
from orion.manager.store import events, rentals
from orion.manager.store.database import Store

INTERVAL_S = 60.0
MOST_BATCHES = 100
"""Batches of one round: what a former version has left is removed in some rounds."""


class RetentionController:
    def __init__(self, store: Store, kept: int, wall: Callable[[], float]) -> None:
        """`kept`: how many events; `wall`: Unix seconds by which what was kept may be removed."""
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
