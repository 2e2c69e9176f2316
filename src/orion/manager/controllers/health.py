"""The health controller: the only one that judges workers and writes their health.

It judges a worker when something about it may have changed: a commit touched it (known from the pool index), it was
heard again or is exiting (known from the heartbeat's route), or a deadline has passed, at which time alone may change
the verdict (domain/health.deadlines; deadlines are moved lazily, so a heartbeat costs nothing here). What a round has
no time for is due in the next. Each round also judges some more workers, until all have had their turn: a worker that
was missed by mistake is found by this sweep.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice

import structlog

from orion.manager.controllers.loop import Loop
from orion.manager.domain.brake import Brake, Observation, advance
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.health import (
    FORGET_AFTER_S,
    FORGET_EVERY_S,
    FORGOTTEN_AT_ONCE,
    Evidence,
    LivenessReport,
    Verdict,
    deadlines,
    judge,
)
from orion.manager.domain.leases import Leases
from orion.manager.domain.model import Worker
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import Health
from orion.manager.domain.steps import Step, move_worker
from orion.manager.operations.liveness import LivenessConnections
from orion.manager.store.port import StateStore

log = structlog.get_logger()

LOOKED_AT_ONCE = 200
"""Workers that are judged from one read of the database, so that the event loop is never blocked for long."""
ROUND_BUDGET_S = 0.5
"""Seconds after which a round leaves the other due workers to the next."""
SWEPT_AT_ONCE = 50
"""Workers that one round judges without a reason."""
NOTES_AT_ONCE = 500
"""Notes of heartbeats in one write. Each dirties a page of the database; api/workers.py shows those that still wait."""
NOTES_EVERY_S = 1.0
STEPS_AT_ONCE = 5000
"""Steps of a microsecond each before other work has its turn."""
LINES_AT_ONCE = 20
"""Log lines about equal verdicts of one commit; more of them are logged as one number."""
JUST_NOW_S = 1.0
"""Seconds for which a deadline that has passed is planned again: the judgement may have come just before it."""


class HealthController:
    def __init__(
        self,
        *,
        state_store: StateStore,
        pool_index: PoolIndex,
        leases: Leases,
        clocks: Clocks,
        proxy_answers: Callable[[], bool],
        monotonic: Callable[[], float],
        on_verdict: Callable[[], None],
        liveness: LivenessConnections | None = None,
    ) -> None:
        """`proxy_answers`: whether the manager reached itself through the proxy the last time it tried.

        `on_verdict` is called when a verdict was committed. `liveness` proves deaths; None: only leases do.
        """
        self._state_store = state_store
        self._pool_index = pool_index
        self._leases = leases
        self._clocks = clocks
        self._proxy_answers = proxy_answers
        self._monotonic = monotonic
        self._on_verdict = on_verdict
        self._liveness = liveness
        self._began_at: float | None = None
        self._noted_at: float | None = None
        self._forgot_at = monotonic()
        self._due: dict[str, None] = {}
        """Workers to be judged, in order."""
        self._deadlines: list[tuple[float, str]] = []
        """A heap of monotonic seconds and workers."""
        self._planned: dict[str, float] = {}
        """The one deadline of each worker that counts; others in the heap are outdated."""
        self._silent: dict[str, float] = {}
        """The monotonic second at which each silent worker became suspect."""
        self._due_after_brake: dict[str, None] = {}
        self._sweep: Iterator[str] = iter(())
        self.swept_at_once = SWEPT_AT_ONCE
        self.brake = Brake.at_start(monotonic())
        self.interval_s = max(0.2, min(1.0, clocks.heartbeat_s / 30))
        self.loop = Loop("health", self.interval_s, self.round)

    def mark_due(self, worker_id: str) -> None:
        """Judge this worker in the next round."""
        self._due[worker_id] = None

    def judge_soon(self, worker_id: str) -> None:
        """Judge this worker in the next round, which begins at once."""
        self.mark_due(worker_id)
        self.loop.hint()

    async def round(self) -> None:
        """Judge the workers that are due, as far as the round's time allows."""
        began = self._monotonic()
        await self._write_notes(began)
        await self._advance_brake(began)
        await self._update_liveness(self._find_due())
        self._meet_deadlines(began)
        while self._due:
            some = list(islice(self._due, LOOKED_AT_ONCE))
            for worker_id in some:
                del self._due[worker_id]
            await self._judge(some)
            if self._due and self._monotonic() - began > ROUND_BUDGET_S:
                self.loop.hint()
                return
        await self._forget_the_dead(began)

    async def _forget_the_dead(self, now: float) -> None:
        """Remove workers that have been down for long and hold nothing."""
        if now - self._forgot_at < FORGET_EVERY_S:
            return
        self._forgot_at = now
        dead = self._pool_index.longest_in(Health.DOWN, FORGET_AFTER_S, now, FORGOTTEN_AT_ONCE)
        for worker_id in await self._state_store.forget(dead) if dead else ():
            self._leases.end(worker_id)

    async def _write_notes(self, now: float) -> None:
        """Write when workers were heard, for people to read: once a second, however often a hint brings a round."""
        if self._noted_at is not None and now - self._noted_at < NOTES_EVERY_S:
            return
        notes = self._leases.take_notes(NOTES_AT_ONCE)
        if notes:
            self._noted_at = now
            await self._state_store.record_heartbeats(notes)

    def _find_due(self) -> list[str]:
        """Mark workers as due; return those that a commit touched or whose turn in the sweep it is."""
        changed = self._pool_index.take_changed()
        self._due.update(dict.fromkeys(changed))
        exiting = self._leases.exiting()
        if exiting and not self.brake.on and self._pool_index.destinations(exiting):
            self._due.update(dict.fromkeys(sorted(exiting)))
        swept = list(islice(self._sweep, self.swept_at_once))
        if len(swept) < self.swept_at_once:
            self._sweep = iter(list(self._pool_index.ids()))
        self._due.update(dict.fromkeys(swept))
        return changed + swept

    async def _update_liveness(self, worker_ids: list[str]) -> None:
        """Hold a liveness connection to each of these workers that has a session and is not down, and to no other."""
        if self._liveness is None:
            return
        outdated: list[str] = []
        for worker_id in worker_ids:
            known = self._pool_index.worker(worker_id)
            if known is None:
                self._liveness.close(worker_id)
            elif not self._liveness.is_current(worker_id, known.session_id, known.health):
                outdated.append(worker_id)
        for start in range(0, len(outdated), LOOKED_AT_ONCE):
            for worker in (await self._state_store.workers(outdated[start : start + LOOKED_AT_ONCE])).values():
                self._liveness.update(worker)

    def _meet_deadlines(self, now: float) -> None:
        """Mark the workers as due whose deadline has passed."""
        for _ in range(STEPS_AT_ONCE):
            if not self._deadlines or self._deadlines[0][0] > now:
                return
            deadline, worker_id = heapq.heappop(self._deadlines)
            if self._planned.get(worker_id) == deadline:
                del self._planned[worker_id]
                self._meet_deadline(worker_id, now)
        self.loop.hint()  # for the rest

    def _meet_deadline(self, worker_id: str, now: float) -> None:
        """Mark this worker as due, unless a heartbeat has moved its deadline, as it mostly has."""
        known, suspect_at = self._pool_index.worker(worker_id), self._suspect_at(worker_id)
        if known is not None and known.health is Health.READY and suspect_at is not None and suspect_at > now:
            self._plan_deadline(worker_id, suspect_at)
        else:
            self._due[worker_id] = None

    def _plan_deadline(self, worker_id: str, deadline: float) -> None:
        if self._planned.get(worker_id) != deadline:
            self._planned[worker_id] = deadline
            heapq.heappush(self._deadlines, (deadline, worker_id))

    # -- the brake ---------------------------------------------------------------------------------------------------

    async def _advance_brake(self, now: float) -> None:
        late_s = 0.0 if self._began_at is None else now - self._began_at - self.interval_s
        self._began_at = now
        exiting = self._leases.exiting()
        pool = len(self._pool_index) - self._pool_index.number(Health.DOWN) - len(exiting)
        silent = tuple([at async for at in self._silent_since(now)])
        seen = Observation(
            proxy_answers=self._proxy_answers(),
            late_s=late_s,
            heard_at=self._leases.heard_at,
            silent_since=silent,
            pool=pool,
        )
        before, self.brake = self.brake, advance(self.brake, seen, now, self._clocks)
        if before.on != self.brake.on or before.reason != self.brake.reason:
            log.info("brake", on=self.brake.on, reason=self.brake.reason or f"ended: {before.reason}")
        if not self.brake.on and self._due_after_brake:
            self._due |= self._due_after_brake
            self._due_after_brake = {}

    async def _silent_since(self, now: float) -> AsyncIterator[float]:
        """Yield when each silent worker became suspect, and drop those that were heard since or have exited."""
        for number, worker_id in enumerate(list(self._silent), start=1):
            if number % STEPS_AT_ONCE == 0:
                await asyncio.sleep(0)
            suspect_at = self._suspect_at(worker_id)
            if suspect_at is None or suspect_at > now:
                del self._silent[worker_id]
            else:
                yield suspect_at

    def _suspect_at(self, worker_id: str) -> float | None:
        known, lease = self._pool_index.worker(worker_id), self._leases.get(worker_id)
        if known is None or known.health is Health.DOWN or lease is None or lease.exiting_at is not None:
            return None
        return None if lease.received_at is None else lease.received_at + self._clocks.suspect_after_s

    # -- verdicts ----------------------------------------------------------------------------------------------------

    async def _judge(self, worker_ids: list[str]) -> None:
        now = self._monotonic()  # before the rows are read: see domain/health.py
        destinations = self._pool_index.destinations(self._leases.exiting())
        suspects = [worker_id for worker_id in worker_ids if self._may_change(worker_id, destinations, now)]
        if not suspects:
            await asyncio.sleep(0)  # other work has its turn between two slices
            return
        workers = await self._state_store.workers(suspects)
        verdicts: list[tuple[Evidence, Verdict]] = []
        for worker in workers.values():
            evidence = self._evidence(worker, destinations, now)
            verdict = judge(evidence)
            if verdict is None:
                self._plan(evidence)
            else:
                verdicts.append((evidence, verdict))
        await self._commit(verdicts)

    def _may_change(self, worker_id: str, destinations: int, now: float) -> bool:
        """Return whether a verdict is likely from what is in memory; if not, plan when to judge again."""
        known = self._pool_index.worker(worker_id)
        if known is None:
            return False
        evidence = self._evidence(known.as_worker(worker_id), destinations, now)
        if judge(evidence) is not None:
            return True
        self._plan(evidence)
        return False

    def _evidence(self, worker: Worker, destinations: int, now: float) -> Evidence:
        lease = self._leases.get(worker.id)
        known = self._pool_index.worker(worker.id)
        is_destination = (
            known is not None
            and known.is_destination
            and (lease is None or (lease.exiting_at or lease.evacuating_at) is None)
        )
        joined_at = self._pool_index.since(worker.id) if worker.health is Health.JOINING else None
        return Evidence(
            worker=worker,
            lease=lease,
            now=now,
            clocks=self._clocks,
            brake=self.brake,
            has_destination=destinations > is_destination,
            joining_s=0.0 if joined_at is None else now - joined_at,
            losses=self._leases.losses(worker.id, now, self._clocks.flap_window_s),
            liveness=self._liveness.report(worker) if self._liveness else LivenessReport(),
        )

    def _plan(self, evidence: Evidence) -> None:
        """Plan when to judge this worker again."""
        worker_id, now = evidence.worker.id, evidence.now
        ahead = deadlines(evidence)
        suspect_at = self._suspect_at(worker_id)
        if suspect_at is not None and suspect_at <= now:
            self._silent[worker_id] = suspect_at
        if self.brake.on and any(deadline <= now for deadline in ahead):
            self._due_after_brake[worker_id] = None
        lately = [deadline for deadline in ahead if deadline > now - JUST_NOW_S]
        if lately:
            self._plan_deadline(worker_id, min(lately))

    async def _commit(self, verdicts: list[tuple[Evidence, Verdict]]) -> None:
        """Commit these verdicts. The session of a worker that is declared down is revoked before the commit."""
        applicable: list[tuple[Evidence, Verdict]] = []
        steps: list[Step] = []
        for evidence, verdict in verdicts:
            worker = evidence.worker
            if verdict.to is Health.DOWN and not self._leases.revoke(worker.id, evidence.lease):
                self.mark_due(worker.id)
                continue  # it was heard since, so the verdict is outdated
            applicable.append((evidence, verdict))
            steps.append(move_worker(worker, verdict.to, verdict.reason))
        if steps:
            await self._apply(applicable, steps)

    async def _apply(self, verdicts: list[tuple[Evidence, Verdict]], steps: list[Step]) -> None:
        applied = await self._state_store.apply_each(steps)
        equal = Counter((verdict.to, verdict.reason) for _, verdict in verdicts)
        for (evidence, verdict), done in zip(verdicts, applied, strict=True):
            if not done:
                self.mark_due(evidence.worker.id)
                continue
            self._note_loss(evidence, verdict)
            if equal[verdict.to, verdict.reason] <= LINES_AT_ONCE:
                worker_id, hostname = evidence.worker.id, evidence.worker.hostname
                log.info(
                    "health changed", worker_id=worker_id, hostname=hostname, health=verdict.to, reason=verdict.reason
                )
        for (health, reason), number in equal.items():
            if number > LINES_AT_ONCE:  # each worker has its event
                log.info("health changed", workers=number, health=health, reason=reason)
        self._on_verdict()

    def _note_loss(self, evidence: Evidence, verdict: Verdict) -> None:
        if verdict.is_loss(evidence.worker) and not self.brake.on:
            self._leases.lost_ready(evidence.worker.id, evidence.now, self._clocks.flap_window_s)
