"""Restoring a rental on a new worker: its home is filled from a snapshot before the rental is activated.

Safe order: make the account locked; restore the snapshot into its home; only then activate it, by the usual job. After
a kill between any two, all begins again: the worker refuses to write over a home that was activated at this epoch, and
that refusal counts as done. Files are never given up automatically: a restore that fails is tried again, and only an
operator or the renter may say that the rental begins without its files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from orion.manager.ansible.port import Action, Engine, Job, Outcome
from orion.manager.domain.fair_share import Claim
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import EMPTY, NEWEST, Snapshot, SnapshotId, described
from orion.manager.operations.recover import Recoverer
from orion.manager.queues import FairQueue
from orion.manager.snapshots import port
from orion.manager.snapshots.port import Home, SnapshotError, SnapshotService
from orion.manager.store.snapshots import SnapshotCatalog

ACTIVATED_BEFORE = "it was activated already"
NO_SNAPSHOT = "there is no snapshot of its files; files that a lost worker still has are kept when it comes back"
NOT_COUNTED = "waits"
"""The key in the report of a failure that is not counted, because it would happen on another worker too."""
AT_ONCE = 16
"""Homes that are filled at a time on one worker; one owner has at most half of them. A worker has a processor or two,
so a hundred at a time would all be late, and its sshd takes at most 64 sessions of one connection."""
BATCH = 8
BATCH_WAIT_S = 0.4
"""Number of filled homes of one worker that are activated together, and the seconds that a filled home waits at most
for others that are being filled: one run of Ansible activates all of them, and costs little more than for one."""


class _Worker:
    """A worker's own queue of homes to fill, so that a worker that hangs delays no other."""

    def __init__(self) -> None:
        self._shares = FairQueue(AT_ONCE)
        self._restoring = 0
        self._filling = 0
        self._ready = 0
        self._batch = asyncio.Event()

    @contextmanager
    def restoring(self) -> Iterator[bool]:
        """Count a restore of the length of the block; yield whether no other one runs."""
        self._restoring += 1
        try:
            yield self._restoring == 1
        finally:
            self._restoring -= 1

    @asynccontextmanager
    async def filling(self, owner: str) -> AsyncIterator[None]:
        self._filling += 1
        try:
            async with self._shares.place(Claim(owner)):
                yield
        finally:
            self._filling -= 1
            if not self._filling:
                self._release_batch()

    async def wait_for_batch(self) -> None:
        """Wait until the homes that are filled by now may be activated together."""
        self._ready += 1
        if not self._filling or self._ready >= BATCH:
            self._release_batch()
            return
        batch = self._batch
        try:
            async with asyncio.timeout(BATCH_WAIT_S):
                await batch.wait()
        except TimeoutError:
            if batch is self._batch:
                self._release_batch()

    def _release_batch(self) -> None:
        self._batch.set()
        self._batch, self._ready = asyncio.Event(), 0


@dataclass(kw_only=True, eq=False)
class Restorer:
    engine: Engine
    snapshot_service: SnapshotService
    catalog: SnapshotCatalog
    limits: SnapshotLimits = field(default_factory=SnapshotLimits)

    def __post_init__(self) -> None:
        self._workers: WeakValueDictionary[str, _Worker] = WeakValueDictionary()
        self.recoverer = Recoverer(self.snapshot_service, self.catalog, self.limits)

    async def make(self, job: Job, wanted: str, filled: str = "") -> Outcome:
        """Make the account, fill its home and activate it; the report names the snapshot.

        `filled`: the snapshot that a planned migration has put there already.
        """
        if filled:
            made = await self.engine.run(job)
            restored = {"generation": filled, "reason": "migrated with all its files"}
            return replace(made, report={**made.report, "restored": restored})
        worker = self._workers.setdefault(job.host.worker_id, _Worker())
        with worker.restoring() as alone:
            # The restore of a rental alone is requested while its account is made: the worker waits for the account.
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
        prepared = await self.engine.run(replace(job, action=Action.PREPARE))
        if not prepared.ok:
            return prepared
        before = prepared.report.get("restored")
        found: dict[str, Any] = {"restored": {"generation": before, "reason": ACTIVATED_BEFORE}} if before else {}
        if prepared.report.get("state") != "running":
            try:
                async with worker.filling(job.owner):
                    restored: dict[str, Any] = {}
                    if early:
                        with suppress(SnapshotError):  # the worker refuses it while the account is not made yet
                            restored = await early
                    found = {"restored": restored or await self._fill(job, wanted)}
            except SnapshotError as error:
                return _refused(error)
            await worker.wait_for_batch()
        made = await self.engine.run(job)
        return replace(made, report={**made.report, **found})

    async def _fill(self, job: Job, wanted: str) -> dict[str, Any]:
        if wanted == EMPTY:
            return {"reason": "without its files, as asked for"}
        home = home_of(job)
        try:
            snapshot = await (self._newest(home) if wanted == NEWEST else self._named(home, wanted))
        except SnapshotError as error:
            if error.code != port.ALREADY_ACTIVATED:
                raise
            return {"generation": error.restored, "reason": ACTIVATED_BEFORE}
        return described(snapshot) if snapshot else {"reason": NO_SNAPSHOT}

    async def _named(self, home: Home, wanted: str) -> Snapshot | None:
        if snapshot := await self.snapshot_service.restore(home, SnapshotId.parse(wanted)):
            return snapshot
        raise SnapshotError(port.NO_SUCH_SNAPSHOT, f"there is no snapshot {wanted}, nor any other")

    async def _newest(self, home: Home) -> Snapshot | None:
        """Restore the snapshot that the database accepted last; the newest on disk where the database knows none.

        Either may be lost without the other: the database when a backup is restored, the snapshots with their disk.
        """
        newest = await self.catalog.newest(home.rental_id)
        try:
            snapshot = await self.snapshot_service.restore(home, newest.id if newest else None)
        except SnapshotError as error:
            if error.code != port.NO_SUCH_SNAPSHOT:
                raise
            snapshot = await self.snapshot_service.restore(home)
        if snapshot is None and newest:
            raise SnapshotError("copies_lost", "there were snapshots of its files, and they are not there any more")
        return snapshot


def home_of(job: Job) -> Home:
    return Home(rental_id=job.order.rental_id, uid=job.order.uid, epoch=job.order.epoch, host=job.host, owner=job.owner)


def _refused(error: SnapshotError) -> Outcome:
    ways = "To begin without them: orion restore --empty, or with an older snapshot: orion restore --from"
    message = f"its files cannot be restored now: {error}. {ways}"
    return Outcome(ok=False, message=message, report={NOT_COUNTED: error.code not in port.WORKER_CODES})
