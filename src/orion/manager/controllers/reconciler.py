"""The reconciler: load, decide, apply, run, and feed the outcome back.

A round looks at what is not at rest: the workers that the roster calls restless, those whose inventory does not agree
with what is placed there, the rentals that wait, and the workers that could take them. What each of these is follows
from rows and inventories as they are now. As a net below it, each round looks at some more workers, whatever they are,
until all have had their turn.

Killing the manager at any instant converges: nothing is kept here that the next round does not find again, except
how often a task has failed and for how long things have been as they are.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import structlog

from orion.manager.ansible.port import OTHER_BOOT, Action, Engine, Job, Outcome
from orion.manager.controllers.loop import Loop
from orion.manager.domain import outcomes
from orion.manager.domain.assignment import MAX_PLACED, request_migration
from orion.manager.domain.fair_share import Claim, may_take
from orion.manager.domain.leases import Leases
from orion.manager.domain.migration import NotMigrated, Source
from orion.manager.domain.model import Item
from orion.manager.domain.observations import Observations
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.reconcile import decide
from orion.manager.domain.states import Health, PlacementState
from orion.manager.domain.tasks import Task, TaskEnded, TaskKind, thaw
from orion.manager.domain.world import World
from orion.manager.operations.migrate import Migrator
from orion.manager.operations.recover import TRIES
from orion.manager.operations.restore import WAITS, Restorer
from orion.manager.ssh.port import Host, Reach, Reached
from orion.manager.store.names import new_id
from orion.manager.store.port import StateStore

log = structlog.get_logger()

INTERVAL_S = 2.0
JOB_DEADLINE_S = 30.0
REACH_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 15.0
MOST_SALVAGES = 4
"""Homes that are copied aside at once on one worker, of which one owner has half: there is a time for all of them."""
MOST_ORPHANS = 2
"""Rentals that only its own inventory shows and that are purged at once on one worker: it may have made them up."""
LOOKED_AT_ONCE = 400
"""Workers of one round: so that no decision holds everybody else up."""
SWEPT_AT_ONCE = 50
MOST_TRIES = 5
"""To begin a move while others act."""
SPARE_CANDIDATES = 16
"""Beyond one for each rental that waits: for those that failed to make one of them."""

VACATING_SETTLES_S = 1.0
"""Until the rentals of a worker that was told to stop are moved: where all are told, none is to move among them."""
FIRST_REST_S = 2.0
LONGEST_REST_S = 300.0
"""Between two attempts to move what could not be moved."""

_ACTIONS = {TaskKind.CREATE: Action.CREATE, TaskKind.DELETE: Action.DELETE, TaskKind.THAW: Action.THAW}
MOVES = frozenset({TaskKind.PRECOPY, TaskKind.FINAL_SYNC, TaskKind.PARK})
_REACHED = {
    Reached.YES: Outcome(True),
    Reached.NO: Outcome(False, "it cannot be reached by SSH"),
    Reached.IMPOSTOR: Outcome(False, "something else answers at its address: its host key is not the pinned one"),
}

NO_LEASE = "no_lease"
"""The code of that refusal (orion_worker/rental/commands.py)."""

Inventories = Mapping[str, tuple[Item, ...]]


@dataclass(frozen=True)
class _Failure:
    count: int
    again_at: float


class Reconciler:
    def __init__(
        self,
        *,
        state_store: StateStore,
        pool_index: PoolIndex,
        leases: Leases,
        engine: Engine,
        reach: Reach,
        restorer: Restorer,
        mover: Migrator,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        counts_from: Callable[[], float | None],
        placement_ids: Iterator[str] | None = None,
        awaits_files_s: float = 0.0,
        on_worker_change: Callable[[], None] = lambda: None,
        on_job: Callable[[str, bool, float], None] = lambda _kind, _ok, _seconds: None,
    ) -> None:
        """`counts_from`: see TrustedClock. `awaits_files_s`: see domain/observations.py.

        `on_worker_change` is called when a task has changed what the health loop judges by; `on_job` when a task has
        ended, with its kind, whether it succeeded, and its seconds.
        """
        self._ledger = state_store
        self._roster = pool_index
        self._leases = leases
        self._engine = engine
        self._reach = reach
        self._restorer = restorer
        self._mover = mover
        self._monotonic = monotonic
        self._wall = wall
        self._counts_from = counts_from
        self._placement_ids = placement_ids or _random_ids()
        self._awaits_files_s = awaits_files_s
        self._on_worker_change = on_worker_change
        self._on_job = on_job
        self._placing = asyncio.Lock()
        """From the look to the commit of whoever gives slots away: two that looked at once would give the same one."""
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._tasks: dict[tuple[str, str], Task] = {}
        """The tasks under way, by the same keys."""
        self._rests: dict[str, _Failure] = {}
        """Of rentals that could not be moved."""
        self._failures: dict[Task, _Failure] = {}
        self._at_work: Counter[str] = Counter()
        self._failing: set[str] = set()
        """Workers on which the last task failed."""
        self._disagreeing: dict[str, None] = {}
        self._sweep: Iterator[str] = iter(())
        self._ended: list[tuple[TaskEnded, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self.swept_at_once = SWEPT_AT_ONCE
        self.loop = Loop("reconciler", INTERVAL_S, self.round)

    def shown(self, worker_id: str, inventory: Sequence[Item]) -> None:
        """What a worker that called home shows, compared with what is placed there."""
        news = self._roster.has_new_ends(worker_id, self._leases.start_ends(worker_id))
        if news or self._roster.disagrees(worker_id, inventory):
            self._disagreeing[worker_id] = None
        else:
            self._disagreeing.pop(worker_id, None)

    async def round(self) -> None:
        """One pass over all that is not at rest, or over a good part of it."""
        looked_at = self._look_at()
        inventories = self._leases.inventories(looked_at)  # before the snapshot: see domain/reconcile.py
        busy = set(self._running)  # before it too: what ends meanwhile is not yet done in this snapshot
        async with self._placing:
            world = await self._snapshot(looked_at)
            unknown_rentals = await self._strangers(world, inventories)
            decision = decide(world, self._facts(world, inventories, unknown_rentals))
            if decision.steps and not await self._ledger.apply(decision.steps):
                self.loop.hint()  # somebody else acted: decide again from what is true now
                return
        self._forget_failures(looked_at, decision.tasks)
        self._end_what_is_overtaken(busy, decision.tasks)
        for task in decision.tasks:
            if task.key not in busy:
                self._start(task)
        self._compare_again(looked_at)
        if decision.steps and self._is_more_than_one_round():
            self.loop.hint()

    def _compare_again(self, looked_at: frozenset[str]) -> None:
        """With what each shows by now, not with what this round was decided from."""
        by_now = self._leases.inventories(looked_at)
        for worker_id in looked_at:
            if worker_id in by_now:
                self.shown(worker_id, by_now[worker_id])
            else:
                self._disagreeing.pop(worker_id, None)

    async def stop(self) -> None:
        """Let go of what runs; the next manager asks for it again."""
        running: list[asyncio.Task[None]] = list(self._running.values())
        running += [self._writing] if self._writing else []
        for job in running:
            job.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    @property
    def running(self) -> int:
        """Tasks under way."""
        return len(self._running)

    async def overdue_world(self, worker_ids: Collection[str]) -> tuple[World, dict[str, float]]:
        """These workers, all that is in work, and for how long each rental and placement has been as it is."""
        world = await self._ledger.load_part({*worker_ids, *self._roster.dirty_workers(LOOKED_AT_ONCE)}, ())
        return world, self._ages(world)

    async def ask_to_move(self, rental_id: str, worker_id: str, actor: str) -> None:
        """Begin a planned move from that worker, unless it is under way. Raises moves.NotMigrated."""
        for _ in range(MOST_TRIES):
            async with self._placing:
                exiting = self._leases.exiting()
                candidates = self._roster.room.best(SPARE_CANDIDATES, without={*exiting, worker_id})
                world = await self._ledger.load_part({worker_id}, candidates)
                here = [w for w in world.workers if world.is_whole(w) or w in world.taken]
                world.elsewhere = self._roster.refusals(here, exiting)
                observations = Observations(inventories={}, exiting=exiting, ages={}, new_ids=self._placement_ids)
                step = request_migration(world, rental_id, actor, observations)
                if step is None or await self._ledger.apply([step]):
                    self.loop.hint()
                    return
        raise NotMigrated("busy", "it is changing just now: try again")

    def _look_at(self) -> frozenset[str]:
        dirty_workers = self._roster.dirty_workers(LOOKED_AT_ONCE)
        disagreeing = list(islice(self._disagreeing, LOOKED_AT_ONCE))
        for worker_id in disagreeing:
            self._disagreeing[worker_id] = self._disagreeing.pop(worker_id)  # another's turn, if they are too many
        swept = list(islice(self._sweep, self.swept_at_once))
        if len(swept) < self.swept_at_once:
            self._sweep = iter(list(self._roster.ids()))
        evacuating = (w for w in self._evacuating() if self._roster.placements_on(w))
        return frozenset((*dirty_workers, *disagreeing, *evacuating, *swept))

    def _evacuating(self) -> frozenset[str]:
        return self._leases.evacuating(self._monotonic() - VACATING_SETTLES_S)

    def _end_what_is_overtaken(self, busy: set[tuple[str, str]], wanted: Iterable[Task]) -> None:
        """End parts of a move that was given up before this snapshot, and the filling of a home that is to go away.

        To fill a home may take minutes. As long as it is under way nothing else of that rental is done on that worker,
        nor salvaged elsewhere.
        """
        kinds: dict[tuple[str, str], set[TaskKind]] = {}
        for task in wanted:
            kinds.setdefault(task.key, set()).add(task.kind)
        for key in self._tasks.keys() & busy:
            task, now = self._tasks[key], kinds.get(key, set())
            is_given_up = task.kind in MOVES and not now & MOVES
            is_filling = task.kind is TaskKind.CREATE and bool(task.restore)
            if is_given_up or (is_filling and TaskKind.DELETE in now and TaskKind.CREATE not in now):
                self._running[key].cancel()

    def _is_more_than_one_round(self) -> bool:
        many = max(self._roster.number_of_dirty_workers, len(self._disagreeing)) > LOOKED_AT_ONCE
        return many or self._roster.waiting() > MAX_PLACED

    async def _snapshot(self, looked_at: frozenset[str]) -> World:
        exiting = self._leases.exiting()
        wanted = min(self._roster.wanted_places(looked_at, exiting), MAX_PLACED)
        candidates = self._roster.room.best(wanted + SPARE_CANDIDATES, without=exiting) if wanted else []
        world = await self._ledger.load_part(looked_at, candidates)
        if wanted:
            here = [w for w in world.workers if world.is_whole(w) or w in world.taken]
            world.elsewhere = self._roster.refusals(here, exiting)
        return world

    async def _strangers(self, world: World, inventories: Inventories) -> frozenset[tuple[str, int]]:
        placed = {(p.rental_id, p.epoch) for p in world.placements.values()}
        unknown = [i for held in inventories.values() for i in held if (i.rental_id, i.epoch) not in placed]
        return await self._ledger.never_placed(unknown) if unknown else frozenset()

    def _facts(
        self, world: World, inventories: Inventories, unknown_rentals: frozenset[tuple[str, int]]
    ) -> Observations:
        now = self._monotonic()
        migration_backoff = frozenset(rental_id for rental_id, failure in self._rests.items() if failure.again_at > now)
        migration_failed = frozenset(r for r, failure in self._rests.items() if failure.again_at > now - LONGEST_REST_S)
        return Observations(
            inventories=inventories,
            exiting=self._leases.exiting(),
            ages=self._ages(world),
            new_ids=self._placement_ids,
            unknown_rentals=unknown_rentals,
            wall=self._wall(),
            evacuating=self._evacuating(),
            migration_backoff=migration_backoff,
            migration_failed=migration_failed,
            awaits_files_s=self._awaits_files_s,
            start_ends={worker_id: self._leases.start_ends(worker_id) for worker_id in inventories},
        )

    def _ages(self, world: World) -> dict[str, float]:
        now = self._monotonic()
        moving = [p.id for p in world.placements.values() if p.state is not PlacementState.RUNNING or p.held]
        ages = {identity: self._roster.age_of(identity, now) for identity in (*moving, *world.rentals)}
        joining = (w.id for w in world.workers.values() if w.health is Health.JOINING)
        return ages | {w: now - since for w in joining if (since := self._roster.since(w)) is not None}

    def _forget_failures(self, looked_at: frozenset[str], wanted: Iterable[Task]) -> None:
        """Of what is not wanted any more, or of a worker that was removed."""
        still = set(wanted)
        self._failures = {
            task: failure
            for task, failure in self._failures.items()
            if task in still or not (task.worker_id in looked_at or self._roster.worker(task.worker_id) is None)
        }
        concerned = {task.worker_id for task in still}
        self._failing = {w for w in self._failing if w in concerned or (w not in looked_at and self._roster.worker(w))}
        self._at_work = Counter({worker_id: number for worker_id, number in self._at_work.items() if number})

    def _start(self, task: Task) -> None:
        failure = self._failures.get(task)
        if task.key in self._running or (failure and failure.again_at > self._monotonic()):
            return
        if not self._has_a_share(task):
            return
        self._running[task.key] = asyncio.create_task(self._run(task))
        self._tasks[task.key] = task
        if task.kind not in MOVES:
            self._at_work[task.worker_id] += 1

    def _has_a_share(self, task: Task) -> bool:
        """The engine is everybody's: a worker that hangs with all that it is asked must not take all of it."""
        at_work = self._at_work[task.worker_id]
        if task.kind in MOVES:
            return True  # they are few, take long, and fail by the worker that is left as often as by this one
        if task.worker_id in self._failing:
            return at_work < 1
        if task.kind is TaskKind.RECOVER:
            return may_take(Claim(task.owner), self._salvages_on(task.worker_id), MOST_SALVAGES)
        return task.kind is not TaskKind.DELETE or task.placement_id is not None or at_work < MOST_ORPHANS

    def _salvages_on(self, worker_id: str) -> Counter[Claim]:
        under_way = (t for t in self._tasks.values() if t.worker_id == worker_id and t.kind is TaskKind.RECOVER)
        return Counter(Claim(task.owner) for task in under_way)

    async def _run(self, task: Task) -> None:
        try:
            began = self._monotonic()
            outcome = await self._perform(task)
            self._on_job(str(task.kind), outcome.ok, self._monotonic() - began)
            await self._feed_back(task, outcome)
        except Exception:
            log.exception("task failed", task=task.kind, worker_id=task.worker_id)
            self._fail(task)
        finally:
            # In this order: the round that the hint brings must not find it running still.
            self._running.pop(task.key, None)
            self._tasks.pop(task.key, None)
            if task.kind not in MOVES:
                self._at_work[task.worker_id] -= 1
            self.loop.hint()

    async def _perform(self, task: Task) -> Outcome:
        ids = {task.worker_id, *((task.source.worker_id,) if task.source else ())}
        workers = await self._ledger.workers(ids)
        if len(workers) < len(ids):
            return Outcome(False, "its worker was removed")
        hosts = {w.id: Host(w.id, w.address, w.host_keys, boot_id=w.ordered_boot_id) for w in workers.values()}
        host = hosts[task.worker_id]
        if task.item is None:
            return _REACHED[await self._reach.reach(host, REACH_TIMEOUT_S)]
        item = task.item
        if task.kind is TaskKind.RECOVER:
            return await self._restorer.salvager.salvage(host, item, task.placement_id or "", task.owner)
        keys, action = tuple(task.public_key.splitlines()), _ACTIONS.get(task.kind, Action.PREPARE)
        who = item.rental_id, item.username, item.uid, item.epoch
        job = Job(action, host, *who, keys, JOB_DEADLINE_S, task.start, task.start_mark, task.rental_name)
        job = replace(job, owner=task.owner)
        if task.source:
            return await self._move(task, job, hosts[task.source.worker_id], task.source)
        if task.restore:
            return await self._restorer.make(job, task.restore, task.filled)
        return await self._engine.run(job)

    async def _move(self, task: Task, job: Job, host: Host, source: Source) -> Outcome:
        away = replace(job, host=host, epoch=source.epoch, move=source.move)
        if task.kind is TaskKind.THAW:
            return await self._engine.run(away)
        if task.kind is TaskKind.PARK:
            return await self._mover.park(away)
        part = self._mover.finish if task.kind is TaskKind.FINAL_SYNC else self._mover.seed
        return await part(away, job)

    async def _feed_back(self, task: Task, outcome: Outcome) -> None:
        if not outcome.ok:
            failure = self._fail(task)
            log.warning("task failed", **_story(task), attempts=failure.count, message=outcome.message)
            # A worker without a lease lets nobody in until its next heartbeat, and one that has restarted takes no
            # order before it has registered: that is no failure to make anything. The next try asks anew who is there.
            waits = outcome.report.get(WAITS) or outcome.report.get("code") in {NO_LEASE, OTHER_BOOT}
            attempts = 0 if waits else failure.count * int(outcome.report.get(TRIES, 1))
            if task.source and task.item and task.kind is not TaskKind.THAW:
                self._rest(task.item.rental_id)
            await self._write(self._end_of(task, outcome, attempts))
            await self._thaw_after(task)
            return
        self._failures.pop(task, None)
        self._failing.discard(task.worker_id)
        if task.source and task.item and task.kind in {TaskKind.FINAL_SYNC, TaskKind.PARK}:
            self._rests.pop(task.item.rental_id, None)
        if task.kind is TaskKind.DELETE and task.item:
            self._leases.cleaned(task.worker_id, task.item.rental_id, task.item.epoch)
        await self._write(self._end_of(task, outcome))
        log.info("task done", **_story(task))
        if task.kind is not TaskKind.CREATE:
            self._on_worker_change()

    def _end_of(self, task: Task, outcome: Outcome, attempts: int = 0) -> TaskEnded:
        return TaskEnded(
            task=task,
            ok=outcome.ok,
            wall=self._wall(),
            counts_from=self._counts_from(),
            report=outcome.report,
            message=outcome.message,
            attempts=attempts,
        )

    async def _thaw_after(self, task: Task) -> None:
        """What stood still for a move that has failed goes on at once."""
        if task.source is None or not task.source.move or task.kind is TaskKind.THAW:
            return
        thawing = thaw(await self._ledger.load_part({task.source.worker_id}, ()), task.source)
        if thawing is not None:
            self._start(thawing)

    async def _write(self, ended: TaskEnded) -> None:
        """With all the others that wait, in one transaction."""
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
            await self._ledger.finish([ended for ended, _ in batch], outcomes.follow)
        except Exception as error:
            if len(batch) > 1:  # one that cannot be written is nobody else's failure
                for one in batch:
                    await self._write_batch([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for _, written in batch:
            if not written.done():
                written.set_result(None)

    def _rest(self, rental_id: str) -> None:
        """The longer, the more often it could not be moved."""
        now = self._monotonic()
        self._rests = {r: f for r, f in self._rests.items() if f.again_at > now - LONGEST_REST_S}
        count = self._rests[rental_id].count + 1 if rental_id in self._rests else 1
        rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** (count - 1))
        self._rests[rental_id] = _Failure(count, now + rest_s)

    def _fail(self, task: Task) -> _Failure:
        count = self._failures[task].count + 1 if task in self._failures else 1
        pause_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (count - 1))
        self._failures[task] = _Failure(count, self._monotonic() + pause_s)
        if task.kind not in MOVES:
            self._failing.add(task.worker_id)
        asyncio.get_running_loop().call_later(pause_s, self.loop.hint)
        return self._failures[task]


def _random_ids() -> Iterator[str]:
    while True:
        yield f"p-{new_id(12)}"


def _story(task: Task) -> dict[str, Any]:
    story: dict[str, Any] = {"task": task.kind, "worker_id": task.worker_id}
    return story | ({"rental_id": task.item.rental_id, "epoch": task.item.epoch} if task.item else {})
