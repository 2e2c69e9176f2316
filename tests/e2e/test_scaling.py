"""The pool grows and shrinks by `up --scale worker=N`."""

from __future__ import annotations

import time

import pytest
from conftest import Figures
from renter import Renter
from stack import WORKERS, Container, Stack, story

from orion.client.sdk import Orion
from orion.wire import Event, RentalState, WorkerHealth

READY_WITHIN_S = 30.0
"""Seconds until a new worker is ready: a few, but more on a busy machine."""


@pytest.mark.usefixtures("all_slots")
def test_a_new_worker_becomes_ready_and_a_removed_one_migrates_its_rental_first(
    stack: Stack, orion: Orion, renter: Renter, figures: Figures
) -> None:
    """Both are in one test, because each undoes the other."""
    newcomer = _scale_up(stack, figures)
    rentals = [orion.rent(ssh_public_key=renter.public_key) for _ in range(WORKERS + 1)]
    assert {one.state for one in rentals} == {RentalState.ACTIVE}
    left = orion.find_worker(newcomer.hostname)
    (moving,) = (one for one in rentals if one.worker_id == left.id)
    place = next(one for one in rentals if one.worker_id != left.id)
    orion.release(place.id, wait_s=30)
    renter.inside(moving, "echo written at the last moment > kept")

    mark, began = stack.mark(), time.monotonic()
    stack.scale(WORKERS)
    assert newcomer.id not in {one.id for one in stack.containers()}, "Compose takes away the highest number"
    stack.await_active(mark, moving, moving.epoch + 1)
    figures["scale-down to active on another worker"] = f"{time.monotonic() - began:.1f} s"
    down = stack.await_kind(mark, "worker.became_down", 60, left.id)
    _check_move(stack, mark, down)
    migrated = orion.rental(moving.id)
    assert (migrated.state, migrated.worker_id, migrated.username) == (
        RentalState.ACTIVE,
        place.worker_id,
        moving.username,
    )
    assert renter.inside(migrated, "cat kept") == "written at the last moment"

    assert orion.worker(left.id).health is WorkerHealth.DOWN
    renter.orion("remove", left.id, "--yes")
    assert left.id not in {one.id for one in orion.workers()}


def _scale_up(stack: Stack, figures: Figures) -> Container:
    mark, before = stack.mark(), {one.id for one in stack.containers("worker")}
    stack.scale(WORKERS + 1)
    (newcomer,) = (one for one in stack.containers("worker") if one.id not in before)
    with stack.connect() as orion:

        def registered() -> str:
            return next((one.id for one in orion.workers() if one.hostname == newcomer.hostname), "")

        ready = stack.await_event(
            mark,
            "the new worker is ready",
            lambda event: event.kind == "worker.became_ready" and event.worker_id == registered(),
            2 * READY_WITHIN_S,
        )
    took_s = (ready.at - newcomer.started_at).total_seconds()
    figures["start of a new worker's container to ready"] = f"{took_s:.1f} s"
    assert took_s < READY_WITHIN_S
    return newcomer


def _check_move(stack: Stack, mark: int, down: Event) -> None:
    """Assert that the rental migrated with all its files before its worker ended."""
    events = stack.events(mark)
    assert down.reason == "its last heartbeat announced that it stops", story(events)
    activated = next(event for event in events if event.kind == "rental.activated")
    assert activated.id < down.id, story(events)
    assert "placement.lost" not in {event.kind for event in events}, story(events)
