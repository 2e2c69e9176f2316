"""A snapshot service in memory for the fake workers. Its contract is tests/snapshot_service_contract.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot, SnapshotId, base_of, counted, may_stay, next_number
from orion.manager.fakes.workers import FakeWorker, FakeWorld
from orion.manager.snapshots.port import (
    ALREADY_ACTIVATED,
    CONNECT_DEADLINE_S,
    NO_SUCH_SNAPSHOT,
    NOTHING_TO_RECOVER,
    OVER_LIMIT,
    OVER_SHARE,
    PAUSE_TOO_LONG,
    RECOVER_DEADLINE_S,
    RESTORE_DEADLINE_S,
    SNAPSHOT_DEADLINE_S,
    Home,
    SnapshotError,
    Taken,
)
from orion.manager.ssh.port import Host

Files = dict[str, str]


@dataclass(kw_only=True)
class FakeSnapshotService:
    """Implements `port.SnapshotService`. `wall`: UTC seconds."""

    world: FakeWorld
    wall: Callable[[], float]
    stored: dict[str, dict[SnapshotId, tuple[Snapshot, Files]]] = field(default_factory=dict)
    failure: SnapshotError | None = None
    """The error that every call raises; None if calls work."""
    restored: list[tuple[str, int, str]] = field(default_factory=list)
    """The rental, epoch and snapshot id of each restore."""
    connected: list[str] = field(default_factory=list)
    """The workers that `connect` was called for."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when any call has begun."""
    pause_s: float = 0.0
    """The seconds for which processes are stopped for a snapshot that differs from the one before."""
    unreadable: set[str] = field(default_factory=set)
    """The names of the files that are unreadable in every home."""
    disk_bytes: int = 1 << 40
    """The size of the disk, of which each owner has a share. Inodes are not counted."""
    _restored_from: dict[tuple[str, int], str] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)
    """The owner of each rental."""
    _refused: set[str] = field(default_factory=set)
    """The rentals whose last snapshot did not fit into their owner's share."""

    async def take(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SNAPSHOT_DEADLINE_S,
        protected: SnapshotId | None = None,
        for_migration: bool = False,
    ) -> Taken:
        began_at = self.wall()
        worker = await self._worker(home, deadline_s)
        if home.rental_id in worker.set_aside:
            raise SnapshotError("laid_down", "it is laid down to be recovered")
        try:
            files, snapshot = self._read(home, worker, began_at, limits)
        except SnapshotError as error:
            over = {home.rental_id} - worker.exempt
            worker.over |= over
            raise SnapshotError(error.code, f"{error}: {'frozen' if over else 'spared'}") from error
        if self.pause_s > limits.pause_s and not for_migration:
            raise SnapshotError(PAUSE_TOO_LONG, f"its programs would have to stand still for {self.pause_s} s")
        return self._keep(home, files, snapshot, protected, limits)

    async def recover(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = RECOVER_DEADLINE_S,
        protected: SnapshotId | None = None,
    ) -> Taken:
        began_at = self.wall()
        worker = await self._worker(home, deadline_s)
        if worker.activated.get(home.rental_id) != home.epoch:
            raise SnapshotError(NOTHING_TO_RECOVER, "its renter was never activated here")
        worker.set_aside.add(home.rental_id)
        worker.frozen.pop(home.rental_id, None)
        files, snapshot = self._read(home, worker, began_at, limits)
        return self._keep(home, files, replace(snapshot, recovered=True), protected, limits)

    def _read(self, home: Home, worker: FakeWorker, at: float, limits: SnapshotLimits) -> tuple[Files, Snapshot]:
        """Return the readable files of a home, and a snapshot of them that has no number yet."""
        there = worker.homes[home.rental_id]
        files = {name: content for name, content in there.items() if name not in self.unreadable}
        size, entries, skipped = _counted(files), len(files) + 1, tuple(sorted(there.keys() - files.keys()))
        if entries > limits.max_files or size > limits.max_bytes:
            raise SnapshotError(OVER_LIMIT, "its home holds more than a copy may")
        snapshot_id = SnapshotId(home.epoch, 1)
        return files, Snapshot(id=snapshot_id, at=at, bytes=size, files=entries, skipped=skipped)

    def _keep(
        self, home: Home, files: Files, snapshot: Snapshot, protected: SnapshotId | None, limits: SnapshotLimits
    ) -> Taken:
        there = self.stored.setdefault(home.rental_id, {})
        self._owners[home.rental_id] = home.owner
        base = base_of(self._copies(home.rental_id), home.epoch, snapshot.recovered)
        if base and base.id.epoch == home.epoch and there[base.id][1] == files:
            there[base.id] = (replace(base, at=snapshot.at), files)
            if not snapshot.recovered:
                self._make_room(home, protected, limits)
            return Taken(there[base.id][0], self._copies(home.rental_id))
        snapshot = replace(snapshot, id=SnapshotId(home.epoch, next_number(list(there), home.epoch)))
        there[snapshot.id] = (snapshot, files)
        if not self._make_room(home, protected, limits):
            del there[snapshot.id]
            raise SnapshotError(OVER_SHARE, "the copies of all that its owner rents would take more than its share")
        return Taken(snapshot, self._copies(home.rental_id), self.pause_s)

    def _make_room(self, home: Home, protected: SnapshotId | None, limits: SnapshotLimits) -> bool:
        """Remove the snapshots that do not stay; return False, and remove none, if the owner's share has no room."""
        there = self.stored[home.rental_id]
        others = {rental_id for rental_id, owner in self._owners.items() if owner == home.owner} - {home.rental_id}
        used = sum(_taken(one, one.keys()) for one in (self.stored.get(rental_id, {}) for rental_id in others))
        room = limits.owner_share * self.disk_bytes - used
        choices = may_stay(self._copies(home.rental_id), protected)
        fitting = [staying for staying in choices if _taken(there, staying) <= room]
        self._refused = self._refused - {home.rental_id} if fitting else self._refused | {home.rental_id}
        if fitting:
            for old in there.keys() - fitting[-1 if self._refused.intersection(others) else 0]:
                del there[old]
        return bool(fitting)

    async def restore(
        self,
        home: Home,
        snapshot_id: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        previous: SnapshotId | None = None,
        precopy: bool = False,
    ) -> Snapshot | None:
        await self._begin_call()
        there = self.stored.get(home.rental_id, {})
        wanted = snapshot_id or max((g for g, (snapshot, _) in there.items() if not snapshot.recovered), default=None)
        if not there or wanted is None:
            return None
        if wanted not in there:
            raise SnapshotError(NO_SUCH_SNAPSHOT, f"there is no copy {wanted}")
        worker = await self._worker(home, deadline_s)
        if worker.activated.get(home.rental_id) == home.epoch:
            before = self._restored_from.get((home.rental_id, home.epoch), "")
            raise SnapshotError(ALREADY_ACTIVATED, "its renter was activated here at this epoch", before)
        snapshot, files = there[wanted]
        worker.homes[home.rental_id] = dict(files)
        self.restored.append((home.rental_id, home.epoch, str(wanted)))
        self._restored_from[home.rental_id, home.epoch] = worker.restored[home.rental_id] = str(wanted)
        return snapshot

    async def connect(self, host: Host, deadline_s: float = CONNECT_DEADLINE_S) -> None:
        await self._begin_call()
        await self._reached(host, deadline_s)
        self.connected.append(host.worker_id)

    async def snapshots(self, rental_id: str, uid: int) -> list[Snapshot]:
        await self._begin_call()
        return list(self._copies(rental_id))

    async def remove(self, rental_id: str, uid: int) -> None:
        await self._begin_call()
        self.stored.pop(rental_id, None)
        self._owners.pop(rental_id, None)
        self._refused.discard(rental_id)

    async def short_of_room(self) -> list[str]:
        await self._begin_call()
        return sorted({self._owners[rental_id] for rental_id in self._refused})

    async def rentals(self) -> list[str]:
        await self._begin_call()
        return sorted(self.stored)

    def _copies(self, rental_id: str) -> tuple[Snapshot, ...]:
        return tuple(snapshot for _, (snapshot, _) in sorted(self.stored.get(rental_id, {}).items()))

    async def _begin_call(self) -> None:
        await asyncio.sleep(0)
        self.asked.set()
        if self.failure:
            raise self.failure

    async def _reached(self, host: Host, deadline_s: float) -> FakeWorker:
        try:
            worker = await self.world.reach(host, deadline_s)
        except TimeoutError as error:
            raise SnapshotError("timed_out", "it took longer than it may") from error
        if worker is None or not self.world.recognises(worker, host):
            raise SnapshotError("unreachable", "the worker cannot be asked")
        return worker

    async def _worker(self, home: Home, deadline_s: float) -> FakeWorker:
        await self._begin_call()
        worker = await self._reached(home.host, deadline_s)
        account = worker.accounts.get(home.rental_id)
        if account is None:
            raise SnapshotError("unknown_rental", "no such rental on this worker")
        if account.epoch != home.epoch:
            raise SnapshotError("stale_epoch", f"epoch {home.epoch} is not epoch {account.epoch}, which is here")
        return worker


def _counted(files: Files) -> int:
    """Return the bytes that a home counts for: its directory and its files, each in whole blocks."""
    return sum(counted((len(content) + 4095) // 4096 * 8, len(content)) for content in ("", *files.values()))


def _taken(there: dict[SnapshotId, tuple[Snapshot, Files]], staying: Iterable[SnapshotId]) -> int:
    """Return the bytes that these snapshots use. A file that is as in the snapshot before counts once."""
    taken, before = 0, Files()
    for snapshot_id in sorted(staying):
        files = there[snapshot_id][1]
        taken += _counted({name: content for name, content in files.items() if before.get(name) != content})
        before = files
    return taken
