"""The reconciler: loads a part of the world, decides, applies the steps, and gives the tasks to the task runner.

A round loads dirty workers, workers whose inventory disagrees with the database, queued rentals, and the workers that
could take them. It also loads some more workers in turn: this sweep finds a worker that was missed by mistake. After a
restart the manager finds everything again, except how often tasks have failed and for how long states have lasted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat

from orion.manager.controllers.loop import Loop
from orion.manager.domain.assignment import MAX_PLACED, request_migration
from orion.manager.domain.leases import Leases
from orion.manager.domain.migration import NotMigrated
from orion.manager.domain.model import Item
from orion.manager.domain.observations import Observations
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.reconcile import decide
from orion.manager.domain.states import Health, PlacementState
from orion.manager.domain.world import World
from orion.manager.operations.task_runner import TaskRunner
from orion.manager.store.names import new_id
from orion.manager.store.port import StateStore

INTERVAL_S = 2.0
LOOKED_AT_ONCE = 400
"""Most workers that one round loads for a reason: a longer decision would block the event loop."""
SWEPT_AT_ONCE = 50
"""Workers that one round loads without a reason."""
MOST_TRIES = 5
"""Attempts to begin a migration while other transactions change the same rows."""
SPARE_CANDIDATES = 16
"""Candidate workers beyond one for each queued rental, because some of them may have failed to make that rental."""
EVACUATION_SETTLES_S = 1.0
"""Seconds between a worker's message that it is evacuating and the first migration from it. If all workers stop at
once, all have said so by then, and no rental is migrated from one of them to another."""

Inventories = Mapping[str, tuple[Item, ...]]


@dataclass(kw_only=True, eq=False)
class Reconciler:
    state_store: StateStore
    pool_index: PoolIndex
    leases: Leases
    task_runner: TaskRunner
    monotonic: Callable[[], float]
    wall: Callable[[], float]
    placement_ids: Iterator[str] = field(default_factory=lambda: (f"p-{new_id(12)}" for _ in repeat(None)))
    awaits_files_s: float = 0.0
    """See domain/observations.py."""

    def __post_init__(self) -> None:
        self._placing = asyncio.Lock()
        """The lock from load to commit, without which two decisions could reserve the same slot."""
        self._disagreeing: dict[str, None] = {}
        """Workers whose inventory disagrees with the database, in the order of their turns."""
        self._sweep: Iterator[str] = iter(())
        self.swept_at_once = SWEPT_AT_ONCE
        self.loop = Loop("reconciler", INTERVAL_S, self.round)

    def compare(self, worker_id: str, inventory: Sequence[Item]) -> None:
        """Note whether the inventory that a worker has sent disagrees with what is placed there."""
        has_new_ends = self.pool_index.has_new_ends(worker_id, self.leases.start_ends(worker_id))
        if has_new_ends or self.pool_index.disagrees(worker_id, inventory):
            self._disagreeing[worker_id] = None
        else:
            self._disagreeing.pop(worker_id, None)

    async def round(self) -> None:
        """Load, decide and apply once, and start the tasks that follow."""
        looked_at = self._workers_of_round()
        # Both are read before the rows: see domain/reconcile.py; a task that ends after the load still counts as busy.
        inventories = self.leases.inventories(looked_at)
        busy = self.task_runner.keys()
        async with self._placing:
            world = await self._load(looked_at)
            unknown_rentals = await self._unknown_rentals(world, inventories)
            decision = decide(world, self._observations(world, inventories, unknown_rentals))
            if decision.steps and not await self.state_store.apply(decision.steps):
                self.loop.hint()  # another transaction changed the rows: decide again from the new ones
                return
        self.task_runner.forget_failures(looked_at, decision.tasks)
        self.task_runner.cancel_overtaken(busy, decision.tasks)
        for task in decision.tasks:
            if task.key not in busy:
                self.task_runner.start(task)
        self._compare_again(looked_at)
        if decision.steps and self._is_more_than_one_round():
            self.loop.hint()

    async def overdue_world(self, worker_ids: Collection[str]) -> tuple[World, dict[str, float]]:
        """Return these workers with the dirty ones, and the age in seconds of each rental's and placement's state."""
        world = await self.state_store.load_part({*worker_ids, *self.pool_index.dirty_workers(LOOKED_AT_ONCE)}, ())
        return world, self._ages(world)

    async def begin_migration(self, rental_id: str, worker_id: str, actor: str) -> None:
        """Begin a planned migration from that worker, unless one is under way, or raise migration.NotMigrated."""
        for _ in range(MOST_TRIES):
            async with self._placing:
                exiting = self.leases.exiting()
                candidates = self.pool_index.room.best(SPARE_CANDIDATES, without={*exiting, worker_id})
                world = await self.state_store.load_part({worker_id}, candidates)
                self._add_refusals_elsewhere(world, exiting)
                observations = Observations(inventories={}, exiting=exiting, ages={}, new_ids=self.placement_ids)
                step = request_migration(world, rental_id, actor, observations)
                if step is None or await self.state_store.apply([step]):
                    self.loop.hint()
                    return
        raise NotMigrated("busy", "it is changing just now: try again")

    def _workers_of_round(self) -> frozenset[str]:
        dirty_workers = self.pool_index.dirty_workers(LOOKED_AT_ONCE)
        disagreeing = list(islice(self._disagreeing, LOOKED_AT_ONCE))
        for worker_id in disagreeing:
            self._disagreeing[worker_id] = self._disagreeing.pop(worker_id)  # last, so that others have their turn
        swept = list(islice(self._sweep, self.swept_at_once))
        if len(swept) < self.swept_at_once:
            self._sweep = iter(list(self.pool_index.ids()))
        evacuating = (w for w in self._evacuating() if self.pool_index.placements_on(w))
        return frozenset((*dirty_workers, *disagreeing, *evacuating, *swept))

    def _evacuating(self) -> frozenset[str]:
        return self.leases.evacuating(self.monotonic() - EVACUATION_SETTLES_S)

    async def _load(self, looked_at: frozenset[str]) -> World:
        exiting = self.leases.exiting()
        wanted = min(self.pool_index.wanted_places(looked_at, exiting), MAX_PLACED)
        candidates = self.pool_index.room.best(wanted + SPARE_CANDIDATES, without=exiting) if wanted else []
        world = await self.state_store.load_part(looked_at, candidates)
        if wanted:
            self._add_refusals_elsewhere(world, exiting)
        return world

    def _add_refusals_elsewhere(self, world: World, exiting: frozenset[str]) -> None:
        """Let explanations count the workers that were not loaded."""
        here = [w for w in world.workers if world.is_whole(w) or w in world.taken]
        world.elsewhere = self.pool_index.refusals(here, exiting)

    async def _unknown_rentals(self, world: World, inventories: Inventories) -> frozenset[tuple[str, int]]:
        placed = {(p.rental_id, p.epoch) for p in world.placements.values()}
        not_loaded = [i for items in inventories.values() for i in items if (i.rental_id, i.epoch) not in placed]
        return await self.state_store.never_placed(not_loaded) if not_loaded else frozenset()

    def _observations(
        self, world: World, inventories: Inventories, unknown_rentals: frozenset[tuple[str, int]]
    ) -> Observations:
        return Observations(
            inventories=inventories,
            exiting=self.leases.exiting(),
            ages=self._ages(world),
            new_ids=self.placement_ids,
            unknown_rentals=unknown_rentals,
            wall=self.wall(),
            evacuating=self._evacuating(),
            migration_backoff=self.task_runner.resting(),
            migration_failed=self.task_runner.unmigrated(),
            awaits_files_s=self.awaits_files_s,
            start_ends={worker_id: self.leases.start_ends(worker_id) for worker_id in inventories},
        )

    def _ages(self, world: World) -> dict[str, float]:
        now = self.monotonic()
        changing = [p.id for p in world.placements.values() if p.state is not PlacementState.RUNNING or p.quiesced_for]
        ages = {identity: self.pool_index.age_of(identity, now) for identity in (*changing, *world.rentals)}
        joining = (w.id for w in world.workers.values() if w.health is Health.JOINING)
        return ages | {w: now - since for w in joining if (since := self.pool_index.since(w)) is not None}

    def _compare_again(self, looked_at: frozenset[str]) -> None:
        """Compare the newest inventories, which may have come after those that this round decided from."""
        newest = self.leases.inventories(looked_at)
        for worker_id in looked_at:
            if worker_id in newest:
                self.compare(worker_id, newest[worker_id])
            else:
                self._disagreeing.pop(worker_id, None)

    def _is_more_than_one_round(self) -> bool:
        workers = max(self.pool_index.number_of_dirty_workers, len(self._disagreeing))
        return workers > LOOKED_AT_ONCE or self.pool_index.waiting() > MAX_PLACED
