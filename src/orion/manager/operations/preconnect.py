"""Connections that are opened in advance to the workers where the rentals of a dying worker would go.

The proof of a death takes 1.5 s, and an ssh connection 0.25 s, for which a takeover then does not wait. The scheduler
may still choose other workers.
"""

from __future__ import annotations

import asyncio

import structlog

from orion.manager.domain.pool_index import PoolIndex
from orion.manager.snapshots.port import SnapshotError, SnapshotService
from orion.manager.ssh.port import Host
from orion.manager.store.port import StateStore

log = structlog.get_logger()

AT_ONCE = 4
"""Connections that are opened at a time. Others are opened when they are needed."""


class Preconnector:
    def __init__(self, state_store: StateStore, pool_index: PoolIndex, snapshot_service: SnapshotService) -> None:
        self._state_store = state_store
        self._pool_index = pool_index
        self._snapshot_service = snapshot_service
        self._opening: set[asyncio.Task[None]] = set()

    def prepare_for_loss_of(self, worker_id: str) -> None:
        """Connect to the workers that the scheduler would choose first for the rentals of this worker."""
        number = min(len(self._pool_index.placements_on(worker_id)), AT_ONCE - len(self._opening))
        for candidate in self._pool_index.room.best(max(0, number), without={worker_id}):
            task = asyncio.create_task(self._open(candidate))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def stop(self) -> None:
        for task in (opening := list(self._opening)):
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    async def _open(self, worker_id: str) -> None:
        for worker in (await self._state_store.workers([worker_id])).values():
            try:
                await self._snapshot_service.connect(Host.of(worker))
            except SnapshotError as error:
                log.info("connection not opened in advance", worker_id=worker_id, code=error.code)
