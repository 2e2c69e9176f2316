"""The health loop: the only one that judges workers and writes their health."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from orion.manager.domain.brake import Brake, Observation, advance
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.health import Evidence, Verdict, judge
from orion.manager.domain.leases import Lease, Leases
from orion.manager.domain.model import Worker, move_worker
from orion.manager.domain.states import Health, Intent
from orion.manager.loops.timer import Loop
from orion.manager.store.port import Ledger

log = structlog.get_logger()


class HealthLoop:
    def __init__(
        self,
        ledger: Ledger,
        leases: Leases,
        clocks: Clocks,
        door_open: Callable[[], bool],
        monotonic: Callable[[], float],
        on_verdict: Callable[[], None],
    ) -> None:
        """`door_open`: whether the manager reached itself through the proxy the last time it asked."""
        self._ledger = ledger
        self._leases = leases
        self._clocks = clocks
        self._door_open = door_open
        self._monotonic = monotonic
        self._on_verdict = on_verdict
        self._began_at: float | None = None
        self._since: dict[tuple[str, Health], float] = {}
        self.brake = Brake.at_start(monotonic())
        self.interval_s = max(0.2, min(1.0, clocks.heartbeat_s / 30))
        self.loop = Loop("health", self.interval_s, self.round)

    async def round(self) -> None:
        now = self._monotonic()  # before the snapshot: see domain/health.py
        notes = self._leases.take_notes()
        if notes:
            await self._ledger.heard(notes)
        workers = await self._ledger.load_workers()
        self._advance_brake(workers, now)
        self._since = {(w.id, w.health): self._since.get((w.id, w.health), now) for w in workers.values()}
        for worker in workers.values():
            evidence = self._evidence(worker, workers, now)
            verdict = judge(evidence)
            if verdict is not None:
                await self._commit(evidence, verdict)

    def ages(self) -> dict[str, float]:
        """Seconds that each worker has been in its state."""
        now = self._monotonic()
        return {worker_id: now - since for (worker_id, _), since in self._since.items()}

    def _advance_brake(self, workers: dict[str, Worker], now: float) -> None:
        late_s = 0.0 if self._began_at is None else now - self._began_at - self.interval_s
        self._began_at = now
        pool = [w for w in workers.values() if w.health is not Health.DOWN and not self._is_leaving(w)]
        silent = [self._silent_since(self._leases.get(w.id), now) for w in pool]
        seen = Observation(
            self._door_open(), late_s, self._leases.heard_at, tuple(at for at in silent if at is not None), len(pool)
        )
        before, self.brake = self.brake, advance(self.brake, seen, now, self._clocks)
        if before.on != self.brake.on or before.reason != self.brake.reason:
            log.info("brake", on=self.brake.on, reason=self.brake.reason or f"ended: {before.reason}")

    def _silent_since(self, lease: Lease | None, now: float) -> float | None:
        if lease is None or lease.received_at is None:
            return None
        suspect_at = lease.received_at + self._clocks.suspect_after_s
        return suspect_at if suspect_at <= now else None

    def _evidence(self, worker: Worker, workers: dict[str, Worker], now: float) -> Evidence:
        return Evidence(
            worker,
            self._leases.get(worker.id),
            now,
            self._clocks,
            self.brake,
            any(self._is_refuge(other) for other in workers.values() if other.id != worker.id),
            now - self._since.get((worker.id, Health.JOINING), now),
            self._leases.losses(worker.id, now, self._clocks.flap_window_s),
        )

    def _is_refuge(self, worker: Worker) -> bool:
        return worker.health is Health.READY and worker.intent is Intent.ACTIVE and not self._is_leaving(worker)

    def _is_leaving(self, worker: Worker) -> bool:
        lease = self._leases.get(worker.id)
        return lease is not None and lease.leaving_at is not None

    async def _commit(self, evidence: Evidence, verdict: Verdict) -> None:
        worker = evidence.worker
        if verdict.to is Health.DOWN and not self._leases.revoke(worker.id, evidence.lease):
            return  # it was heard since: the verdict rests on nothing any more
        if not await self._ledger.apply([move_worker(worker, verdict.to, verdict.reason)]):
            return
        log.info("worker", worker_id=worker.id, hostname=worker.hostname, health=verdict.to, reason=verdict.reason)
        flapped = worker.health is Health.READY and verdict.to in {Health.SUSPECT, Health.JOINING}
        if flapped and not self.brake.on:
            self._leases.lost_ready(worker.id, evidence.now, self._clocks.flap_window_s)
        self._on_verdict()
