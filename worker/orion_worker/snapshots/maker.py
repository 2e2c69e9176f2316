"""The making of a snapshot: scan a home, stage what changed, and stop the rental's programs only for the last part."""

from __future__ import annotations

import os
import resource
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from orion_worker.freezer.marks import Freezer
from orion_worker.freezer.stopper import has_run, tasks_of
from orion_worker.records import RentalRecord, RentalRecords, RequestRefused, check_unlock
from orion_worker.snapshots import scan
from orion_worker.snapshots.manifests import Manifest, Manifests
from orion_worker.snapshots.requests import PAUSE_MOST_S, TransferRequest
from orion_worker.snapshots.scan import HomeEntry, Scan
from orion_worker.snapshots.staging import NAMES_SHOWN, StagingTree

MOST_ODD_BYTES = 4000
"""Bytes of the paths of closed directories whose modes a report names; the modes of others count as missing."""
LOCK_WAIT_S = 5.0
SMALL_BYTES, SMALL_NUMBER = 4 << 20, 64
"""Bytes and number of changed files from which on they are staged before the rental is stopped, not only then."""
MOST_ROUNDS = 4
HELPS = 0.7
"""The share of the bytes of the previous round that may be left for another round to be worth it."""
PAUSE_ENDS_S = 12.0
"""Seconds after which the fence resumes a rental whose snapshot died in its pause."""
PAUSE_TRIES = 3
"""The number of pauses that are tried where something ran in one, such as a log-in that came just then."""
SO_MUCH = "so much changes in its home at once"
COPIED_A_SECOND = 300e6
"""Bytes per second at which files are expected to be copied."""


class RentalOperations(Protocol):
    """The part of `rental.commands.Rentals` that a transfer uses."""

    records: RentalRecords
    freezer: Freezer
    manifests: Manifests

    def retire(self, record: RentalRecord) -> None: ...

    def freeze_over_limit(self, record: RentalRecord, reason: str) -> bool: ...


@dataclass(eq=False, kw_only=True)
class SnapshotMaker:
    """The making of one snapshot."""

    operations: RentalOperations
    record: RentalRecord
    request: TransferRequest
    staging: StagingTree
    home: int
    is_salvage: bool
    requested_at: float
    """The monotonic seconds at which the request had been read."""

    def __post_init__(self) -> None:
        operations, record, request = self.operations, self.record, self.request
        self._deadline = monotonic_of(request.deadline)
        self._base = operations.manifests.read(request.rental_id, request.base) if request.base else None
        self._known = self._base or Manifest(Scan(frozenset(), 0.0))
        self._missing: dict[bytes, str] = {}
        self._folders: dict[str, int] = {}
        self._mapped = frozenset[int]()
        """The inodes of files that were mapped for writing at any time of this snapshot."""
        self._scan_s = 0.0
        self._is_stopped = self.is_salvage or operations.freezer.is_frozen(record.rental_id)
        """Whether nothing of the rental runs, so that its home is scanned only once."""
        self._pause_most_s = PAUSE_MOST_S if request.for_migration else min(PAUSE_MOST_S, request.pause_s)

    @property
    def is_scheduled(self) -> bool:
        """Whether the snapshot is one of those that are made at an interval."""
        return not (self.is_salvage or self.request.for_migration)

    def make(self) -> dict[str, Any]:
        """Stage what changed and write the manifest; return the report for the manager. Raise RequestRefused."""
        began, copied = time.monotonic(), Scan(self._known.scan.lines, 0.0)
        if not self._is_stopped:
            self._mapped = scan.mapped_inodes(self.record.uid)
            now = self._scan()
            self._check_size(now)
            if self._base and self._is_same(now):
                return self._report(began, now, same=True, whole=False)
            copied = self._stage_while_running(now)
        records, rental_id = self.operations.records, self.record.rental_id
        with records.locked(rental_id, LOCK_WAIT_S):
            check_unlock(records.find(rental_id), records.purged_epoch(rental_id), self.record.epoch)
            began = time.monotonic()
            last, pause_s = self._stage_while_stopped(copied)
        if self._is_stopped and self._base and self._is_same(last):
            return self._report(began, last, same=True, whole=False)
        self.operations.manifests.write(rental_id, self.request.mark, self._settle(last), self.request.base)
        is_whole, paused = self._base is None, {"pause_s": round(pause_s, 4), "folders": self._folders}
        return self._report(began, last, same=False, whole=is_whole) | paused

    def _report(self, began: float, found: Scan, same: bool, whole: bool) -> dict[str, Any]:
        """Return the report for the manager of a snapshot that began at `began`, in monotonic seconds.

        All that was written before that is in the snapshot. Managers use `after_s`; those of earlier versions subtract
        `age_s` from the time at which they read the report.
        """
        names = [_shown(path) for path in sorted(self._missing)[:NAMES_SHOWN]]
        times = {"after_s": began - self.requested_at, "age_s": time.monotonic() - began}
        return times | {"same": same, "whole": whole, "files": len(found.lines), "skipped": names}

    def _stage_while_running(self, now: Scan) -> Scan:
        """Copy what changed while programs run; return the scan up to which all is copied."""
        waiting = scan.changed_entries(now, self._known.scan)
        copied, before, keeping_s = Scan(self._known.scan.lines, 0.0), float("inf"), 0.0
        for _ in range(MOST_ROUNDS):
            left = _bytes_of(waiting)
            if (left <= SMALL_BYTES and len(waiting) <= SMALL_NUMBER) or left > HELPS * before:
                break
            began, number = _processor_s(), len(waiting)
            self.staging.stage(waiting.values(), self._look)
            took_s = _processor_s() - began
            before, copied = left, now
            now = self._scan()
            waiting = scan.changed_entries(now, copied)
            more = max(_bytes_of(waiting) / max(SMALL_BYTES, left), len(waiting) / max(SMALL_NUMBER, number))
            keeping_s = took_s * more
        pause_s = self._scan_s + keeping_s + _bytes_of(self._entries_in_doubt(now)) / COPIED_A_SECOND
        if self.is_scheduled and pause_s > self._pause_most_s:
            what = f"would have to be stopped for about {pause_s:.1f} s"
            raise RequestRefused("pause_too_long", f"its programs {what} for a snapshot: {SO_MUCH}")
        return copied

    def _scan(self) -> Scan:
        """Return a scan of a home in which programs may run, and remember the processor time that the scan took.

        Its elapsed time depends on the renter's programs, which use the processors meanwhile.
        """
        began = _processor_s()
        found = scan.scan(self.request.max_files, self._deadline, strict=False)
        self._scan_s = _processor_s() - began
        return found

    def _entries_in_doubt(self, of: Scan) -> dict[bytes, HomeEntry]:
        """Return by path the files that are mapped for writing, or were doubtful in the base snapshot."""
        doubtful, inodes = self._known.doubtful, {str(inode).encode() for inode in self._mapped}
        lines = of.lines if doubtful or inodes else ()
        return {
            scan.path_of(line): scan.parse_entry(line)
            for line in lines
            if line.split(b" ", 1)[0] in inodes or (doubtful and scan.path_of(line) in doubtful)
        }

    def _stage_while_stopped(self, copied: Scan) -> tuple[Scan, float]:
        """Stop the programs and copy the rest; return the scan of that moment, and the seconds of the pause."""
        freezer, record = self.operations.freezer, self.record
        for _ in range(PAUSE_TRIES):
            began = time.monotonic()
            until = time.clock_gettime(time.CLOCK_BOOTTIME) + PAUSE_ENDS_S
            tasks = frozenset() if self.is_salvage else freezer.pause(record, until)
            is_pause = tasks is not None and not self.is_salvage
            ends_at = monotonic_of(self.request.deadline)
            self._deadline = min(ends_at, began + self._pause_most_s) if is_pause else ends_at
            try:
                if is_pause and self._is_stopped:
                    raise RequestRefused("restless", "it was frozen, and was thawed as its snapshot began")
                self._mapped |= scan.mapped_inodes(record.uid)
                before = tasks_of(record.uid) if tasks is None else tasks
                last = scan.scan(self.request.max_files, self._deadline, strict=True)
                if self._is_stopped:
                    self._check_size(last)
                self.staging.stage(self._entries_left(last, copied), self._look)
                self._look()
                if not has_run(before, tasks_of(record.uid)) and not self.staging.vanished:
                    return last, time.monotonic() - began if is_pause else 0.0
            except RequestRefused as refusal:
                if refusal.code == "timed_out" and self._deadline < ends_at:
                    what = f"were stopped for {time.monotonic() - began:.1f} s in vain"
                    raise RequestRefused("pause_in_vain", f"its programs {what} for a snapshot: {SO_MUCH}") from refusal
                raise
            finally:
                if is_pause:
                    freezer.resume(record.rental_id)
        problem = "something ran, or came in, each time that its programs were stopped for a snapshot"
        raise RequestRefused("restless", problem)

    def _entries_left(self, last: Scan, copied: Scan) -> list[HomeEntry]:
        """Return the entries to copy while nothing runs: those that changed since `copied`, or may have."""
        rest = scan.changed_entries(last, copied)
        for path, found in scan.changed_entries(last, self._known.scan).items():
            if scan.is_racy(found, copied.at) or found.path in self.staging.vanished:
                rest[path] = found
        rest |= self._entries_in_doubt(last)
        self.staging.vanished.clear()
        return list(rest.values())

    def _settle(self, last: Scan) -> Manifest:
        """Write the list of paths to send; return the manifest of the snapshot. The rental's programs run meanwhile."""
        changed = scan.changed_entries(last, self._known.scan)
        doubtful = {path: found for path, found in changed.items() if scan.is_racy(found, last.at)}
        doubtful |= self._entries_in_doubt(last)
        removed = {scan.path_of(line) for line in self._known.scan.lines - last.lines} - changed.keys()
        others = [found.path for found in changed.values() if found.kind != b"d"]
        sent = [*(changed.keys() | doubtful.keys()), b"."]
        self.staging.keep_only(sent)
        self.staging.write_list(path.removeprefix(b"./") for path in (*sent, *scan.topmost(removed, others)))
        missing = {path: why for path, why in self._known.missing.items() if path not in changed.keys() | removed}
        missing |= self.staging.incomplete | self.staging.missing
        self._folders, room = {}, MOST_ODD_BYTES
        for path, mode in sorted(scan.closed_folders(last).items()):
            room -= len(path)
            if room >= 0:
                self._folders[path.hex()] = mode
            else:
                missing[path] = f"its mode {mode:o} comes back as {mode | 0o700:o}"
        if missing and self.request.for_migration:
            names = ", ".join(f"{_shown(path)} ({why})" for path, why in sorted(missing.items())[:3])
            raise RequestRefused("cannot_carry", f"{len(missing)} of its files cannot be carried whole: {names}")
        self._missing = missing
        hashes = {path: self.staging.digest(path) for path in doubtful if doubtful[path].kind == b"f"}
        return Manifest(last, hashes, missing)

    def _is_same(self, now: Scan) -> bool:
        """Return whether the home is as in the snapshot that the manager has. Nothing is stopped for this."""
        self._missing = self._known.missing
        if now.lines != self._known.scan.lines:
            return False
        home, uid, doubtful = self.home, self.record.uid, self._known.doubtful
        return all(found and scan.digest_at(home, path, uid) == found for path, found in doubtful.items())

    def _check_size(self, now: Scan) -> None:
        if scan.size_of(now) > self.request.max_bytes:
            most = self.request.max_bytes >> 20
            counted = "each directory and small file counts as 4 KiB, and holes count"
            raise RequestRefused("over_limit", f"its home holds more than {most} MiB ({counted})")

    def _look(self) -> None:
        """Raise RequestRefused if the deadline has passed or the manager has closed the connection."""
        if time.monotonic() > self._deadline:
            raise RequestRefused("timed_out", "staging the files that changed took longer than it may")
        if hung_up():
            raise RequestRefused("abandoned", "the manager no longer waits for the snapshot")


def _processor_s() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _bytes_of(entries: Mapping[bytes, HomeEntry]) -> int:
    return sum(each.size for each in entries.values() if each.kind == b"f")


def hung_up() -> bool:
    """Return whether the other end of standard output is closed."""
    look = select.poll()
    look.register(1, 0)
    return bool(look.poll(0))


def _shown(path: bytes) -> str:
    return os.fsdecode(path.removeprefix(b"./")).encode(errors="backslashreplace").decode()[:200]


def monotonic_of(deadline: float) -> float:
    """Return a Unix time as monotonic seconds."""
    return time.monotonic() + deadline - time.time()
