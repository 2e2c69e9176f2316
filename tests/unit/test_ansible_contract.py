"""The fake engine and the fake reach keep the contract of the real ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ansible_contract import KEY, EngineBench, EngineContract, ReachContract, account, new_job

from orion.manager.ansible import client
from orion.manager.ansible.client import AnsibleEngine, ReachedAndExpected
from orion.manager.fakes.workers import Account, FakeEngine, FakeReach, FakeWorker, FakeWorld
from orion.manager.ssh.port import Host, Reached


class FakeEngineBench(EngineBench):
    def __init__(self) -> None:
        world = FakeWorld()
        self.host = Host(worker_id="w-fakefake", address="192.0.2.7", host_keys=(KEY,))
        self.worker: FakeWorker = world.add(self.host)
        self.engine = FakeEngine(world)
        self.reach = FakeReach(world)

    async def accounts(self) -> dict[str, Account]:
        return self.worker.accounts

    async def pause(self) -> None:
        self.worker.hang()

    async def resume(self) -> None:
        self.worker.resume()


@pytest.fixture
def bench() -> FakeEngineBench:
    return FakeEngineBench()


class TestFakeEngine(EngineContract):
    async def test_a_hanging_job_fails_when_its_worker_dies(self, bench: FakeEngineBench) -> None:
        bench.worker.hang()
        running = asyncio.create_task(bench.engine.run(new_job(bench.host)))
        await bench.worker.asked.wait()
        bench.worker.die()
        assert not (await running).ok
        assert bench.worker.accounts == {}

    async def test_a_worker_that_comes_back_has_everything_locked(self, bench: FakeEngineBench) -> None:
        job = new_job(bench.host)
        await bench.engine.run(job)
        bench.worker.die()
        assert await bench.reach.reach(bench.host, 1) is Reached.NO
        bench.worker.come_back()
        assert not bench.worker.accounts[job.order.rental_id].unlocked
        await bench.engine.run(job)
        assert bench.worker.accounts[job.order.rental_id] == account(job)

    async def test_a_failure_on_demand_fails_every_job_with_its_message(self, bench: FakeEngineBench) -> None:
        bench.worker.failure = "no space left on device"
        outcome = await bench.engine.run(new_job(bench.host))
        assert (outcome.ok, outcome.message) == (False, "no space left on device")


class TestFakeReach(ReachContract):
    pass


async def test_a_reach_does_not_wait_for_an_engine_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "EXPECT_WITHIN_S", 0.01)
    world = FakeWorld()
    host = Host(worker_id="w-one", address="192.0.2.1", host_keys=(KEY,))
    world.add(host)
    reach = ReachedAndExpected(FakeReach(world), AnsibleEngine(tmp_path / "nobody.sock"))
    async with asyncio.timeout(60):
        assert await reach.reach(host, 1.0) is Reached.YES
