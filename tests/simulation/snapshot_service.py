"""The simulated snapshot service: its jobs end with the manager that asked, and fail when the network is bad."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, TypeVar

from orion_worker.records import RequestRefused

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot, SnapshotId, kept, next_number
from orion.manager.snapshots.port import (
    NO_SUCH_SNAPSHOT,
    RECOVER_DEADLINE_S,
    RESTORE_DEADLINE_S,
    SNAPSHOT_DEADLINE_S,
    Home,
    SnapshotError,
    Taken,
)

if TYPE_CHECKING:
    from simulation.agents import SimulatedContainer
    from simulation.manager import SimulatedManager
    from simulation.world import Simulation

T = TypeVar("T")


@dataclass
class SimulatedSnapshotService:
    """Implements `port.SnapshotService` for one life of the manager. Its snapshots outlive the manager."""

    sim: Simulation
    manager: SimulatedManager

    def __post_init__(self) -> None:
        # The word in the seed stays, so that known seeds replay the same histories.
        self._random = Random(f"vault {self.sim.loop.now} {self.sim.schedule.seed}")

    async def take(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SNAPSHOT_DEADLINE_S,
        protected: SnapshotId | None = None,
        for_migration: bool = False,
    ) -> Taken:
        began_at = self.sim.loop.now
        content = await self._on_worker(home, lambda container: container.read_home(home.rental_id, home.epoch))
        return await self._keep(home, min(content, began_at), protected)

    async def recover(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = RECOVER_DEADLINE_S,
        protected: SnapshotId | None = None,
    ) -> Taken:
        content = await self._on_worker(home, lambda container: container.recover_home(home.rental_id, home.epoch))
        return await self._keep(home, content, protected, recovered=True)

    async def _keep(self, home: Home, content: float, protected: SnapshotId | None, recovered: bool = False) -> Taken:
        there = self.sim.stored.setdefault(home.rental_id, {})
        snapshot_id = SnapshotId(home.epoch, next_number(list(there), home.epoch))
        copy = there[snapshot_id] = Snapshot(id=snapshot_id, at=content, bytes=1, files=1, recovered=recovered)
        for old in there.keys() - kept(there.values()) - {protected}:
            del there[old]
        await self.manager.point()
        return Taken(copy, tuple(there[each] for each in sorted(there)))

    async def restore(
        self,
        home: Home,
        snapshot_id: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        previous: SnapshotId | None = None,
        precopy: bool = False,
    ) -> Snapshot | None:
        there = self.sim.stored.get(home.rental_id, {})
        if not there or not (snapshot_id or any(not copy.recovered for copy in there.values())):
            await self.manager.point()
            return None
        wanted = snapshot_id or max(each for each in there if not there[each].recovered)
        if wanted not in there:
            raise SnapshotError(NO_SUCH_SNAPSHOT, f"there is no snapshot {wanted}")
        copy = there[wanted]
        self.sim.checker.filled(home.rental_id, copy)
        await self._on_worker(
            home, lambda container: container.fill_home(home.rental_id, home.epoch, copy.at, str(wanted))
        )
        self.sim.say("snapshots", f"restored {wanted} into {home.rental_id} at epoch {home.epoch}")
        await self.manager.point()
        return copy

    async def snapshots(self, rental_id: str, uid: int) -> list[Snapshot]:
        await self.manager.point()
        there = self.sim.stored.get(rental_id, {})
        return [there[each] for each in sorted(there)]

    async def remove(self, rental_id: str, uid: int) -> None:
        await self.manager.point()
        self.sim.stored.pop(rental_id, None)

    async def rentals(self) -> list[str]:
        await self.manager.point()
        return sorted(self.sim.stored)

    async def short_of_room(self) -> list[str]:
        await self.manager.point()
        return []

    async def _on_worker(self, home: Home, work: Callable[[SimulatedContainer], T]) -> T:
        await self.manager.point()
        chance = self._random.random() if self.sim.network.bad else 1.0
        await asyncio.sleep(0.1 + (20.0 if chance < 0.3 else 1.0) * self._random.random())
        container = self.sim.reachable(home.host)
        if container is None or chance < 0.2:
            raise SnapshotError("unreachable", "the worker cannot be asked")
        boots = container.boots
        await container.until_resumed()
        if container.boots != boots or self.sim.reachable(home.host) is not container or container.disk_fails:
            raise SnapshotError("failed", "the connection broke")
        try:
            return work(container)
        except RequestRefused as refusal:
            raise SnapshotError(refusal.code, str(refusal), refusal.details.get("restored", "")) from refusal
