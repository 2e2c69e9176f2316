"""The steps of a planned migration: their guards, and that a step in between makes them stale."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from support.builders import active_rental, new_placement, new_rental, new_worker, new_world

from orion import wire
from orion.manager.domain import migration
from orion.manager.domain.assignment import request_migration
from orion.manager.domain.fair_share import Claim
from orion.manager.domain.model import Placement, Rental
from orion.manager.domain.observations import Observations
from orion.manager.domain.reconcile import decide
from orion.manager.domain.states import (
    QUIESCED,
    ForbiddenTransition,
    Health,
    Intent,
    MigrationPhase,
    PlacementState,
    RentalState,
)
from orion.manager.domain.tasks import TaskKind
from orion.manager.domain.world import World

SOURCE, TARGET = new_worker(1), new_worker(2)
RENTAL = active_rental(last_epoch=4)
RUNNING = new_placement(RENTAL, SOURCE, PlacementState.RUNNING)
TARGET_PLACEMENT = replace(
    new_placement(RENTAL, TARGET, PlacementState.PREPARING),
    id="p-standby",
    epoch=4,
    is_target=True,
    target_snapshot="1-3",
)
QUIESCED_SOURCE = replace(RUNNING, quiesced_for=4)
STOPPING = replace(QUIESCED_SOURCE, state=PlacementState.STOPPING)
MIGRATING, RELEASING = (replace(RENTAL, state=s) for s in (RentalState.MIGRATING, RentalState.RELEASING))
SOURCE_OF_MIGRATION = migration.Source(placement_id=RUNNING.id, worker_id=SOURCE.id, epoch=1, move=4)


def observations(**more: frozenset[str]) -> Observations:
    exiting = more.get("evacuating", frozenset())
    return Observations(
        inventories={}, exiting=exiting, ages={}, new_ids=(f"p-new-{number}" for number in count()), **more
    )


def world(*placements: Placement) -> World:
    return new_world(SOURCE, TARGET, RENTAL, *placements)


def test_the_explanation_of_a_failed_migration_is_the_api_s() -> None:
    assert migration.NOT_MOVED == wire.NOT_MOVED


@pytest.mark.parametrize(
    ("rental", "source", "target", "phase"),
    [
        (RENTAL, RUNNING, None, MigrationPhase.NONE),
        (
            RENTAL,
            RUNNING,
            replace(TARGET_PLACEMENT, state=PlacementState.RESERVED, target_snapshot=""),
            MigrationPhase.RESERVED,
        ),
        (RENTAL, RUNNING, replace(TARGET_PLACEMENT, target_snapshot=""), MigrationPhase.PRECOPY),
        (RENTAL, RUNNING, TARGET_PLACEMENT, MigrationPhase.QUIESCE),
        (RENTAL, QUIESCED_SOURCE, TARGET_PLACEMENT, MigrationPhase.FINAL_SYNC),
        (RENTAL, QUIESCED_SOURCE, None, MigrationPhase.PARK),
        (MIGRATING, STOPPING, None, MigrationPhase.CUTOVER),
        # The migration is over, its source is not purged yet, and the target's worker was lost.
        (replace(MIGRATING, activated_epoch=4), STOPPING, None, MigrationPhase.NONE),
        (MIGRATING, replace(STOPPING, quiesced_for=0), None, MigrationPhase.NONE),
        (RELEASING, STOPPING, None, MigrationPhase.NONE),
        (RENTAL, QUIESCED_SOURCE, replace(TARGET_PLACEMENT, epoch=5), MigrationPhase.STALE),
        (RENTAL, QUIESCED_SOURCE, replace(TARGET_PLACEMENT, state=PlacementState.RESERVED), MigrationPhase.STALE),
        (MIGRATING, replace(QUIESCED_SOURCE, state=PlacementState.LOST), None, MigrationPhase.NONE),
    ],
)
def test_the_phase_of_a_migration_follows_from_the_rows(
    rental: Rental, source: Placement, target: Placement | None, phase: MigrationPhase
) -> None:
    assert migration.phase_of(rental, source, target) is phase
    assert migration.is_quiesced(source) is (phase in QUIESCED)


def test_a_placement_is_a_target_until_the_cutover_or_its_end() -> None:
    assert migration.as_target(TARGET_PLACEMENT) == TARGET_PLACEMENT
    ended = replace(TARGET_PLACEMENT, state=PlacementState.FAILED)
    assert [migration.as_target(p) for p in (None, ended, replace(TARGET_PLACEMENT, is_target=False))] == [
        None,
        None,
        None,
    ]


@pytest.mark.parametrize("source", [RUNNING, replace(QUIESCED_SOURCE, state=PlacementState.STOPPING)])
def test_a_step_out_of_its_phase_raises(source: Placement) -> None:
    with pytest.raises(ForbiddenTransition):
        migration.abandon(RENTAL, source, None, "a test")
    with pytest.raises(ForbiddenTransition):
        migration.quiesce(RENTAL, source, replace(TARGET_PLACEMENT, target_snapshot=""), "a test")


def test_a_cutover_raises_the_epoch_and_ends_the_quiesced_source_in_one_step() -> None:
    after = world(QUIESCED_SOURCE, TARGET_PLACEMENT)
    step = migration.cut_over(RENTAL, QUIESCED_SOURCE, TARGET_PLACEMENT, SOURCE_OF_MIGRATION, "1-9")
    assert step
    assert after.apply(step)
    rental = after.rentals[RENTAL.id]
    assert (rental.state, rental.epoch) == (RentalState.MIGRATING, 4)
    assert after.placements[RUNNING.id].state is PlacementState.STOPPING
    live = after.live_placement(RENTAL.id)
    assert live == replace(TARGET_PLACEMENT, is_target=False, target_snapshot="1-9")


@pytest.mark.parametrize(
    ("placement", "standby"),
    [
        (RUNNING, TARGET_PLACEMENT),
        (replace(QUIESCED_SOURCE, quiesced_for=5), TARGET_PLACEMENT),
        (replace(QUIESCED_SOURCE, quiesced_for=5), None),
        (replace(QUIESCED_SOURCE, state=PlacementState.STOPPING), TARGET_PLACEMENT),
        (QUIESCED_SOURCE, replace(TARGET_PLACEMENT, state=PlacementState.FAILED)),
        (QUIESCED_SOURCE, replace(TARGET_PLACEMENT, epoch=5)),
        (QUIESCED_SOURCE, replace(TARGET_PLACEMENT, is_target=False)),
    ],
)
def test_there_is_no_cutover_of_a_rental_that_is_not_quiesced_for_this_migration(
    placement: Placement, standby: Placement | None
) -> None:
    assert migration.cut_over(RENTAL, placement, standby, SOURCE_OF_MIGRATION, "1-9") is None


def test_a_cutover_is_dropped_if_another_step_came_in_between() -> None:
    step = migration.cut_over(RENTAL, QUIESCED_SOURCE, TARGET_PLACEMENT, SOURCE_OF_MIGRATION, "1-9")
    assert step
    for changed in (replace(QUIESCED_SOURCE, quiesced_for=0), replace(QUIESCED_SOURCE, quiesced_for=7)):
        assert not world(changed, TARGET_PLACEMENT).apply(step)
    assert not world(QUIESCED_SOURCE, replace(TARGET_PLACEMENT, state=PlacementState.FAILED)).apply(step)


def test_a_source_is_quiesced_only_for_a_target_that_has_a_snapshot() -> None:
    empty = replace(TARGET_PLACEMENT, target_snapshot="")
    (task,) = decide(world(RUNNING, empty), observations()).tasks
    assert task.kind is TaskKind.PRECOPY
    decision = decide(world(RUNNING, TARGET_PLACEMENT), observations())
    assert [task.kind for task in decision.tasks] == [TaskKind.FINAL_SYNC]
    assert decision.steps[0].events[0].kind == "rental.held"


@pytest.mark.parametrize(
    "target",
    [
        replace(TARGET, intent=Intent.DRAINING),
        replace(TARGET, health=Health.JOINING),
        replace(TARGET, health=Health.QUARANTINED),
        replace(TARGET, fault="it flaps"),
    ],
)
def test_a_target_on_an_ineligible_worker_is_given_up_and_the_quiesced_source_thawed(target: object) -> None:
    now = new_world(SOURCE, target, RENTAL, QUIESCED_SOURCE, TARGET_PLACEMENT)  # type: ignore[arg-type]
    decision = decide(now, observations())
    for step in decision.steps:
        assert now.apply(step)
    assert now.placements[TARGET_PLACEMENT.id].state is PlacementState.FAILED
    assert now.placements[RUNNING.id].quiesced_for == 0
    thaw = next(task for task in decision.tasks if task.kind is TaskKind.THAW)
    assert (thaw.worker_id, thaw.source) == (SOURCE.id, SOURCE_OF_MIGRATION)


def test_a_quiesced_rental_without_a_target_is_parked_only_while_its_worker_evacuates() -> None:
    exiting = frozenset({SOURCE.id})
    assert [task.kind for task in decide(world(QUIESCED_SOURCE), observations(evacuating=exiting)).tasks] == [
        TaskKind.PARK
    ]
    assert [task.kind for task in decide(world(QUIESCED_SOURCE), observations()).tasks] == [TaskKind.THAW]


def test_a_parked_rental_is_placed_where_there_is_room_before_its_source_is_purged() -> None:
    parked = replace(QUIESCED_SOURCE, state=PlacementState.STOPPING)
    waiting = replace(RENTAL, state=RentalState.MIGRATING)
    now = new_world(SOURCE, TARGET, waiting, parked)
    for step in decide(now, observations()).steps:
        assert now.apply(step)
    live = now.live_placement(RENTAL.id)
    assert live
    assert (live.worker_id, live.epoch) == (TARGET.id, 5)


def test_the_number_of_concurrent_migrations_is_limited() -> None:
    source, target = (
        replace(SOURCE, slots=20, intent=Intent.DRAINING),
        replace(TARGET, slots=20),
    )
    rentals = [active_rental(number, owner="alice" if number <= 8 else f"owner{number % 2}") for number in range(1, 21)]
    placed = [
        replace(new_placement(rental, source, PlacementState.RUNNING), slot=number)
        for number, rental in enumerate(rentals)
    ]
    now = new_world(source, target, *rentals, *placed)
    for step in decide(now, observations()).steps:
        assert now.apply(step)
    assert migration.under_way(now).total() == migration.MAX_UNDER_WAY
    assert migration.under_way(now)[Claim("alice")] == migration.MAX_UNDER_WAY // 2
    still = next(rental for rental in rentals if now.target_of(rental.id) is None)
    with pytest.raises(migration.NotMigrated) as refused:
        request_migration(now, still.id, "alice", observations())
    assert refused.value.code == "too_many_moves"


def crowd(*owners: str, intent: Intent = Intent.ACTIVE) -> tuple[World, list[Rental]]:
    """Return a world with a rental of each of these owners on one worker, and slots for all on another one."""
    source, target = replace(SOURCE, slots=40, intent=intent), replace(TARGET, slots=40)
    rentals = [active_rental(number, owner=owner) for number, owner in enumerate(owners, 1)]
    placed = [replace(new_placement(each, source, PlacementState.RUNNING), slot=n) for n, each in enumerate(rentals)]
    return new_world(source, target, *rentals, *placed), rentals


def test_an_owner_that_requests_many_migrations_leaves_places_for_others() -> None:
    now, rentals = crowd(*["greedy"] * migration.MAX_REQUESTED, "other")
    asked, known = list[str](), observations()
    for rental in rentals:
        try:
            step = request_migration(now, rental.id, rental.owner, known)
        except migration.NotMigrated as refused:
            assert refused.code == "too_many_moves"  # noqa: PT017 - some of them are refused
        else:
            assert step
            assert now.apply(step)
            asked.append(rental.owner)
    assert asked == [*["greedy"] * (migration.MAX_REQUESTED // 2), "other"]


def test_failed_migrations_share_one_place_of_their_owner() -> None:
    now, rentals = crowd(*["greedy"] * 5, intent=Intent.DRAINING)
    migration_failed = frozenset(rental.id for rental in rentals[:4])
    for step in decide(now, observations(migration_failed=migration_failed)).steps:
        assert now.apply(step)
    moving = {rental.id for rental in rentals if now.target_of(rental.id)}
    assert len(moving & migration_failed) == 1
    assert rentals[4].id in moving


def test_a_failed_migration_does_not_wait_for_its_turn_on_an_evacuating_worker() -> None:
    now, rentals = crowd(*["greedy"] * 4)
    more = {"migration_failed": frozenset(rental.id for rental in rentals), "evacuating": frozenset({SOURCE.id})}
    for step in decide(now, observations(**more)).steps:
        assert now.apply(step)
    assert all(now.target_of(rental.id) for rental in rentals)


def test_there_is_no_planned_migration_from_a_silent_worker() -> None:
    silent = replace(SOURCE, health=Health.SUSPECT)
    with pytest.raises(migration.NotMigrated) as refused:
        request_migration(new_world(silent, TARGET, RENTAL, RUNNING), RENTAL.id, "alice", observations())
    assert refused.value.code == "worker_not_ready"
    with pytest.raises(migration.NotMigrated, match="it has ended"):
        request_migration(world(), new_rental(2).id, "alice", observations())
