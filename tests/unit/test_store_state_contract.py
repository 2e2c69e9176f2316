"""The contract of the state stores in the database and in memory: so what the simulation shows holds for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytest
from sqlalchemy.exc import IntegrityError
from support.builders import active_rental, host_key, new_placement, new_rental, new_worker, new_world
from support.pools import differences
from support.rows import event_kinds, insert_world

from orion.manager.domain.expiry import WallClock, count, expire, release, renew
from orion.manager.domain.model import Item, Worker
from orion.manager.domain.outcomes import follow
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import Health, Intent, PlacementState, RentalState
from orion.manager.domain.steps import (
    WRITTEN,
    Kind,
    Step,
    UnknownField,
    Write,
    move_placement,
    move_rental,
    move_worker,
)
from orion.manager.domain.tasks import Task, TaskEnded, TaskKind
from orion.manager.store.database import Store
from orion.manager.store.memory import InvariantBroken, MemoryStateStore
from orion.manager.store.port import Registration, Registry, StateStore
from orion.manager.store.sql import SqlStateStore


class Both(StateStore, Registry, Protocol):
    """The ports that both state stores implement."""


@dataclass
class StateStoreBench:
    """A state store that holds a world, and its events."""

    state_store: Both
    store: Store | None = None

    async def kinds(self) -> list[str]:
        if self.store is None:
            assert isinstance(self.state_store, MemoryStateStore)
            return [event.kind for event in self.state_store.events]
        return await event_kinds(self.store)

    async def become(self, worker: Worker, *healths: Health) -> None:
        for health in healths:
            assert await self.state_store.apply([move_worker(worker, health, "a test")])
            worker = replace(worker, health=health)


WORKER, OTHER = new_worker(1, slots=2), new_worker(2)
RENTAL, QUEUED = active_rental(1, epoch=3), new_rental(2)
RUNNING = new_placement(RENTAL, WORKER, PlacementState.RUNNING)
PURGED = new_placement(replace(RENTAL, epoch=1), OTHER, PlacementState.PURGED)
ENDED = active_rental(4, state=RentalState.RELEASED)
LEFT_OF_ENDED = new_placement(ENDED, OTHER, PlacementState.LOST)
LONG_GONE = active_rental(5, state=RentalState.EXPIRED)
TASK = Task(
    kind=TaskKind.DELETE,
    worker_id=WORKER.id,
    session_id=WORKER.session_id,
    item=Item(rental_id=RENTAL.id, username=RENTAL.username, uid=RENTAL.uid, epoch=3),
    placement_id=RUNNING.id,
)
PATH_TO: dict[Health, tuple[Health, ...]] = {
    Health.JOINING: (),
    Health.READY: (Health.READY,),
    Health.SUSPECT: (Health.SUSPECT,),
    Health.UNKNOWN: (Health.READY, Health.UNKNOWN),
    Health.DOWN: (Health.DOWN,),
    Health.QUARANTINED: (Health.QUARANTINED,),
}
CLAIM = Registration(
    address="172.20.128.9",
    hostname="node-9",
    host_keys=(host_key(9),),
    slots=3,
    labels={},
    boot_id="boot-0009",
    agent_version="0.1",
)


@pytest.fixture(params=["memory", "sql"])
async def bench(request: pytest.FixtureRequest) -> StateStoreBench:
    world = new_world(WORKER, OTHER, RENTAL, QUEUED, ENDED, LONG_GONE, RUNNING, LEFT_OF_ENDED, PURGED)
    if request.param == "memory":
        return StateStoreBench(MemoryStateStore(world))
    store: Store = request.getfixturevalue("store")
    await insert_world(store, world)
    return StateStoreBench(SqlStateStore(store), store)


def reserved(number: int, rental: Any, worker: Any, **change: Any) -> Step:
    row = new_placement(replace(rental, epoch=rental.epoch + 1), worker, PlacementState.RESERVED, id=f"new-{number}")
    return Step((), (), replace(row, **change))


async def test_a_loaded_world_has_living_rentals_and_unpurged_placements_of_ended_ones(bench: StateStoreBench) -> None:
    assert await bench.state_store.load() == new_world(WORKER, OTHER, RENTAL, QUEUED, ENDED, RUNNING, LEFT_OF_ENDED)
    assert await bench.state_store.workers([WORKER.id, "w-unknown"]) == {WORKER.id: WORKER}


async def test_a_loaded_world_does_not_change_afterwards(bench: StateStoreBench) -> None:
    seen = await bench.state_store.load()
    assert await bench.state_store.apply([release(RENTAL, "released", "alice", "asked for")])
    assert seen.rentals[RENTAL.id] == RENTAL


async def test_living_rentals_are_due_when_their_time_is_over(bench: StateStoreBench) -> None:
    assert await bench.state_store.due(5599.0) == []
    assert await bench.state_store.due(5600.0) == [RENTAL]


async def test_a_rental_without_expiry_gets_one_once_the_clock_is_trusted(bench: StateStoreBench) -> None:
    doubted = WallClock(offset_s=0.0).observe(86_400.0, 0.0)
    assert await bench.state_store.without_expiry() == []
    assert await bench.state_store.apply([renew(RENTAL, 60, "alice", None)])
    assert await bench.state_store.due(1e12) == []
    (without_expiry,) = await bench.state_store.without_expiry()
    assert (without_expiry.id, without_expiry.ttl_s, without_expiry.expires_at) == (RENTAL.id, 60, None)
    assert count([without_expiry], 7000.0, doubted) == []
    counted = count([without_expiry], 7000.0, WallClock(offset_s=0.0))
    assert await bench.state_store.apply(counted)
    assert not await bench.state_store.apply(counted), "the expiry is already set"
    assert await bench.state_store.without_expiry() == []
    assert [rental.expires_at for rental in await bench.state_store.due(7060.0)] == [7060.0]


async def test_a_rental_that_was_renewed_since_it_was_due_does_not_expire(bench: StateStoreBench) -> None:
    wall = 5600.0
    decided = expire(await bench.state_store.due(wall), wall, WallClock(offset_s=0.0))
    assert len(decided) == 1
    assert await bench.state_store.apply([renew(RENTAL, 60, "alice", wall)])
    assert not await bench.state_store.apply(decided)
    assert (await bench.state_store.load()).rentals[RENTAL.id].state is RentalState.ACTIVE
    assert await bench.state_store.apply(
        expire(await bench.state_store.due(wall + 60), wall + 60, WallClock(offset_s=0.0))
    )


async def test_a_step_is_applied_with_its_events(bench: StateStoreBench) -> None:
    assert await bench.state_store.apply([release(RENTAL, "released", "alice", "asked for")])
    assert (await bench.state_store.load()).rentals[RENTAL.id].state is RentalState.RELEASING
    assert await bench.kinds() == ["rental.release_started"]


async def test_steps_are_applied_up_to_the_first_stale_one(bench: StateStoreBench) -> None:
    first = release(RENTAL, "released", "alice", "asked for")
    stale = move_worker(replace(WORKER, session_id="another"), Health.SUSPECT, "silence")
    after = move_worker(OTHER, Health.SUSPECT, "silence")
    assert not await bench.state_store.apply([first, stale, after])
    assert await bench.kinds() == ["rental.release_started"]
    assert (await bench.state_store.workers([OTHER.id]))[OTHER.id] == OTHER


BROKEN = {
    "a second live placement": reserved(1, RENTAL, OTHER),
    "a second placement in a slot": reserved(1, QUEUED, WORKER),
    "an epoch that was used and purged": reserved(1, replace(RENTAL, epoch=0), OTHER, state=PlacementState.STOPPED),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_a_broken_invariant_is_refused_and_rolls_the_transaction_back(bench: StateStoreBench, what: str) -> None:
    before = await bench.state_store.load()
    harmless = move_worker(OTHER, Health.SUSPECT, "silence")
    with pytest.raises((InvariantBroken, IntegrityError)):
        await bench.state_store.apply([harmless, BROKEN[what]])
    assert await bench.state_store.load() == before
    assert await bench.kinds() == []


@pytest.mark.parametrize(
    ("kind", "identity"), [("worker", WORKER.id), ("rental", RENTAL.id), ("placement", RUNNING.id)]
)
@pytest.mark.parametrize(
    ("expect", "change"), [({}, {"explanatoin": "x"}), ({"epcoh": 3}, {}), ({}, {"id": "x"}), ({}, {"labels": {}})]
)
async def test_a_write_of_a_field_that_no_step_may_write_raises_at_once(
    bench: StateStoreBench, kind: Kind, identity: str, expect: dict[str, Any], change: dict[str, Any]
) -> None:
    before = await bench.state_store.load()
    with pytest.raises(UnknownField, match=f"{kind} {identity}"):
        await bench.state_store.apply([Step((Write(kind=kind, id=identity, expect=expect, change=change),))])
    assert await bench.state_store.load() == before


def test_a_misspelt_change_of_a_state_raises_at_once() -> None:
    with pytest.raises(UnknownField, match="activated"):
        move_rental(QUEUED, RentalState.PROVISIONING, "a test", "a test", activated=1.0)
    with pytest.raises(UnknownField, match="filed"):
        move_placement(RUNNING, "alice", PlacementState.STOPPING, "a test", "a test", filed="1-1")


@pytest.mark.parametrize(("kind", "row"), [("worker", WORKER), ("rental", RENTAL), ("placement", RUNNING)])
async def test_each_field_that_a_step_may_write_can_be_written(bench: StateStoreBench, kind: Kind, row: Any) -> None:
    for name in sorted(WRITTEN[kind]):
        change = {name: getattr(row, name, 7)}
        assert await bench.state_store.apply([Step((Write(kind=kind, id=row.id, expect={}, change=change),))]), name


async def test_a_free_slot_may_be_taken(bench: StateStoreBench) -> None:
    assert await bench.state_store.apply([reserved(1, QUEUED, WORKER, slot=1)])
    assert "new-1" in (await bench.state_store.load()).placements


async def test_a_slot_is_free_when_its_placement_is_purged(bench: StateStoreBench) -> None:
    stopping = move_placement(RUNNING, "alice", PlacementState.STOPPING, "a", "why")
    await bench.state_store.apply([stopping])
    await bench.state_store.finish(
        [TaskEnded(task=TASK, ok=True, wall=9000.0, counts_from=9000.0, report={"left": []})], follow
    )
    assert RUNNING.id not in (await bench.state_store.load()).placements
    assert (await bench.kinds())[-2:] == ["placement.stopped", "placement.purged"]
    assert await bench.state_store.apply([reserved(1, QUEUED, WORKER)])


async def test_the_success_of_an_obsolete_task_changes_nothing(bench: StateStoreBench) -> None:
    before = await bench.state_store.load()
    await bench.state_store.finish(
        [TaskEnded(task=TASK, ok=True, wall=9000.0, counts_from=9000.0, report={"left": []})], follow
    )
    assert await bench.state_store.load() == before


async def test_a_failure_is_explained_in_its_rental(bench: StateStoreBench) -> None:
    await bench.state_store.apply([release(RENTAL, "released", "alice", "asked for")])
    await bench.state_store.finish(
        [TaskEnded(task=TASK, ok=False, wall=9000.0, counts_from=9000.0, message="no space left", attempts=1)], follow
    )
    assert (await bench.state_store.load()).rentals[RENTAL.id].explanation == "trying again: no space left"


async def test_recorded_heartbeats_change_nothing_that_decisions_read(bench: StateStoreBench) -> None:
    before = await bench.state_store.load()
    await bench.state_store.record_heartbeats([(WORKER.id, 9000.0, {"cpu": 1.0})])
    assert await bench.state_store.load() == before


async def test_a_new_worker_is_joining_and_known_at_its_address(bench: StateStoreBench) -> None:
    registered = await bench.state_store.register(CLAIM, None, True)
    (known,) = await bench.state_store.known_at(CLAIM.address)
    assert registered.token
    assert (known.id, known.session_id) == (registered.worker_id, registered.session_id)
    assert (known.health, known.slots, known.host_keys) == (Health.JOINING, 3, CLAIM.host_keys)
    assert await bench.state_store.worker(known.id) == known


async def test_a_worker_that_calls_home_again_has_a_new_session_and_the_same_health(bench: StateStoreBench) -> None:
    registered = await bench.state_store.register(CLAIM, WORKER.id, False)
    again = await bench.state_store.worker(WORKER.id)
    assert registered.worker_id == WORKER.id
    assert registered.token is None
    assert again is not None
    assert (again.health, again.address, again.verified_session) == (WORKER.health, CLAIM.address, None)
    assert again.session_id == registered.session_id != WORKER.session_id
    assert await bench.kinds() == ["worker.registered"]


@pytest.mark.parametrize("health", Health)
async def test_a_worker_without_placements_is_removed_when_a_new_one_has_its_address(
    bench: StateStoreBench, health: Health
) -> None:
    before = await bench.state_store.register(CLAIM, None, True)
    (known,) = await bench.state_store.known_at(CLAIM.address)
    await bench.become(known, *PATH_TO[health])
    after = await bench.state_store.register(replace(CLAIM, host_keys=(host_key(10),)), None, True)
    gone = health in {Health.JOINING, Health.DOWN}
    assert after.replaced == ((before.worker_id,) if gone else ())
    assert ("worker.removed" in await bench.kinds()) == gone
    assert (await bench.state_store.worker(before.worker_id) is None) == gone
    assert await bench.state_store.worker(after.worker_id)


@pytest.mark.parametrize("health", Health)
async def test_a_worker_that_never_got_the_answer_to_its_registration_is_stored_once(
    bench: StateStoreBench, health: Health
) -> None:
    """The worker has another address since its network was cut: its host keys identify it."""
    before = await bench.state_store.register(CLAIM, None, True)
    (known,) = await bench.state_store.known_at(CLAIM.address)
    await bench.become(known, *PATH_TO[health])
    others = replace(CLAIM, host_keys=("no", "other")), replace(CLAIM, boot_id="of another start")
    for each in others:
        registered = await bench.state_store.register(replace(each, address="172.20.128.98"), None, True)
        assert before.worker_id not in registered.replaced
    after = await bench.state_store.register(replace(CLAIM, address="172.20.128.99"), None, True)
    gone = health in {Health.JOINING, Health.SUSPECT, Health.DOWN}
    assert (before.worker_id in after.replaced) == gone
    assert (await bench.state_store.worker(before.worker_id) is None) == gone


@pytest.mark.parametrize("keeps", ["a placement", "an intent"])
async def test_a_worker_with_a_placement_or_an_intent_is_kept_when_a_new_one_has_its_address(
    bench: StateStoreBench, keeps: str
) -> None:
    await bench.become(OTHER, Health.SUSPECT, Health.DOWN)
    if keeps == "an intent":
        purged = move_placement(LEFT_OF_ENDED, "reconciler", PlacementState.PURGED, "a", "why")
        await bench.state_store.apply(
            [purged, Step((Write(kind="worker", id=OTHER.id, expect={}, change={"intent": Intent.DRAINING}),), ())]
        )
    newcomer = await bench.state_store.register(replace(CLAIM, address=OTHER.address), None, True)
    assert newcomer.replaced == ()
    assert await bench.state_store.worker(OTHER.id)


async def test_a_part_has_the_whole_workers_and_every_rental_in_transition(bench: StateStoreBench) -> None:
    releasing = release(RENTAL, "released", "alice", "asked for")
    assert await bench.state_store.apply([releasing])
    everything = await bench.state_store.load()
    seen = await bench.state_store.load_part({OTHER.id, "w-gone"}, {WORKER.id})
    assert seen == replace(everything, whole=frozenset({OTHER.id, "w-gone"}), taken={WORKER.id: frozenset({0})})


async def test_a_part_leaves_out_active_rentals_of_other_workers(bench: StateStoreBench) -> None:
    seen = await bench.state_store.load_part((), ())
    assert (seen.workers, seen.rentals, seen.placements) == ({}, {QUEUED.id: QUEUED}, {})
    with_candidate = await bench.state_store.load_part((), {WORKER.id})
    assert (with_candidate.workers, with_candidate.taken) == ({WORKER.id: WORKER}, {WORKER.id: {0}})
    assert with_candidate.placements == {}, "only its slots are changed"


async def test_independent_steps_are_applied_one_by_one(bench: StateStoreBench) -> None:
    stale = move_worker(replace(WORKER, session_id="another"), Health.SUSPECT, "silence")
    good = move_worker(OTHER, Health.SUSPECT, "silence")
    assert await bench.state_store.apply_each([stale, good]) == [False, True]
    assert (await bench.state_store.workers([OTHER.id]))[OTHER.id].health is Health.SUSPECT
    assert await bench.kinds() == ["worker.became_suspect"]


async def test_tasks_that_end_together_are_all_applied_and_each_sees_the_ones_before_it(bench: StateStoreBench) -> None:
    await bench.state_store.apply([move_placement(RUNNING, "alice", PlacementState.STOPPING, "a", "why")])
    reached = Task(kind=TaskKind.REACH, worker_id=OTHER.id, session_id=OTHER.session_id)
    await bench.state_store.finish(
        [
            TaskEnded(task=one, ok=True, wall=9000.0, counts_from=9000.0, report={"left": []})
            for one in (TASK, TASK, reached)
        ],
        follow,
    )
    assert await bench.kinds() == [
        "placement.stopping",
        "placement.stopped",
        "placement.purged",
        "worker.cleaned",
        "worker.verified",
    ]


async def test_a_follower_gets_the_whole_pool_and_then_the_changes_of_each_commit(bench: StateStoreBench) -> None:
    followed, anew = PoolIndex(), PoolIndex()
    await bench.state_store.follow(lambda changes: followed.apply(changes, 0.0))
    assert [placement.id for placement in followed.placements_on(WORKER.id)] == [RUNNING.id]
    registered = await bench.state_store.register(CLAIM, None, True)
    known = followed.worker(registered.worker_id)
    assert known is not None
    assert (known.health, known.session_id, known.verified) == (Health.JOINING, registered.session_id, False)
    await bench.state_store.apply([move_placement(RUNNING, "alice", PlacementState.STOPPING, "a", "why")])
    assert [placement.state for placement in followed.placements_on(WORKER.id)] == [PlacementState.STOPPING]
    await bench.state_store.finish(
        [TaskEnded(task=TASK, ok=True, wall=9000.0, counts_from=9000.0, report={"left": []})], follow
    )
    assert followed.placements_on(WORKER.id) == ()
    await bench.state_store.apply([reserved(1, QUEUED, WORKER)])
    await bench.state_store.apply([release(QUEUED, "released", "alice", "asked for")])
    await bench.state_store.follow(lambda changes: anew.apply(changes, 0.0))
    assert not differences(anew, followed)


async def test_workers_that_are_down_are_removed_if_they_hold_no_files_that_are_needed(bench: StateStoreBench) -> None:
    """A worker that may hold the newest files of a living rental is kept; files of an ended rental are not needed."""
    await bench.become(WORKER, Health.SUSPECT, Health.DOWN)
    assert await bench.state_store.forget([WORKER.id, OTHER.id]) == ()
    await bench.become(OTHER, Health.SUSPECT, Health.DOWN)
    assert await bench.state_store.forget([WORKER.id, OTHER.id, "w-never"]) == (OTHER.id,)
    assert (await bench.state_store.workers([WORKER.id, OTHER.id])).keys() == {WORKER.id}
