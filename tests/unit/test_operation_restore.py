"""Restores of many homes at once: a few at a time on each worker."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from ansible_contract import KEY

from orion.manager.ansible.port import Action, Job, Outcome
from orion.manager.domain.snapshots import NEWEST, Snapshot, SnapshotId
from orion.manager.fakes.snapshots import FakeSnapshotService
from orion.manager.fakes.workers import FakeEngine, FakeWorld
from orion.manager.operations import restore
from orion.manager.operations.restore import AT_ONCE, BATCH, Restorer
from orion.manager.snapshots.port import RESTORE_DEADLINE_S, Home
from orion.manager.ssh.port import Host
from orion.rental_order import RentalOrder

HANGS, WORKS = (
    Host(worker_id="w-hangs", address="192.0.2.1", host_keys=(KEY,)),
    Host(worker_id="w-works", address="192.0.2.2", host_keys=(KEY,)),
)


class NoBook:
    """The part of a `SnapshotCatalog` that a Restorer needs, without any rows."""

    async def newest(self, _rental_id: str) -> Snapshot | None:
        return None


class Slow(FakeSnapshotService):
    """A snapshot service whose restores to one worker do not end until the test lets them."""

    def __init__(self, world: FakeWorld) -> None:
        super().__init__(world=world, wall=lambda: 0.0)
        self.under_way: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.let_go = asyncio.Event()

    async def restore(
        self, home: Home, generation: SnapshotId | None = None, deadline_s: float = RESTORE_DEADLINE_S
    ) -> Snapshot | None:
        worker = home.host.worker_id
        self.under_way[worker] += 1
        self.most[worker] = max(self.most[worker], self.under_way[worker])
        if worker == HANGS.worker_id:
            await self.let_go.wait()
        try:
            return await super().restore(home, generation, deadline_s)
        finally:
            self.under_way[worker] -= 1


def _job(host: Host, number: int) -> Job:
    name = f"home{number}".translate(str.maketrans("0123456789", "abcdefghij"))
    order = RentalOrder(rental_id=name, username=f"r-{name}", uid=200_000 + number, epoch=2, public_keys=(KEY,))
    return Job(action=Action.CREATE, host=host, order=order, owner=f"owner{number % 2}")


async def test_a_few_homes_are_restored_at_a_time_and_a_hanging_worker_delays_no_other() -> None:
    world = FakeWorld()
    for host in (HANGS, WORKS):
        world.add(host)
    snapshot_service, engine = Slow(world), FakeEngine(world)
    restorer = Restorer(engine=engine, snapshot_service=snapshot_service, catalog=NoBook())  # type: ignore[arg-type]
    jobs = [_job(HANGS, number) for number in range(3 * AT_ONCE)]
    hanging = [asyncio.create_task(restorer.make(job, NEWEST)) for job in jobs]
    others = [restorer.make(_job(WORKS, 100 + number), NEWEST) for number in range(2 * AT_ONCE)]
    assert all(outcome.ok for outcome in await asyncio.gather(*others))
    assert snapshot_service.under_way == {HANGS.worker_id: AT_ONCE, WORKS.worker_id: 0}
    snapshot_service.let_go.set()
    assert all(outcome.ok for outcome in await asyncio.gather(*hanging))
    assert snapshot_service.most[HANGS.worker_id] == AT_ONCE


async def test_an_owner_has_half_of_the_concurrent_restores_of_one_worker() -> None:
    world = FakeWorld()
    world.add(HANGS)
    snapshot_service = Slow(world)
    restorer = Restorer(engine=FakeEngine(world), snapshot_service=snapshot_service, catalog=NoBook())  # type: ignore[arg-type]
    jobs = [replace(_job(HANGS, number), owner="greedy") for number in range(2 * AT_ONCE)]
    jobs.append(replace(_job(HANGS, 99), owner="other"))
    making = [asyncio.create_task(restorer.make(job, NEWEST)) for job in jobs]
    await _spin()
    assert snapshot_service.under_way[HANGS.worker_id] == AT_ONCE // 2 + 1
    snapshot_service.let_go.set()
    assert all(outcome.ok for outcome in await asyncio.gather(*making))


class Stops(FakeSnapshotService):
    """A snapshot service whose restores of these rentals do not end until the test lets them."""

    def __init__(self, world: FakeWorld, stopped: set[str]) -> None:
        super().__init__(world=world, wall=lambda: 0.0)
        self._stopped = stopped
        self.let_go = asyncio.Event()

    async def restore(
        self, home: Home, generation: SnapshotId | None = None, deadline_s: float = RESTORE_DEADLINE_S
    ) -> Snapshot | None:
        if home.rental_id in self._stopped:
            await self.let_go.wait()
        return await super().restore(home, generation, deadline_s)


async def test_rentals_whose_files_have_arrived_are_activated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "BATCH_WAIT_S", 3600.0)
    worker = (world := FakeWorld()).add(WORKS)
    few, late = [_job(WORKS, number) for number in range(BATCH - 1)], _job(WORKS, 100)
    snapshot_service = Stops(world, {late.order.rental_id})
    restorer = Restorer(engine=FakeEngine(world), snapshot_service=snapshot_service, catalog=NoBook())  # type: ignore[arg-type]

    def activated() -> set[str]:
        return {rental_id for rental_id, account in worker.accounts.items() if account.unlocked}

    making = [asyncio.create_task(restorer.make(job, NEWEST)) for job in (*few, late)]
    await _spin()
    assert len(worker.accounts) == BATCH
    assert not activated(), "one more is being filled, and two are too few for a batch"
    more = asyncio.create_task(restorer.make(_job(WORKS, 200), NEWEST))
    await _spin()
    assert len(activated()) == BATCH, "a whole batch does not wait for the last one"
    snapshot_service.let_go.set()
    assert all(outcome.ok for outcome in await asyncio.gather(*making, more))
    assert len(activated()) == BATCH + 1


async def test_a_rental_that_is_restored_alone_is_activated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "BATCH_WAIT_S", 3600.0)
    world = FakeWorld()
    world.add(WORKS)
    restorer = Restorer(
        engine=FakeEngine(world), snapshot_service=FakeSnapshotService(world=world, wall=lambda: 0.0), catalog=NoBook()
    )  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        assert (await restorer.make(_job(WORKS, 0), NEWEST)).ok


class Asked(FakeEngine):
    """An engine that makes no account before the restore of its rental was requested."""

    def __init__(self, world: FakeWorld, snapshot_service: FakeSnapshotService) -> None:
        super().__init__(world)
        self._vault = snapshot_service

    async def run(self, job: Job) -> Outcome:
        if job.action is Action.PREPARE:
            await self._vault.asked.wait()
        return await super().run(job)


async def test_the_restore_of_a_single_rental_begins_while_its_account_is_made() -> None:
    worker = (world := FakeWorld()).add(WORKS)
    snapshot_service = FakeSnapshotService(world=world, wall=lambda: 0.0)
    restorer = Restorer(engine=Asked(world, snapshot_service), snapshot_service=snapshot_service, catalog=NoBook())  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        assert (await restorer.make(_job(WORKS, 0), NEWEST)).ok
    assert worker.accounts[_job(WORKS, 0).order.rental_id].unlocked


async def test_of_many_rentals_only_one_restore_begins_before_its_account_exists() -> None:
    world = FakeWorld()
    world.add(WORKS)
    snapshot_service = Slow(world)
    restorer = Restorer(engine=Asked(world, Stops(world, set())), snapshot_service=snapshot_service, catalog=NoBook())  # type: ignore[arg-type]
    making = [asyncio.create_task(restorer.make(_job(WORKS, number), NEWEST)) for number in range(2 * AT_ONCE)]
    await _spin()
    assert snapshot_service.most[WORKS.worker_id] == 1
    for one in making:
        one.cancel()
    await asyncio.gather(*making, return_exceptions=True)


async def _spin() -> None:
    for _ in range(50):
        await asyncio.sleep(0)
