"""The ledger and the registry in the database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orion.manager.domain.model import Item, Placement, Rental, Step, Worker, World
from orion.manager.domain.reconcile import Task
from orion.manager.store import ledger, workers
from orion.manager.store.database import Store
from orion.manager.store.port import Notes, Registered, Registration


class SqlLedger:
    """Implements `port.Ledger` and `port.Registry`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def load(self) -> World:
        return await self._store.read(ledger.load)

    async def never_placed(self, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
        return await self._store.read(ledger.never_placed, list(items))

    async def load_workers(self) -> dict[str, Worker]:
        return await self._store.read(ledger.load_workers)

    async def due(self, wall: float) -> list[Rental]:
        return await self._store.read(ledger.load_due, wall)

    async def apply(self, steps: Iterable[Step]) -> bool:
        return await self._store.write(ledger.apply, steps)

    async def succeed(self, task: Task, report: Mapping[str, Any], wall: float) -> None:
        await self._store.write(ledger.record_success, task, report, wall)

    async def fail(self, task: Task, message: str, attempts: int) -> None:
        await self._store.write(ledger.record_failure, task, message, attempts)

    async def heard(self, notes: Notes) -> None:
        await self._store.write(workers.heard, notes)

    async def known_at(self, address: str) -> list[Worker]:
        return await self._store.read(ledger.load_known_at, address)

    async def worker(self, worker_id: str) -> Worker | None:
        return (await self.load_workers()).get(worker_id)

    async def register(self, claim: Registration, worker_id: str | None, new_token: bool) -> Registered:
        return await self._store.write(workers.register, claim, worker_id, new_token)

    async def placements_of(self, worker_id: str) -> tuple[list[Placement], bool]:
        return await self._store.read(workers.placements_of, worker_id)
