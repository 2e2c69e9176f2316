"""Which rentals are frozen, and that this worker has no lease: marks in files, for the agent and the program alike.

A mark stands before anything is stopped, and goes after everything was woken: whoever is killed in between leaves a
rental that is frozen, and that is frozen or thawed again by the next who is told to. While a mark stands the agent
repeats the freezing (worker/fence.py). Marks are gone after a restart of the container, and so are all processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orion_worker.freezer.enforcer import Vigil
from orion_worker.freezer.stopper import Task, stop, stopped_processes, wake
from orion_worker.records import Record, Refused
from orion_worker.system.locks import got_lock, opened_lock

OVER_LIMIT = "over_limit"
SPARED_S = 600.0
"""What is thawed though its home holds too much has so long to make room."""
COMMAND_WAITS_S = 5.0
STOPPED_WITHIN_S = 2.0
"""Seconds within which all processes of a rental have to stand for a snapshot."""
FENCE_WAITS_S = 0.1
"""The fence goes on without the lock then: freezing twice harms nobody, not freezing does."""


@dataclass(frozen=True)
class Mark:
    """What a thaw has to know of a freeze."""

    stay: frozenset[tuple[int, int]]
    """(pid, start) of processes that were stopped before: they stay so."""
    ordered_at: float | None = None
    """When an order froze it (CLOCK_BOOTTIME): no reply to a call that was sent before may thaw it."""
    over: str = ""
    """What its home holds too much of: then no reply at all thaws it, only an order."""
    move: int = 0
    """The planned move for which an order froze it, by a number that only rises: no order of an earlier thaws it."""


class Freezer:
    def __init__(self, root: Path) -> None:
        self._folder = root / "run/orion/frozen"
        self._spared = root / "run/orion/spared"
        self._pausing = root / "run/orion/pausing"
        self._no_lease = root / "run/orion/no-lease"
        self._lock = root / "run/orion/freezing.lock"

    def begin(self) -> None:
        """At the start of the container: nothing runs, and there is no lease yet."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for mark in (*self._folder.iterdir(), *self._pausing.glob("*")):
            mark.unlink()
        self.set_lease(False)

    @property
    def has_lease(self) -> bool:
        """Also where no agent keeps one, as in a test."""
        return not self._no_lease.exists()

    def set_lease(self, held: bool) -> None:
        if held:
            self._no_lease.unlink(missing_ok=True)
        else:
            self._no_lease.touch()

    def is_frozen(self, rental_id: str) -> bool:
        return (self._folder / rental_id).exists()

    def frozen(self) -> list[str]:
        return sorted(mark.name for mark in self._folder.glob("[!.]*")) if self._folder.is_dir() else []

    def is_over(self, rental_id: str) -> str:
        """What its home holds too much of, if it is frozen for that."""
        mark = self._read(rental_id)
        return mark.over if mark else ""

    def is_spared(self, record: Record, now: float) -> bool:
        """Whether it was thawed so short a time ago, at this epoch, that it may still be making room."""
        try:
            epoch, until = json.loads((self._spared / record.rental_id).read_text())
        except FileNotFoundError:
            return False
        return bool(epoch == record.epoch and now < until)

    def freeze(self, record: Record, ordered_at: float | None, over: str = "", move: int = 0) -> tuple[bool, int]:
        """By an order, or because its home is `over` its limits.

        Whether it was not frozen before, and how many processes were killed for fighting it.
        """
        with self.locked(COMMAND_WAITS_S) as mine:
            if not mine:
                raise Refused("busy", "something else is being frozen or thawed; try again")
            mark = self._read(record.rental_id)
            stay = mark.stay if mark else self.stopped_before(record.uid)
            before = mark or Mark(frozenset())
            self._write(record.rental_id, Mark(stay, ordered_at, over or before.over, max(move, before.move)))
            return mark is None, Vigil(record.uid, record.username).hold()

    def pause(self, record: Record, until: float) -> frozenset[Task] | None:
        """Stop all processes of a rental for a moment; return them as they stand. None: it stands still already.

        `until`: the moment (CLOCK_BOOTTIME) at which the fence lets them go on if nobody has. Raise Refused if they
        cannot be stopped in time; they go on then.
        """
        with self.locked(COMMAND_WAITS_S) as mine:
            if not mine:
                raise Refused("busy", "something else is being frozen or thawed; try again")
            if self.is_frozen(record.rental_id):
                return None
            stay = self.stopped_before(record.uid)
            self._pausing.mkdir(mode=0o700, parents=True, exist_ok=True)
            told = {"uid": record.uid, "username": record.username, "stay": sorted(stay), "until": until}
            (self._pausing / record.rental_id).write_text(json.dumps(told))
        tasks = stop(record.uid, record.username, STOPPED_WITHIN_S)
        if tasks is None:
            self.resume(record.rental_id)
            raise Refused("restless", "its programs could not be stopped for the moment that a snapshot takes")
        return frozenset(tasks)

    def resume(self, rental_id: str) -> None:
        """End a pause, if there is one. What was frozen meanwhile stays frozen, and so does all without a lease."""
        with self.locked(COMMAND_WAITS_S):
            mark = self._pausing / rental_id
            try:
                told = json.loads(mark.read_text())
            except (OSError, ValueError):
                mark.unlink(missing_ok=True)
                return
            if self.has_lease and not self.is_frozen(rental_id):
                wake(told["uid"], told["username"], frozenset((pid, started) for pid, started in told["stay"]))
            mark.unlink(missing_ok=True)

    def overdue(self, now: float) -> list[str]:
        """Return the rentals whose pause nobody has ended in time."""
        return [rental_id for rental_id, told in self._pauses() if told["until"] < now]

    def stopped_before(self, uid: int) -> frozenset[tuple[int, int]]:
        """Return (pid, start) of the processes that are stopped by their renter, and not by a pause."""
        for _, told in self._pauses():
            if told["uid"] == uid:
                return frozenset((pid, started) for pid, started in told["stay"])
        return stopped_processes(uid)

    def _pauses(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for mark in self._pausing.glob("[!.]*") if self._pausing.is_dir() else ():
            with suppress(OSError, ValueError):
                found.append((mark.name, dict(json.loads(mark.read_text()))))
        return found

    def mark(self, record: Record, stay: frozenset[tuple[int, int]]) -> bool:
        """By the fence, with the lock if it could get it; `stay` as in Mark. Whether it was not frozen before."""
        if self.is_frozen(record.rental_id):
            return False
        self._write(record.rental_id, Mark(stay))
        return True

    def again(self, rental_id: str, vigil: Vigil, shut: Callable[[], None]) -> int:
        """Repeat a freezing; how many processes were killed for fighting it. Not while it is being thawed.

        `shut`: takes its keys away. Once it is thawed, they are where its renter is let in by them.
        """
        with self.locked(FENCE_WAITS_S) as mine:
            if not self.is_frozen(rental_id) or not (mine or not self.has_lease):
                return 0
            shut()
            return vigil.hold()

    def thaw(self, record: Record, asked_at: float | None, move: int = 0) -> bool:
        """Whether it was frozen. `asked_at`: when the call was sent whose reply says so; None: it is an order."""
        with self.locked(COMMAND_WAITS_S) as mine:
            mark = self._read(record.rental_id)
            if mark is None:
                return False
            if not mine:
                raise Refused("busy", "something else is being frozen or thawed; try again")
            if not self.has_lease:
                raise Refused("no_lease", "this worker has no lease: nothing may run here")
            if asked_at is not None and mark.ordered_at is not None and asked_at <= mark.ordered_at:
                raise Refused("frozen_since", "it was frozen by an order since that was asked")
            if asked_at is None and move < mark.move:
                raise Refused("frozen_since", f"it stands still for planned move {mark.move}, which is a later one")
            if mark.over and move:
                self._write(record.rental_id, replace(mark, move=0))  # it stood still before, and goes on standing
                raise Refused(OVER_LIMIT, "its home holds more than it may: its owner alone may have it go on")
            if mark.over:
                self._spare(record, asked_at)
            wake(record.uid, record.username, mark.stay)
            self.forget(record.rental_id)
            return True

    def _spare(self, record: Record, asked_at: float | None) -> None:
        if asked_at is not None:
            raise Refused(OVER_LIMIT, "its home holds more than it may: it is thawed by an order alone")
        self._spared.mkdir(mode=0o700, parents=True, exist_ok=True)
        until = time.clock_gettime(time.CLOCK_BOOTTIME) + SPARED_S
        (self._spared / record.rental_id).write_text(json.dumps([record.epoch, until]))

    def forget(self, rental_id: str) -> None:
        (self._folder / rental_id).unlink(missing_ok=True)

    def forget_purged(self, rental_id: str) -> None:
        self.forget(rental_id)
        (self._spared / rental_id).unlink(missing_ok=True)

    @contextmanager
    def locked(self, wait_s: float) -> Iterator[bool]:
        """Give whether the lock was got within that time."""
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with opened_lock(self._lock) as lock:
            yield got_lock(lock, wait_s)

    def _read(self, rental_id: str) -> Mark | None:
        try:
            told = json.loads((self._folder / rental_id).read_text())
        except FileNotFoundError:
            return None
        stay = frozenset((pid, started) for pid, started in told["stay"])
        return Mark(stay, told["ordered_at"], told.get("over", ""), told.get("move", 0))

    def _write(self, rental_id: str, mark: Mark) -> None:
        """Whole or not at all, but not to the disk: it need not outlive the machine, and must not wait for it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._folder / f".{rental_id}"
        told = {"stay": sorted(mark.stay), "ordered_at": mark.ordered_at, "over": mark.over, "move": mark.move}
        new.write_text(json.dumps(told))
        new.replace(self._folder / rental_id)
