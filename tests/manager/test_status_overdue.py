"""No stuck state: each state that may not last ends as its table says, and `orion status` lists overdue ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from support.builders import active_rental, new_placement, new_rental, new_worker, new_world
from support.harness import Harness

from orion.manager.domain.brake import Brake
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.health import Evidence, judge
from orion.manager.domain.leases import Lease
from orion.manager.domain.observations import Observations
from orion.manager.domain.overdue import WHAT_TO_DO, overdue
from orion.manager.domain.reconcile import decide
from orion.manager.domain.states import (
    JOIN_DEADLINE_S,
    QUEUE_DEADLINE_S,
    TABLES,
    Health,
    PlacementState,
    RentalState,
)
from orion.manager.domain.steps import move_worker
from orion.manager.domain.world import World

R, P, H = RentalState, PlacementState, Health
PATIENT = [
    (kind, state) for kind, table in TABLES.items() for state, row in table.items() if row.deadline_s is not None
]
LATE_S = 1.0
CALM = Brake(disturbed_at=-10_000.0, since=None, reason="")


def ids() -> Iterator[str]:
    return (f"p-new-{number}" for number in count())


def decided(world: World, late: str, rounds: int = 4, **observations: Any) -> World:
    """Return the world after some rounds in which `late` has been in its state for longer than any deadline."""
    new_ids = ids()
    for _ in range(rounds):
        decision = decide(
            world,
            Observations(
                inventories={},
                exiting=frozenset(),
                ages={late: QUEUE_DEADLINE_S + LATE_S},
                new_ids=new_ids,
                **observations,
            ),
        )
        for step in decision.steps:
            assert world.apply(step)
    return world


def judged(health: Health, silent_s: float, **change: Any) -> Health:
    """Return the verdict on a worker that was in a state for too long."""
    worker = new_worker(health=health, **change)
    lease = Lease(session_id=worker.session_id or "", received_at=-silent_s)
    verdict = judge(
        Evidence(
            worker=worker,
            lease=lease,
            now=0.0,
            clocks=Clocks(),
            brake=CALM,
            has_destination=True,
            joining_s=JOIN_DEADLINE_S + LATE_S,
        )
    )
    if verdict is None:
        return health
    move_worker(worker, verdict.to, verdict.reason)  # raises for a verdict that is not in the table
    return verdict.to


def placed(state: PlacementState, rental_state: RentalState, worker_health: Health = H.READY) -> tuple[World, str]:
    rental = new_rental(state=rental_state, epoch=1)
    placement = new_placement(rental, new_worker(health=worker_health), state)
    return new_world(rental, new_worker(health=worker_health), placement), placement.id


@pytest.mark.parametrize(("kind", "state"), PATIENT)
def test_each_state_that_may_not_last_has_an_owner_a_deadline_an_exit_and_words_for_a_person(
    kind: str, state: str
) -> None:
    row = TABLES[kind][state]
    assert row.owner in {"health", "reconciler"}
    assert row.exits
    assert row.overdue
    assert WHAT_TO_DO[kind, state]


def ended(state: PlacementState, rental_state: RentalState) -> tuple[PlacementState, str]:
    """Return a placement after one round, and the reason why its worker is quarantined."""
    world, late = placed(state, rental_state)
    decided(world, late, rounds=1)
    return world.placements[late].state, world.workers["w-0001"].fault


def made_nowhere(state: RentalState) -> RentalState:
    rental = new_rental(state=state) if state is R.QUEUED else active_rental(state=state)
    return decided(new_world(rental), rental.id, rounds=1).rentals[rental.id].state


def released_when_its_worker_is_removed() -> RentalState:
    world, late = placed(P.FAILED, R.RELEASING)
    del world.workers["w-0001"]
    return decided(world, late).rentals["rental0001"].state


BLAMED = "rental rental0001 could not be cleaned up"
ENDINGS: dict[tuple[str, str], tuple[Callable[[], object], object]] = {
    ("worker", H.JOINING): (lambda: judged(H.JOINING, 0.0, verified_session=None), H.QUARANTINED),
    ("worker", H.SUSPECT): (lambda: judged(H.SUSPECT, 10_000.0), H.DOWN),
    ("worker", H.UNKNOWN): (lambda: judged(H.UNKNOWN, 10_000.0), H.DOWN),
    ("placement", P.RESERVED): (lambda: ended(P.RESERVED, R.PROVISIONING), (P.PREPARING, "")),
    ("placement", P.PREPARING): (lambda: ended(P.PREPARING, R.PROVISIONING), (P.FAILED, "")),
    ("placement", P.STOPPING): (lambda: ended(P.STOPPING, R.RELEASING), (P.FAILED, BLAMED)),
    ("placement", P.STOPPED): (lambda: ended(P.STOPPED, R.RELEASING), (P.PURGED, "")),
    ("placement", P.FAILED): (
        lambda: ended(P.FAILED, R.RELEASING),
        (P.FAILED, BLAMED),
    ),  # from here on an operator has to act
    ("rental", R.QUEUED): (lambda: made_nowhere(R.QUEUED), R.FAILED),
    ("rental", R.PROVISIONING): (lambda: made_nowhere(R.PROVISIONING), R.QUEUED),
    ("rental", R.MIGRATING): (lambda: made_nowhere(R.MIGRATING), R.QUEUED),
    ("rental", R.RELEASING): (released_when_its_worker_is_removed, R.RELEASED),
}


@pytest.mark.parametrize(("kind", "state"), PATIENT)
def test_each_state_that_may_not_last_ends_as_its_table_says_when_its_deadline_has_passed(
    kind: str, state: str
) -> None:
    what_becomes_of_it, expected = ENDINGS[kind, state]
    assert what_becomes_of_it() == expected


def test_remedies_exist_only_for_states_that_may_not_last_and_for_quarantined_workers() -> None:
    assert set(WHAT_TO_DO) == {*PATIENT, ("worker", H.QUARANTINED)}


def test_a_slot_that_is_reserved_for_too_long_is_prepared_or_given_up() -> None:
    world, late = placed(P.RESERVED, R.PROVISIONING)
    assert decided(world, late, rounds=1).placements[late].state is P.PREPARING
    world, late = placed(P.RESERVED, R.RELEASING)
    assert decided(world, late).placements[late].state is P.PURGED


@pytest.mark.parametrize("worker_health", [H.READY, H.SUSPECT, H.UNKNOWN, H.JOINING, H.QUARANTINED])
def test_a_placement_that_prepares_for_too_long_fails_whatever_its_worker_s_health(worker_health: Health) -> None:
    world, late = placed(P.PREPARING, R.PROVISIONING, worker_health)
    decided(world, late, rounds=1)
    assert world.placements[late].state is P.FAILED
    assert world.rentals["rental0001"].state is R.QUEUED


@pytest.mark.parametrize("worker_health", [H.READY, H.JOINING])
@pytest.mark.parametrize(("state", "then"), [(P.STOPPING, P.FAILED), (P.FAILED, P.FAILED)])
def test_a_clean_up_that_takes_too_long_quarantines_its_worker(
    state: PlacementState, then: PlacementState, worker_health: Health
) -> None:
    world, late = placed(state, R.RELEASING, worker_health)
    decided(world, late, rounds=1)
    assert world.placements[late].state is then
    assert world.workers["w-0001"].fault
    assert judged(H.JOINING, 0.0, fault="x", verified_session=None) is H.QUARANTINED


def test_a_stopped_placement_is_purged_by_the_next_round() -> None:
    world, late = placed(P.STOPPED, R.RELEASING)
    assert decided(world, late, rounds=1).placements[late].state is P.PURGED


@pytest.mark.parametrize("state", [P.STOPPING, P.FAILED])
def test_a_release_that_lasts_too_long_ends_when_its_worker_is_stopped_and_removed(state: PlacementState) -> None:
    world, late = placed(state, R.RELEASING, H.DOWN)
    assert decided(world, late).rentals["rental0001"].state is R.RELEASED
    world, late = placed(state, R.RELEASING)
    del world.workers["w-0001"]
    assert decided(world, late).rentals["rental0001"].state is R.RELEASED


def test_a_rental_that_was_never_active_does_not_wait_for_ever() -> None:
    rental = new_rental()
    assert decided(new_world(rental), rental.id).rentals[rental.id].state is R.FAILED


def test_a_rental_that_was_active_waits_and_the_status_says_so() -> None:
    rental = active_rental(state=R.QUEUED)
    world = decided(new_world(rental), rental.id)
    assert world.rentals[rental.id].state is R.QUEUED
    (notice,) = overdue(world, {rental.id: QUEUE_DEADLINE_S})
    assert "no worker" in notice.why
    assert "start more workers" in notice.what_to_do


@pytest.mark.parametrize("state", [R.PROVISIONING, R.MIGRATING])
def test_a_provisioning_rental_without_a_placement_is_queued_again(state: RentalState) -> None:
    rental = active_rental(state=state)
    assert decided(new_world(rental), rental.id, rounds=1).rentals[rental.id].state is R.QUEUED


@pytest.mark.parametrize("silent_s", [0.0, 50.0, 10_000.0])
def test_a_worker_that_joins_for_too_long_is_quarantined_or_down(silent_s: float) -> None:
    assert judged(H.JOINING, silent_s, verified_session=None) in {H.QUARANTINED, H.SUSPECT, H.DOWN}


@pytest.mark.parametrize("health", [H.SUSPECT, H.UNKNOWN])
@pytest.mark.parametrize(("silent_s", "then"), [(0.0, H.READY), (10_000.0, H.DOWN)])
def test_a_worker_that_is_suspect_or_unknown_for_too_long_is_ready_or_down(
    health: Health, silent_s: float, then: Health
) -> None:
    assert judged(health, silent_s) is then


def test_nothing_that_is_in_time_is_overdue() -> None:
    rental = active_rental()
    worker = new_worker()
    world = new_world(rental, worker, new_placement(rental, worker, P.RUNNING))
    assert overdue(world, dict.fromkeys([*world.rentals, *world.workers, *world.placements], 1e9)) == []


@pytest.mark.parametrize(("kind", "state"), PATIENT)
def test_an_overdue_state_is_listed_with_its_reason_and_remedy(kind: str, state: str) -> None:
    rental = new_rental(state=state if kind == "rental" else R.ACTIVE, explanation="something is wrong")
    worker = new_worker(health=state if kind == "worker" else H.READY, explanation="something is wrong")
    placement = new_placement(rental, worker, PlacementState(state) if kind == "placement" else P.RUNNING)
    world = new_world(rental, worker, placement)
    late = {"rental": rental.id, "worker": worker.id, "placement": placement.id}[kind]
    assert overdue(world, {late: 60.0 if state != P.RESERVED else 59.0}) == []
    (notice,) = overdue(world, {late: 1e6})
    assert (notice.kind, notice.id, notice.state, notice.since_s) == (kind, late, state, 1e6)
    assert "something is wrong" in notice.why
    assert notice.what_to_do
    assert "{" not in notice.what_to_do


async def test_the_status_shows_overdue_states_to_an_admin_and_not_to_clients(harness: Harness) -> None:
    rental = await harness.rent()
    await harness.pass_time(600.0)
    client = await harness.new_client("alice")
    assert (await client.get("/api/status")).json()["overdue"] == []
    (notice,) = (await harness.as_admin.get("/api/status")).json()["overdue"]
    assert (notice["kind"], notice["id"], notice["state"]) == ("rental", rental["id"], "queued")
    assert notice["since_s"] == pytest.approx(600.0, abs=10.0)
    assert "no worker" in notice["why"]
    await harness.join()
    assert (await harness.as_admin.get("/api/status")).json()["overdue"] == []
