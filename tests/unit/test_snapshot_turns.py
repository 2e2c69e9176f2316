"""When snapshots are due: the first one on a worker, turns of several owners, and repeats."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from support.builders import active_rental, new_placement, new_worker

from orion.manager.controllers.snapshots import JITTER, SPREAD, SnapshotController
from orion.manager.domain.snapshot_plan import SnapshotPlan
from orion.manager.domain.states import PlacementState
from orion.manager.domain.steps import Event
from orion.manager.fakes.snapshots import FakeSnapshotService
from orion.manager.fakes.workers import FakeWorld
from orion.manager.snapshots.port import Home, SnapshotError
from orion.manager.store.snapshots import Running

WORKER = new_worker(1)
RENTAL = active_rental(1)
PLACEMENT = new_placement(RENTAL, WORKER, PlacementState.RUNNING)

RENTALS = [f"rental{number}" for number in range(40)]
PLAN = SnapshotPlan(interval_s=30.0, at_once=2 * len(RENTALS))
STEP_S = 0.5


class FakeCatalog:
    """The part of a `SnapshotCatalog` that the controller needs; it notes when a snapshot begins."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.epochs: dict[str, int] = {}
        self.owners: dict[str, str] = {}
        self.begun: dict[str, float] = {}

    async def running(self) -> dict[str, tuple[int, str]]:
        return {rental_id: (epoch, self.owners.get(rental_id, rental_id)) for rental_id, epoch in self.epochs.items()}

    async def one(self, rental_id: str) -> None:
        self.begun.setdefault(rental_id, self.now)

    async def removable(self, *_: object) -> list[tuple[str, int]]:
        return []


def new_controller(catalog: FakeCatalog, snapshot_service: Any, plan: SnapshotPlan = PLAN) -> SnapshotController:
    """Return a controller whose clocks are the catalog's."""
    return SnapshotController(
        catalog=catalog,
        snapshot_service=snapshot_service,
        plan=plan,
        disk_share=lambda: 0.0,
        monotonic=lambda: catalog.now,
        wall=lambda: catalog.now,
    )  # type: ignore[arg-type]


async def _waits(catalog: FakeCatalog, controller: SnapshotController, epoch: int) -> list[float]:
    """Return the seconds until the first snapshot of each rental that runs at this epoch from now on."""
    catalog.epochs, catalog.begun, began = dict.fromkeys(RENTALS, epoch), {}, catalog.now
    while catalog.now <= began + PLAN.interval_s:
        await _round(controller)
        catalog.now += STEP_S
    return [at - began for at in catalog.begun.values()]


async def _nothing_runs(catalog: FakeCatalog, controller: SnapshotController) -> None:
    catalog.epochs = {}
    catalog.now += PLAN.interval_s
    await _round(controller)


async def _round(controller: SnapshotController) -> None:
    await controller.round()
    for _ in range(5):  # the snapshots that the round began end
        await asyncio.sleep(0)


async def test_a_new_rental_has_a_snapshot_at_its_activation_and_after_its_first_session() -> None:
    catalog = FakeCatalog()
    controller = new_controller(catalog, FakeSnapshotService(world=FakeWorld(), wall=lambda: catalog.now))

    async def at_once(kind: str) -> bool:
        catalog.begun = {}
        controller.on_events([Event(kind=kind, actor="", reason="", rental_id="one", epoch=catalog.epochs["one"])])
        await _round(controller)
        return bool(catalog.begun)

    async def much_later(epoch: int) -> None:
        await _nothing_runs(catalog, controller)
        catalog.epochs = {"one": epoch}
        await _round(controller)

    await _round(controller)
    catalog.epochs = {"one": 1}
    assert await at_once("rental.activated")
    assert not await at_once("rental.session_opened")
    assert await at_once("rental.session_closed")
    assert not await at_once("rental.session_closed"), "its snapshots have become regular"
    await much_later(2)
    assert not await at_once("rental.activated"), "it is as its snapshot is, and others may still be restored"
    assert await at_once("rental.session_closed")
    assert await at_once("rental.started_empty")
    await controller.stop()


async def test_a_rental_that_was_just_restored_gets_no_snapshot_while_others_are_restored() -> None:
    catalog = FakeCatalog()
    controller = new_controller(catalog, FakeSnapshotService(world=FakeWorld(), wall=lambda: catalog.now))
    soon = PLAN.interval_s * JITTER + STEP_S
    at_first = await _waits(catalog, controller, 1)
    assert len(at_first) == len(RENTALS)
    assert max(at_first) <= soon
    await _nothing_runs(catalog, controller)
    taken_over = await _waits(catalog, controller, 2)
    assert len(taken_over) == len(RENTALS)
    assert min(taken_over) >= PLAN.interval_s * (1 - SPREAD)
    await _nothing_runs(catalog, controller)
    unchanged = await _waits(catalog, controller, 2)
    assert len(unchanged) == len(RENTALS)
    assert max(unchanged) <= soon, "its snapshot is older by now than it may be"
    await controller.stop()


class BlockedSnapshotService:
    """A snapshot service in which each snapshot lasts until the test ends it with a code of failure."""

    def __init__(self) -> None:
        self.blocked: dict[str, asyncio.Future[str]] = {}

    async def take(self, home: Home, *_: object, **__: object) -> None:
        ending = self.blocked[home.rental_id] = asyncio.get_running_loop().create_future()
        try:
            raise SnapshotError(await ending, "it is blocked")
        finally:
            del self.blocked[home.rental_id]

    async def rentals(self) -> list[str]:
        return []

    def end(self, rental_id: str, code: str) -> None:
        self.blocked[rental_id].set_result(code)


class CatalogOfRunning(FakeCatalog):
    """A catalog in which a snapshot of each rental can be taken."""

    async def one(self, rental_id: str) -> Running:  # type: ignore[override]
        rental = replace(RENTAL, id=rental_id, owner=self.owners[rental_id], last_snapshot_at=1.0)
        return Running(rental, replace(PLACEMENT, rental_id=rental_id), WORKER)

    async def record(self, _: object) -> None:
        pass


async def four_of_one_owner_and_one_of_another(
    owner: str,
) -> tuple[CatalogOfRunning, BlockedSnapshotService, SnapshotController]:
    """Return a controller of four places that has just seen the rentals `owner`0 to `owner`3, and `quick`."""
    catalog, snapshot_service = CatalogOfRunning(), BlockedSnapshotService()
    names = [f"{owner}{number}" for number in range(4)] + ["quick"]
    catalog.owners = {name: name.rstrip("0123456789") for name in names}
    controller = new_controller(catalog, snapshot_service, replace(PLAN, at_once=4))
    await _round(controller)
    catalog.epochs = dict.fromkeys(names, 1)
    return catalog, snapshot_service, controller


async def test_an_owner_whose_snapshots_hang_takes_half_of_the_places_and_later_one() -> None:
    catalog, snapshot_service, controller = await four_of_one_owner_and_one_of_another("slow")
    for _ in range(8):
        await _round(controller)
        catalog.now += STEP_S
    assert len([name for name in snapshot_service.blocked if name.startswith("slow")]) == 2
    assert "quick" in snapshot_service.blocked
    snapshot_service.end("quick", "unreadable_home")
    for name in [name for name in snapshot_service.blocked if name.startswith("slow")]:
        snapshot_service.end(name, "stalled")
    await _round(controller)
    await _round(controller)
    assert len(snapshot_service.blocked) == 2, "the other two of the same owner"
    for name in list(snapshot_service.blocked):
        snapshot_service.end(name, "timed_out")
    catalog.now += 2 * PLAN.interval_s
    await _round(controller)
    await _round(controller)
    assert sorted(name.rstrip("0123") for name in snapshot_service.blocked) == ["quick", "slow"], (
        "rentals whose snapshots fail share one place"
    )
    await controller.stop()


async def test_an_owner_that_requests_snapshots_of_all_its_rentals_takes_half_of_the_places() -> None:
    catalog, snapshot_service, controller = await four_of_one_owner_and_one_of_another("asked")
    await _round(controller)
    requests = [asyncio.create_task(controller.take_now(f"asked{number}", None)) for number in range(4)]
    await _round(controller)
    catalog.now += PLAN.interval_s
    await _round(controller)
    assert sorted(name.rstrip("0123") for name in snapshot_service.blocked) == ["asked", "asked", "quick"]
    while any(not task.done() for task in requests):
        for name in [name for name in snapshot_service.blocked if name != "quick"]:
            snapshot_service.end(name, "failed")
        await _round(controller)
    assert {task.result() for task in requests} == {"it is blocked"}
    await controller.stop()
