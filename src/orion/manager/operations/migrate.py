"""The long parts of a planned migration: precopy while the rental runs, final sync and park while it is quiesced.

domain/migration.py says why their order is safe. Each may be killed at any point and begun again: a home that has not
changed gives the same snapshot, and a home that was not activated may be filled any number of times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from orion.manager.ansible.port import Action, Engine, Job, Outcome
from orion.manager.domain import snapshots
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.domain.tasks import TaskKind
from orion.manager.operations.restore import home_of
from orion.manager.snapshots.port import SnapshotError, SnapshotService
from orion.manager.store.snapshots import SnapshotCatalog

FREEZE_DEADLINE_S = 15.0
COPY_DEADLINE_S = 120.0
RESTORE_DEADLINE_S = 120.0
PRECOPY_WITHIN_S = 500.0
FINAL_SYNC_WITHIN_S = 280.0
"""Less than a rental may be quiesced (states.HELD_DEADLINE_S); for a park too."""
MOST_ROUNDS = 3
SHORT_ROUND_S = 2.0
"""Seconds of a round of precopy that leaves little to copy while the rental is quiesced."""
MOST_REMEMBERED = 100
"""Target placements whose last snapshot is remembered; the home of an older one is compared as a whole."""
LIMIT_FACTOR = 4
"""The multiple of the limits of periodic snapshots up to which a home can be migrated. With it no renter prevents a
drain by filling a home."""


@dataclass(kw_only=True, eq=False)
class Migrator:
    engine: Engine
    snapshot_service: SnapshotService
    catalog: SnapshotCatalog
    limits: SnapshotLimits
    """The limits of periodic snapshots."""
    monotonic: Callable[[], float]

    def __post_init__(self) -> None:
        max_files, max_bytes = self.limits.max_files * LIMIT_FACTOR, self.limits.max_bytes * LIMIT_FACTOR
        self._migration_limits = replace(self.limits, max_files=max_files, max_bytes=max_bytes)
        self._filled: dict[tuple[str, int], SnapshotId] = {}
        """The snapshot with which each target was filled last, by rental and epoch."""

    async def run(self, kind: TaskKind, source: Job, target: Job) -> Outcome:
        """Run this part of a migration within its time; the report names the last snapshot."""
        within_s = PRECOPY_WITHIN_S if kind is TaskKind.PRECOPY else FINAL_SYNC_WITHIN_S
        try:
            async with asyncio.timeout(within_s):
                if kind is TaskKind.PARK:
                    return await self.park(source)
                return await (self.precopy if kind is TaskKind.PRECOPY else self.final_sync)(source, target)
        except SnapshotError as error:
            return Outcome(False, str(error), {"code": error.code})
        except TimeoutError:
            return Outcome(False, f"it took longer than {within_s:.0f} s")

    async def precopy(self, source: Job, target: Job) -> Outcome:
        """Fill the target while the source runs."""
        prepared = await self.engine.run(replace(target, action=Action.PREPARE))
        if not prepared.ok:
            return prepared
        for _ in range(MOST_ROUNDS):
            began = self.monotonic()
            snapshot = await self._snapshot(source)
            await self._fill(target, snapshot, again=True)
            if self.monotonic() - began < SHORT_ROUND_S:
                break
        return _done(snapshot)

    async def final_sync(self, source: Job, target: Job) -> Outcome:
        """Quiesce the source and give the target every byte of it."""
        await self._quiesce(source)
        snapshot = await self._snapshot(source)
        await self._fill(target, snapshot, again=False)
        self._filled.pop((target.order.rental_id, target.order.epoch), None)
        return _done(snapshot)

    async def park(self, source: Job) -> Outcome:
        """Quiesce the source and put every byte of it into a snapshot."""
        await self._quiesce(source)
        return _done(await self._snapshot(source))

    async def _quiesce(self, source: Job) -> None:
        """Stop all processes of the source. Raise SnapshotError unless they are stopped."""
        job = replace(source, action=Action.FREEZE, deadline_s=FREEZE_DEADLINE_S)
        frozen = await self.engine.run(job.with_order(public_keys=()))
        if not frozen.ok:
            raise SnapshotError("not_frozen", frozen.message)
        if frozen.report.get("state") != "frozen" or frozen.report.get("epoch") != source.order.epoch:
            raise SnapshotError("not_frozen", "its worker does not have this placement any more")

    async def _fill(self, target: Job, snapshot: Snapshot, again: bool) -> None:
        key = target.order.rental_id, target.order.epoch
        before = self._filled.pop(key, None)
        await self.snapshot_service.restore(home_of(target), snapshot.id, RESTORE_DEADLINE_S, before, again)
        self._filled = {key: snapshot.id} | self._filled
        while len(self._filled) > MOST_REMEMBERED:
            self._filled.popitem()

    async def _snapshot(self, source: Job) -> Snapshot:
        """Take a complete snapshot and have the database accept it, so that every later restore uses it."""
        found = await self.catalog.migrating(source.order.rental_id)
        if found is None:
            raise SnapshotError("superseded", "it was ended or migrated meanwhile")
        limits, home = self._migration_limits, home_of(source)
        taken = await self.snapshot_service.take(home, limits, COPY_DEADLINE_S, for_migration=True)
        warning = snapshots.nearly_full(taken.snapshot, self.limits.max_bytes, self.limits.max_files)
        step = snapshots.accepted(found.rental, found.placement, taken.snapshot, warning)
        if not await self.catalog.accept(step, source.order.rental_id, taken.kept):
            raise SnapshotError("superseded", "it was ended or migrated meanwhile")
        return taken.snapshot


def _done(snapshot: Snapshot) -> Outcome:
    return Outcome(True, report={"generation": str(snapshot.id)})
