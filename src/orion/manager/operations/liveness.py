"""The liveness connections to workers, and their reports, by which the health controller judges.

Each worker that is not down and has a session has one task, which holds its connection and opens it again after a loss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from orion.manager.domain.health import LivenessReport
from orion.manager.domain.model import Worker
from orion.manager.domain.states import Health
from orion.manager.ssh.port import End, Host, Liveness, Sign

log = structlog.get_logger()

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_AFTER_S = 60.0
"""Seconds after which the loss of a connection is followed by the first pause again; before, each doubles the pause."""
PROOFS = {
    End.GONE: "its container is gone: it closed the liveness connection, and nothing answers at its address",
    End.REPLACED: "its container is gone: it closed the liveness connection, and another machine has its address",
}


@dataclass
class _Known:
    session_id: str
    """The worker's session. A new one may be at another address, so it needs a new connection."""
    task: asyncio.Task[None]
    report: LivenessReport


class LivenessConnections:
    def __init__(self, liveness: Liveness, monotonic: Callable[[], float], on_change: Callable[[str], None]) -> None:
        """`on_change` is called with the id of a worker whose report has changed."""
        self._liveness = liveness
        self._monotonic = monotonic
        self._on_change = on_change
        self._tasks: dict[str, _Known] = {}

    def is_current(self, worker_id: str, session_id: str | None, health: Health) -> bool:
        """Return whether `update` would change nothing."""
        known = self._tasks.get(worker_id)
        wanted = session_id if health is not Health.DOWN else None
        return (known.session_id if known else None) == wanted

    def update(self, worker: Worker) -> None:
        """Open, keep or close the connection to this worker, as its row says."""
        if self.is_current(worker.id, worker.session_id, worker.health):
            return
        self.close(worker.id)
        if worker.session_id and worker.health is not Health.DOWN:
            task = asyncio.create_task(self._keep(worker), name=f"liveness {worker.id}")
            self._tasks[worker.id] = _Known(worker.session_id, task, LivenessReport())

    def close(self, worker_id: str) -> None:
        if worker_id in self._tasks:
            self._tasks.pop(worker_id).task.cancel()

    def report(self, worker: Worker) -> LivenessReport:
        """Return what the connection has found in the worker's present session."""
        known = self._tasks.get(worker.id)
        return known.report if known and known.session_id == worker.session_id else LivenessReport()

    def is_closed(self, worker_id: str) -> bool:
        """Return whether the worker's kernel closed the connection and the worker is not proved dead yet."""
        known = self._tasks.get(worker_id)
        return known is not None and known.report.closed_at is not None and not known.report.proof

    async def stop(self) -> None:
        """Close all connections in order, so that no worker freezes its rentals because the manager ends."""
        tasks = [known.task for known in self._tasks.values()]
        for worker_id in list(self._tasks):
            self.close(worker_id)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, worker: Worker) -> None:
        host = Host.of(worker)
        pause_s = FIRST_PAUSE_S
        with suppress(asyncio.CancelledError):
            while True:
                began = self._monotonic()
                end = await self._liveness.hold(host, worker.boot_id, lambda sign: self._on_sign(worker, sign))
                if proof := PROOFS.get(end, ""):
                    self._note(worker, LivenessReport(self.report(worker).closed_at, proof))
                    await asyncio.sleep(LONGEST_PAUSE_S)  # a worker that is not declared down meanwhile was heard
                self._note(worker, LivenessReport())
                if self._monotonic() - began > STEADY_AFTER_S:
                    pause_s = FIRST_PAUSE_S
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _on_sign(self, worker: Worker, sign: Sign) -> None:
        self._note(worker, LivenessReport(self._monotonic() if sign is Sign.CLOSED else None))

    def _note(self, worker: Worker, report: LivenessReport) -> None:
        known = self._tasks.get(worker.id)
        if known and known.task is asyncio.current_task() and known.report != report:
            known.report = report
            self._on_change(worker.id)
