"""The health loop: the only one that judges workers and writes their health.

It looks at a worker when something about it may have changed: a commit touched it (the roster tells), it was heard
again or said goodbye (the heartbeat's route tells), or a moment has come at which time alone may change the verdict
(domain/health.deadlines; kept lazily, so a heartbeat moves nothing here). What a round has no time for is due in the
next. As a net below it, each round looks at some more workers until all have had their turn.
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
"""Workers judged from one snapshot: so that nobody is held up for long in between."""
ROUND_BUDGET_S = 0.5
SWEPT_AT_ONCE = 50
NOTES_AT_ONCE = 500
"""Each dirties a page of the database: of a large pool some wait, and people are shown what waits (api/workers.py)."""
NOTES_EVERY_S = 1.0
GONE_THROUGH_AT_ONCE = 5000
"""Of what takes a microsecond each."""
LINES_AT_ONCE = 20
"""Of the log, about verdicts that are alike and come together."""
JUST_NOW_S = 1.0
"""A moment that passed so lately may not have counted yet when its worker was judged."""


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
        watching: LivenessConnections | None = None,
    ) -> None:
        """`door_open`: whether the manager reached itself through the proxy the last time it asked.

        `watching`: what proves deaths; None: only leases do.
        """
        self._ledger = state_store
        self._roster = pool_index
        self._leases = leases
        self._clocks = clocks
        self._door_open = proxy_answers
        self._monotonic = monotonic
        self._on_verdict = on_verdict
        self._watching = watching
        self._began_at: float | None = None
        self._noted_at: float | None = None
        self._forgot_at = monotonic()
        self._due: dict[str, None] = {}
        self._moments: list[tuple[float, str]] = []
        self._planned: dict[str, float] = {}
        self._silent: dict[str, float] = {}
        self._until_the_brake_ends: dict[str, None] = {}
        self._sweep: Iterator[str] = iter(())
        self.swept_at_once = SWEPT_AT_ONCE
        self.brake = Brake.at_start(monotonic())
        self.interval_s = max(0.2, min(1.0, clocks.heartbeat_s / 30))
        self.loop = Loop("health", self.interval_s, self.round)

    def look_at(self, worker_id: str) -> None:
        """Judge it in the next round."""
        self._due[worker_id] = None

    def judge_now(self, worker_id: str) -> None:
        self.look_at(worker_id)
        self.loop.hint()

    async def round(self) -> None:
        began = self._monotonic()
        await self._write_notes(began)
        await self._advance_brake(began)
        await self._watch(self._find_due())
        self._come_to_moments(began)
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
        """Those that have been down for long, and of which nothing is missing."""
        if now - self._forgot_at < FORGET_EVERY_S:
            return
        self._forgot_at = now
        dead = self._roster.longest_in(Health.DOWN, FORGET_AFTER_S, now, FORGOTTEN_AT_ONCE)
        for worker_id in await self._ledger.forget(dead) if dead else ():
            self._leases.end(worker_id)

    async def _write_notes(self, now: float) -> None:
        """For people to read: once a second, however often a hint brings a round."""
        if self._noted_at is not None and now - self._noted_at < NOTES_EVERY_S:
            return
        notes = self._leases.take_notes(NOTES_AT_ONCE)
        if notes:
            self._noted_at = now
            await self._ledger.record_heartbeats(notes)

    def _find_due(self) -> list[str]:
        """Those of them that a commit touched, or whose turn it is."""
        changed = self._roster.take_changed()
        self._due.update(dict.fromkeys(changed))
        exiting = self._leases.exiting()
        if exiting and not self.brake.on and self._roster.destinations(exiting):
            self._due.update(dict.fromkeys(sorted(exiting)))
        swept = list(islice(self._sweep, self.swept_at_once))
        if len(swept) < self.swept_at_once:
            self._sweep = iter(list(self._roster.ids()))
        self._due.update(dict.fromkeys(swept))
        return changed + swept

    async def _watch(self, worker_ids: list[str]) -> None:
        """Hold a watch on those that are counted on, and on no others."""
        if self._watching is None:
            return
        begun: list[str] = []
        for worker_id in worker_ids:
            known = self._roster.worker(worker_id)
            if known is None:
                self._watching.close(worker_id)
            elif not self._watching.is_current(worker_id, known.session_id, known.health):
                begun.append(worker_id)
        for start in range(0, len(begun), LOOKED_AT_ONCE):
            for worker in (await self._ledger.workers(begun[start : start + LOOKED_AT_ONCE])).values():
                self._watching.update(worker)

    def _come_to_moments(self, now: float) -> None:
        for _ in range(GONE_THROUGH_AT_ONCE):
            if not self._moments or self._moments[0][0] > now:
                return
            moment, worker_id = heapq.heappop(self._moments)
            if self._planned.get(worker_id) == moment:
                del self._planned[worker_id]
                self._come_to(worker_id, now)
        self.loop.hint()  # for the rest

    def _come_to(self, worker_id: str, now: float) -> None:
        """A moment of its has come; most often a heartbeat has come before, and moved it."""
        known, suspect_at = self._roster.worker(worker_id), self._suspect_at(worker_id)
        if known is not None and known.health is Health.READY and suspect_at is not None and suspect_at > now:
            self._wait_for(worker_id, suspect_at)
        else:
            self._due[worker_id] = None

    def _wait_for(self, worker_id: str, moment: float) -> None:
        if self._planned.get(worker_id) != moment:
            self._planned[worker_id] = moment
            heapq.heappush(self._moments, (moment, worker_id))

    # -- the brake ---------------------------------------------------------------------------------------------------

    async def _advance_brake(self, now: float) -> None:
        late_s = 0.0 if self._began_at is None else now - self._began_at - self.interval_s
        self._began_at = now
        exiting = self._leases.exiting()
        pool = len(self._roster) - self._roster.number(Health.DOWN) - len(exiting)
        silent = tuple([at async for at in self._silent_since(now)])
        seen = Observation(
            proxy_answers=self._door_open(),
            late_s=late_s,
            heard_at=self._leases.heard_at,
            silent_since=silent,
            pool=pool,
        )
        before, self.brake = self.brake, advance(self.brake, seen, now, self._clocks)
        if before.on != self.brake.on or before.reason != self.brake.reason:
            log.info("brake", on=self.brake.on, reason=self.brake.reason or f"ended: {before.reason}")
        if not self.brake.on and self._until_the_brake_ends:
            self._due |= self._until_the_brake_ends
            self._until_the_brake_ends = {}

    async def _silent_since(self, now: float) -> AsyncIterator[float]:
        """When each of those became suspect that have gone silent; whoever was heard since, or has left, is dropped."""
        for number, worker_id in enumerate(list(self._silent), start=1):
            if number % GONE_THROUGH_AT_ONCE == 0:
                await asyncio.sleep(0)
            suspect_at = self._suspect_at(worker_id)
            if suspect_at is None or suspect_at > now:
                del self._silent[worker_id]
            else:
                yield suspect_at

    def _suspect_at(self, worker_id: str) -> float | None:
        known, lease = self._roster.worker(worker_id), self._leases.get(worker_id)
        if known is None or known.health is Health.DOWN or lease is None or lease.exiting_at is not None:
            return None
        return None if lease.received_at is None else lease.received_at + self._clocks.suspect_after_s

    # -- verdicts ----------------------------------------------------------------------------------------------------

    async def _judge(self, worker_ids: list[str]) -> None:
        now = self._monotonic()  # before the snapshot: see domain/health.py
        destinations = self._roster.destinations(self._leases.exiting())
        suspects = [worker_id for worker_id in worker_ids if self._may_change(worker_id, destinations, now)]
        if not suspects:
            await asyncio.sleep(0)  # others have their turn between two slices
            return
        workers = await self._ledger.workers(suspects)
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
        """By what is in memory; a verdict is given by the row itself. When not: plans when to look again."""
        known = self._roster.worker(worker_id)
        if known is None:
            return False
        evidence = self._evidence(known.as_worker(worker_id), destinations, now)
        if judge(evidence) is not None:
            return True
        self._plan(evidence)
        return False

    def _evidence(self, worker: Worker, destinations: int, now: float) -> Evidence:
        lease = self._leases.get(worker.id)
        known = self._roster.worker(worker.id)
        is_destination = (
            known is not None
            and known.is_destination
            and (lease is None or (lease.exiting_at or lease.evacuating_at) is None)
        )
        joined_at = self._roster.since(worker.id) if worker.health is Health.JOINING else None
        return Evidence(
            worker=worker,
            lease=lease,
            now=now,
            clocks=self._clocks,
            brake=self.brake,
            has_destination=destinations > is_destination,
            joining_s=0.0 if joined_at is None else now - joined_at,
            losses=self._leases.losses(worker.id, now, self._clocks.flap_window_s),
            liveness=self._watching.report(worker) if self._watching else LivenessReport(),
        )

    def _plan(self, evidence: Evidence) -> None:
        """When to look at it again."""
        worker_id, now = evidence.worker.id, evidence.now
        ahead = deadlines(evidence)
        suspect_at = self._suspect_at(worker_id)
        if suspect_at is not None and suspect_at <= now:
            self._silent[worker_id] = suspect_at
        if self.brake.on and any(moment <= now for moment in ahead):
            self._until_the_brake_ends[worker_id] = None
        lately = [moment for moment in ahead if moment > now - JUST_NOW_S]
        if lately:
            self._wait_for(worker_id, min(lately))

    async def _commit(self, verdicts: list[tuple[Evidence, Verdict]]) -> None:
        """Whoever is declared down has no session any more before that is committed."""
        standing: list[tuple[Evidence, Verdict]] = []
        steps: list[Step] = []
        for evidence, verdict in verdicts:
            worker = evidence.worker
            if verdict.to is Health.DOWN and not self._leases.revoke(worker.id, evidence.lease):
                self.look_at(worker.id)
                continue  # it was heard since: the verdict rests on nothing any more
            standing.append((evidence, verdict))
            steps.append(move_worker(worker, verdict.to, verdict.reason))
        if not steps:
            return
        applied = await self._ledger.apply_each(steps)
        told = Counter((verdict.to, verdict.reason) for _, verdict in standing)
        for (evidence, verdict), done in zip(standing, applied, strict=True):
            if not done:
                self.look_at(evidence.worker.id)
                continue
            self._note_loss(evidence, verdict)
            if told[verdict.to, verdict.reason] <= LINES_AT_ONCE:
                worker_id, hostname = evidence.worker.id, evidence.worker.hostname
                log.info("worker", worker_id=worker_id, hostname=hostname, health=verdict.to, reason=verdict.reason)
        for (health, reason), number in told.items():
            if number > LINES_AT_ONCE:  # each has its event
                log.info("workers", number=number, health=health, reason=reason)
        self._on_verdict()

    def _note_loss(self, evidence: Evidence, verdict: Verdict) -> None:
        if verdict.is_loss(evidence.worker) and not self.brake.on:
            self._leases.lost_ready(evidence.worker.id, evidence.now, self._clocks.flap_window_s)
