"""Many homes that are to be filled at once: a few at a time on each worker."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from engine_contract import KEY

from orion.manager.domain.copies import NEWEST, Copy, Generation
from orion.manager.engine.fake import FakeEngine, FakeWorld
from orion.manager.engine.port import Action, Host, Job, Outcome
from orion.manager.engine.vault.fake import FakeVault
from orion.manager.engine.vault.port import RESTORE_DEADLINE_S, Home
from orion.manager.loops import restoring
from orion.manager.loops.restoring import AT_ONCE, TOGETHER, Restorer

HANGS, WORKS = Host("w-hangs", "192.0.2.1", (KEY,)), Host("w-works", "192.0.2.2", (KEY,))


class NoBook:
    """Implements what a Restorer needs of `store.copies.CopyBook`: the database knows nothing."""

    async def newest(self, _rental_id: str) -> Copy | None:
        return None


class Slow(FakeVault):
    """Restores to one worker do not end until they are let go."""

    def __init__(self, world: FakeWorld) -> None:
        super().__init__(world, lambda: 0.0)
        self.under_way: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.let_go = asyncio.Event()

    async def restore(
        self, home: Home, generation: Generation | None = None, deadline_s: float = RESTORE_DEADLINE_S
    ) -> Copy | None:
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
    return Job(Action.CREATE, host, name, f"r-{name}", 200_000 + number, 2, (KEY,), owner=f"owner{number % 2}")


async def test_a_few_homes_are_filled_at_a_time_and_a_worker_that_hangs_holds_up_no_other() -> None:
    world = FakeWorld()
    for host in (HANGS, WORKS):
        world.add(host)
    vault, engine = Slow(world), FakeEngine(world)
    restorer = Restorer(engine=engine, vault=vault, book=NoBook())  # type: ignore[arg-type]
    jobs = [_job(HANGS, number) for number in range(3 * AT_ONCE)]
    hanging = [asyncio.create_task(restorer.make(job, NEWEST)) for job in jobs]
    others = [restorer.make(_job(WORKS, 100 + number), NEWEST) for number in range(2 * AT_ONCE)]
    assert all(outcome.ok for outcome in await asyncio.gather(*others))
    assert vault.under_way == {HANGS.worker_id: AT_ONCE, WORKS.worker_id: 0}
    vault.let_go.set()
    assert all(outcome.ok for outcome in await asyncio.gather(*hanging))
    assert vault.most[HANGS.worker_id] == AT_ONCE


async def test_an_owner_fills_half_of_the_homes_that_one_worker_fills_at_a_time() -> None:
    world = FakeWorld()
    world.add(HANGS)
    vault = Slow(world)
    restorer = Restorer(engine=FakeEngine(world), vault=vault, book=NoBook())  # type: ignore[arg-type]
    jobs = [replace(_job(HANGS, number), owner="greedy") for number in range(2 * AT_ONCE)]
    jobs.append(replace(_job(HANGS, 99), owner="other"))
    making = [asyncio.create_task(restorer.make(job, NEWEST)) for job in jobs]
    await _spin()
    assert vault.under_way[HANGS.worker_id] == AT_ONCE // 2 + 1
    vault.let_go.set()
    assert all(outcome.ok for outcome in await asyncio.gather(*making))


class Stops(FakeVault):
    """The restores of these rentals do not end until they are let go."""

    def __init__(self, world: FakeWorld, stopped: set[str]) -> None:
        super().__init__(world, lambda: 0.0)
        self._stopped = stopped
        self.let_go = asyncio.Event()

    async def restore(
        self, home: Home, generation: Generation | None = None, deadline_s: float = RESTORE_DEADLINE_S
    ) -> Copy | None:
        if home.rental_id in self._stopped:
            await self.let_go.wait()
        return await super().restore(home, generation, deadline_s)


async def test_those_whose_files_are_there_are_let_in_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "TOGETHER_S", 3600.0)
    worker = (world := FakeWorld()).add(WORKS)
    few, late = [_job(WORKS, number) for number in range(TOGETHER - 1)], _job(WORKS, 100)
    vault = Stops(world, {late.rental_id})
    restorer = Restorer(engine=FakeEngine(world), vault=vault, book=NoBook())  # type: ignore[arg-type]

    def let_in() -> set[str]:
        return {rental_id for rental_id, account in worker.accounts.items() if account.unlocked}

    making = [asyncio.create_task(restorer.make(job, NEWEST)) for job in (*few, late)]
    await _spin()
    assert len(worker.accounts) == TOGETHER
    assert not let_in(), "one more is being filled, and they are few"
    more = asyncio.create_task(restorer.make(_job(WORKS, 200), NEWEST))
    await _spin()
    assert len(let_in()) == TOGETHER, "so many do not wait for the one that is late"
    vault.let_go.set()
    assert all(outcome.ok for outcome in await asyncio.gather(*making, more))
    assert len(let_in()) == TOGETHER + 1


async def test_who_is_filled_alone_is_let_in_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "TOGETHER_S", 3600.0)
    world = FakeWorld()
    world.add(WORKS)
    restorer = Restorer(engine=FakeEngine(world), vault=FakeVault(world, lambda: 0.0), book=NoBook())  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        assert (await restorer.make(_job(WORKS, 0), NEWEST)).ok


class Asked(FakeEngine):
    """Makes no account before somebody has asked for the files of its rental."""

    def __init__(self, world: FakeWorld, vault: FakeVault) -> None:
        super().__init__(world)
        self._vault = vault

    async def run(self, job: Job) -> Outcome:
        if job.action is Action.PREPARE:
            await self._vault.asked.wait()
        return await super().run(job)


async def test_the_copy_of_one_rental_is_sent_for_while_its_account_is_made() -> None:
    worker = (world := FakeWorld()).add(WORKS)
    vault = FakeVault(world, lambda: 0.0)
    restorer = Restorer(engine=Asked(world, vault), vault=vault, book=NoBook())  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        assert (await restorer.make(_job(WORKS, 0), NEWEST)).ok
    assert worker.accounts[_job(WORKS, 0).rental_id].unlocked


async def test_of_many_only_one_is_sent_for_before_its_account_is_there() -> None:
    world = FakeWorld()
    world.add(WORKS)
    vault = Slow(world)
    restorer = Restorer(engine=Asked(world, Stops(world, set())), vault=vault, book=NoBook())  # type: ignore[arg-type]
    making = [asyncio.create_task(restorer.make(_job(WORKS, number), NEWEST)) for number in range(2 * AT_ONCE)]
    await _spin()
    assert vault.most[WORKS.worker_id] == 1
    for one in making:
        one.cancel()
    await asyncio.gather(*making, return_exceptions=True)


async def _spin() -> None:
    for _ in range(50):
        await asyncio.sleep(0)
