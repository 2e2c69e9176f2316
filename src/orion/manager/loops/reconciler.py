"""The reconciler: load, decide, apply, run, and feed the outcome back.

Killing the manager at any instant converges: nothing is kept here that the next round does not find again, except
how often a task has failed and for how long things have been as they are.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from orion.manager.domain.leases import Leases
from orion.manager.domain.model import Item, World
from orion.manager.domain.reconcile import Facts, Task, TaskKind, decide
from orion.manager.engine.port import Action, Engine, Host, Job, Outcome, Reach, Reached
from orion.manager.loops.timer import Loop
from orion.manager.store.names import new_id
from orion.manager.store.port import Ledger

log = structlog.get_logger()

INTERVAL_S = 2.0
JOB_DEADLINE_S = 30.0
REACH_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 15.0
MOST_ORPHANS = 2
"""Rentals that only its own inventory shows and that are purged at once on one worker: it may have made them up."""

_ACTIONS = {TaskKind.CREATE: Action.CREATE, TaskKind.DELETE: Action.DELETE}
_REACHED = {
    Reached.YES: Outcome(True),
    Reached.NO: Outcome(False, "it cannot be reached by SSH"),
    Reached.IMPOSTOR: Outcome(False, "something else answers at its address: its host key is not the pinned one"),
}


Inventories = Mapping[str, tuple[Item, ...]]


@dataclass(frozen=True)
class _Failure:
    count: int
    again_at: float


class Reconciler:
    def __init__(
        self,
        ledger: Ledger,
        leases: Leases,
        engine: Engine,
        reach: Reach,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        placement_ids: Iterator[str] | None = None,
    ) -> None:
        self._ledger = ledger
        self._leases = leases
        self._engine = engine
        self._reach = reach
        self._monotonic = monotonic
        self._wall = wall
        self._placement_ids = placement_ids or _random_ids()
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failures: dict[Task, _Failure] = {}
        self._at_work: Counter[str] = Counter()
        self._failing: set[str] = set()
        """Workers on which the last task failed."""
        self._since: dict[tuple[str, str], float] = {}
        self.loop = Loop("reconciler", INTERVAL_S, self.round)
        self.on_worker_change: Callable[[], None] = lambda: None
        """Told when a task changed what the health loop judges by."""

    async def round(self) -> None:
        """One pass over the whole world."""
        inventories = self._leases.inventories()  # before the snapshot: see domain/reconcile.py
        busy = set(self._running)  # before it too: what ends meanwhile is not yet done in this snapshot
        world = await self._ledger.load()
        strangers = await self._strangers(world, inventories)
        decision = decide(world, self._facts(world, inventories, strangers))
        if decision.steps and not await self._ledger.apply(decision.steps):
            self.loop.hint()  # somebody else acted: decide again from what is true now
            return
        self._forget_failures(decision.tasks)
        for task in decision.tasks:
            if task.key not in busy:
                self._start(task)

    async def stop(self) -> None:
        """Let go of what runs; the next manager asks for it again."""
        running = list(self._running.values())
        for job in running:
            job.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def overdue_ages(self) -> tuple[World, dict[str, float]]:
        """The world, and for how long each rental and placement has been as it is."""
        return await self._ledger.load(), self._ages(self._monotonic())

    async def _strangers(self, world: World, inventories: Inventories) -> frozenset[tuple[str, int]]:
        placed = {(p.rental_id, p.epoch) for p in world.placements.values()}
        unknown = [i for held in inventories.values() for i in held if (i.rental_id, i.epoch) not in placed]
        return await self._ledger.never_placed(unknown) if unknown else frozenset()

    def _facts(self, world: World, inventories: Inventories, strangers: frozenset[tuple[str, int]]) -> Facts:
        now = self._monotonic()
        # With its worker's fault: when an operator resumes that, a failed clean-up has its time again.
        faults = {worker.id: worker.fault for worker in world.workers.values()}
        states = {(p.id, f"{p.state} {faults.get(p.worker_id, '')}") for p in world.placements.values()}
        states |= {(r.id, str(r.state)) for r in world.rentals.values()}
        self._since = {key: self._since.get(key, now) for key in states}
        return Facts(inventories, self._leases.leaving(), self._ages(now), self._placement_ids, strangers)

    def _ages(self, now: float) -> dict[str, float]:
        return {identity: now - since for (identity, _), since in self._since.items()}

    def _forget_failures(self, wanted: tuple[Task, ...]) -> None:
        still = set(wanted)
        self._failures = {task: failure for task, failure in self._failures.items() if task in still}
        concerned = {task.worker_id for task in wanted}
        self._failing &= concerned
        self._at_work = Counter({worker_id: n for worker_id, n in self._at_work.items() if n or worker_id in concerned})

    def _start(self, task: Task) -> None:
        failure = self._failures.get(task)
        if task.key in self._running or (failure and failure.again_at > self._monotonic()):
            return
        if not self._has_a_share(task):
            return
        self._at_work[task.worker_id] += 1
        self._running[task.key] = asyncio.create_task(self._run(task))

    def _has_a_share(self, task: Task) -> bool:
        """The engine is everybody's: a worker that hangs with all that it is asked must not take all of it."""
        at_work = self._at_work[task.worker_id]
        if task.worker_id in self._failing:
            return at_work < 1
        return task.kind is not TaskKind.DELETE or task.placement_id is not None or at_work < MOST_ORPHANS

    async def _run(self, task: Task) -> None:
        try:
            outcome = await self._perform(task)
            await self._feed_back(task, outcome)
        except Exception:
            log.exception("task failed", task=task.kind, worker_id=task.worker_id)
            self._fail(task)
        finally:
            # In this order: the round that the hint brings must not find it running still.
            self._running.pop(task.key, None)
            self._at_work[task.worker_id] -= 1
            self.loop.hint()

    async def _perform(self, task: Task) -> Outcome:
        workers = await self._ledger.load_workers()
        worker = workers.get(task.worker_id)
        if worker is None:
            return Outcome(False, "its worker was removed")
        host = Host(worker.id, worker.address, worker.host_keys)
        if task.item is None:
            return _REACHED[await self._reach.reach(host, REACH_TIMEOUT_S)]
        item = task.item
        keys = (task.public_key,) if task.public_key else ()
        job = Job(_ACTIONS[task.kind], host, item.rental_id, item.username, item.uid, item.epoch, keys, JOB_DEADLINE_S)
        return await self._engine.run(job)

    async def _feed_back(self, task: Task, outcome: Outcome) -> None:
        if not outcome.ok:
            failure = self._fail(task)
            log.warning("task failed", **_story(task), attempts=failure.count, message=outcome.message)
            await self._ledger.fail(task, outcome.message, failure.count)
            return
        self._failures.pop(task, None)
        self._failing.discard(task.worker_id)
        if task.kind is TaskKind.DELETE and task.item:
            self._leases.cleaned(task.worker_id, task.item.rental_id, task.item.epoch)
        await self._ledger.succeed(task, outcome.report, self._wall())
        log.info("task done", **_story(task))
        if task.kind is not TaskKind.CREATE:
            self.on_worker_change()

    def _fail(self, task: Task) -> _Failure:
        count = self._failures[task].count + 1 if task in self._failures else 1
        pause_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (count - 1))
        self._failures[task] = _Failure(count, self._monotonic() + pause_s)
        self._failing.add(task.worker_id)
        asyncio.get_running_loop().call_later(pause_s, self.loop.hint)
        return self._failures[task]


def _random_ids() -> Iterator[str]:
    while True:
        yield f"p-{new_id(12)}"


def _story(task: Task) -> dict[str, Any]:
    story: dict[str, Any] = {"task": task.kind, "worker_id": task.worker_id}
    return story | ({"rental_id": task.item.rental_id, "epoch": task.item.epoch} if task.item else {})
