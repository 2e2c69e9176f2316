"""The worker's end of a transfer: `orion-rental send`, `salvage` and `receive`, by SSH as root.

One line of JSON comes in and one goes out; then an rsync takes over the connection, which is never root.

`send` makes a snapshot of a home: a state that existed at one moment. The manager names the snapshot that it has, by
its mark; only what changed since then is sent. The order of the steps:
1. Scan the home while its programs run, and set staging what changed (snapshot.py), again while that helps.
2. Take the rental's lock, stop its programs, scan once more, set staging what changed since step 1, let them go on.
   Where that takes longer than the manager allows, let them go on and refuse; where it will, refuse before.
3. Write down the scan under the mark of the new snapshot, answer, and send what was set staging.
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
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from orion_worker.records import (
    RentalRecord,
    RentalRecords,
    RequestRefused,
    check_not_retired,
    check_receive,
    check_unlock,
)
from orion_worker.snapshots.maker import LOCK_WAIT_S, RentalOperations, SnapshotMaker, monotonic_of
from orion_worker.snapshots.manifests import Manifest
from orion_worker.snapshots.requests import MAX_REQUEST_BYTES, TransferRequest, parse_request
from orion_worker.snapshots.scan import Scan, racy_entries, restore_modes, scan
from orion_worker.snapshots.staging import StagingTree
from orion_worker.system import trees
from orion_worker.system.locks import got_lock, open_lock
from orion_worker.system.processes import (
    FIRST_SENDER,
    be_killed_after,
    begin_child,
    die_with,
    has_ended,
    kill_group,
    ticks,
)
from orion_worker.system.trees import remove_tree

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

They are fixed, whatever the other side says; rsync asks for the same with the options of snapshots/transfer.py.
"""
TRANSFERS = ("send", "salvage", "receive")
ACCOUNT_WITHIN_S = 1.0
LOOK_EVERY_S = 0.005
TIDIES_S = 60.0
"""Seconds after the deadline of a transfer within which root's process has removed its staging tree, and has ended."""
NICENESS = 10
WAY_OUT = "it is frozen: `orion thaw` lets it go on for ten minutes, to make room"
SPARED = "it was thawed to make room, and is frozen again unless it does"
NO_NEW_PRIVILEGES = 38
"""prctl(2), PR_SET_NO_NEW_PRIVS."""


def sender_uid(uid: int) -> int:
    """Return the uid of the account that sends a rental's files: of nobody else, and out of the renter's reach."""
    return uid + FIRST_SENDER


def run_transfer(direction: str, operations: RentalOperations, staging_root: Path, homes: Path) -> int:
    """Do one transfer over standard input and output; return the exit status.

    `staging_root`: the directory in which files are staged. `homes`: the directory of the homes.
    """
    try:
        line, requested_at = _read_line(), time.monotonic()
        request = parse_request(line, time.time())
        be_killed_after(request.deadline - time.time() + TIDIES_S)
        if direction == "receive":
            return _receive(operations, request, homes)
        return _send(direction, operations, request, staging_root, homes, requested_at)
    except (ValueError, TypeError) as error:
        return _answer(2, {"error": f"request not understood: {error}", "code": "invalid_request"})
    except RequestRefused as refusal:
        return _answer(3, {"error": str(refusal), "code": refusal.code} | refusal.details)


def _receive(operations: RentalOperations, request: TransferRequest, homes: Path) -> int:
    records = operations.records
    await_account(records, request)
    with records.locked(request.rental_id, LOCK_WAIT_S) as lock:
        os.set_inheritable(lock, True)
        record = record_for("receive", records, request)
        home = open_home(homes / record.username, record.uid)
        update = bool(request.base)
        if update and operations.manifests.read(request.rental_id, request.base) is None:
            raise RequestRefused("no_base", "its home here is not known to hold what is to be brought up to date")
        is_same = update and request.base == request.mark
        if not is_same:
            operations.manifests.forget(request.rental_id)
        _answer(0, {"ok": True})
        status = run_rsync("update" if update else "receive", record.uid, request.deadline, gently=False)
        restore_modes(home, {bytes.fromhex(path): mode for path, mode in request.folders.items()}, record.uid)
        os.close(home)
        if status == 0 and request.mark and not is_same:
            looked = scan(sys.maxsize, monotonic_of(request.deadline), strict=True)
            operations.manifests.write(request.rental_id, request.mark, Manifest(looked, _doubtful_now(looked)))
    return status


def _doubtful_now(looked: Scan) -> dict[bytes, str]:
    """Return the files that may change without showing it; nobody has been let in, so they are as they were filled."""
    return {found.path: "" for found in racy_entries(looked)}


def _send(
    direction: str,
    operations: RentalOperations,
    request: TransferRequest,
    staging_root: Path,
    homes: Path,
    requested_at: float,
) -> int:
    records = operations.records
    place = staging_root / request.rental_id
    staging_root.mkdir(mode=0o711, parents=True, exist_ok=True)
    with _lock_of(staging_root, request.rental_id) as alone:
        if not got_lock(alone.fileno(), LOCK_WAIT_S):
            raise RequestRefused("busy", "another transfer of this rental's files is still at work")
        alone.truncate(0)
        alone.write(f"{os.getpid()}\n")
        alone.flush()
        record = record_for(direction, records, request)
        if direction == "salvage":
            with records.locked(request.rental_id, LOCK_WAIT_S):
                record = record_for(direction, records, request)
                operations.retire(record)
        elif not request.for_migration and (what := operations.freezer.over_limit_reason(record.rental_id)):
            raise RequestRefused("over_limit", f"{what}; {WAY_OUT}")  # it stands still: nothing is to be counted again
        home = open_home(homes / record.username, record.uid)
        try:
            staging = StagingTree(home, place, record.uid, sender_uid(record.uid))
            if not request.for_migration:
                os.nice(NICENESS)
            try:
                is_salvage = direction == "salvage"
                payload = make_snapshot(
                    operations,
                    record,
                    SnapshotMaker(operations, record, request, staging, home, is_salvage, requested_at),
                )
                _answer(0, {"ok": True} | payload)
                if payload["same"]:
                    return 0
                os.fchdir(staging.top)
                return run_rsync(
                    "whole" if payload["whole"] else "send", staging.sender, request.deadline, not request.for_migration
                )
            finally:
                staging.remove()
        finally:
            os.close(home)


def _lock_of(staging_root: Path, rental_id: str) -> IO[str]:
    """Return the open file whose lock a transfer holds that sets files staging; its process number is in it."""
    return os.fdopen(open_lock(staging_root / f".{rental_id}"), "r+")


def remove_staging(staging_root: Path, rental_id: str) -> None:
    """Remove what is set staging of a purged rental, and end the transfer that is under way. No other begins then.

    Two that remove a tree at a time leave parts of it behind (seen). Raise RequestRefused if the transfer does not end.
    """
    if not staging_root.is_dir():
        return
    deadline = time.monotonic() + LOCK_WAIT_S
    with _lock_of(staging_root, rental_id) as alone:
        while not got_lock(alone.fileno(), LOOK_EVERY_S):
            alone.seek(0)
            with suppress(ValueError, ProcessLookupError):  # it has not written its number yet, or has just ended
                os.kill(int(alone.read()), signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RequestRefused("busy", "a transfer of its files does not end")
        remove_tree(staging_root / rental_id)
        (staging_root / f".{rental_id}").unlink(missing_ok=True)


def make_snapshot(operations: RentalOperations, record: RentalRecord, snapshot: SnapshotMaker) -> dict[str, Any]:
    """Return what the other side is payload. A home that runs and holds more than it may is frozen."""
    try:
        return snapshot.make()
    except RequestRefused as refusal:
        if refusal.code != "over_limit" or not snapshot.is_scheduled:
            raise
        held = operations.freeze_over_limit(record, str(refusal))
        raise RequestRefused("over_limit", f"{refusal}; {WAY_OUT if held else SPARED}", {"held": held}) from refusal


def await_account(records: RentalRecords, request: TransferRequest) -> None:
    """Whoever fills a home may come a moment before it is made; whether it may be filled is looked at afterwards."""
    deadline = time.monotonic() + ACCOUNT_WITHIN_S
    while records.purged_epoch(request.rental_id) < request.epoch and time.monotonic() < deadline:
        record = records.find(request.rental_id)
        if record and record.epoch >= request.epoch:
            return
        time.sleep(LOOK_EVERY_S)


def record_for(direction: str, records: RentalRecords, request: TransferRequest) -> RentalRecord:
    """The record of the rental, if it may be copied from, or into, at this epoch. Raises RequestRefused."""
    record = records.find(request.rental_id)
    check = check_receive if direction == "receive" else check_unlock
    check(record, records.purged_epoch(request.rental_id), request.epoch)
    assert record is not None  # noqa: S101 - the check has refused it
    if direction == "send":
        check_not_retired(record)  # it would hold up the salvage, and be a copy of nothing that goes on
    if direction == "salvage" and not record.activated:
        raise RequestRefused("nothing_to_salvage", "its renter was never let in here at this epoch")
    if direction == "receive":
        record = replace(record, restored=request.snapshot_id)
        records.save(record)
    return record


def open_home(home: Path, uid: int) -> int:
    """Make a home the current directory and return it opened.

    Raise RequestRefused if it is not a directory of the renter's own.
    """
    try:
        folder = os.open(home, trees.OPEN_FOLDER)
    except OSError as error:
        raise RequestRefused("no_home", f"its home is not there: {error.strerror}") from error
    if os.fstat(folder).st_uid != uid:
        os.close(folder)
        raise RequestRefused("no_home", "its home is not its own")
    os.fchdir(folder)
    return folder


def drop_privileges(uid: int) -> None:
    """Be this uid for good, without any privilege."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise RequestRefused("broken", f"privileges cannot be given up: {os.strerror(ctypes.get_errno())}")


def run_rsync(kind: str, uid: int, deadline: float, gently: bool) -> int:
    """Let rsync use the connection, in the current directory, and end it at its deadline; return its exit status."""
    parent = os.getpid()

    def be_rsync() -> None:
        if gently:
            os.nice(NICENESS)
        drop_privileges(uid)
        die_with(parent)
        os.execve(RSYNC, ("rsync", *ARGUMENTS[kind]), {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})  # noqa: S606

    child = begin_child(be_rsync)
    try:
        _say_that_it_works(child, deadline)
    finally:
        status = kill_group(child)
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


def _read_line() -> bytes:
    """Byte by byte: what follows is rsync's."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte or len(line) > MAX_REQUEST_BYTES:
            raise ValueError("it has no end")
        line += byte
    return line


def _answer(status: int, report: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    return status
