"""The worker's end of a copy: `orion-rental send`, `orion-rental salvage` and `orion-rental receive`, by SSH as root.

One line of JSON comes in, one goes out; then this process is rsync, in the rental's home, under the renter's own uid.
What root does here is only to look at the record and to open the home, without following a link: whatever a renter
does with its files, and with this process, it can do already.

`receive` holds the rental's lock until rsync ends, so nobody is let in, and nothing is purged, while files still come.
It never fills a home whose renter was let in at this epoch: what is there then is newer than any copy.

`salvage` sends a home of an epoch that was lost, before it is purged. Nothing of it runs any more, or it would be
stopped with what reads its files: its processes are ended first, with the rental's lock. The rsync does not hold that:
whoever purges meanwhile ends it as all that is the renter's.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import traces
from freezing import Freezer
from ledger import Ledger, Record, Refused, check_receive, check_unlock

RSYNC = "/usr/bin/rsync"
_MEANING = "-lHogtpXrSe.iLsfxCIvu"
"""Links, hard links, owner, group, times, modes, extended attributes, recursively, sparse; no devices, no FIFOs."""
_SEND = ("--server", "--sender", _MEANING, "--no-msgs2stderr", "--numeric-ids", ".", ".")
ARGUMENTS = {
    "send": _SEND,
    "salvage": _SEND,
    "receive": ("--server", _MEANING, "--no-msgs2stderr", "--delete", "-@-1", "--numeric-ids", ".", "."),
}
"""Fixed, whatever the other side says; rsync itself asks for the same with the options of engine/vault/transfer.py."""
LONGEST_REQUEST = 4096
MADE_WITHIN_S = 1.0
LOOK_EVERY_S = 0.005
LOCK_WAIT_S = 5.0
NICENESS = 10
WAY_OUT = "it is frozen: `orion thaw` lets it go on for ten minutes, to make room"
SPARED = "it was thawed to make room, and is frozen again unless it does"
NO_NEW_PRIVILEGES = 38
"""prctl(2), PR_SET_NO_NEW_PRIVS."""


@dataclass(frozen=True)
class Wish:
    rental_id: str
    epoch: int
    deadline: float
    """Unix time at which the transfer is ended."""
    max_files: int = 0
    max_bytes: int = 0
    generation: str = ""
    """The copy that is received, kept in the record."""
    moving: bool = False
    """For a planned move: nothing may be left behind because its renter has shut its home to itself."""


class Keeper(Protocol):
    """What is done to a rental besides: rental.Rentals."""

    ledger: Ledger
    freezer: Freezer

    def lay_down(self, record: Record) -> None: ...

    def hold_over(self, record: Record, what: str) -> bool: ...


def carry(direction: str, keeper: Keeper, homes: Path) -> int:
    """Become rsync, or say why not; the exit status of a refusal."""
    ledger = keeper.ledger
    with ExitStack() as held:
        try:
            wish = parse(_read_line(), time.time())
            if direction == "receive":
                await_account(ledger, wish)
            if direction != "send":
                lock = held.enter_context(ledger.locked(wish.rental_id, LOCK_WAIT_S))
                os.set_inheritable(lock, direction == "receive")
            record = allowed(direction, ledger, wish)
            if direction == "salvage":
                keeper.lay_down(record)
            enter(homes / record.username, record.uid, wish.moving)
            told = look_through(direction, keeper, record, wish)
            if direction == "send":
                keeper.freezer.spare(record, os.getpid())
            become(record.uid, gently=not (direction == "receive" or wish.moving))
        except (ValueError, TypeError) as error:
            return _answer(2, {"error": f"request not understood: {error}", "code": "invalid_request"})
        except Refused as refusal:
            return _answer(3, {"error": str(refusal), "code": refusal.code} | refusal.details)
        _answer(0, {"ok": True} | told)
        become_rsync(direction, wish)
    return 1  # nothing comes back from there


def parse(line: bytes, now: float) -> Wish:
    """Raises ValueError or TypeError for what is no request, Refused for one that is late."""
    wish = Wish(**json.loads(line))
    if not isinstance(wish.rental_id, str) or not re.fullmatch(r"[a-z0-9-]{1,64}", wish.rental_id):
        raise ValueError("rental_id is not an id")
    if type(wish.epoch) is not int or wish.epoch < 1:
        raise ValueError("epoch must be a whole number from 1")
    if not re.fullmatch(r"[0-9-]{0,64}", wish.generation):
        raise ValueError("generation is not one")
    if wish.deadline <= now + 1:
        raise Refused("deadline_passed", "its deadline has passed: who ordered it no longer waits for it")
    return wish


def await_account(ledger: Ledger, wish: Wish) -> None:
    """Whoever fills a home may come a moment before it is made; whether it may be filled is looked at afterwards."""
    last_moment = time.monotonic() + MADE_WITHIN_S
    while ledger.purged_epoch(wish.rental_id) < wish.epoch and time.monotonic() < last_moment:
        record = ledger.living(wish.rental_id)
        if record and record.epoch >= wish.epoch:
            return
        time.sleep(LOOK_EVERY_S)


def allowed(direction: str, ledger: Ledger, wish: Wish) -> Record:
    """The record of the rental, if it may be copied from, or into, at this epoch. Raises Refused."""
    record = ledger.living(wish.rental_id)
    check = check_receive if direction == "receive" else check_unlock
    check(record, ledger.purged_epoch(wish.rental_id), wish.epoch)
    assert record is not None  # noqa: S101 - the check has refused it
    if direction == "salvage" and not record.let_in:
        raise Refused("nothing_to_salvage", "its renter was never let in here at this epoch")
    if direction == "receive":
        record = replace(record, restored=wish.generation)
        ledger.keep(record)
    return record


def enter(home: Path, uid: int, open_it: bool = False) -> None:
    """Its home is the current directory. Raises Refused where that is not the renter's own directory."""
    try:
        folder = os.open(home, traces.OPEN_FOLDER)
    except OSError as error:
        raise Refused("no_home", f"its home is not there: {error.strerror}") from error
    try:
        if os.fstat(folder).st_uid != uid:
            raise Refused("no_home", "its home is not its own")
        if open_it:
            os.fchmod(folder, stat.S_IMODE(os.fstat(folder).st_mode) | 0o700)
        os.fchdir(folder)
    finally:
        os.close(folder)


def become(uid: int, gently: bool) -> None:
    """The renter, for good. `gently`: what it and others do for themselves comes first; else somebody waits for it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if gently:
        os.nice(NICENESS)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise Refused("broken", f"privileges cannot be given up: {os.strerror(ctypes.get_errno())}")


def look_through(direction: str, keeper: Keeper, record: Record, wish: Wish) -> dict[str, Any]:
    """What there is to send. Raises Refused; a home that runs and holds more than it may is frozen then."""
    if direction == "receive":
        return {}
    if direction == "send" and not wish.moving and (what := keeper.freezer.is_over(record.rental_id)):
        raise Refused("over_limit", f"{what}; {WAY_OUT}")  # it stands still: nothing is to be counted again
    answer = measured_by_the_renter(record.uid, wish, lambda counting: keeper.freezer.spare(record, counting))
    if answer.get("code") == "over_limit" and direction == "send" and not wish.moving:
        held = keeper.hold_over(record, str(answer["error"]))
        raise Refused("over_limit", f"{answer['error']}; {WAY_OUT if held else SPARED}", {"held": held})
    if "code" in answer:
        raise Refused(str(answer["code"]), str(answer["error"]))
    return answer


def measured_by_the_renter(uid: int, wish: Wish, spare: Callable[[int], None] = lambda _pid: None) -> dict[str, Any]:
    """What `measure` finds in a process that is the renter, so that this one may still freeze it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _measure_and_tell(uid, wish, writing)
    os.close(writing)
    try:
        spare(child)
        ready, _, _ = select.select([reading], [], [], max(0.0, wish.deadline - time.time()))
        told = os.read(reading, LONGEST_REQUEST) if ready else b""
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not told:
        raise Refused("failed", "its home could not be measured: that was ended, or took too long")
    return dict(json.loads(told))


def _measure_and_tell(uid: int, wish: Wish, writing: int) -> NoReturn:
    """In the child, which ends here whatever happens."""
    try:
        become(uid, gently=not wish.moving)
        try:
            told: dict[str, Any] = dict(measure(wish))
        except Refused as refusal:
            told = {"code": refusal.code, "error": str(refusal)}
        os.write(writing, json.dumps(told).encode())
    finally:
        os._exit(0)


def measure(wish: Wish) -> dict[str, int]:
    """Number and size of the files in the current directory, holes counted; what cannot be looked at is passed over.

    Raises Refused where that is more than a copy may have, and where the home itself cannot be read: a copy of it
    would be empty, and would be taken for all that there is.
    """
    files, size, folders = 0, 0, [b"."]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    files += 1
                    if files > wish.max_files:
                        raise over(f"more than {wish.max_files} files", wish)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        size += entry.stat(follow_symlinks=False).st_size
        except OSError as error:
            if folder == b".":
                raise Refused("unreadable_home", f"its home cannot be read by its renter: {error.strerror}") from error
        if size > wish.max_bytes:
            raise over(f"more than {wish.max_bytes >> 20} MiB (holes in files counted)", wish)
    return {"files": files, "bytes": size}


def over(what: str, wish: Wish) -> Refused:
    return Refused("over_limit", f"its home holds {what}", {"max_files": wish.max_files, "max_bytes": wish.max_bytes})


def become_rsync(direction: str, wish: Wish) -> NoReturn:
    """The alarm outlives the exec: whatever becomes of the other side, this one ends, and its lock with it."""
    signal.alarm(max(1, int(wish.deadline - time.time())))
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    os.execve(RSYNC, ("rsync", *ARGUMENTS[direction]), environment)  # noqa: S606 - and no shell, on purpose


def _read_line() -> bytes:
    """Byte by byte: what follows is rsync's."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte or len(line) > LONGEST_REQUEST:
            raise ValueError("it has no end")
        line += byte
    return line


def _answer(status: int, report: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    return status
