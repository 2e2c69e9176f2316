"""The contract of the snapshot catalogs in the database and in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from support.builders import active_rental, new_placement, new_worker, new_world
from support.rows import event_kinds, insert_world

from orion.manager.domain import snapshots as rules
from orion.manager.domain.model import Rental
from orion.manager.domain.snapshots import EXPIRED_KEPT_S, Snapshot, SnapshotId
from orion.manager.domain.states import Health, PlacementState, RentalState
from orion.manager.store.database import Store
from orion.manager.store.memory import MemoryStateStore
from orion.manager.store.snapshots import MemorySnapshotCatalog, Running, SnapshotCatalog, SqlSnapshotCatalog

WORKER, SUSPECT = new_worker(1, slots=4), new_worker(2, slots=4, health=Health.SUSPECT)
QUARANTINED = new_worker(3, health=Health.QUARANTINED)
RENTAL, ELSEWHERE = active_rental(1, epoch=3), active_rental(2)
TAKEN_OVER = active_rental(3, state=RentalState.MIGRATING)
RELEASED = active_rental(4, state=RentalState.RELEASED)
EXPIRED = active_rental(5, state=RentalState.EXPIRED)
ON_QUARANTINED = active_rental(6)
RUNNING = new_placement(RENTAL, WORKER, PlacementState.RUNNING)
LOST = new_placement(RENTAL, SUSPECT, PlacementState.LOST, id="p-lost", epoch=2, slot=1)
WORLD = new_world(
    *(WORKER, SUSPECT, QUARANTINED, RENTAL, ELSEWHERE, TAKEN_OVER, RELEASED, EXPIRED, ON_QUARANTINED, RUNNING),
    new_placement(ON_QUARANTINED, QUARANTINED, PlacementState.RUNNING),
    new_placement(ELSEWHERE, SUSPECT, PlacementState.RUNNING),
    new_placement(TAKEN_OVER, WORKER, PlacementState.PREPARING, slot=1),
    LOST,
    replace(LOST, id="p-given-up", files_recovered=True, epoch=1),
)
SNAPSHOT = Snapshot(id=SnapshotId(3, 1), at=5000.0, bytes=12_345_678_901, files=7, skipped=("secret", "odd \x1b name"))


@dataclass
class CatalogBench:
    """A catalog and the events that it wrote."""

    catalog: SnapshotCatalog
    state_store: MemoryStateStore | None = None
    store: Store | None = None

    async def shown(self) -> Rental:
        """Return the rental of which a snapshot can be taken."""
        found = await self.catalog.one(RENTAL.id)
        assert found
        return found.rental

    async def kinds(self) -> list[str]:
        if self.state_store:
            return [event.kind for event in self.state_store.events]
        assert self.store
        return await event_kinds(self.store)


@pytest.fixture(params=["memory", "sql"])
async def bench(request: pytest.FixtureRequest) -> CatalogBench:
    if request.param == "memory":
        state_store = MemoryStateStore(WORLD)
        return CatalogBench(MemorySnapshotCatalog(state_store), state_store=state_store)
    store: Store = request.getfixturevalue("store")
    await insert_world(store, WORLD)
    return CatalogBench(SqlSnapshotCatalog(store), store=store)


async def test_snapshots_are_taken_on_workers_that_are_ready_or_quarantined(bench: CatalogBench) -> None:
    assert await bench.catalog.running() == {each.id: (each.epoch, each.owner) for each in (RENTAL, ON_QUARANTINED)}
    assert await bench.catalog.one(RENTAL.id) == Running(RENTAL, RUNNING, WORKER)
    assert await bench.catalog.one(TAKEN_OVER.id) is None


async def test_an_accepted_snapshot_is_in_the_catalog_and_the_first_has_an_event(bench: CatalogBench) -> None:
    assert await bench.catalog.of(RENTAL.id) == []
    assert await bench.catalog.accept(rules.accepted(RENTAL, RUNNING, SNAPSHOT), RENTAL.id, [SNAPSHOT])
    assert await bench.catalog.of(RENTAL.id) == [SNAPSHOT]
    shown = await bench.shown()
    assert shown == replace(RENTAL, last_snapshot_at=5000.0)
    later = replace(SNAPSHOT, id=SnapshotId(3, 2), at=5030.0)
    assert await bench.catalog.accept(rules.accepted(shown, RUNNING, later), RENTAL.id, [SNAPSHOT, later])
    assert await bench.catalog.of(RENTAL.id) == [SNAPSHOT, later]
    assert await bench.kinds() == ["rental.copied"]


async def test_a_snapshot_of_a_placement_that_runs_no_more_changes_nothing(bench: CatalogBench) -> None:
    late = replace(RUNNING, epoch=2)
    assert not await bench.catalog.accept(rules.accepted(RENTAL, late, SNAPSHOT), RENTAL.id, [SNAPSHOT])
    preparing = new_placement(TAKEN_OVER, WORKER, PlacementState.PREPARING)
    assert not await bench.catalog.accept(rules.accepted(TAKEN_OVER, preparing, SNAPSHOT), TAKEN_OVER.id, [SNAPSHOT])
    assert await bench.catalog.of(RENTAL.id) == []
    assert await bench.kinds() == []


async def test_a_problem_has_an_event_when_it_begins_and_when_it_ends(bench: CatalogBench) -> None:
    for _ in range(2):
        rental = await bench.shown()
        step = rules.failed(rental, RUNNING, "its home holds too much")
        if step:
            await bench.catalog.record(step)
    rental = await bench.shown()
    assert rental.snapshot_problem == "its home holds too much"
    assert await bench.catalog.accept(rules.accepted(rental, RUNNING, SNAPSHOT), RENTAL.id, [SNAPSHOT])
    rental = await bench.shown()
    assert rental.snapshot_problem == ""
    assert await bench.kinds() == ["rental.copy_failed", "rental.copied"]


async def test_snapshots_are_removable_after_a_release_at_once_and_after_an_expiry_in_a_day(
    bench: CatalogBench,
) -> None:
    all_ids = [RENTAL.id, TAKEN_OVER.id, RELEASED.id, EXPIRED.id, "unknown"]
    ended_at = EXPIRED.expires_at or 0.0
    assert await bench.catalog.removable(all_ids, ended_at) == [(RELEASED.id, RELEASED.uid)]
    removable = await bench.catalog.removable(all_ids, ended_at + EXPIRED_KEPT_S + 1)
    assert sorted(removable) == [(RELEASED.id, RELEASED.uid), (EXPIRED.id, EXPIRED.uid)]


async def test_snapshots_of_an_expired_rental_are_removable_when_its_owner_is_short_of_room(
    bench: CatalogBench,
) -> None:
    all_ids = [RENTAL.id, RELEASED.id, EXPIRED.id]
    ended_at = EXPIRED.expires_at or 0.0
    released, expired = (RELEASED.id, RELEASED.uid), (EXPIRED.id, EXPIRED.uid)
    assert sorted(await bench.catalog.removable(all_ids, ended_at + 1, [EXPIRED.owner])) == [released, expired]
    assert await bench.catalog.removable(all_ids, ended_at + 1, ["somebody else"]) == [released]
    assert await bench.catalog.removable(all_ids, float("-inf"), [EXPIRED.owner]) == [released]


async def test_forgotten_snapshots_are_not_listed(bench: CatalogBench) -> None:
    await bench.catalog.accept(rules.accepted(RENTAL, RUNNING, SNAPSHOT), RENTAL.id, [SNAPSHOT])
    for _ in range(2):
        await bench.catalog.forget(RENTAL.id)
    assert await bench.catalog.of(RENTAL.id) == []


async def test_a_lost_placement_is_recovered_once(bench: CatalogBench) -> None:
    recovered = replace(SNAPSHOT, id=SnapshotId(2, 9), recovered=True)
    assert await bench.catalog.to_recover(LOST.id) == (RENTAL, LOST)
    assert [await bench.catalog.to_recover(each) for each in ("p-given-up", RUNNING.id, "p-unknown")] == [None] * 3
    step = rules.recovered(RENTAL, LOST, recovered, [recovered, SNAPSHOT])
    assert await bench.catalog.accept(step, RENTAL.id, [recovered, SNAPSHOT])
    assert await bench.catalog.to_recover(LOST.id) is None
    assert not await bench.catalog.accept(step, RENTAL.id, [])
    assert await bench.catalog.of(RENTAL.id) == [recovered, SNAPSHOT]
    assert await bench.catalog.newest(RENTAL.id) == SNAPSHOT
    assert await bench.kinds() == ["rental.salvaged"]


async def test_a_recovery_that_failed_is_given_up_once(bench: CatalogBench) -> None:
    for _ in range(2):
        await bench.catalog.record(rules.not_recovered(RENTAL, LOST, "its home holds too much"))
    assert await bench.catalog.to_recover(LOST.id) is None
    assert await bench.kinds() == ["rental.salvage_failed"]
