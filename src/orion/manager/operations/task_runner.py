"""The task runner: runs each task in the share of its worker, feeds back its outcome, and pauses after a failure.

Its memory (tasks under way, how often each failed, which rentals could not be migrated) is lost by a restart: the
reconciler derives the tasks again from the database and the inventories.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import structlog

from orion.manager.ansible.port import OTHER_BOOT, Action, Engine, Job, Outcome
from orion.manager.domain import outcomes
from orion.manager.domain.fair_share import Claim, may_take
from orion.manager.domain.leases import Leases
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.tasks import Task, TaskEnded, TaskKind, thaw
from orion.manager.operations.migrate import Migrator
from orion.manager.operations.recover import TRIES
from orion.manager.operations.restore import NOT_COUNTED, Restorer
from orion.manager.ssh.port import Host, Reach, Reached
from orion.manager.store.port import StateStore
from orion.rental_order import RentalOrder

log = structlog.get_logger()

JOB_DEADLINE_S = 30.0
REACH_TIMEOUT_S = 5.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
"""Seconds between a task's failure and its next try: the first pause, doubled by each failure, up to the longest."""
FIRST_REST_S = 2.0
LONGEST_REST_S = 300.0
"""Seconds between two attempts to migrate a rental that could not be migrated: doubled by each failure as well."""
MAX_RECOVERIES_PER_WORKER = 4
"""Homes of lost placements that are copied at once from one worker. One owner has at most half of them, so that each
owner's homes have their turn before the worker's time to join is over."""
MAX_UNKNOWN_PURGES_PER_WORKER = 2
"""Purges at once on one worker of rentals that only its own inventory has: the worker may have invented them."""
MIGRATION_TASKS = frozenset({TaskKind.PRECOPY, TaskKind.FINAL_SYNC, TaskKind.PARK})

NO_LEASE = "no_lease"
"""The code with which a worker without a lease refuses to activate a rental (orion_worker/rental/commands.py)."""

_ACTIONS = {TaskKind.CREATE: Action.CREATE, TaskKind.DELETE: Action.DELETE, TaskKind.THAW: Action.THAW}
_REACHED = {
    Reached.YES: Outcome(True),
    Reached.NO: Outcome(False, "it cannot be reached by SSH"),
    Reached.IMPOSTOR: Outcome(False, "something else answers at its address: its host key is not the pinned one"),
}

TaskKey = tuple[str, str]
"""Ids of worker and rental, see Task.key."""


@dataclass(frozen=True)
class Failure:
    count: int
    again_at: float
    """Monotonic seconds before which there is no other try."""


@dataclass(kw_only=True, eq=False)
class TaskRunner:
    state_store: StateStore
    pool_index: PoolIndex
    leases: Leases
    engine: Engine
    reach: Reach
    restorer: Restorer
    migrator: Migrator
    monotonic: Callable[[], float]
    wall: Callable[[], float]
    counts_from: Callable[[], float | None]
    """See TrustedClock."""
    wake_reconciler: Callable[[], None]
    """Called when a task has ended, and when the pause after a failure is over."""
    on_worker_change: Callable[[], None] = lambda: None
    """Called when a task has changed something by which the health controller judges."""
    on_job: Callable[[str, bool, float], None] = lambda _kind, _ok, _seconds: None
    """Called when a task has ended, with its kind, whether it succeeded, and its seconds."""

    def __post_init__(self) -> None:
        self._running: dict[TaskKey, asyncio.Task[None]] = {}
        self._tasks: dict[TaskKey, Task] = {}
        self._failures: dict[Task, Failure] = {}
        self._rests: dict[str, Failure] = {}
        """Failed migrations, by rental."""
        self._number_by_worker: Counter[str] = Counter()
        """Number of tasks under way on each worker, those of migrations not counted."""
        self._failing: set[str] = set()
        """Workers on which the last task failed. Others have no limit: many rents on one large worker are no attack."""
        self._ended: list[tuple[TaskEnded, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        """The number of tasks under way."""
        return len(self._running)

    def keys(self) -> frozenset[TaskKey]:
        return frozenset(self._running)

    def resting(self) -> frozenset[str]:
        """Return the rentals whose next migration has to wait, because one failed a short time ago."""
        now = self.monotonic()
        return frozenset(rental_id for rental_id, failure in self._rests.items() if failure.again_at > now)

    def unmigrated(self) -> frozenset[str]:
        """Return the rentals whose last migration failed."""
        since = self.monotonic() - LONGEST_REST_S
        return frozenset(rental_id for rental_id, failure in self._rests.items() if failure.again_at > since)

    def start(self, task: Task) -> None:
        """Begin this task, unless one with its key is under way, it pauses, or its worker has its share of tasks."""
        failure = self._failures.get(task)
        pauses = failure is not None and failure.again_at > self.monotonic()
        if task.key in self._running or pauses or not self._has_a_share(task):
            return
        self._running[task.key] = asyncio.create_task(self._run(task))
        self._tasks[task.key] = task
        if task.kind not in MIGRATION_TASKS:
            self._number_by_worker[task.worker_id] += 1

    def cancel_overtaken(self, busy: Collection[TaskKey], wanted: Iterable[Task]) -> None:
        """Cancel parts of a migration that was given up, and the restore of a home that is to be purged.

        `busy`: the keys of the tasks that were under way before the world was loaded from which `wanted` follows. A
        restore may take minutes, and delays all other tasks of its rental on its worker, and the recovery of its files.
        """
        kinds: dict[TaskKey, set[TaskKind]] = {}
        for task in wanted:
            kinds.setdefault(task.key, set()).add(task.kind)
        for key in self._tasks.keys() & busy:
            task, now = self._tasks[key], kinds.get(key, set())
            is_given_up = task.kind in MIGRATION_TASKS and not now & MIGRATION_TASKS
            is_filling = task.kind is TaskKind.CREATE and bool(task.restore)
            if is_given_up or (is_filling and TaskKind.DELETE in now and TaskKind.CREATE not in now):
                self._running[key].cancel()

    def forget_failures(self, looked_at: frozenset[str], wanted: Iterable[Task]) -> None:
        """Forget failures of tasks that are not wanted any more, or whose worker was removed.

        `looked_at`: the workers whose tasks are all in `wanted`.
        """

        def is_elsewhere(worker_id: str) -> bool:
            return worker_id not in looked_at and self.pool_index.worker(worker_id) is not None

        still = set(wanted)
        busy = {task.worker_id for task in still}
        self._failures = {t: f for t, f in self._failures.items() if t in still or is_elsewhere(t.worker_id)}
        self._failing = {w for w in self._failing if w in busy or is_elsewhere(w)}
        self._number_by_worker = Counter({w: number for w, number in self._number_by_worker.items() if number})

    async def stop(self) -> None:
        """Cancel all tasks; the next manager derives them again."""
        running = [*self._running.values(), *filter(None, [self._writing])]
        for job in running:
            job.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _has_a_share(self, task: Task) -> bool:
        """Return whether the task's worker may have one more: a worker that hangs must not take all of the engine."""
        under_way = self._number_by_worker[task.worker_id]
        if task.kind in MIGRATION_TASKS:
            return True  # they are few and long, and fail because of their source as often as of this worker
        if task.worker_id in self._failing:
            return under_way < 1
        if task.kind is TaskKind.RECOVER:
            there = (t for t in self._tasks.values() if t.worker_id == task.worker_id and t.kind is task.kind)
            return may_take(Claim(task.owner), Counter(Claim(t.owner) for t in there), MAX_RECOVERIES_PER_WORKER)
        is_unknown = task.kind is TaskKind.DELETE and task.placement_id is None
        return not is_unknown or under_way < MAX_UNKNOWN_PURGES_PER_WORKER

    async def _run(self, task: Task) -> None:
        try:
            began = self.monotonic()
            outcome = await self._perform(task)
            self.on_job(str(task.kind), outcome.ok, self.monotonic() - began)
            await self._feed_back(task, outcome)
        except Exception:
            log.exception("task failed", task=task.kind, worker_id=task.worker_id)
            self._fail(task)
        finally:
            # The reconciler is woken last: its round must not find this task under way.
            self._running.pop(task.key, None)
            self._tasks.pop(task.key, None)
            if task.kind not in MIGRATION_TASKS:
                self._number_by_worker[task.worker_id] -= 1
            self.wake_reconciler()

    async def _perform(self, task: Task) -> Outcome:
        ids = {task.worker_id, *((task.source.worker_id,) if task.source else ())}
        workers = await self.state_store.workers(ids)
        if len(workers) < len(ids):
            return Outcome(False, "its worker was removed")
        hosts = {worker.id: Host.of(worker) for worker in workers.values()}
        host = hosts[task.worker_id]
        if (item := task.item) is None:
            return _REACHED[await self.reach.reach(host, REACH_TIMEOUT_S)]
        if task.kind is TaskKind.RECOVER:
            return await self.restorer.recoverer.recover(host, item, task.placement_id or "", task.owner)
        keys, action = tuple(task.public_key.splitlines()), _ACTIONS.get(task.kind, Action.PREPARE)
        order = RentalOrder(
            **vars(item), public_keys=keys, start=task.start, start_mark=task.start_mark, rental_name=task.rental_name
        )
        job = Job(action=action, host=host, order=order, deadline_s=JOB_DEADLINE_S, owner=task.owner)
        if task.source:
            at_source = replace(job, host=hosts[task.source.worker_id])
            at_source = at_source.with_order(epoch=task.source.epoch, move=task.source.move)
            if task.kind is TaskKind.THAW:
                return await self.engine.run(at_source)
            return await self.migrator.run(task.kind, at_source, job)
        if task.restore:
            return await self.restorer.make(job, task.restore, task.target_snapshot)
        return await self.engine.run(job)

    async def _feed_back(self, task: Task, outcome: Outcome) -> None:
        if not outcome.ok:
            failure = self._fail(task)
            log.warning("task failed", **_described(task), attempts=failure.count, message=outcome.message)
            # A worker without a lease refuses until its next heartbeat, and one that has restarted until it registers.
            # Neither counts as an attempt, because it may succeed in a moment.
            waits = outcome.report.get(NOT_COUNTED) or outcome.report.get("code") in {NO_LEASE, OTHER_BOOT}
            attempts = 0 if waits else failure.count * int(outcome.report.get(TRIES, 1))
            if task.source and task.item and task.kind is not TaskKind.THAW:
                self._rest(task.item.rental_id)
            await self._write(task, outcome, attempts)
            await self._thaw_after(task)
            return
        self._failures.pop(task, None)
        self._failing.discard(task.worker_id)
        if task.source and task.item and task.kind in {TaskKind.FINAL_SYNC, TaskKind.PARK}:
            self._rests.pop(task.item.rental_id, None)
        if task.kind is TaskKind.DELETE and task.item:
            self.leases.cleaned(task.worker_id, task.item.rental_id, task.item.epoch)
        await self._write(task, outcome)
        log.info("task done", **_described(task))
        if task.kind is not TaskKind.CREATE:
            self.on_worker_change()

    async def _thaw_after(self, task: Task) -> None:
        """Thaw the source at once after a failed part of its migration."""
        if task.source is None or not task.source.move or task.kind is TaskKind.THAW:
            return
        thawing = thaw(await self.state_store.load_part({task.source.worker_id}, ()), task.source)
        if thawing is not None:
            self.start(thawing)

    async def _write(self, task: Task, outcome: Outcome, attempts: int = 0) -> None:
        """Write this outcome in one transaction with the others that wait for it, and return when it is committed."""
        ended = TaskEnded(
            task=task,
            ok=outcome.ok,
            wall=self.wall(),
            counts_from=self.counts_from(),
            report=outcome.report,
            message=outcome.message,
            attempts=attempts,
        )
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended.append((ended, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        await written

    async def _write_all(self) -> None:
        try:
            while self._ended:
                batch, self._ended = self._ended, []
                await self._write_batch(batch)
        finally:
            self._writing = None

    async def _write_batch(self, batch: list[tuple[TaskEnded, asyncio.Future[None]]]) -> None:
        try:
            await self.state_store.finish([ended for ended, _ in batch], outcomes.follow)
        except Exception as error:
            if len(batch) > 1:  # the outcome that cannot be written is to fail alone
                for one in batch:
                    await self._write_batch([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for _, written in batch:
            if not written.done():
                written.set_result(None)

    def _rest(self, rental_id: str) -> None:
        now = self.monotonic()
        self._rests = {r: f for r, f in self._rests.items() if f.again_at > now - LONGEST_REST_S}
        self._rests[rental_id] = _one_more(self._rests.get(rental_id), now, FIRST_REST_S, LONGEST_REST_S)

    def _fail(self, task: Task) -> Failure:
        now = self.monotonic()
        failure = self._failures[task] = _one_more(self._failures.get(task), now, FIRST_PAUSE_S, LONGEST_PAUSE_S)
        if task.kind not in MIGRATION_TASKS:
            self._failing.add(task.worker_id)
        asyncio.get_running_loop().call_later(failure.again_at - now, self.wake_reconciler)
        return failure


def _one_more(before: Failure | None, now: float, first_s: float, longest_s: float) -> Failure:
    """Return one more failure, which is followed by twice the pause of the failure before, up to the longest."""
    count = before.count + 1 if before else 1
    return Failure(count, now + min(longest_s, first_s * 2 ** (count - 1)))


def _described(task: Task) -> dict[str, Any]:
    fields: dict[str, Any] = {"task": task.kind, "worker_id": task.worker_id}
    return fields | ({"rental_id": task.item.rental_id, "epoch": task.item.epoch} if task.item else {})
