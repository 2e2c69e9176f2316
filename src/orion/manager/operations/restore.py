"""Filling the home of a rental that moved, before its renter is let in.

Safe order: the account is made locked; the copy is put into its home; only then is it let in, by the usual job. Killed
between any two, it is begun again: the worker refuses to put anything over the files of a renter that was let in at
this epoch, and that counts as done. Where one rental alone is made, its copy is sent for while its account is made: the
worker waits for that, and refuses before. Files are never given up by themselves: what cannot be restored now is tried
again, and only an operator or the renter may say that it is to begin without.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakValueDictionary

from orion.manager.ansible.port import Action, Engine, Job, Outcome
from orion.manager.domain.fair_share import Claim
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import EMPTY, NEWEST, Snapshot, SnapshotId
from orion.manager.operations.recover import Recoverer
from orion.manager.queues import FairQueue
from orion.manager.snapshots.port import (
    ALREADY_ACTIVATED,
    NO_SUCH_SNAPSHOT,
    WORKER_CODES,
    Home,
    SnapshotError,
    SnapshotService,
)
from orion.manager.store.snapshots import SnapshotCatalog

LET_IN_BEFORE = "its renter was let in already"
NO_COPY = "there is no copy of its files; what a lost worker may still have of them is kept when that comes back"
WAITS = "waits"
"""In the report of a failure: another worker would do no better."""
AT_ONCE = 16
"""Homes that are filled at a time on one worker, of which one owner has half: it has a processor or two. A hundred that
begin together are all late, and its sshd takes no more than 64 sessions of one connection.
"""
TOGETHER = 8
TOGETHER_S = 0.4
"""While others of their worker are being filled, those whose files are there wait so long at most until so many are:
one run of Ansible lets in all of them, and costs little more than for one. Where nobody else is filled, nobody waits.
"""


class _Worker:
    """On which homes are being filled: one that hangs holds up no other."""

    def __init__(self) -> None:
        self._shares = FairQueue(AT_ONCE)
        self._made = 0
        self._filling = 0
        self._ready = 0
        self._door = asyncio.Event()

    @contextmanager
    def making(self) -> Iterator[bool]:
        """Whether no other rental is being made there."""
        self._made += 1
        try:
            yield self._made == 1
        finally:
            self._made -= 1

    @asynccontextmanager
    async def filling(self, owner: str) -> AsyncIterator[None]:
        self._filling += 1
        try:
            async with self._shares.place(Claim(owner)):
                yield
        finally:
            self._filling -= 1
            if not self._filling:
                self._open()

    async def together(self) -> None:
        """Until those that are ready by now may be let in."""
        self._ready += 1
        if not self._filling or self._ready >= TOGETHER:
            self._open()
            return
        door = self._door
        try:
            async with asyncio.timeout(TOGETHER_S):
                await door.wait()
        except TimeoutError:
            if door is self._door:
                self._open()

    def _open(self) -> None:
        """For those that wait at it; the next wait at another one."""
        self._door.set()
        self._door, self._ready = asyncio.Event(), 0


class Restorer:
    def __init__(
        self,
        *,
        engine: Engine,
        snapshot_service: SnapshotService,
        catalog: SnapshotCatalog,
        limits: SnapshotLimits | None = None,
    ) -> None:
        self._engine = engine
        self._vault = snapshot_service
        self._book = catalog
        self._workers: WeakValueDictionary[str, _Worker] = WeakValueDictionary()
        self.salvager = Recoverer(snapshot_service, catalog, limits or SnapshotLimits())

    async def make(self, job: Job, wanted: str, filled: str = "") -> Outcome:
        """The account is there with its files and its renter is let in; the report tells which copy it was.

        `filled`: the copy that a planned move has put there already.
        """
        if filled:
            made = await self._engine.run(job)
            told = {"generation": filled, "reason": "moved with all its files"}
            return replace(made, report={**made.report, "restored": told})
        worker = self._workers.setdefault(job.host.worker_id, _Worker())
        with worker.making() as alone:
            early = asyncio.create_task(self._fill(job, wanted)) if alone else None
            try:
                return await self._make(job, wanted, worker, early)
            finally:
                if early:
                    early.cancel()
                    await asyncio.gather(early, return_exceptions=True)

    async def _make(
        self, job: Job, wanted: str, worker: _Worker, early: asyncio.Task[dict[str, Any]] | None
    ) -> Outcome:
        """`early`: its home is being filled already, as soon as the worker has it, which refuses that before."""
        prepared = await self._engine.run(replace(job, action=Action.PREPARE))
        if not prepared.ok:
            return prepared
        before = prepared.report.get("restored")
        found: dict[str, Any] = {"restored": {"generation": before, "reason": LET_IN_BEFORE}} if before else {}
        if prepared.report.get("state") != "running":
            try:
                async with worker.filling(job.owner):
                    found = {"restored": await self._filled(job, wanted, early)}
            except SnapshotError as error:
                return _refused(error)
            await worker.together()
        made = await self._engine.run(job)
        return replace(made, report={**made.report, **found})

    async def _filled(self, job: Job, wanted: str, early: asyncio.Task[dict[str, Any]] | None) -> dict[str, Any]:
        if early:
            with suppress(SnapshotError):  # it came too early
                return await early
        return await self._fill(job, wanted)

    async def _fill(self, job: Job, wanted: str) -> dict[str, Any]:
        if wanted == EMPTY:
            return {"reason": "without its files, as asked for"}
        home = Home(job.rental_id, job.uid, job.epoch, job.host, job.owner)
        try:
            copy = await (self._newest(home) if wanted == NEWEST else self._named(home, wanted))
        except SnapshotError as error:
            if error.code != ALREADY_ACTIVATED:
                raise
            return {"generation": error.restored, "reason": LET_IN_BEFORE}
        return told_of(copy) if copy else {"reason": NO_COPY}

    async def _named(self, home: Home, wanted: str) -> Snapshot | None:
        copy = await self._vault.restore(home, SnapshotId.parse(wanted))
        if copy is None:
            raise SnapshotError(NO_SUCH_SNAPSHOT, f"there is no copy {wanted}, nor any other")
        return copy

    async def _newest(self, home: Home) -> Snapshot | None:
        """That of the database, for it was accepted; what only the vault knows, where the database knows nothing.

        One may be lost without the other: the database by going back to a backup, the copies with their disk.
        """
        newest = await self._book.newest(home.rental_id)
        try:
            copy = await self._vault.restore(home, newest.generation if newest else None)
        except SnapshotError as error:
            if error.code != NO_SUCH_SNAPSHOT:
                raise
            copy = await self._vault.restore(home)
        if copy is None and newest:
            raise SnapshotError("copies_lost", "there were copies of its files, and they are not there any more")
        return copy


def told_of(copy: Snapshot) -> dict[str, Any]:
    return asdict(copy) | {"generation": str(copy.generation), "skipped": list(copy.skipped)}


def _refused(error: SnapshotError) -> Outcome:
    message = (
        f"its files cannot be restored now: {error}. To begin without them: orion restore --empty, or with an older "
        "copy: orion restore --from"
    )
    return Outcome(ok=False, message=message, report={WAITS: error.code not in WORKER_CODES})
