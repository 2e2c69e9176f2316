"""Many homes that are to be filled at once: a few at a time on each worker."""

from __future__ import annotations

import asyncio
from collections import Counter

from engine_contract import KEY

from orion.manager.domain.copies import NEWEST, Copy, Generation
from orion.manager.engine.fake import FakeEngine, FakeWorld
from orion.manager.engine.port import Action, Host, Job
from orion.manager.engine.vault.fake import FakeVault
from orion.manager.engine.vault.port import RESTORE_DEADLINE_S, Home
from orion.manager.loops.restoring import AT_ONCE, Restorer

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
    return Job(Action.CREATE, host, name, f"r-{name}", 200_000 + number, 2, (KEY,))


async def test_a_few_homes_are_filled_at_a_time_and_a_worker_that_hangs_holds_up_no_other() -> None:
    world = FakeWorld()
    for host in (HANGS, WORKS):
        world.add(host)
    vault, engine = Slow(world), FakeEngine(world)
    restorer = Restorer(engine, vault, NoBook())  # type: ignore[arg-type]
    jobs = [_job(HANGS, number) for number in range(3 * AT_ONCE)]
    hanging = [asyncio.create_task(restorer.make(job, NEWEST)) for job in jobs]
    others = [restorer.make(_job(WORKS, 100 + number), NEWEST) for number in range(2 * AT_ONCE)]
    assert all(outcome.ok for outcome in await asyncio.gather(*others))
    assert vault.under_way == {HANGS.worker_id: AT_ONCE, WORKS.worker_id: 0}
    vault.let_go.set()
    assert all(outcome.ok for outcome in await asyncio.gather(*hanging))
    assert vault.most[HANGS.worker_id] == AT_ONCE
