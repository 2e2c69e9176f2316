"""Marks in files that say which rentals are frozen, which are paused, and that this worker has no lease.

The agent and orion-rental share them. A mark is written before a process is stopped and removed after all were woken. A
program that is killed in between leaves a frozen rental, which the next order freezes or thaws again. While a mark
exists the agent repeats the freezing (agent/fence.py). A restart of the container removes all marks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orion_worker.freezer.enforcer import Enforcer
from orion_worker.freezer.stopper import KernelTask, stop, stopped_processes, wake
from orion_worker.records import RentalRecord, RequestRefused
from orion_worker.system.locks import got_lock, opened_lock

OVER_LIMIT = "over_limit"
"""The code of a refusal and of a freeze because a home holds more than it may."""
GRACE_S = 600.0
"""Seconds for which a rental over its limits runs after a thaw, so that its renter can make room."""
COMMAND_WAITS_S = 5.0
STOPPED_WITHIN_S = 2.0
"""Seconds within which all processes of a rental have to be stopped for a snapshot."""
FENCE_WAITS_S = 0.1
"""Seconds after which the fence freezes without the lock: to freeze twice is harmless, to let processes run is not."""


@dataclass(frozen=True, kw_only=True)
class FreezeMark:
    """The record of a freeze, which its thaw needs."""

    stopped_before: frozenset[tuple[int, int]]
    """(pid, start) of processes that their renter had stopped before: a thaw leaves these stopped."""
    ordered_at: float | None = None
    """When an order froze the rental (CLOCK_BOOTTIME): no reply to a call that was sent before may thaw it."""
    over_limit: str = ""
    """The resource that the home uses too much of: then no reply thaws the rental, only an order."""
    migration: int = 0
    """The number of the planned migration that froze the rental; no order of an earlier migration thaws it."""


class Freezer:
    """The marks of one worker; `root` is another directory in tests."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "run/orion/frozen"
        self._grace = root / "run/orion/spared"
        self._pausing = root / "run/orion/pausing"
        self._no_lease = root / "run/orion/no-lease"
        self._lock = root / "run/orion/freezing.lock"

    def begin(self) -> None:
        """Remove all marks at the start of the container, and note that there is no lease yet."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for mark in (*self._folder.iterdir(), *self._pausing.glob("*")):
            mark.unlink()
        self.set_lease(False)

    @property
    def has_lease(self) -> bool:
        """Return whether this worker has a lease; True also in tests where no agent notes it."""
        return not self._no_lease.exists()

    def set_lease(self, has_lease: bool) -> None:
        if has_lease:
            self._no_lease.unlink(missing_ok=True)
        else:
            self._no_lease.touch()

    def is_frozen(self, rental_id: str) -> bool:
        return (self._folder / rental_id).exists()

    def frozen(self) -> list[str]:
        return sorted(mark.name for mark in self._folder.glob("[!.]*")) if self._folder.is_dir() else []

    def over_limit_reason(self, rental_id: str) -> str:
        """Return the resource that the home uses too much of, if the rental is frozen for that; else an empty text."""
        mark = self._read(rental_id)
        return mark.over_limit if mark else ""

    def is_in_grace(self, record: RentalRecord, now: float) -> bool:
        """Return whether the rental was thawed less than GRACE_S ago, at this epoch, to make room."""
        try:
            epoch, until = json.loads((self._grace / record.rental_id).read_text())
        except FileNotFoundError:
            return False
        return bool(epoch == record.epoch and now < until)

    def freeze(
        self, record: RentalRecord, ordered_at: float | None, over_limit: str = "", migration: int = 0
    ) -> tuple[bool, int]:
        """Freeze a rental; return whether it was not frozen before, and how many processes were killed for resisting.

        `ordered_at`: None if no order asks for it, but the home is over its limits.
        """
        with self.locked(COMMAND_WAITS_S) as locked:
            _check_locked(locked)
            mark = self._read(record.rental_id)
            before = mark or FreezeMark(stopped_before=self.stopped_before(record.uid))
            over_limit, migration = over_limit or before.over_limit, max(migration, before.migration)
            marked = replace(before, ordered_at=ordered_at, over_limit=over_limit, migration=migration)
            self._write(record.rental_id, marked)
            return mark is None, Enforcer(record.uid, record.username).enforce()

    def pause(self, record: RentalRecord, until: float) -> frozenset[KernelTask] | None:
        """Stop all processes of a rental for a moment; return them as they are then, or None if they are frozen.

        `until`: when the fence lets them run on, unless `resume` has (CLOCK_BOOTTIME). Raise RequestRefused, and let
        them run on, if they cannot be stopped in time.
        """
        with self.locked(COMMAND_WAITS_S) as locked:
            _check_locked(locked)
            if self.is_frozen(record.rental_id):
                return None
            stopped_before = self.stopped_before(record.uid)
            self._pausing.mkdir(mode=0o700, parents=True, exist_ok=True)
            pause = {"uid": record.uid, "username": record.username, "stay": sorted(stopped_before), "until": until}
            (self._pausing / record.rental_id).write_text(json.dumps(pause))
        tasks = stop(record.uid, record.username, STOPPED_WITHIN_S)
        if tasks is None:
            self.resume(record.rental_id)
            raise RequestRefused("restless", "its programs could not be stopped for the moment that a snapshot takes")
        return frozenset(tasks)

    def resume(self, rental_id: str) -> None:
        """End a pause, if there is one. The processes stay stopped if the rental is frozen or there is no lease."""
        with self.locked(COMMAND_WAITS_S):
            mark = self._pausing / rental_id
            try:
                pause = json.loads(mark.read_text())
            except (OSError, ValueError):
                mark.unlink(missing_ok=True)
                return
            if self.has_lease and not self.is_frozen(rental_id):
                wake(pause["uid"], pause["username"], _processes_of(pause))
            mark.unlink(missing_ok=True)

    def overdue(self, now: float) -> list[str]:
        """Return the rentals whose pause was not ended in time."""
        return [rental_id for rental_id, pause in self._pauses() if pause["until"] < now]

    def stopped_before(self, uid: int) -> frozenset[tuple[int, int]]:
        """Return (pid, start) of the processes that are stopped by their renter, and not by a pause."""
        for _, pause in self._pauses():
            if pause["uid"] == uid:
                return _processes_of(pause)
        return stopped_processes(uid)

    def mark(self, record: RentalRecord, stopped_before: frozenset[tuple[int, int]]) -> bool:
        """Write a mark for the fence, which has the lock if it could get it; return whether there was none before."""
        if self.is_frozen(record.rental_id):
            return False
        self._write(record.rental_id, FreezeMark(stopped_before=stopped_before))
        return True

    def refreeze(self, rental_id: str, enforcer: Enforcer, lock_keys: Callable[[], None]) -> int:
        """Repeat a freezing, unless the rental is being thawed; return how many processes were killed for resisting.

        `lock_keys` locks the rental. It is called under the lock, because after a thaw the renter needs the keys.
        """
        with self.locked(FENCE_WAITS_S) as locked:
            if not self.is_frozen(rental_id) or not (locked or not self.has_lease):
                return 0
            lock_keys()
            return enforcer.enforce()

    def thaw(self, record: RentalRecord, requested_at: float | None, migration: int = 0) -> bool:
        """Thaw a rental; return whether it was frozen.

        `requested_at`: when the call was sent whose reply asks for the thaw; None: an order asks for it.
        """
        with self.locked(COMMAND_WAITS_S) as locked:
            mark = self._read(record.rental_id)
            if mark is None:
                return False
            _check_locked(locked)
            if not self.has_lease:
                raise RequestRefused("no_lease", "this worker has no lease: nothing may run here")
            if requested_at is not None and mark.ordered_at is not None and requested_at <= mark.ordered_at:
                raise RequestRefused("frozen_since", "it was frozen by an order since that was asked")
            if requested_at is None and migration < mark.migration:
                reason = f"it is quiesced for planned move {mark.migration}, which is a later one"
                raise RequestRefused("frozen_since", reason)
            if mark.over_limit and migration:
                self._write(record.rental_id, replace(mark, migration=0))  # it stays frozen
                raise RequestRefused(OVER_LIMIT, "its home holds more than it may: its owner alone may thaw it")
            if mark.over_limit:
                self._grant_grace(record, requested_at)
            wake(record.uid, record.username, mark.stopped_before)
            self.forget(record.rental_id)
            return True

    def forget(self, rental_id: str) -> None:
        (self._folder / rental_id).unlink(missing_ok=True)

    def forget_purged(self, rental_id: str) -> None:
        """Remove the mark and the grace of a purged rental."""
        self.forget(rental_id)
        (self._grace / rental_id).unlink(missing_ok=True)

    @contextmanager
    def locked(self, wait_s: float) -> Iterator[bool]:
        """Give whether the lock was got within that time, and free it at the end."""
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with opened_lock(self._lock) as lock:
            yield got_lock(lock, wait_s)

    def _grant_grace(self, record: RentalRecord, requested_at: float | None) -> None:
        if requested_at is not None:
            raise RequestRefused(OVER_LIMIT, "its home holds more than it may: it is thawed by an order alone")
        self._grace.mkdir(mode=0o700, parents=True, exist_ok=True)
        until = time.clock_gettime(time.CLOCK_BOOTTIME) + GRACE_S
        (self._grace / record.rental_id).write_text(json.dumps([record.epoch, until]))

    def _pauses(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for mark in self._pausing.glob("[!.]*") if self._pausing.is_dir() else ():
            with suppress(OSError, ValueError):
                found.append((mark.name, dict(json.loads(mark.read_text()))))
        return found

    def _read(self, rental_id: str) -> FreezeMark | None:
        try:
            text = (self._folder / rental_id).read_text()
        except FileNotFoundError:
            return None
        found = json.loads(text)
        return FreezeMark(
            stopped_before=_processes_of(found),
            ordered_at=found["ordered_at"],
            over_limit=found.get("over", ""),
            migration=found.get("move", 0),
        )

    def _write(self, rental_id: str, mark: FreezeMark) -> None:
        """Write a mark whole or not at all. It is not synced: it need not outlive the machine or wait for its disk."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._folder / f".{rental_id}"
        content = {"stay": sorted(mark.stopped_before), "ordered_at": mark.ordered_at}
        new.write_text(json.dumps(content | {"over": mark.over_limit, "move": mark.migration}))
        new.replace(self._folder / rental_id)


def _check_locked(locked: bool) -> None:
    if not locked:
        raise RequestRefused("busy", "another rental is being frozen or thawed; try again")


def _processes_of(content: dict[str, Any]) -> frozenset[tuple[int, int]]:
    return frozenset((pid, started) for pid, started in content["stay"])
