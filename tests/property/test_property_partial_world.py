"""The decision from a part of the world is that from the whole world, in any history."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

import pytest
from support.pools import differences
from test_property_reconciliation import INVARIANTS, RATES, PoolHistory, _play

from orion.manager.controllers.reconciler import Reconciler
from orion.manager.domain.leases import Heartbeat, Leases
from orion.manager.domain.observations import Observations
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.reconcile import Decision, decide
from orion.manager.domain.world import World
from orion.manager.operations.task_runner import TaskRunner
from orion.manager.store.memory import MemoryStateStore

SEEDS, STEPS = 12, 300
T = TypeVar("T")


class Partly(PoolHistory):
    """Compare each decision from the whole world with the one from the part that the reconciler would load."""

    parts: int = 0

    def _decide(self, world: World) -> Decision:
        decision = super()._decide(world)
        ages = {identity: self.now - since for (identity, _), since in self.since.items()}
        exiting = frozenset(self.exiting & self.inventories.keys())
        start = next(self.numbers)

        def observations(**different: Any) -> Observations:
            ids = (f"p-{start:06d}-{number}" for number in range(1000))
            return replace(
                Observations(inventories=dict(self.inventories), exiting=exiting, ages=ages, new_ids=ids), **different
            )

        part, shown = self._part(world, exiting)
        whole = decide(_now(MemoryStateStore(world).load()), observations())  # purged placements are not in it
        assert _told(decide(part, observations(inventories=shown))) == _told(whole)
        self.parts += len(part.placements) < len(world.placements)
        return decision

    def _part(self, world: World, exiting: frozenset[str]) -> tuple[World, Any]:
        state_store, pool_index, leases = MemoryStateStore(world), PoolIndex(), Leases(75.0)
        nobody: Any = None  # no task is run here
        clock = lambda: self.now  # noqa: E731
        task_runner = TaskRunner(
            state_store=state_store,
            pool_index=pool_index,
            leases=leases,
            engine=nobody,
            reach=nobody,
            restorer=nobody,
            migrator=nobody,
            monotonic=clock,
            wall=clock,
            counts_from=clock,
            wake_reconciler=lambda: None,
        )
        reconciler = Reconciler(
            state_store=state_store,
            pool_index=pool_index,
            leases=leases,
            task_runner=task_runner,
            monotonic=clock,
            wall=clock,
        )
        reconciler.swept_at_once = 0
        _now(state_store.follow(lambda changes: pool_index.apply(changes, self.now)))
        for worker_id, inventory in self.inventories.items():
            leases.open(worker_id, "session", self.now, inventory)
            leases.renew(
                worker_id,
                Heartbeat(session_id="session", seq=1, inventory=inventory, exiting=worker_id in exiting),
                self.now,
            )
            reconciler.compare(worker_id, inventory)
        looked_at = reconciler._workers_of_round()
        return _now(reconciler._load(looked_at)), leases.inventories(looked_at)


def _told(decision: Decision) -> tuple[list[str], list[str]]:
    return sorted(map(repr, decision.steps)), sorted(map(repr, decision.tasks))


def _now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine of the state store in memory, which never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_part_of_the_world_leads_to_the_same_decision_as_the_whole(seed: int) -> None:
    random = Random(f"partly {seed}")  # noqa: S311  a history to play again, no secret
    platform = Partly()
    platform.a_pool([1, 2, 1])
    luck = random.choice([0.3, 0.6, 0.9])
    for _ in range(STEPS):
        _play(platform, random, luck, random.choices(list(RATES), list(RATES.values()))[0])
        for name in INVARIANTS:
            getattr(platform, name)()
    platform.teardown()
    assert platform.parts, "the part was the whole world every time"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_pool_index_that_followed_each_step_equals_a_new_one(seed: int) -> None:
    """Check the pool index of the state store in memory; Harness compares that of the database when it is at rest."""
    random = Random(f"followed {seed}")  # noqa: S311
    platform = PoolHistory()
    platform.a_pool([1, 2])
    state_store, followed = MemoryStateStore(platform.world), PoolIndex()
    _now(state_store.follow(lambda changes: followed.apply(changes, 0.0)))
    for _ in range(STEPS):
        _play(platform, random, 0.6, random.choices(list(RATES), list(RATES.values()))[0])
        before, state_store.world = state_store.world, MemoryStateStore(platform.world).world
        placed = {p.worker_id for world in (before, state_store.world) for p in world.placements.values()}
        workers = {*before.workers, *state_store.world.workers, *placed}
        rentals = {*before.rentals, *state_store.world.rentals}
        state_store.publish(random.sample(sorted(workers), len(workers)), random.sample(sorted(rentals), len(rentals)))
        anew = PoolIndex()
        _now(MemoryStateStore(platform.world).follow(lambda changes, anew=anew: anew.apply(changes, 0.0)))
        assert not differences(anew, followed)
