"""The worker's end of a transfer: `orion-rental send`, `salvage` and `receive`, by SSH as root.

One line of JSON comes in and one goes out; then an rsync takes over the connection, which is never root.

`send` makes a snapshot of a home, a state that existed at one moment. The manager names the snapshot that it has by its
mark, and only entries that changed since then are sent. The order of the steps:
1. Scan the home while its programs run, and stage what changed (snapshots/staging.py); repeat while that helps.
2. Take the rental's lock, stop its programs, scan once more, stage what changed since step 1, resume the programs.
   Where that takes longer than the manager allows, resume and refuse; where it is expected to, refuse before.
3. Write the scan as the manifest of the new snapshot, answer, and send the staging tree.
If nothing changed, nothing is stopped. A rental that is frozen already is scanned in step 2 alone, and is neither
stopped nor resumed. The fence resumes a rental whose snapshot died between stop and resume (PAUSE_ENDS_S).

At the deadline rsync is killed with all that it has started, and TIDIES_S later root's own process, even if a part of
them is stopped. `salvage` (the released name) recovers a home of a lost epoch before it is purged: it is the same as
`send`, but first ends the rental's processes. `receive` fills a home under the renter's own uid. It holds the rental's
lock until it ends, so the rental is neither activated nor purged while files arrive, and it never fills a home that was
activated at this epoch: such a home is newer than any snapshot.
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
from contextlib import ExitStack, suppress
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
from orion_worker.snapshots.scan import racy_entries, restore_modes, scan
from orion_worker.snapshots.staging import StagingTree
from orion_worker.system import processes, trees
from orion_worker.system.locks import got_lock, open_lock

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
"""The arguments of rsync: to send changes, to send a whole home, to fill a home, and to bring one up to date.

They never come from the other side, whose rsync has the matching options of the manager's snapshots/transfer.py.
"""
TRANSFERS = ("send", "salvage", "receive")
ACCOUNT_WITHIN_S = 1.0
LOOK_EVERY_S = 0.005
TIDIES_S = 60.0
"""Seconds after the deadline of a transfer within which root's process has removed its staging tree, and has ended."""
NICENESS = 10
"""The niceness of snapshots. Restores and migrations have none: renters wait for them, also beside busy neighbours."""
WAY_OUT = "it is frozen: `orion thaw` lets it go on for ten minutes, to make room"
"""The end of a refusal for a rental that is frozen because its home is over the limit."""
SPARED = "it was thawed to make room, and is frozen again unless it does"
"""The end of a refusal for a rental that is over the limit and has time to make room."""
NO_NEW_PRIVILEGES = 38
"""prctl(2), PR_SET_NO_NEW_PRIVS."""


def sender_uid(uid: int) -> int:
    """Return the uid that sends a rental's files and does nothing else. The renter cannot signal its processes."""
    return uid + processes.FIRST_SENDER


def run_transfer(direction: str, operations: RentalOperations, staging_root: Path, homes: Path) -> int:
    """Do one transfer over standard input and output, for a home in `homes`; return the exit status."""
    try:
        line, requested_at = _read_line(), time.monotonic()
        request = parse_request(line, time.time())
        processes.be_killed_after(request.deadline - time.time() + TIDIES_S)
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
            raise RequestRefused("no_base", "its home here is not known to hold the base of the update")
        is_same = update and request.base == request.mark
        if not is_same:
            operations.manifests.forget(request.rental_id)
        _answer(0, {"ok": True})
        status = run_rsync("update" if update else "receive", record.uid, request.deadline, gently=False)
        restore_modes(home, {bytes.fromhex(path): mode for path, mode in request.folders.items()}, record.uid)
        os.close(home)
        if status == 0 and request.mark and not is_same:
            looked = scan(sys.maxsize, monotonic_of(request.deadline), strict=True)
            # Racy files need no hashes: the renter was not activated, so the files are as received.
            doubtful = {found.path: "" for found in racy_entries(looked)}
            operations.manifests.write(request.rental_id, request.mark, Manifest(looked, doubtful))
    return status


def _send(
    direction: str,
    operations: RentalOperations,
    request: TransferRequest,
    staging_root: Path,
    homes: Path,
    requested_at: float,
) -> int:
    records, is_salvage = operations.records, direction == "salvage"
    staging_root.mkdir(mode=0o711, parents=True, exist_ok=True)
    with _lock_of(staging_root, request.rental_id) as alone, ExitStack() as stack:
        if not got_lock(alone.fileno(), LOCK_WAIT_S):
            raise RequestRefused("busy", "another transfer of this rental's files is still at work")
        alone.truncate(0)
        alone.write(f"{os.getpid()}\n")
        alone.flush()
        record = record_for(direction, records, request)
        if is_salvage:
            with records.locked(request.rental_id, LOCK_WAIT_S):
                record = record_for(direction, records, request)
                operations.retire(record)
        elif not request.for_migration and (what := operations.freezer.over_limit_reason(record.rental_id)):
            raise RequestRefused("over_limit", f"{what}; {WAY_OUT}")  # a frozen home cannot have become smaller
        home = open_home(homes / record.username, record.uid)
        stack.callback(os.close, home)
        staging = StagingTree(
            home=home, place=staging_root / request.rental_id, uid=record.uid, sender=sender_uid(record.uid)
        )
        stack.callback(staging.remove)
        if not request.for_migration:
            os.nice(NICENESS)
        report = make_snapshot(
            SnapshotMaker(
                operations=operations,
                record=record,
                request=request,
                staging=staging,
                home=home,
                is_salvage=is_salvage,
                requested_at=requested_at,
            )
        )
        _answer(0, {"ok": True} | report)
        if report["same"]:
            return 0
        os.fchdir(staging.top)
        kind = "whole" if report["whole"] else "send"
        return run_rsync(kind, staging.sender, request.deadline, gently=not request.for_migration)


def _lock_of(staging_root: Path, rental_id: str) -> IO[str]:
    """Return the open file whose lock each transfer that stages files holds. The file holds its process number."""
    return os.fdopen(open_lock(staging_root / f".{rental_id}"), "r+")


def remove_staging(staging_root: Path, rental_id: str) -> None:
    """Remove the staging tree of a purged rental, after ending its transfer. Raise RequestRefused if it does not end.

    Two processes that remove one tree at a time leave parts of it behind. No other transfer can begin after a purge.
    """
    if not staging_root.is_dir():
        return
    deadline = time.monotonic() + LOCK_WAIT_S
    with _lock_of(staging_root, rental_id) as alone:
        while not got_lock(alone.fileno(), LOOK_EVERY_S):
            alone.seek(0)
            with suppress(ValueError, ProcessLookupError):  # the transfer has no number in the file yet, or has ended
                os.kill(int(alone.read()), signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RequestRefused("busy", "a transfer of its files does not end")
        trees.remove_tree(staging_root / rental_id)
        (staging_root / f".{rental_id}").unlink(missing_ok=True)


def make_snapshot(snapshot: SnapshotMaker) -> dict[str, Any]:
    """Make the snapshot and return the report for the manager. Freeze a running rental whose home is over the limit."""
    try:
        return snapshot.make()
    except RequestRefused as refusal:
        if refusal.code != "over_limit" or not snapshot.is_scheduled:
            raise
        frozen = snapshot.operations.freeze_over_limit(snapshot.record, str(refusal))
        details = {"held": frozen}  # the released name
        raise RequestRefused("over_limit", f"{refusal}; {WAY_OUT if frozen else SPARED}", details) from refusal


def await_account(records: RentalRecords, request: TransferRequest) -> None:
    """Wait up to ACCOUNT_WITHIN_S for an account that is being made. The caller checks that its home may be filled."""
    deadline = time.monotonic() + ACCOUNT_WITHIN_S
    while records.purged_epoch(request.rental_id) < request.epoch and time.monotonic() < deadline:
        record = records.find(request.rental_id)
        if record and record.epoch >= request.epoch:
            return
        time.sleep(LOOK_EVERY_S)


def record_for(direction: str, records: RentalRecords, request: TransferRequest) -> RentalRecord:
    """Return the record of the rental; raise RequestRefused unless this transfer is allowed at this epoch."""
    record = records.find(request.rental_id)
    check = check_receive if direction == "receive" else check_unlock
    check(record, records.purged_epoch(request.rental_id), request.epoch)
    assert record is not None  # noqa: S101 - the check refuses a missing record
    if direction == "send":
        check_not_retired(record)  # such a snapshot would delay the recovery, and hold nothing newer
    if direction == "salvage" and not record.activated:
        raise RequestRefused("nothing_to_salvage", "it was never activated here at this epoch")
    if direction == "receive":
        record = replace(record, restored=request.snapshot_id)
        records.save(record)
    return record


def open_home(home: Path, uid: int) -> int:
    """Make a home the current directory and return it opened. Raise RequestRefused if it is not the renter's."""
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
    """Become this uid for good, without any privilege. Raise RequestRefused if privileges cannot be given up."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise RequestRefused("broken", f"privileges cannot be given up: {os.strerror(ctypes.get_errno())}")


def run_rsync(kind: str, uid: int, deadline: float, gently: bool) -> int:
    """Run rsync over the connection, in the current directory, and end it at the deadline; return its exit status."""
    parent = os.getpid()

    def be_rsync() -> None:
        if gently:
            os.nice(NICENESS)
        drop_privileges(uid)
        processes.die_with(parent)
        os.execve(RSYNC, ("rsync", *ARGUMENTS[kind]), {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})  # noqa: S606

    child = processes.begin_child(be_rsync)
    try:
        _await_rsync(child, deadline)
    finally:
        status = processes.kill_group(child)
    return status & 0xFF


def _await_rsync(child: int, deadline: float) -> None:
    """Wait for the end of rsync or its deadline; write a byte for each second in which rsync used the processor.

    The other side gives up a transfer in which nothing moves, but rsync may read gigabytes to find that hardly anything
    has changed. The byte goes to standard error, because standard output is rsync's, and is left out if that is full,
    so that this process never waits to write it.
    """
    used = 0
    while (left_s := deadline - time.time()) > 0 and not processes.has_ended(child, min(1.0, left_s)):
        before, used = used, processes.ticks(child)
        if used != before and select.select([], [2], [], 0)[1]:
            with suppress(OSError):
                os.write(2, b".")


def _read_line() -> bytes:
    """Read a line from standard input byte by byte: the bytes after it are rsync's. Raise ValueError if it is cut."""
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
