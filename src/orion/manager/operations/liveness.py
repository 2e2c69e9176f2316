"""Which workers are watched, and what the watches have found; the health loop judges by it.

Each worker that is counted on has one task, which holds its watch and begins again when that was not to be held.
Nothing here runs at an interval: a task sleeps until its connection ends.
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
"""A watch that was held so long begins again at once; one that is closed again and again costs little."""
PROOFS = {
    End.GONE: "its container is gone: it closed the watch, and nothing answers at its address",
    End.REPLACED: "its container is gone: it closed the watch, and another machine answers at its address",
}


@dataclass
class _Kept:
    session_id: str
    """With each one its boot and its address may be others: then it is another worker to watch."""
    task: asyncio.Task[None]
    found: LivenessReport


class LivenessConnections:
    def __init__(self, watch: Liveness, monotonic: Callable[[], float], on_change: Callable[[str], None]) -> None:
        """`on_change`: told the worker of which a watch has found something."""
        self._watch = watch
        self._monotonic = monotonic
        self._on_change = on_change
        self._tasks: dict[str, _Kept] = {}

    def is_right(self, worker_id: str, session_id: str | None, health: Health) -> bool:
        """Whether `see` would change nothing."""
        known = self._tasks.get(worker_id)
        wanted = session_id if health is not Health.DOWN else None
        return (known.session_id if known else None) == wanted

    def see(self, worker: Worker) -> None:
        """Begin, go on or end: call it with what is known of a worker, as often as you like."""
        if self.is_right(worker.id, worker.session_id, worker.health):
            return
        self.forget(worker.id)
        if worker.session_id and worker.health is not Health.DOWN:
            task = asyncio.create_task(self._keep(worker), name=f"watch {worker.id}")
            self._tasks[worker.id] = _Kept(worker.session_id, task, LivenessReport())

    def forget(self, worker_id: str) -> None:
        known = self._tasks.pop(worker_id, None)
        if known:
            known.task.cancel()

    def found(self, worker: Worker) -> LivenessReport:
        """What counts of it in the worker's present session."""
        known = self._tasks.get(worker.id)
        return known.found if known and known.session_id == worker.session_id else LivenessReport()

    def is_closed(self, worker_id: str) -> bool:
        """Whether its kernel closed the watch, and it is not proved dead: it may be in a moment."""
        known = self._tasks.get(worker_id)
        return known is not None and known.found.closed_at is not None and not known.found.proof

    async def stop(self) -> None:
        """Let go of all, so that no worker takes the manager's end for something that it must freeze for."""
        tasks = [known.task for known in self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, worker: Worker) -> None:
        host = Host(worker.id, worker.address, worker.host_keys)
        pause_s = FIRST_PAUSE_S
        with suppress(asyncio.CancelledError):
            while True:
                began = self._monotonic()
                end = await self._watch.hold(host, worker.boot_id, lambda sign: self._told(worker, sign))
                proof = PROOFS.get(end, "")
                if proof:
                    self._note(worker, LivenessReport(self.found(worker).closed_at, proof))
                    await asyncio.sleep(LONGEST_PAUSE_S)  # to be cancelled in: else it was heard since, and lives
                self._note(worker, LivenessReport())
                if self._monotonic() - began > STEADY_AFTER_S:
                    pause_s = FIRST_PAUSE_S
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _told(self, worker: Worker, sign: Sign) -> None:
        self._note(worker, LivenessReport(self._monotonic()) if sign is Sign.CLOSED else LivenessReport())

    def _note(self, worker: Worker, found: LivenessReport) -> None:
        known = self._tasks.get(worker.id)
        if known and known.task is asyncio.current_task() and known.found != found:
            known.found = found
            self._on_change(worker.id)
