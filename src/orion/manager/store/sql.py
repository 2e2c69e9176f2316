"""The state store and the registry in the database."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from orion.manager.domain.model import Item, Rental, Worker
from orion.manager.domain.pool_index import Changes
from orion.manager.domain.steps import Step
from orion.manager.domain.tasks import Follow, TaskEnded
from orion.manager.domain.world import World
from orion.manager.store import state, workers
from orion.manager.store.database import Store
from orion.manager.store.port import Notes, Registered, Registration


class SqlStateStore:
    """Implements `port.StateStore` and `port.Registry`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def follow(self, follower: Callable[[Changes], None]) -> None:
        await self._store.follow(follower)

    async def load(self) -> World:
        return await self._store.read(state.load)

    async def load_part(self, whole: Collection[str], candidates: Collection[str]) -> World:
        return await self._store.read(state.load_part, whole, candidates)

    async def never_placed(self, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
        return await self._store.read(state.never_placed, list(items))

    async def workers(self, ids: Iterable[str]) -> dict[str, Worker]:
        return await self._store.read(state.load_workers, ids)

    async def due(self, wall: float) -> list[Rental]:
        return await self._store.read(state.load_due, wall)

    async def without_expiry(self) -> list[Rental]:
        return await self._store.read(state.load_without_expiry)

    async def apply(self, steps: Iterable[Step]) -> bool:
        return await self._store.write(state.apply, steps)

    async def apply_each(self, steps: Iterable[Step]) -> list[bool]:
        return await self._store.write(state.apply_each, steps)

    async def finish(self, ended: Sequence[TaskEnded], follow: Follow) -> None:
        await self._store.write(state.finish, ended, follow)

    async def forget(self, worker_ids: Collection[str]) -> tuple[str, ...]:
        return (await self._store.write(workers.prune, "health", worker_ids)).forgotten

    async def record_heartbeats(self, notes: Notes) -> None:
        await self._store.write(workers.record_heartbeats, notes)

    async def known_at(self, address: str) -> list[Worker]:
        return await self._store.read(state.load_known_at, address)

    async def worker(self, worker_id: str) -> Worker | None:
        return (await self.workers([worker_id])).get(worker_id)

    async def register(self, claim: Registration, worker_id: str | None, new_token: bool) -> Registered:
        return await self._store.write(workers.register, claim, worker_id, new_token)
