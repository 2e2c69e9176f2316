"""While it is being proved that a worker is dead, connections are opened to where its rentals would go.

The proof takes 1.5 s, and a new connection of ssh a quarter of a second of which nobody has to wait for afterwards.
Nothing is decided here: another place may be chosen then, or none, and a connection that cannot be opened is no matter.
"""

from __future__ import annotations

import asyncio

import structlog

from orion.manager.domain.pool_index import PoolIndex
from orion.manager.snapshots.port import SnapshotError, SnapshotService
from orion.manager.ssh.port import Host
from orion.manager.store.port import StateStore

log = structlog.get_logger()

MOST = 4
"""Connections that are opened at a time, whatever dies: others are opened when they are needed."""


class Preconnector:
    def __init__(self, state_store: StateStore, pool_index: PoolIndex, snapshot_service: SnapshotService) -> None:
        self._ledger = state_store
        self._roster = pool_index
        self._vault = snapshot_service
        self._opening: set[asyncio.Task[None]] = set()

    def prepare_for_loss_of(self, worker_id: str) -> None:
        """Its rentals would go to the workers that are first in the order (domain/scheduler.py)."""
        number = min(len(self._roster.placements_on(worker_id)), MOST - len(self._opening))
        for candidate in self._roster.room.best(max(0, number), without={worker_id}):
            task = asyncio.create_task(self._open(candidate))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def stop(self) -> None:
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    async def _open(self, worker_id: str) -> None:
        worker = (await self._ledger.workers([worker_id])).get(worker_id)
        if worker is None:
            return
        try:
            await self._vault.connect(Host(worker.id, worker.address, worker.host_keys))
        except SnapshotError as error:
            log.info("no connection in advance", worker_id=worker_id, code=error.code)
