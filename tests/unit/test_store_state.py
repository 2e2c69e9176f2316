"""Steps in the database are atomic, in order, and with their events, as in the World that decisions use."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from sqlalchemy import update
from support.builders import active_rental, new_placement, new_rental, new_worker, new_world
from support.rows import event_kinds, insert_world

from orion.manager.domain.expiry import release, renew
from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.states import HEALTH_TABLE, PLACEMENT_TABLE, RENTAL_TABLE, Health, PlacementState, RentalState
from orion.manager.domain.steps import Event, Step, Write, move_placement, move_rental, move_worker
from orion.manager.domain.world import World
from orion.manager.store import events, state
from orion.manager.store.database import Store
from orion.manager.store.schema import rentals

WORKER, RENTAL = new_worker(), active_rental()
RUNNING = new_placement(RENTAL, WORKER, PlacementState.RUNNING)


@pytest.fixture
async def world(store: Store) -> World:
    world = new_world(WORKER, RENTAL, RUNNING)
    await insert_world(store, world)
    return world


async def test_the_rows_are_loaded_as_they_were_written(store: Store, world: World) -> None:
    assert await store.read(state.load) == world


async def test_the_rows_of_ended_rentals_and_purged_placements_are_not_loaded(store: Store) -> None:
    ended, gone = active_rental(2, state=RentalState.RELEASED), active_rental(3, state=RentalState.EXPIRED)
    lost = new_placement(ended, WORKER, PlacementState.LOST)
    purged = new_placement(gone, WORKER, PlacementState.PURGED, slot=1)
    await insert_world(store, new_world(WORKER, ended, gone, lost, purged))
    assert await store.read(state.load) == new_world(WORKER, ended, lost)


async def test_a_step_is_applied_with_its_events_in_one_transaction(store: Store, world: World) -> None:
    step = release(RENTAL, "released", "alice", "asked for")
    assert await store.write(state.apply, [step])
    assert (await store.read(state.load)).rentals[RENTAL.id].state is RentalState.RELEASING
    (event,) = await store.read(events.page, None, None, None, 0, 100)
    assert (event["kind"], event["actor"], event["owner"], event["epoch"]) == (
        "rental.release_started",
        "alice",
        "alice",
        1,
    )


async def test_a_step_with_one_stale_guard_changes_nothing(store: Store, world: World) -> None:
    stale = replace(RENTAL, epoch=RENTAL.epoch + 1)
    placed = Placement(
        id="p-2", rental_id=RENTAL.id, worker_id=WORKER.id, slot=1, epoch=2, state=PlacementState.RESERVED
    )
    lost = move_placement(RUNNING, "alice", PlacementState.LOST, "reconciler", "down")
    step = lost + move_rental(stale, RentalState.MIGRATING, "reconciler", "down") + Step((), (), placed)
    assert not await store.write(state.apply, [step])
    assert await store.read(state.load) == world
    assert await event_kinds(store) == []


async def test_steps_before_a_stale_one_are_applied_and_later_ones_are_not(store: Store, world: World) -> None:
    first = renew(RENTAL, 60, "alice", 1000.0)
    stale = move_worker(replace(WORKER, session_id="another"), Health.SUSPECT, "silence")
    after = release(RENTAL, "released", "alice", "asked for")
    assert not await store.write(state.apply, [first, stale, after])
    assert await event_kinds(store) == ["rental.renewed"]
    assert (await store.read(state.load)).rentals[RENTAL.id].state is RentalState.ACTIVE


async def test_a_guard_of_a_write_without_changes_holds(store: Store, world: World) -> None:
    guard = Step(
        (Write(kind="worker", id=WORKER.id, expect={"health": Health.DOWN}, change={}),),
        (Event(kind="x", actor="y", reason="z"),),
    )
    assert not await store.write(state.apply, [guard])
    assert not world.apply(guard)
    met = Step((Write(kind="worker", id=WORKER.id, expect={"health": Health.READY}, change={}),))
    assert await store.write(state.apply, [met])
    assert await store.read(state.load) == world


async def test_a_guard_on_an_empty_field_holds(store: Store, world: World) -> None:
    assert await store.write(
        state.apply, [Step((Write(kind="rental", id=RENTAL.id, expect={"end": None}, change={"failures": 1}),))]
    )
    await store.write(lambda c: c.execute(update(rentals).values(end="released")).rowcount)
    assert not await store.write(
        state.apply, [Step((Write(kind="rental", id=RENTAL.id, expect={"end": None}, change={"failures": 2}),))]
    )


async def test_a_write_to_a_row_that_does_not_exist_is_not_applied(store: Store, world: World) -> None:
    assert not await store.write(state.apply, [move_worker(new_worker(7), Health.SUSPECT, "silence")])


async def test_living_rentals_are_due_when_their_time_is_over(store: Store) -> None:
    due, later = active_rental(1, expires_at=100.0), active_rental(2, expires_at=100.1)
    ended = active_rental(3, expires_at=1.0, state=RentalState.RELEASED)
    await insert_world(store, new_world(due, later, ended, new_rental(4)))
    assert await store.read(state.load_due, 100.0) == [due]


@pytest.mark.parametrize("seed", range(5))
async def test_the_store_applies_steps_as_the_world_of_decisions_does(store: Store, seed: int) -> None:
    """The same random steps, some of them stale, end in the same rows on both sides."""
    random = Random(seed)  # noqa: S311  a reproducible history, no secret
    rows: list[Any] = [new_worker(1, slots=3), new_worker(2, slots=3)]
    rows += [new_rental(number) for number in range(4)]
    world = new_world(*rows)
    await insert_world(store, world)
    for number in range(60):
        step = _some_step(random, world, number)
        if step is not None:
            assert await store.write(state.apply, [step]) == world.apply(step)
    stored = await store.read(state.load)
    assert stored.workers == world.workers
    assert all(stored.rentals.get(i, r) == r for i, r in world.rentals.items())
    open_ = {i: p for i, p in world.placements.items() if p.state is not PlacementState.PURGED}
    assert stored.placements == open_


def _some_step(random: Random, world: World, number: int) -> Step | None:
    stale = random.random() < 0.2
    row: Worker | Rental | Placement = random.choice(
        [*world.workers.values(), *world.rentals.values(), *world.placements.values()]
    )
    if isinstance(row, Worker):
        exits = sorted(HEALTH_TABLE[row.health].exits)
        changed = replace(row, session_id="stale") if stale else row
        return move_worker(changed, Health(random.choice(exits)), "why")
    if isinstance(row, Placement):
        exits = sorted(PLACEMENT_TABLE[row.state].exits)
        return move_placement(row, "alice", PlacementState(random.choice(exits)), "a", "why") if exits else None
    if world.live_placement(row.id) is None and random.random() < 0.5:
        placed = Placement(
            id=f"p-{number}",
            rental_id=row.id,
            worker_id=f"gone-{number}",
            slot=0,
            epoch=row.epoch + 1,
            state=PlacementState.RESERVED,
        )
        return Step(
            (Write(kind="rental", id=row.id, expect={"epoch": row.epoch}, change={"epoch": row.epoch + 1}),), (), placed
        )
    exits = sorted(RENTAL_TABLE[row.state].exits)
    changed_rental = replace(row, epoch=row.epoch + 7) if stale else row
    return move_rental(changed_rental, RentalState(random.choice(exits)), "a", "why") if exits else None
