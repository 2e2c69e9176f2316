"""The workers that need the reconciler, and the figures of the pool, each from the rows alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.builders import active_rental, new_placement, new_worker

from orion.manager.domain.model import Item, Placement, Rental, Worker
from orion.manager.domain.pool_index import Changes, IndexedPlacement, IndexedWorker, PoolIndex
from orion.manager.domain.states import Health, Intent, PlacementState, RentalState

WORKER, RENTAL = new_worker(1, slots=2), active_rental(1)
RUNNING = new_placement(RENTAL, WORKER, PlacementState.RUNNING)
SHOWN = Item(rental_id=RENTAL.id, username=RENTAL.username, uid=RENTAL.uid, epoch=RENTAL.epoch)


def index_of(worker: Worker | None, *placements: Placement, rental: Rental = RENTAL, now: float = 0.0) -> PoolIndex:
    pool_index = PoolIndex()
    apply_rows(pool_index, worker, *placements, rental=rental, now=now)
    return pool_index


def apply_rows(
    pool_index: PoolIndex, worker: Worker | None, *placements: Placement, rental: Rental = RENTAL, now: float = 0.0
) -> None:
    held = tuple(IndexedPlacement.of(placement, rental) for placement in placements)
    pool_index.apply(Changes({WORKER.id: (IndexedWorker.of(worker, "hash") if worker else None, held)}, {}), now)


def in_state(state: PlacementState) -> Placement:
    return replace(RUNNING, state=state)


AT_REST = {
    "a ready worker with nothing": (WORKER,),
    "a ready worker with what runs there": (WORKER, RUNNING),
    "a dead worker with what was lost there": (
        replace(WORKER, health=Health.DOWN),
        in_state(PlacementState.LOST),
    ),
    "a worker that was quarantined while it joined": (
        replace(WORKER, health=Health.JOINING, verified_session=None, fault="it flaps"),
    ),
    "a drained worker": (replace(WORKER, intent=Intent.DRAINED),),
    "one that nobody knows and that holds nothing": (None,),
    "what runs without a key after a restore, until its worker shows it": (WORKER, replace(RUNNING, public_key="")),
}
DIRTY = {
    "a removed worker": (None, in_state(PlacementState.LOST)),
    "a dead worker with what ran there": (replace(WORKER, health=Health.DOWN), RUNNING),
    "a draining worker with what runs there": (replace(WORKER, intent=Intent.DRAINING), RUNNING),
    "a quarantined worker with what runs there": (replace(WORKER, health=Health.QUARANTINED), RUNNING),
    "what stands still": (WORKER, replace(RUNNING, quiesced_for=2)),
    "something reserved": (WORKER, in_state(PlacementState.RESERVED)),
    "something being cleaned up": (WORKER, in_state(PlacementState.STOPPING)),
    "something that could not be made": (WORKER, in_state(PlacementState.FAILED)),
    "something lost on a worker that is back": (WORKER, in_state(PlacementState.LOST)),
    "another key": (WORKER, replace(RUNNING, public_key="ssh-ed25519 old")),
    "one that joins": (replace(WORKER, health=Health.JOINING, verified_session=None),),
    "one that is drained at last": (replace(WORKER, intent=Intent.DRAINING), in_state(PlacementState.LOST)),
}


@pytest.mark.parametrize("what", AT_REST)
def test_a_worker_without_work_for_the_reconciler_is_not_dirty(what: str) -> None:
    assert index_of(*AT_REST[what]).dirty_workers(9) == []


@pytest.mark.parametrize("what", DIRTY)
def test_a_worker_with_work_for_the_reconciler_is_dirty(what: str) -> None:
    pool_index = index_of(*DIRTY[what])
    assert pool_index.dirty_workers(9) == [WORKER.id]
    apply_rows(pool_index, None)
    assert pool_index.dirty_workers(9) == [], "nothing of the rental is left"


def test_dirty_workers_beyond_the_limit_of_a_round_get_their_turn() -> None:
    pool_index = PoolIndex()
    joining = IndexedWorker.of(replace(WORKER, health=Health.JOINING, verified_session=None), "")
    pool_index.apply(Changes({f"w-{n}": (joining, ()) for n in range(5)}, {}), 0.0)
    assert [*pool_index.dirty_workers(2), *pool_index.dirty_workers(2), *pool_index.dirty_workers(2)] == [
        "w-0",
        "w-1",
        "w-2",
        "w-3",
        "w-4",
        "w-0",
    ]


@pytest.mark.parametrize(
    ("worker", "placements", "shown", "disagrees"),
    [
        (WORKER, [RUNNING], [SHOWN], False),
        (WORKER, [RUNNING], [], False),  # an order may be running, so a missing rental decides nothing
        (WORKER, [in_state(PlacementState.PREPARING)], [SHOWN], False),
        (WORKER, [], [SHOWN], True),
        (WORKER, [RUNNING], [replace(SHOWN, epoch=9)], True),
        (WORKER, [replace(RUNNING, public_key="")], [SHOWN], True),
        (replace(WORKER, fault="it holds what nobody knows"), [], [], True),
        (replace(WORKER, health=Health.DOWN), [], [SHOWN], False),
        (None, [], [SHOWN], False),
    ],
)
def test_an_inventory_with_an_unplaced_rental_makes_its_worker_dirty(
    worker: Worker | None, placements: list[Placement], shown: list[Item], disagrees: bool
) -> None:
    assert index_of(worker, *placements).disagrees(WORKER.id, shown) is disagrees


def test_ages_count_from_the_first_sight_of_a_state_and_anew_when_a_worker_s_fault_changes() -> None:
    stopping = in_state(PlacementState.STOPPING)
    faulty = replace(WORKER, fault="it was not cleaned up")
    pool_index = index_of(WORKER, RUNNING, now=10.0)
    assert pool_index.age_of(RUNNING.id, 99.0) == 0.0, "a running placement has no deadline"
    apply_rows(pool_index, WORKER, stopping, now=20.0)
    apply_rows(pool_index, WORKER, stopping, now=30.0)
    assert pool_index.age_of(RUNNING.id, 50.0) == 30.0
    apply_rows(pool_index, faulty, stopping, now=60.0)
    assert pool_index.age_of(RUNNING.id, 70.0) == 10.0
    apply_rows(pool_index, faulty, now=80.0)
    assert pool_index.age_of(RUNNING.id, 90.0) == 0.0, "the placement is purged"


def test_health_and_rentals_are_counted_with_the_longest_first() -> None:
    pool_index = PoolIndex()
    for number, now in ((1, 10.0), (2, 20.0), (3, 30.0)):
        suspect = IndexedWorker.of(replace(WORKER, health=Health.SUSPECT), "")
        pool_index.apply(Changes({f"w-{number}": (suspect, ())}, {f"r-{number}": RentalState.QUEUED}), now)
    assert pool_index.by_health() == {"suspect": 3}
    assert pool_index.by_state() == {"queued": 3}
    assert pool_index.longest_in(Health.SUSPECT, 15.0, 40.0, 9) == ["w-1", "w-2"]
    assert pool_index.longest_in(Health.SUSPECT, 15.0, 40.0, 1) == ["w-1"]
    pool_index.apply(
        Changes({"w-1": (IndexedWorker.of(WORKER, ""), ())}, {"r-1": None, "r-2": RentalState.PROVISIONING}), 40.0
    )
    assert pool_index.by_health() == {"ready": 1, "suspect": 2}
    assert pool_index.by_state() == {"queued": 1, "provisioning": 1}
    assert (pool_index.age_of("r-1", 50.0), pool_index.age_of("r-2", 50.0), pool_index.age_of("r-3", 50.0)) == (
        0.0,
        10.0,
        20.0,
    )


def test_a_refusal_counts_each_worker_once_and_the_exiting_as_exiting() -> None:
    pool_index = PoolIndex()
    full = (IndexedWorker.of(replace(WORKER, slots=1), ""), (IndexedPlacement.of(RUNNING, RENTAL),))
    free = (IndexedWorker.of(WORKER, ""), ())
    down = (IndexedWorker.of(replace(WORKER, health=Health.DOWN), ""), ())
    pool_index.apply(Changes({"w-full": full, "w-free": free, "w-down": down, "w-gone": free}, {}), 0.0)
    assert pool_index.refusals((), ()) == {"full": 1, "": 2, "down": 1}
    assert pool_index.refusals(["w-free"], ["w-gone", "w-full", "w-down"]) == {"exiting": 2, "down": 1}
    assert pool_index.destinations(["w-gone"]) == 2
    assert pool_index.slots() == (5, 4)
