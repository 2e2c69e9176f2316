"""The job log: the ended jobs of each rental, collected in memory and written once a second.

A manager that is killed loses the last second of the log. No decision reads it.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from orion.manager.ansible.port import Engine, Job, Outcome
from orion.manager.controllers.loop import Loop
from orion.manager.store import job_log
from orion.manager.store.database import Row, Store
from orion.manager.store.job_log import Entry

INTERVAL_S = 1.0
MOST_PENDING = 10_000
"""The most entries that wait to be written; beyond that, the oldest are lost."""
MAX_MESSAGE = 500
"""Characters of a message that are kept."""
_SECRET = re.compile(
    r"-----BEGIN[^-]*-----.*?(-----END[^-]*-----|$)"  # a private key
    r"|\b(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/=]{20,}"  # a public one
    r"|\borion_[a-z]+_[a-z0-9-]+_[A-Za-z0-9]{20,}"  # a token
    r"|[A-Za-z0-9+/]{60,}={0,2}",  # a part of any of them
    re.DOTALL,
)


class JobLog:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: deque[Entry] = deque(maxlen=MOST_PENDING)
        self._writing = asyncio.Lock()
        self.loop = Loop("engine log", INTERVAL_S, self.flush)

    def note(self, entry: Entry) -> None:
        self._pending.append(entry)

    async def flush(self) -> None:
        if not self._pending:
            return
        async with self._writing:
            entries = list(self._pending)
            self._pending.clear()
            try:
                await self._store.write(job_log.add, entries)
            except BaseException:
                self._pending.extendleft(reversed(entries))
                raise

    async def of(self, rental_id: str) -> list[Row]:
        """Return all entries of a rental, oldest first."""
        await self.flush()
        return await self._store.read(job_log.of_rental, rental_id)


@dataclass(kw_only=True)
class LoggedEngine:
    """An engine that gives each job to another one, and notes its end."""

    engine: Engine
    note: Callable[[Entry], None]
    monotonic: Callable[[], float]
    wall: Callable[[], float]

    async def run(self, job: Job) -> Outcome:
        began = self.monotonic()
        outcome = await self.engine.run(job)
        self.note(
            Entry(
                at=self.wall(),
                rental_id=job.order.rental_id,
                epoch=job.order.epoch,
                action=str(job.action),
                worker_id=job.host.worker_id,
                ok=outcome.ok,
                seconds=round(self.monotonic() - began, 4),
                message=readable(outcome.message or _done(outcome)),
            )
        )
        return outcome


def readable(message: str) -> str:
    """Return the message without anything that could be a key or a token."""
    return _SECRET.sub("(not shown)", message)[:MAX_MESSAGE]


def _done(outcome: Outcome) -> str:
    report = outcome.report
    if "left" in report:
        removed, killed = report.get("removed_files", 0), report.get("killed", 0)
        return f"nothing is left: {removed} files removed, {killed} processes ended"
    return "made" if report.get("changed") else "nothing was to be done"
