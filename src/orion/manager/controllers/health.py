"""The health controller: the only one that judges workers and writes their health.

It judges a worker when a commit has touched it (known from the pool index), when it was heard again or is exiting
(known from the heartbeat's route), and when a deadline has passed, at which time alone may change the verdict
(domain/health.deadlines; deadlines are moved lazily, so a heartbeat costs nothing here). Each round also judges some
more workers in turn: this sweep finds a worker that was missed by mistake.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import structlog

from orion.manager.controllers.loop import Loop
from orion.manager.domain import health
from orion.manager.domain.brake import Brake, Observation, advance
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.health import Evidence, LivenessReport, Verdict, deadlines, judge
from orion.manager.domain.leases import Leases
from orion.manager.domain.model import Worker
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import Health
from orion.manager.domain.steps import move_worker
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
"""Log lines about equal verdicts of one commit; if there are more, one line has their number."""
JUST_NOW_S = 1.0
"""Seconds for which a passed deadline is planned again, because the judgement may have come just before it."""


@dataclass(kw_only=True, eq=False)
class HealthController:
    state_store: StateStore
    pool_index: PoolIndex
    leases: Leases
    clocks: Clocks
    proxy_answers: Callable[[], bool]
    """Returns whether the manager reached itself through the proxy the last time it tried."""
    monotonic: Callable[[], float]
    on_verdict: Callable[[], None]
    """Called when a verdict was committed."""
    liveness: LivenessConnections | None = None
    """Proves deaths; None: only leases do."""

    def __post_init__(self) -> None:
        self._began_at: float | None = None
        self._noted_at = float("-inf")
        self._forgot_at = self.monotonic()
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
        self.brake = Brake.at_start(self.monotonic())
        self.interval_s = max(0.2, min(1.0, self.clocks.heartbeat_s / 30))
        self.loop = Loop("health", self.interval_s, self.round)

    def mark_due(self, worker_id: str) -> None:
        self._due[worker_id] = None

    def judge_soon(self, worker_id: str) -> None:
        """Judge this worker in the next round, which begins at once."""
        self.mark_due(worker_id)
        self.loop.hint()

    async def round(self) -> None:
        """Judge the workers that are due, as far as the round's time allows."""
        began = self.monotonic()
        await self._write_notes(began)
        await self._advance_brake(began)
        await self._update_liveness(self._find_due())
        self._meet_deadlines(began)
        while self._due:
            some = list(islice(self._due, LOOKED_AT_ONCE))
            for worker_id in some:
                del self._due[worker_id]
            await self._judge(some)
            if self._due and self.monotonic() - began > ROUND_BUDGET_S:
                self.loop.hint()
                return
        await self._forget_the_dead(began)

    async def _forget_the_dead(self, now: float) -> None:
        """Remove workers that have been down for long and hold nothing."""
        if now - self._forgot_at < health.FORGET_EVERY_S:
            return
        self._forgot_at = now
        dead = self.pool_index.longest_in(Health.DOWN, health.FORGET_AFTER_S, now, health.FORGOTTEN_AT_ONCE)
        for worker_id in await self.state_store.forget(dead) if dead else ():
            self.leases.end(worker_id)

    async def _write_notes(self, now: float) -> None:
        """Write when workers were heard, for people to read: once a second, however often a hint brings a round."""
        if now - self._noted_at < NOTES_EVERY_S:
            return
        if notes := self.leases.take_notes(NOTES_AT_ONCE):
            self._noted_at = now
            await self.state_store.record_heartbeats(notes)

    def _find_due(self) -> list[str]:
        """Mark workers as due; return those that a commit touched, and those of the sweep."""
        changed = self.pool_index.take_changed()
        self._due.update(dict.fromkeys(changed))
        exiting = self.leases.exiting()
        if exiting and not self.brake.on and self.pool_index.destinations(exiting):
            self._due.update(dict.fromkeys(sorted(exiting)))
        swept = list(islice(self._sweep, self.swept_at_once))
        if len(swept) < self.swept_at_once:
            self._sweep = iter(list(self.pool_index.ids()))
        self._due.update(dict.fromkeys(swept))
        return changed + swept

    async def _update_liveness(self, worker_ids: list[str]) -> None:
        """Hold a liveness connection to each of these workers that has a session and is not down, and to no other."""
        if self.liveness is None:
            return
        outdated: list[str] = []
        for worker_id in worker_ids:
            known = self.pool_index.worker(worker_id)
            if known is None:
                self.liveness.close(worker_id)
            elif not self.liveness.is_current(worker_id, known.session_id, known.health):
                outdated.append(worker_id)
        for start in range(0, len(outdated), LOOKED_AT_ONCE):
            for worker in (await self.state_store.workers(outdated[start : start + LOOKED_AT_ONCE])).values():
                self.liveness.update(worker)

    def _meet_deadlines(self, now: float) -> None:
        for _ in range(STEPS_AT_ONCE):
            if not self._deadlines or self._deadlines[0][0] > now:
                return
            deadline, worker_id = heapq.heappop(self._deadlines)
            if self._planned.get(worker_id) != deadline:
                continue
            del self._planned[worker_id]
            known, suspect_at = self.pool_index.worker(worker_id), self._suspect_at(worker_id)
            if known is not None and known.health is Health.READY and suspect_at is not None and suspect_at > now:
                self._plan_deadline(worker_id, suspect_at)  # a heartbeat has moved the deadline, as it mostly has
            else:
                self.mark_due(worker_id)
        self.loop.hint()  # for the rest

    def _plan_deadline(self, worker_id: str, deadline: float) -> None:
        if self._planned.get(worker_id) != deadline:
            self._planned[worker_id] = deadline
            heapq.heappush(self._deadlines, (deadline, worker_id))

    async def _advance_brake(self, now: float) -> None:
        late_s = 0.0 if self._began_at is None else now - self._began_at - self.interval_s
        self._began_at = now
        pool = len(self.pool_index) - self.pool_index.number(Health.DOWN) - len(self.leases.exiting())
        silent = tuple([at async for at in self._silent_since(now)])
        heard_at, proxy_answers = self.leases.heard_at, self.proxy_answers()
        seen = Observation(
            proxy_answers=proxy_answers, late_s=late_s, heard_at=heard_at, silent_since=silent, pool=pool
        )
        before, self.brake = self.brake, advance(self.brake, seen, now, self.clocks)
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
        known, lease = self.pool_index.worker(worker_id), self.leases.get(worker_id)
        if known is None or known.health is Health.DOWN or lease is None or lease.exiting_at is not None:
            return None
        return None if lease.received_at is None else lease.received_at + self.clocks.suspect_after_s

    async def _judge(self, worker_ids: list[str]) -> None:
        now = self.monotonic()  # before the rows are read: see domain/health.py
        destinations = self.pool_index.destinations(self.leases.exiting())
        suspects = [worker_id for worker_id in worker_ids if self._may_change(worker_id, destinations, now)]
        if not suspects:
            await asyncio.sleep(0)  # other work has its turn between two slices
            return
        verdicts: list[tuple[Evidence, Verdict]] = []
        for worker in (await self.state_store.workers(suspects)).values():
            evidence = self._evidence(worker, destinations, now)
            if verdict := judge(evidence):
                verdicts.append((evidence, verdict))
            else:
                self._plan(evidence)
        await self._commit(verdicts)

    def _may_change(self, worker_id: str, destinations: int, now: float) -> bool:
        """Return whether memory alone makes a verdict likely; if not, plan when to judge again."""
        known = self.pool_index.worker(worker_id)
        if known is None:
            return False
        evidence = self._evidence(known.as_worker(worker_id), destinations, now)
        if judge(evidence) is not None:
            return True
        self._plan(evidence)
        return False

    def _evidence(self, worker: Worker, destinations: int, now: float) -> Evidence:
        lease, known = self.leases.get(worker.id), self.pool_index.worker(worker.id)
        stays = lease is None or (lease.exiting_at or lease.evacuating_at) is None
        is_destination = known is not None and known.is_destination and stays
        joined_at = self.pool_index.since(worker.id) if worker.health is Health.JOINING else None
        return Evidence(
            worker=worker,
            lease=lease,
            now=now,
            clocks=self.clocks,
            brake=self.brake,
            has_destination=destinations > is_destination,
            joining_s=0.0 if joined_at is None else now - joined_at,
            losses=self.leases.losses(worker.id, now, self.clocks.flap_window_s),
            liveness=self.liveness.report(worker) if self.liveness else LivenessReport(),
        )

    def _plan(self, evidence: Evidence) -> None:
        worker_id, now, ahead = evidence.worker.id, evidence.now, deadlines(evidence)
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
        for evidence, verdict in verdicts:
            if verdict.to is Health.DOWN and not self.leases.revoke(evidence.worker.id, evidence.lease):
                self.mark_due(evidence.worker.id)  # it was heard since, so the verdict is outdated
            else:
                applicable.append((evidence, verdict))
        if not applicable:
            return
        steps = [move_worker(evidence.worker, verdict.to, verdict.reason) for evidence, verdict in applicable]
        applied = await self.state_store.apply_each(steps)
        equal = Counter((verdict.to, verdict.reason) for _, verdict in applicable)
        for (evidence, verdict), done in zip(applicable, applied, strict=True):
            worker, to, reason = evidence.worker, verdict.to, verdict.reason
            if not done:
                self.mark_due(worker.id)
                continue
            if verdict.is_loss(worker) and not self.brake.on:
                self.leases.lost_ready(worker.id, evidence.now, self.clocks.flap_window_s)
            if equal[to, reason] <= LINES_AT_ONCE:
                log.info("health changed", worker_id=worker.id, hostname=worker.hostname, health=to, reason=reason)
        for (to, reason), number in equal.items():
            if number > LINES_AT_ONCE:  # each worker has its event
                log.info("health changed", workers=number, health=to, reason=reason)
        self.on_verdict()
