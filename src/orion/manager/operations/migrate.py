"""The long parts of a planned move: filling the standby while the rental runs, and finishing when it stands still.

What each is for, and why the order is safe, is in domain/migration.py. Each may be killed anywhere and begun again: a
copy that has not changed is the same copy, and a home that nobody was let into may be filled as often as one likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from orion.manager.ansible.port import Action, Engine, Job, Outcome
from orion.manager.domain import snapshots
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.snapshots.port import Home, SnapshotError, SnapshotService
from orion.manager.store.snapshots import SnapshotCatalog

FREEZE_DEADLINE_S = 15.0
COPY_DEADLINE_S = 120.0
RESTORE_DEADLINE_S = 120.0
SEED_WITHIN_S = 500.0
FINISH_WITHIN_S = 280.0
"""Less than a hold may last (states.HELD_DEADLINE_S)."""
MOST_ROUNDS = 3
SOON_S = 2.0
"""A round that took no longer leaves little to copy for when the rental stands still."""
MOST_REMEMBERED = 100
"""Standbys of which it is remembered with what they were filled; of an older one the whole home is compared."""
ROOMIER = 4
"""Times what a home may hold to be copied every so often: one that has grown too large may be moved all the same."""


class Migrator:
    def __init__(
        self,
        *,
        engine: Engine,
        snapshot_service: SnapshotService,
        catalog: SnapshotCatalog,
        limits: SnapshotLimits,
        monotonic: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._vault = snapshot_service
        self._book = catalog
        self._may_hold = limits
        self._limits = replace(limits, max_files=limits.max_files * ROOMIER, max_bytes=limits.max_bytes * ROOMIER)
        self._monotonic = monotonic
        self._filled: dict[tuple[str, int], SnapshotId] = {}
        """The snapshot with which each standby was filled last, by rental and epoch."""

    async def seed(self, source: Job, standby: Job) -> Outcome:
        """The standby has the files as they were at most a moment ago; the report tells which copy that is."""
        return await _within(SEED_WITHIN_S, self._seed(source, standby))

    async def finish(self, source: Job, standby: Job) -> Outcome:
        """It stands still, and the standby has every byte of it; the report tells in which copy."""
        return await _within(FINISH_WITHIN_S, self._finish(source, standby))

    async def park(self, source: Job) -> Outcome:
        """It stands still, and every byte of it is in a copy."""
        return await _within(FINISH_WITHIN_S, self._park(source))

    async def _seed(self, source: Job, standby: Job) -> Outcome:
        prepared = await self._engine.run(replace(standby, action=Action.PREPARE))
        if not prepared.ok:
            return prepared
        for _ in range(MOST_ROUNDS):
            began = self._monotonic()
            copy = await self._copy(source)
            await self._fill(standby, copy, again=True)
            if self._monotonic() - began < SOON_S:
                break
        return _done(copy)

    async def _finish(self, source: Job, standby: Job) -> Outcome:
        await self._freeze(source)
        copy = await self._copy(source)
        await self._fill(standby, copy, again=False)
        self._filled.pop((standby.rental_id, standby.epoch), None)
        return _done(copy)

    async def _park(self, source: Job) -> Outcome:
        await self._freeze(source)
        return _done(await self._copy(source))

    async def _freeze(self, source: Job) -> None:
        """Raises SnapshotError unless all of it stands still."""
        job = replace(source, action=Action.FREEZE, public_keys=(), deadline_s=FREEZE_DEADLINE_S)
        frozen = await self._engine.run(job)
        if not frozen.ok:
            raise SnapshotError("not_frozen", frozen.message)
        if frozen.report.get("state") != "frozen" or frozen.report.get("epoch") != source.epoch:
            raise SnapshotError("not_frozen", "its worker does not have it any more")

    async def _fill(self, standby: Job, copy: Snapshot, again: bool) -> None:
        key = standby.rental_id, standby.epoch
        before = self._filled.pop(key, None)
        await self._vault.restore(_home(standby), copy.generation, RESTORE_DEADLINE_S, before, again)
        self._filled = {key: copy.generation} | self._filled
        while len(self._filled) > MOST_REMEMBERED:
            self._filled.popitem()

    async def _copy(self, source: Job) -> Snapshot:
        """Complete, and accepted: so that it is the one that counts, whatever happens next."""
        found = await self._book.migrating(source.rental_id)
        if found is None:
            raise SnapshotError("superseded", "it was ended or moved meanwhile")
        copied = await self._vault.copy(_home(source), self._limits, COPY_DEADLINE_S, for_migration=True)
        warning = snapshots.nearly_full(copied.copy, self._may_hold.max_bytes, self._may_hold.max_files)
        step = snapshots.accepted(found.rental, found.placement, copied.copy, warning)
        if not await self._book.accept(step, source.rental_id, copied.kept):
            raise SnapshotError("superseded", "it was ended or moved meanwhile")
        return copied.copy


async def _within(seconds: float, work: Awaitable[Outcome]) -> Outcome:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except SnapshotError as error:
        return Outcome(False, str(error), {"code": error.code})
    except TimeoutError:
        return Outcome(False, f"it took longer than {seconds:.0f} s")


def _home(job: Job) -> Home:
    return Home(job.rental_id, job.uid, job.epoch, job.host, job.owner)


def _done(copy: Snapshot) -> Outcome:
    return Outcome(True, report={"generation": str(copy.generation)})
