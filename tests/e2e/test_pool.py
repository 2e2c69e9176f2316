"""The pool for an operator: a full pool, a drain, and the removal of a worker."""

from __future__ import annotations

import pytest
from conftest import Rent
from renter import Renter
from stack import Stack, story
from waiting import eventually

from orion.client.sdk import Orion
from orion.errors import Conflict
from orion.wire import Rental, RentalState, WorkerHealth


@pytest.mark.usefixtures("all_slots")
def test_a_full_pool_queues_a_rent_with_an_explanation_and_continues_by_itself(
    stack: Stack, orion: Orion, renter: Renter
) -> None:
    rentals = [orion.rent(ssh_public_key=renter.public_key) for _ in range(stack.free_slots())]
    assert {one.state for one in rentals} == {RentalState.ACTIVE}
    reply = stack.post("/api/rent", {"name": "patient", "wait_s": 0, "ssh_public_key": renter.public_key})
    assert reply.status_code == 202
    queued = orion.rental(Rental.model_validate_json(reply.content).id, state=RentalState.ACTIVE, wait_s=3)
    assert queued.state is RentalState.QUEUED
    eventually(
        "the explanation says that all workers are full",
        lambda: "of 3 workers, 3 full" in orion.rental(queued.id).explanation,
        60,
    )
    assert "by itself" in orion.rental(queued.id).explanation

    mark = stack.mark()
    orion.release(rentals[0].id)
    active = orion.rental(queued.id, state=RentalState.ACTIVE, wait_s=50)
    assert active.state is RentalState.ACTIVE, story(stack.events(mark))
    assert active.worker_id == rentals[0].worker_id
    assert renter.can_log_in(active)


def test_a_worker_that_holds_a_rental_is_not_removed(orion: Orion, rent: Rent, renter: Renter) -> None:
    rental = rent()
    with pytest.raises(Conflict) as refusal:
        orion.remove_worker(str(rental.worker_id))
    assert refusal.value.code == "worker_in_use"
    assert renter.can_log_in(rental)


def test_a_removed_worker_that_still_runs_registers_as_a_new_one(stack: Stack, orion: Orion, renter: Renter) -> None:
    old = next(one for one in orion.workers() if one.slots_free)
    renter.orion("remove", old.id, "--yes")
    assert old.id not in {one.id for one in orion.workers()}

    def returned() -> bool:
        (again,) = [one for one in orion.workers() if one.hostname == old.hostname] or [None]
        return again is not None and again.id != old.id and again.health is WorkerHealth.READY

    eventually("the worker is ready under a new id", returned, 60)
