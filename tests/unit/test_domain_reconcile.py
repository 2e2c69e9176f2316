"""Decisions of the reconciler, applied to a world that has changed since they were made."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from support.builders import active_rental, new_rental, new_worker, new_world

from orion.manager.domain.model import Rental
from orion.manager.domain.observations import Observations
from orion.manager.domain.reconcile import decide
from orion.manager.domain.states import Health, Intent, RentalState

WORKER = new_worker(1, slots=2)


def observations() -> Observations:
    return Observations(inventories={}, exiting=frozenset(), ages={}, new_ids=(f"p-{number}" for number in count(1)))


@pytest.mark.parametrize("rental", [new_rental(), active_rental(state=RentalState.MIGRATING)], ids=["new", "migrating"])
@pytest.mark.parametrize(
    "change",
    [{"health": Health.JOINING}, {"health": Health.DOWN}, {"intent": Intent.DRAINING}, {"slots": 1}],
    ids=str,
)
def test_a_slot_is_reserved_only_on_a_worker_that_is_unchanged_since_the_choice(
    rental: Rental, change: dict[str, Any]
) -> None:
    world = new_world(WORKER, rental)
    placing, *_ = decide(world, observations()).steps
    assert placing.placement is not None
    assert world.copy().apply(placing)
    world.workers[WORKER.id] = replace(WORKER, **change)
    assert not world.apply(placing)
    del world.workers[WORKER.id]
    assert not world.apply(placing)
