"""The order of a heartbeat's reply for each rental in the inventory."""

from __future__ import annotations

import pytest
from support.builders import active_rental, new_placement, new_worker

from orion.manager.domain.heartbeat_orders import orders
from orion.manager.domain.model import Item
from orion.manager.domain.states import PlacementState as P

RENTAL, WORKER = active_rental(epoch=3), new_worker()


def item(epoch: int = 3, rental_id: str = RENTAL.id) -> Item:
    return Item(rental_id=rental_id, username=RENTAL.username, uid=RENTAL.uid, epoch=epoch)


@pytest.mark.parametrize(
    ("state", "want"),
    [
        (P.RESERVED, None),
        (P.PREPARING, None),
        (P.RUNNING, "run"),
        (P.STOPPING, "purge"),
        (P.STOPPED, "purge"),
        (P.FAILED, "purge"),
        (P.LOST, "purge"),
        (P.PURGED, "purge"),
    ],
)
def test_each_state_of_a_placement_has_its_order(state: P, want: str | None) -> None:
    found = orders([item()], [new_placement(RENTAL, WORKER, state)], down=False)
    assert found == ([(item(), want)] if want else [])


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_only_the_very_epoch_that_is_placed_there_runs(epoch: int) -> None:
    found = orders([item(epoch)], [new_placement(RENTAL, WORKER, P.RUNNING)], down=False)
    assert found == [(item(epoch), "purge")]


def test_a_rental_without_a_placement_on_the_worker_is_purged() -> None:
    assert orders([item(rental_id="another")], [new_placement(RENTAL, WORKER, P.RUNNING)], down=False) == [
        (item(rental_id="another"), "purge")
    ]


def test_there_is_no_order_for_a_rental_that_is_not_in_the_inventory() -> None:
    assert orders([], [new_placement(RENTAL, WORKER, P.RUNNING)], down=False) == []


@pytest.mark.parametrize(
    ("state", "want"), [(P.RUNNING, "hold"), (P.PREPARING, None), (P.LOST, "purge"), (P.STOPPING, "purge")]
)
def test_a_worker_that_is_declared_down_gets_no_order_to_run(state: P, want: str | None) -> None:
    found = orders([item()], [new_placement(RENTAL, WORKER, state)], down=True)
    assert found == ([(item(), want)] if want else [])
