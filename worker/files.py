"""The worker's end of a transfer: `orion-rental send`, `salvage` and `receive`, by SSH as root.

One line of JSON comes in and one goes out; then an rsync takes over the connection, which is never root.

`send` makes a snapshot of a home: a state that existed at one moment. The manager names the snapshot that it has, by
its mark; only what changed since then is sent. The order of the steps:
1. Scan the home while its programs run, and set aside what changed (snapshot.py), again while that helps.
2. Take the rental's lock, stop its programs, scan once more, set aside what changed since step 1, let them go on.
   Where that takes longer than the manager allows, let them go on and refuse; where it will, refuse before.
3. Write down the scan under the mark of the new snapshot, answer, and send what was set aside.
Where nothing changed nothing is stopped. A rental that is frozen already is scanned in step 2 alone, and is not stopped
and not let go on. A process that dies between stop and go-on leaves a mark, by which the fence lets the rental go on
after PAUSE_ENDS_S.

Nothing of a transfer outlives its deadline, whoever stops a part of it: rsync is killed then with all that it has
started, root's process itself TIDIES_S later, and rsync also when root's process ends before it.

`salvage` is the same for a home of an epoch that was lost, before it is purged. Its processes are ended first.

`receive` fills a home, under the renter's own uid. It holds the rental's lock until that ends, so nobody is let in,
and nothing is purged, while files still come. It never fills a home whose renter was let in at this epoch: what is
there then is newer than any snapshot.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import traces
from freezing import Freezer
from ledger import Ledger, Record, Refused, check_not_laid_down, check_receive, check_unlock
from locks import got_lock, open_lock
from processes import FIRST_SENDER, be_killed_after, begin, die_with, end_group, has_ended, ticks
from snapshot import (
    NAMES_SHOWN,
    Aside,
    Entry,
    Manifest,
    Manifests,
    Scan,
    close_folders,
    digest_at,
    entry,
    fresh,
    gone,
    mapped_inodes,
    odd_folders,
    path_of,
    racy,
    racy_in,
    remove_tree,
    scan,
    size_of,
    topmost,
)
from stillness import has_run, tasks_of

RSYNC = "/usr/bin/rsync"
_SEND = ("--server", "--sender")
_CHANGES, _ALL = "-lHogtpAXIRSe.LsfxCIvu", "-lHogtpAXrSe.iLsfxCIvu"
_KINDS = ("--specials", "--no-msgs2stderr")
_LIST = ("--delete-missing-args", "--numeric-ids", "--files-from", "../list", "--from0")
_TO_FILL = ("-@-1", "--numeric-ids", ".", ".")
ARGUMENTS = {
    "send": (*_SEND, _CHANGES, *_KINDS, *_LIST, "--fake-super", ".", "."),
    "whole": (*_SEND, _ALL.replace("rS", "rcS"), *_KINDS, "--numeric-ids", "--fake-super", ".", "."),
    "receive": ("--server", _ALL, *_KINDS, "--delete", *_TO_FILL),
    "update": ("--server", _CHANGES, *_KINDS, "--force", "--delete-missing-args", *_TO_FILL),
}
"""The arguments of rsync here: for what changed, for a whole home, to fill a home, and to bring one up to date.

They are fixed, whatever the other side says; rsync asks for the same with the options of engine/vault/transfer.py.
"""
TRANSFERS = ("send", "salvage", "receive")
MARK = re.compile(r"[0-9a-f]{0,32}")
LONGEST_REQUEST = 1 << 16
MOST_ODD_BYTES = 4000
"""Bytes of the paths of odd directories that the other side is told of; beyond that, they are named as not whole."""
MADE_WITHIN_S = 1.0
LOOK_EVERY_S = 0.005
LOCK_WAIT_S = 5.0
TIDIES_S = 60.0
"""Seconds after the deadline of a transfer within which root's process has removed what it set aside, and has ended."""
NICENESS = 10
SMALL_BYTES, SMALL_NUMBER = 4 << 20, 64
"""Bytes and number of changed files from which on they are set aside before the rental is stopped, not only then."""
MOST_ROUNDS = 4
HELPS = 0.7
"""The share of the bytes of the round before that a round may have left, to be worth another."""
PAUSE_MOST_S = 10.0
PAUSE_ENDS_S = 12.0
PAUSE_TRIES = 3
"""How often a pause is begun again in which something ran all the same, such as a log-in that came just then."""
SO_MUCH = "so much changes in its home at once"
COPIED_A_SECOND = 300e6
"""Bytes, as a guess for files that were not copied in this snapshot yet."""
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
    base: str = ""
    """The mark of the snapshot that the other side has: only what changed since is sent. Empty: it has none."""
    mark: str = ""
    """The mark of the snapshot that is sent or received."""
    folders: Mapping[str, int] = field(default_factory=dict)
    """Modes that directories of a home that is filled have to get, by path in hexadecimal: see odd_folders."""
    moving: bool = False
    """Whether it is for a planned move: somebody waits, and nothing may be left behind."""
    pause_s: float = PAUSE_MOST_S
    """The seconds for which the programs of the rental may be stopped for it, unless it is for a planned move."""


class Keeper(Protocol):
    """What is done to a rental besides: rental.Rentals."""

    ledger: Ledger
    freezer: Freezer
    manifests: Manifests

    def lay_down(self, record: Record) -> None: ...

    def hold_over(self, record: Record, what: str) -> bool: ...


def sender_of(uid: int) -> int:
    """Return the uid of the account that sends a rental's files: of nobody else, and out of the renter's reach."""
    return uid + FIRST_SENDER


def carry(direction: str, keeper: Keeper, places: Path, homes: Path) -> int:
    """Do one transfer over standard input and output; return the exit status. `places`: where things are set aside."""
    try:
        line, asked_at = _read_line(), time.monotonic()
        wish = parse(line, time.time())
        be_killed_after(wish.deadline - time.time() + TIDIES_S)
        if direction == "receive":
            return _receive(keeper, wish, homes)
        return _send(direction, keeper, wish, places, homes, asked_at)
    except (ValueError, TypeError) as error:
        return _answer(2, {"error": f"request not understood: {error}", "code": "invalid_request"})
    except Refused as refusal:
        return _answer(3, {"error": str(refusal), "code": refusal.code} | refusal.details)


def _receive(keeper: Keeper, wish: Wish, homes: Path) -> int:
    ledger = keeper.ledger
    await_account(ledger, wish)
    with ledger.locked(wish.rental_id, LOCK_WAIT_S) as lock:
        os.set_inheritable(lock, True)
        record = allowed("receive", ledger, wish)
        home = enter(homes / record.username, record.uid)
        update = bool(wish.base)
        if update and keeper.manifests.read(wish.rental_id, wish.base) is None:
            raise Refused("no_base", "its home here is not known to hold what is to be brought up to date")
        is_same = update and wish.base == wish.mark
        if not is_same:
            keeper.manifests.forget(wish.rental_id)
        _answer(0, {"ok": True})
        status = run_rsync("update" if update else "receive", record.uid, wish.deadline, gently=False)
        close_folders(home, {bytes.fromhex(path): mode for path, mode in wish.folders.items()}, record.uid)
        os.close(home)
        if status == 0 and wish.mark and not is_same:
            looked = scan(sys.maxsize, _monotonic(wish.deadline), strict=True)
            keeper.manifests.write(wish.rental_id, wish.mark, Manifest(looked, _doubtful_now(looked)))
    return status


def _doubtful_now(looked: Scan) -> dict[bytes, str]:
    """Return the files that may change without showing it; nobody has been let in, so they are as they were filled."""
    return {found.path: "" for found in racy_in(looked)}


def _send(direction: str, keeper: Keeper, wish: Wish, places: Path, homes: Path, asked_at: float) -> int:
    ledger = keeper.ledger
    place = places / wish.rental_id
    places.mkdir(mode=0o711, parents=True, exist_ok=True)
    with _lock_of(places, wish.rental_id) as alone:
        if not got_lock(alone.fileno(), LOCK_WAIT_S):
            raise Refused("busy", "another transfer of this rental's files is still at work")
        alone.truncate(0)
        alone.write(f"{os.getpid()}\n")
        alone.flush()
        record = allowed(direction, ledger, wish)
        if direction == "salvage":
            with ledger.locked(wish.rental_id, LOCK_WAIT_S):
                record = allowed(direction, ledger, wish)
                keeper.lay_down(record)
        elif not wish.moving and (what := keeper.freezer.is_over(record.rental_id)):
            raise Refused("over_limit", f"{what}; {WAY_OUT}")  # it stands still: nothing is to be counted again
        home = enter(homes / record.username, record.uid)
        try:
            aside = Aside(home, place, record.uid, sender_of(record.uid))
            if not wish.moving:
                os.nice(NICENESS)
            try:
                is_salvage = direction == "salvage"
                told = told_of(keeper, record, Snapshot(keeper, record, wish, aside, home, is_salvage, asked_at))
                _answer(0, {"ok": True} | told)
                if told["same"]:
                    return 0
                os.fchdir(aside.top)
                return run_rsync("whole" if told["whole"] else "send", aside.sender, wish.deadline, not wish.moving)
            finally:
                aside.remove()
        finally:
            os.close(home)


def _lock_of(places: Path, rental_id: str) -> IO[str]:
    """Return the open file whose lock a transfer holds that sets files aside; its process number is in it."""
    return os.fdopen(open_lock(places / f".{rental_id}"), "r+")


def forget_aside(places: Path, rental_id: str) -> None:
    """Remove what is set aside of a purged rental, and end the transfer that is under way. No other begins then.

    Two that remove a tree at a time leave parts of it behind (seen). Raise Refused if the transfer does not end.
    """
    if not places.is_dir():
        return
    last_moment = time.monotonic() + LOCK_WAIT_S
    with _lock_of(places, rental_id) as alone:
        while not got_lock(alone.fileno(), LOOK_EVERY_S):
            alone.seek(0)
            with suppress(ValueError, ProcessLookupError):  # it has not written its number yet, or has just ended
                os.kill(int(alone.read()), signal.SIGKILL)
            if time.monotonic() > last_moment:
                raise Refused("busy", "a transfer of its files does not end")
        remove_tree(places / rental_id)
        (places / f".{rental_id}").unlink(missing_ok=True)


def told_of(keeper: Keeper, record: Record, snapshot: Snapshot) -> dict[str, Any]:
    """Return what the other side is told. A home that runs and holds more than it may is frozen."""
    try:
        return snapshot.make()
    except Refused as refusal:
        if refusal.code != "over_limit" or not snapshot.is_regular:
            raise
        held = keeper.hold_over(record, str(refusal))
        raise Refused("over_limit", f"{refusal}; {WAY_OUT if held else SPARED}", {"held": held}) from refusal


class Snapshot:
    """The making of one snapshot; `make` returns what the other side is told of it."""

    def __init__(
        self, keeper: Keeper, record: Record, wish: Wish, aside: Aside, home: int, salvage: bool, asked_at: float
    ) -> None:
        """`asked_at`: when the request had been read, in monotonic seconds."""
        self._asked_at = asked_at
        self._keeper = keeper
        self._record = record
        self._wish = wish
        self._aside = aside
        self._home = home
        self._salvage = salvage
        self._last_moment = _monotonic(wish.deadline)
        self._base = keeper.manifests.read(wish.rental_id, wish.base) if wish.base else None
        self._known = self._base or Manifest(Scan(frozenset(), 0.0))
        self._missing: dict[bytes, str] = {}
        self._folders: dict[str, int] = {}
        self._scan_s = 0.0
        self._stands_still = salvage or keeper.freezer.is_frozen(record.rental_id)
        """Whether nothing of the rental runs already: its home is scanned once only then."""
        self._pause_most_s = PAUSE_MOST_S if wish.moving else min(PAUSE_MOST_S, wish.pause_s)

    @property
    def is_regular(self) -> bool:
        """Whether it is one of those that are made every so often."""
        return not (self._salvage or self._wish.moving)

    def make(self) -> dict[str, Any]:
        began, copied, mapped = time.monotonic(), Scan(self._known.scan.lines, 0.0), frozenset[int]()
        if not self._stands_still:
            mapped = self._mapped()
            now = self._scan()
            self._check_size(now)
            if self._base and self._is_same(now):
                return self._same(now, began)
            copied = self._set_aside_what_runs(now, mapped)
        with self._keeper.ledger.locked(self._record.rental_id, LOCK_WAIT_S):
            check_unlock(
                self._keeper.ledger.living(self._record.rental_id),
                self._keeper.ledger.purged_epoch(self._record.rental_id),
                self._record.epoch,
            )
            began = time.monotonic()
            last, pause_s, mapped = self._while_it_stands(copied, mapped)
        if self._stands_still and self._base and self._is_same(last):
            return self._same(last, began)
        manifest = self._settle(last, mapped)
        self._keeper.manifests.write(self._record.rental_id, self._wish.mark, manifest, self._wish.base)
        return {
            "same": False, "whole": self._base is None, "pause_s": round(pause_s, 4), "folders": self._folders,
        } | self._when(began) | self._figures(last)  # fmt: skip

    def _same(self, now: Scan, began: float) -> dict[str, Any]:
        return {"same": True, "whole": False} | self._when(began) | self._figures(now)

    def _when(self, began: float) -> dict[str, Any]:
        """Return the seconds from the request until it was begun, and since then: what was written before is in it.

        The first counts. The second is for managers of earlier versions, which subtract it from the time at which they
        hear of it.
        """
        return {"after_s": began - self._asked_at, "age_s": time.monotonic() - began}

    def _set_aside_what_runs(self, now: Scan, mapped: frozenset[int]) -> Scan:
        """Copy what changed while programs go on; return the scan up to which all is copied."""
        waiting = fresh(now, self._known.scan)
        copied, before = Scan(self._known.scan.lines, 0.0), float("inf")
        keeping_s = 0.0
        for _ in range(MOST_ROUNDS):
            left = _bytes_of(waiting)
            if (left <= SMALL_BYTES and len(waiting) <= SMALL_NUMBER) or left > HELPS * before:
                break
            began, number = _processor_s(), len(waiting)
            self._aside.keep(waiting.values(), self._look)
            took_s = _processor_s() - began
            before, copied = left, now
            now = self._scan()
            waiting = fresh(now, copied)
            more = max(_bytes_of(waiting) / max(SMALL_BYTES, left), len(waiting) / max(SMALL_NUMBER, number))
            keeping_s = took_s * more
        pause_s = self._scan_s + keeping_s + _bytes_of(self._unseen(now, mapped)) / COPIED_A_SECOND
        if self.is_regular and pause_s > self._pause_most_s:
            what = f"would have to stand still for some {pause_s:.1f} s"
            raise Refused("pause_too_long", f"its programs {what} for a snapshot: {SO_MUCH}")
        return copied

    def _scan(self) -> Scan:
        """Return a scan of what may go on meanwhile, and remember the processor time that it took.

        The time on the clock says more about the renter's programs, which have the processors at present.
        """
        began = _processor_s()
        found = scan(self._wish.max_files, self._last_moment, strict=False)
        self._scan_s = _processor_s() - began
        return found

    def _unseen(self, of: Scan, mapped: frozenset[int]) -> dict[bytes, Entry]:
        """Return by path what may change without showing it: mapped for writing, or doubtful in the snapshot before."""
        doubtful, inodes = self._known.doubtful, {str(inode).encode() for inode in mapped}
        lines = of.lines if doubtful or inodes else ()
        return {
            path_of(line): entry(line)
            for line in lines
            if line.split(b" ", 1)[0] in inodes or (doubtful and path_of(line) in doubtful)
        }

    def _while_it_stands(self, copied: Scan, mapped: frozenset[int]) -> tuple[Scan, float, frozenset[int]]:
        """Copy the rest while nothing of it runs; return the scan of that moment, the pause, and what was mapped."""
        freezer, record = self._keeper.freezer, self._record
        for _ in range(PAUSE_TRIES):
            began = time.monotonic()
            until = time.clock_gettime(time.CLOCK_BOOTTIME) + PAUSE_ENDS_S
            tasks = frozenset() if self._salvage else freezer.pause(record, until)
            is_pause = tasks is not None and not self._salvage
            ends_at = _monotonic(self._wish.deadline)
            self._last_moment = min(ends_at, began + self._pause_most_s) if is_pause else ends_at
            try:
                if is_pause and self._stands_still:
                    raise Refused("restless", "it stood still, and was let go on as its snapshot began")
                mapped = mapped | self._mapped()
                before = tasks_of(record.uid) if tasks is None else tasks
                last = scan(self._wish.max_files, self._last_moment, strict=True)
                if self._stands_still:
                    self._check_size(last)
                self._aside.keep(self._rest(last, copied, mapped), self._look)
                self._look()
                if not has_run(before, tasks_of(record.uid)) and not self._aside.vanished:
                    return last, time.monotonic() - began if is_pause else 0.0, mapped
            except Refused as refusal:
                if refusal.code == "timed_out" and self._last_moment < ends_at:
                    what = f"stood still for {time.monotonic() - began:.1f} s in vain"
                    raise Refused("pause_in_vain", f"its programs {what} for a snapshot: {SO_MUCH}") from refusal
                raise
            finally:
                if is_pause:
                    freezer.resume(record.rental_id)
            self._last_moment = _monotonic(self._wish.deadline)
        raise Refused("restless", "something ran, or came in, each time that its programs were stopped for a snapshot")

    def _rest(self, last: Scan, copied: Scan, mapped: frozenset[int]) -> list[Entry]:
        """Return what has to be copied while nothing runs: what changed since, or may have without showing it."""
        rest = fresh(last, copied)
        for path, found in fresh(last, self._known.scan).items():
            if racy(found, copied.at) or found.path in self._aside.vanished:
                rest[path] = found
        rest |= self._unseen(last, mapped)
        self._aside.vanished.clear()
        return list(rest.values())

    def _settle(self, last: Scan, mapped: frozenset[int]) -> Manifest:
        """Write the list of what is sent; return the manifest of the snapshot. Everything goes on meanwhile."""
        changed = fresh(last, self._known.scan)
        doubtful = {path: found for path, found in changed.items() if racy(found, last.at)}
        doubtful |= self._unseen(last, mapped)
        removed = gone(last, self._known.scan)
        others = [found.path for found in changed.values() if found.kind != b"d"]
        sent = [*(changed.keys() | doubtful.keys()), b"."]
        self._aside.settle(sent)
        listed = [*sent, *topmost(removed, others)]
        self._aside.write_list([path[2:] if path.startswith(b"./") else path for path in listed])
        missing = {path: why for path, why in self._known.missing.items() if path not in changed.keys() | removed}
        missing |= self._aside.poorer | self._aside.missing
        self._folders, room = {}, MOST_ODD_BYTES
        for path, mode in sorted(odd_folders(last).items()):
            room -= len(path)
            if room >= 0:
                self._folders[path.hex()] = mode
            else:
                missing[path] = f"its mode {mode:o} comes back as {mode | 0o700:o}"
        if missing and self._wish.moving:
            names = ", ".join(f"{_shown(path)} ({why})" for path, why in sorted(missing.items())[:3])
            raise Refused("cannot_carry", f"{len(missing)} of its files cannot be carried whole: {names}")
        self._missing = missing
        hashes = {path: self._aside.digest(path) for path in doubtful if doubtful[path].kind == b"f"}
        return Manifest(last, hashes, missing)

    def _is_same(self, now: Scan) -> bool:
        """Return whether the home is as in the snapshot that the other side has. Nothing is stopped to find out."""
        self._missing = self._known.missing
        if now.lines != self._known.scan.lines:
            return False
        uid = self._record.uid
        return all(found and digest_at(self._home, path, uid) == found for path, found in self._known.doubtful.items())

    def _check_size(self, now: Scan) -> None:
        if size_of(now) > self._wish.max_bytes:
            most = self._wish.max_bytes >> 20
            counted = "each directory and small file counts as 4 KiB, and holes count"
            raise Refused("over_limit", f"its home holds more than {most} MiB ({counted})")

    def _figures(self, of: Scan) -> dict[str, Any]:
        names = [_shown(path) for path in sorted(self._missing)[:NAMES_SHOWN]]
        return {"files": len(of.lines), "skipped": names}

    def _mapped(self) -> frozenset[int]:
        return mapped_inodes(self._record.uid)

    def _look(self) -> None:
        """Raise Refused where the deadline has passed, or nobody waits any more."""
        if time.monotonic() > self._last_moment:
            raise Refused("timed_out", "setting aside what changed took longer than it may")
        if hung_up():
            raise Refused("abandoned", "nobody waits for it any more")


def _processor_s() -> float:
    """Return the processor seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _bytes_of(entries: Mapping[bytes, Entry]) -> int:
    return sum(each.size for each in entries.values() if each.kind == b"f")


def parse(line: bytes, now: float) -> Wish:
    """Raises ValueError or TypeError for what is no request, Refused for one that is late."""
    wish = Wish(**json.loads(line))
    if not isinstance(wish.rental_id, str) or not re.fullmatch(r"[a-z0-9-]{1,64}", wish.rental_id):
        raise ValueError("rental_id is not an id")
    if type(wish.epoch) is not int or wish.epoch < 1:
        raise ValueError("epoch must be a whole number from 1")
    if not re.fullmatch(r"[0-9-]{0,64}", wish.generation):
        raise ValueError("generation is not one")
    if not (MARK.fullmatch(wish.base) and MARK.fullmatch(wish.mark)):
        raise ValueError("base and mark must be marks")
    for path, mode in wish.folders.items():
        if not (re.fullmatch(r"2e(2f([0-9a-f]{2})+)?", path) and 0 <= mode < 0o10000):
            raise ValueError("folders must be modes by path")
    if not wish.pause_s > 0:
        raise ValueError("pause_s must be a number over 0")
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
    if direction == "send":
        check_not_laid_down(record)  # it would hold up the salvage, and be a copy of nothing that goes on
    if direction == "salvage" and not record.let_in:
        raise Refused("nothing_to_salvage", "its renter was never let in here at this epoch")
    if direction == "receive":
        record = replace(record, restored=wish.generation)
        ledger.keep(record)
    return record


def enter(home: Path, uid: int) -> int:
    """Make a home the current directory; return it opened. Raise Refused where it is not the renter's own directory."""
    try:
        folder = os.open(home, traces.OPEN_FOLDER)
    except OSError as error:
        raise Refused("no_home", f"its home is not there: {error.strerror}") from error
    if os.fstat(folder).st_uid != uid:
        os.close(folder)
        raise Refused("no_home", "its home is not its own")
    os.fchdir(folder)
    return folder


def become(uid: int) -> None:
    """Be this uid for good, without any privilege."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise Refused("broken", f"privileges cannot be given up: {os.strerror(ctypes.get_errno())}")


def run_rsync(kind: str, uid: int, deadline: float, gently: bool) -> int:
    """Have rsync take over the connection, in the current directory, and end it at its deadline; return its status."""
    parent = os.getpid()

    def be_rsync() -> None:
        if gently:
            os.nice(NICENESS)
        become(uid)
        die_with(parent)
        os.execve(RSYNC, ("rsync", *ARGUMENTS[kind]), {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})  # noqa: S606

    child = begin(be_rsync)
    try:
        _say_that_it_works(child, deadline)
    finally:
        status = end_group(child)
    return status & 0xFF


def _say_that_it_works(child: int, deadline: float) -> None:
    """Wait for the end of rsync or its deadline; say one byte for each second in which it has used the processor.

    The other side gives up a transfer in which nothing moves, and rsync may read gigabytes to find that hardly anything
    has changed. What is said goes where complaints go: standard output is rsync's. Where nobody reads it, it is left
    out: this process must not wait to say it.
    """
    used = 0
    while (left_s := deadline - time.time()) > 0 and not has_ended(child, min(1.0, left_s)):
        before, used = used, ticks(child)
        if used != before and select.select([], [2], [], 0)[1]:
            with suppress(OSError):
                os.write(2, b".")


def hung_up() -> bool:
    """Return whether the other end of standard output is closed."""
    look = select.poll()
    look.register(1, 0)
    return bool(look.poll(0))


def _shown(path: bytes) -> str:
    return os.fsdecode(path[2:] if path.startswith(b"./") else path).encode(errors="backslashreplace").decode()[:200]


def _monotonic(deadline: float) -> float:
    return time.monotonic() + deadline - time.time()


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
