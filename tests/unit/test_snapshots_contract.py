"""The fake snapshot service has the same contract as the real one, which tests/integration/test_snapshots.py tests."""

from __future__ import annotations

from itertools import count

import pytest
from ansible_contract import KEY, OTHER_KEY
from snapshot_service_contract import SnapshotBench, SnapshotServiceContract

from orion.manager.ansible.port import Action, Job
from orion.manager.fakes.snapshots import FakeSnapshotService
from orion.manager.fakes.workers import FakeEngine, FakeWorld
from orion.manager.snapshots.port import Home
from orion.manager.ssh.port import Host
from orion.rental_order import RentalOrder


class FakeSnapshotBench(SnapshotBench):
    def __init__(self) -> None:
        self.world = FakeWorld()
        self.hosts = (
            Host(worker_id="w-one", address="192.0.2.1", host_keys=(KEY,)),
            Host(worker_id="w-two", address="192.0.2.2", host_keys=(OTHER_KEY,)),
        )
        for host in self.hosts:
            self.world.add(host)
        ticks = count(1)
        self.snapshot_service = FakeSnapshotService(world=self.world, wall=lambda: float(next(ticks)))
        self.engine = FakeEngine(self.world)

    @property
    def disk_bytes(self) -> int:
        return self.snapshot_service.disk_bytes

    async def create(self, home: Home, activated: bool) -> None:
        action = Action.CREATE if activated else Action.PREPARE
        order = RentalOrder(
            rental_id=home.rental_id, username=f"r-{home.rental_id}", uid=home.uid, epoch=home.epoch, public_keys=(KEY,)
        )
        outcome = await self.engine.run(Job(action=action, host=home.host, order=order))
        assert outcome.ok, outcome.message

    async def write(self, home: Home, name: str, content: str) -> None:
        self._files(home)[name] = content

    async def remove(self, home: Home, name: str) -> None:
        del self._files(home)[name]

    async def files(self, home: Home) -> dict[str, str]:
        return self._files(home)

    def _files(self, home: Home) -> dict[str, str]:
        worker = self.world.at(home.host)
        assert worker
        return worker.homes[home.rental_id]


@pytest.fixture
def bench() -> FakeSnapshotBench:
    return FakeSnapshotBench()


class TestFakeSnapshotService(SnapshotServiceContract):
    pass
