"""The state machines as tables: they are total, and each state that may not last has an owner and an exit."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import pytest

from orion import wire
from orion.manager.domain.states import (
    ENDED,
    HEALTH_TABLE,
    HELD_DEADLINE_S,
    HOLDING,
    LIVE,
    MIGRATION_TABLE,
    PLACEMENT_TABLE,
    QUIESCED,
    RENTAL_TABLE,
    TABLES,
    ForbiddenTransition,
    Health,
    Intent,
    MigrationPhase,
    PlacementState,
    RentalState,
    Row,
    check_phase,
    check_transition,
)

MACHINES = [
    pytest.param(Health, HEALTH_TABLE, id="worker"),
    pytest.param(PlacementState, PLACEMENT_TABLE, id="placement"),
    pytest.param(RentalState, RENTAL_TABLE, id="rental"),
    pytest.param(MigrationPhase, MIGRATION_TABLE, id="migration"),
]
ALL_TABLES: Mapping[str, Mapping[str, Row]] = {**TABLES, "migration": MIGRATION_TABLE}
ROWS = [pytest.param(table[state], id=f"{kind} {state}") for kind, table in ALL_TABLES.items() for state in table]


@pytest.mark.parametrize(("states", "table"), MACHINES)
def test_each_state_has_a_row(states: type[StrEnum], table: Mapping[str, Row]) -> None:
    assert set(table) == set(states)


@pytest.mark.parametrize(("states", "table"), MACHINES)
def test_each_exit_is_a_state_of_the_same_machine_and_another_one(
    states: type[StrEnum], table: Mapping[str, Row]
) -> None:
    for state, row in table.items():
        assert row.exits <= set(states)
        assert state not in row.exits


@pytest.mark.parametrize("row", ROWS)
def test_each_state_has_an_owner(row: Row) -> None:
    assert row.owner


@pytest.mark.parametrize("row", ROWS)
def test_a_state_that_is_not_restful_has_an_exit_for_when_its_deadline_passes(row: Row) -> None:
    if row.deadline_s is None:
        assert not row.overdue
    else:
        assert row.deadline_s > 0
        assert row.exits
        assert row.overdue


@pytest.mark.parametrize("row", ROWS)
def test_a_state_that_a_program_works_on_and_that_has_exits_is_restful_only_where_waiting_is_right(row: Row) -> None:
    """Such states are a ready worker, and a lost placement on a worker that is away."""
    if row.owner in {"health", "reconciler"} and row.deadline_s is None:
        assert row in {HEALTH_TABLE[Health.READY], PLACEMENT_TABLE[PlacementState.LOST]}


@pytest.mark.parametrize(("states", "table"), MACHINES)
def test_each_state_can_be_reached_from_the_first(states: type[StrEnum], table: Mapping[str, Row]) -> None:
    reached = {next(iter(states))}
    for _ in states:
        reached |= {exit_ for state in reached for exit_ in table[state].exits}
    assert reached == set(states) - {MigrationPhase.STALE}


def test_a_placement_never_goes_back() -> None:
    def reachable(state: str, seen: frozenset[str] = frozenset()) -> set[str]:
        assert state not in seen, f"{state} is reached again through {seen}"
        found = set(PLACEMENT_TABLE[state].exits)
        return found.union(*(reachable(exit_, seen | {state}) for exit_ in found))

    for state in PlacementState:
        assert state not in reachable(state)


def test_a_placement_that_left_life_is_never_live_again() -> None:
    for state in set(PlacementState) - LIVE:
        assert not PLACEMENT_TABLE[state].exits & LIVE


def test_a_placement_that_gave_its_slot_up_never_takes_it_again() -> None:
    for state in set(PlacementState) - HOLDING:
        assert not PLACEMENT_TABLE[state].exits & HOLDING


def test_each_placement_can_be_purged() -> None:
    reaches_the_end = {PlacementState.PURGED}
    for _ in PlacementState:
        reaches_the_end |= {s for s in PlacementState if PLACEMENT_TABLE[s].exits & reaches_the_end}
    assert reaches_the_end == set(PlacementState)


def test_only_ended_rentals_and_purged_placements_have_no_exits() -> None:
    assert {s for s in RentalState if not RENTAL_TABLE[s].exits} == ENDED
    assert [s for s in PlacementState if not PLACEMENT_TABLE[s].exits] == [PlacementState.PURGED]
    assert all(HEALTH_TABLE[s].exits for s in Health)


def test_each_living_rental_can_be_released() -> None:
    for state in set(RentalState) - ENDED - {RentalState.RELEASING}:
        assert RentalState.RELEASING in RENTAL_TABLE[state].exits


def test_only_a_rental_that_waits_in_the_queue_can_fail() -> None:
    assert {s for s in RentalState if RentalState.FAILED in RENTAL_TABLE[s].exits} == {RentalState.QUEUED}


def test_a_worker_becomes_ready_only_from_a_state_in_which_it_was_checked() -> None:
    into_ready = {s for s in Health if Health.READY in HEALTH_TABLE[s].exits}
    assert into_ready == {Health.JOINING, Health.SUSPECT, Health.UNKNOWN}


@pytest.mark.parametrize("kind", TABLES)
def test_a_step_that_is_not_in_the_table_raises_with_its_story(kind: str) -> None:
    table = TABLES[kind]
    for source, row in table.items():
        for target in table:
            if target in row.exits:
                check_transition(kind, "x-1", source, target)
                continue
            with pytest.raises(ForbiddenTransition, match=f"{kind} x-1 cannot go from {source} to {target}"):
                check_transition(kind, "x-1", source, target)


def test_a_phase_that_does_not_follow_raises_with_its_story() -> None:
    for source, row in MIGRATION_TABLE.items():
        for target in MigrationPhase:
            if target in row.exits:
                check_phase("r-1", source, target)
                continue
            with pytest.raises(ForbiddenTransition, match=f"rental r-1 cannot go from {source} to {target}"):
                check_phase("r-1", source, target)


def test_a_source_is_quiesced_for_a_bounded_time_and_before_each_cutover() -> None:
    assert {phase for phase in MigrationPhase if MigrationPhase.CUTOVER in MIGRATION_TABLE[phase].exits} < QUIESCED
    assert all(MIGRATION_TABLE[phase].deadline_s == HELD_DEADLINE_S for phase in QUIESCED)
    assert all(MigrationPhase.NONE in MIGRATION_TABLE[phase].exits for phase in QUIESCED), (
        "a migration can always be given up"
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(Health, wire.WorkerHealth), (Intent, wire.WorkerIntent), (RentalState, wire.RentalState)],
)
def test_the_contract_names_the_states_as_the_domain_does(ours: type[StrEnum], theirs: type[StrEnum]) -> None:
    assert {s.name: s.value for s in ours} == {s.name: s.value for s in theirs}
