"""The vault's jobs, each in a process of its own that was forked for it, and that ends with it.

The process has root's right to act under another uid, and none to read what is another's: what is in a rental's
directory is read, written and removed by a child that has become the rental's uid and is nobody else any more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orion.manager.domain.pacing import LONGEST_PAUSE_S
from orion.manager.domain.snapshots import SnapshotId
from orion.manager.snapshots import directory
from orion.manager.snapshots.disk import Disk, Usage, Usages
from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import NO_BASE, NO_SUCH_SNAPSHOT, OVER_LIMIT, OVER_SHARE, SnapshotError
from orion.manager.snapshots.protocol import SnapshotAction, SnapshotReply, SnapshotRequest, written
from orion.manager.snapshots.transfer import (
    LISTS_BYTES,
    LISTS_BYTES_A_FILE,
    LONG_STALL_S,
    OPTIONS,
    STALL_S,
    RsyncResult,
    SnapshotAnswer,
    Transfer,
    WorkerCommand,
    check,
)
from orion.manager.ssh.options import worker_ssh

LOCK_WAIT_S = 5.0
TIDY_WITHIN_S = 60.0
RECOVER_LOCK_WAIT_S = 45.0
"""A salvage is in nobody's way and in no hurry: a copy of what runs elsewhere may end first."""
MAX_DISK_SHARE = 0.9
"""A copy that is under way is given up when so much of the disk is used, of its bytes or of its inodes; none is begun
from a lower mark on."""
SSH_OPTIONS = ("ControlMaster=auto", "ControlPersist=60s", "ServerAliveInterval=5", "LogLevel=ERROR")
UNUSED_IDS_FROM = 4_000_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class Directories:
    """Where the vault has its things."""

    copies: Path = Path("/var/lib/orion/copies")
    """Root's, 0711; one directory for each rental in it, of the rental's own uid, 0700; and a file of root's, 0600."""
    run: Path = Path("/run/orion-vault")
    """Root's, 0711: the socket, the locks, and `ssh`, where the key is, of an account of its own."""
    ssh_uid: int = 902

    @property
    def ssh(self) -> Path:
        return self.run / "ssh"

    @property
    def locks(self) -> Path:
        return self.run / "locks"

    @property
    def usages(self) -> Usages:
        return Usages(self.copies / ".usages", self.locks / ".usages")


class SnapshotJob:
    def __init__(self, request: SnapshotRequest, directories: Directories, lifetime: Lifetime) -> None:
        self._request = request
        self._directories = directories
        self._lifetime = lifetime
        self._folder = directories.copies / request.rental_id
        self._cleanup: Callable[[Path], bool] | None = None
        """Return a function that removes what the job has left behind; None where nothing is left."""

    def run(self) -> SnapshotReply:
        """Raises SnapshotError for what goes wrong, and Abandoned when nobody waits for it any more."""
        if self._request.action is SnapshotAction.RENTALS:
            names = {place.name for place in self._directories.copies.iterdir()}
            return SnapshotReply(ok=True, rentals=sorted(name for name in names if not name.startswith(".")))
        if self._request.action is SnapshotAction.SHORT_OF_ROOM:
            return SnapshotReply(ok=True, owners=self._directories.usages.refused())
        if self._request.action is SnapshotAction.CONNECT:
            return self._connect()
        work = {
            SnapshotAction.COPY: self._copy,
            SnapshotAction.SALVAGE: self._copy,
            SnapshotAction.RESTORE: self._restore,
            SnapshotAction.LIST: self._list,
            SnapshotAction.REMOVE: self._remove,
        }[self._request.action]
        with self._locked():
            return work()

    def tidy(self) -> None:
        """Remove what a copy in haste, or one that came to nothing, has left, once nobody waits for an answer any more.

        What is not done within TIDY_WITHIN_S, or as another job has come, the next copy does.
        """
        cleanup = self._cleanup
        if cleanup and self._folder.exists():
            unused_end, other_end = socket.socketpair()
            with unused_end, other_end, suppress(SnapshotError):
                self._lifetime = Lifetime(unused_end, TIDY_WITHIN_S)
                with self._locked():
                    self._as_rental(lambda: cleanup(self._folder))

    def _copy(self) -> SnapshotReply:
        """Make a snapshot: a copy of the one before, brought up to date with what changed at the worker since."""
        request = self._request
        self._make_folder()
        self._cleanup = directory.give_up
        salvage = request.action is SnapshotAction.SALVAGE
        base = self._as_rental(lambda: directory.begin(self._folder, request.epoch, salvage))
        self._check_disk()
        mark = secrets.token_hex(16)
        limits = {"max_files": request.max_files, "max_bytes": request.max_bytes}
        payload = limits | {"base": base["mark"], "mark": mark, "moving": request.for_migration}
        if request.pause_s < LONGEST_PAUSE_S:  # which is what a worker assumes, one of an earlier version too
            payload["pause_s"] = request.pause_s
        asked_at = time.time()
        with self._worker_command("salvage" if salvage else "send", **payload) as worker:
            answer = SnapshotAnswer.of(worker.read_answer(self._lifetime))
            # It began at that moment or later: not counted is what the request needed on its way. What the answer needs
            # would make a copy look younger than it is.
            at = min(asked_at + answer.after_s, time.time())
            result = RsyncResult()
            if not answer.same:
                self._check_share()
                if not answer.whole:
                    self._as_rental(lambda: directory.clone(self._folder, base["generation"]))
                result = self._receive(worker, answer, base["generation"])
            elif not base["same_epoch"]:
                self._as_rental(lambda: directory.clone(self._folder, base["generation"]))
        if answer.same and base["same_epoch"]:
            done, *copies = self._renew(base["generation"], at)
        else:
            folders = base["folders"] if answer.same else answer.folders
            made = directory.NewSnapshot(at, base["mark"] if answer.same else mark, answer.skipped, folders, salvage)
            done, *copies = self._finish(made, base, None if answer.whole else result.names)
        self._cleanup = None
        return SnapshotReply(ok=True, done=done, copies=copies, pause_s=answer.pause_s)

    def _renew(self, generation: str, at: float) -> list[dict[str, Any]]:
        """Make a copy younger; return it and all that stay. Others make room where its owner is short of that."""
        protected = SnapshotId.parse(self._request.generation)

        def renew() -> list[Any]:
            done = directory.renew(self._folder, generation, at)
            return [directory.choices(self._folder, protected), written(done), *self._listed()]

        choices, *found = self._as_rental(renew)
        is_salvage = (
            self._request.action is SnapshotAction.SALVAGE
        )  # which may have found an old copy, and must not lose it
        choice = 0 if is_salvage else self._choose(choices)
        if choice != 0:
            fewer = len(choices) - 1 if choice is None else choice
            self._as_rental(lambda: directory.make_room(self._folder, protected, fewer))
            found[1:] = self._found()
        return found

    def _finish(
        self, made: directory.NewSnapshot, base: dict[str, Any], changed: list[bytes] | None
    ) -> list[dict[str, Any]]:
        """Make what has come a complete copy; return it and all that stay. Raise SnapshotError if there is no room."""
        request, protected = self._request, SnapshotId.parse(self._request.generation)

        def describe() -> list[Usage]:
            limits = request.max_files, request.max_bytes
            directory.describe(self._folder, request.epoch, made, limits, base["generation"], changed)
            return directory.choices(self._folder, protected)

        choice = self._choose(self._as_rental(describe))
        if choice is None:
            raise self._over_share()

        def finish() -> list[dict[str, Any]]:
            done = directory.finish(self._folder, protected, choice, in_haste=base["prepared"])
            return [written(done), *self._listed()]

        return self._as_rental(finish)

    def _choose(self, choices: list[Usage]) -> int | None:
        """Return the number of the choice of copies that fits into its owner's share, as `Usages.choose` does."""
        request, takes = self._request, [Usage(*each) for each in choices]
        return self._directories.usages.choose(request.rental_id, request.owner, takes, self._share())

    def _receive(self, worker: WorkerCommand, answer: SnapshotAnswer, base: str) -> RsyncResult:
        request = self._request
        kind = "whole" if answer.whole else "send"
        before = (f"--link-dest={self._folder / base / 'home'}",) if answer.whole and base else ()
        told_of = ("-ii", "--out-format=%i %n", "--info=nonreg0")
        target = f"{self._folder / directory.INCOMING / 'home'}/"
        # What was removed is listed as well: every entry may have been replaced.
        lists = LISTS_BYTES + LISTS_BYTES_A_FILE * request.max_files
        most = request.max_bytes + lists, 2 * request.max_files + 2
        stalled_s = LONG_STALL_S if request.for_migration or request.action is SnapshotAction.SALVAGE else STALL_S
        transfer = Transfer(
            worker, request.uid, self._lifetime, *most, low_priority=not request.for_migration, stalled_s=stalled_s
        )
        arguments = (*OPTIONS[kind], *before, *told_of, "worker:.", target)
        result = transfer.run(arguments, self._check_disk, request.max_bytes, answer_was_read=True)
        check(result, "receiver")
        return result

    def _restore(self) -> SnapshotReply:
        complete = self._found()
        newest = next((each["generation"] for each in reversed(complete) if not each["salvage"]), "")
        wanted = self._request.generation or newest
        if not complete or not wanted:
            return SnapshotReply(ok=True)
        copy = next((each for each in complete if each["generation"] == wanted), None)
        if copy is None:
            there = ", ".join(each["generation"] for each in complete)
            raise SnapshotError(NO_SUCH_SNAPSHOT, f"there is no copy {wanted}; there are {there}")
        result = self._fill(wanted)
        if self._request.precopy:
            with suppress(SnapshotError):  # the home is filled, and the next copy does for itself what was not prepared
                self._as_rental(lambda: directory.prepare(self._folder, wanted))
        else:
            self._cleanup = directory.tidy
        return SnapshotReply(ok=True, done=copy | {"skipped": [*copy["skipped"], *result.skipped()]}, copies=complete)

    def _fill(self, wanted: str) -> RsyncResult:
        """Fill the home with a snapshot; where it is known to hold the one before, with what changed since."""
        source = self._folder / wanted
        marks = self._as_rental(lambda: directory.marks(self._folder, wanted, self._request.previous))
        if marks["base"]:
            changes = source / directory.CHANGES if marks["base"] != marks["mark"] else "/dev/null"
            try:
                return self._send("update", (f"--files-from={changes}",), wanted, marks)
            except SnapshotError as error:
                if error.code != NO_BASE:
                    raise
        return self._send("receive", (), wanted, marks | {"base": ""})

    def _send(self, kind: str, more: tuple[str, ...], wanted: str, marks: dict[str, Any]) -> RsyncResult:
        source = f"{self._folder / wanted / 'home'}/"
        with self._worker_command("receive", generation=wanted, **marks) as worker:
            transfer = Transfer(
                worker, self._request.uid, self._lifetime, LISTS_BYTES, float("inf"), low_priority=False
            )
            result = transfer.run((*OPTIONS[kind], *more, source, "worker:."), lambda: None, None)
        check(result, "sender")
        return result

    def _connect(self) -> SnapshotReply:
        """What comes next finds a connection that is open (ControlPersist). Nothing is asked of the worker."""
        command, environment = self._ssh()
        account = self._directories.ssh_uid
        ssh = subprocess.Popen(
            [*command, "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment, cwd="/", user=account, group=account, extra_groups=[], start_new_session=True,
        )  # fmt: skip
        ended = os.pidfd_open(ssh.pid)
        try:
            self._lifetime.wait_for(ended)
        finally:
            os.close(ended)
            ssh.kill()
            status = ssh.wait()
        if status:
            raise SnapshotError("unreachable", "the worker cannot be asked")
        return SnapshotReply(ok=True)

    def _list(self) -> SnapshotReply:
        return SnapshotReply(ok=True, copies=self._found())

    def _remove(self) -> SnapshotReply:
        if self._folder.exists():
            self._own_folder()
            self._as_rental(lambda: directory.wipe(self._folder))
            self._folder.rmdir()
        self._directories.usages.forget(self._request.rental_id)
        return SnapshotReply(ok=True)

    def _found(self) -> list[dict[str, Any]]:
        if not self._folder.exists():
            return []
        self._own_folder()
        return self._as_rental(self._listed)

    def _listed(self) -> list[dict[str, Any]]:
        """Receive as the rental's uid, in the child that has become it."""
        return [written(copy) for copy in directory.found(self._folder)]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One job for a rental at a time; and nothing that ran under its uid outlives it."""
        with (self._directories.locks / self._request.rental_id).open("w") as lock:
            wait_s = RECOVER_LOCK_WAIT_S if self._request.action is SnapshotAction.SALVAGE else LOCK_WAIT_S
            last_moment = time.monotonic() + min(wait_s, self._lifetime.left_s)
            while not _try_lock(lock.fileno()):
                if time.monotonic() >= last_moment:
                    raise SnapshotError("busy", "another job for this rental is still at work")
                time.sleep(0.02)
            try:
                yield
            finally:
                _kill_all_of(self._request.uid)

    def _make_folder(self) -> None:
        with suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
            os.chown(self._folder, self._request.uid, self._request.uid)
        self._own_folder()

    def _own_folder(self) -> None:
        """It is this uid's. One that was made and not yet given away, by a job that was killed then, is root's."""
        status = self._folder.lstat()
        if status.st_uid == os.geteuid() != self._request.uid:
            os.chown(self._folder, self._request.uid, self._request.uid, follow_symlinks=False)
        elif status.st_uid != self._request.uid:
            raise SnapshotError("conflict", f"the copies of {self._request.rental_id} are another uid's")

    def _check_disk(self) -> None:
        share, what = Disk.of(self._directories.copies).scarcest
        if share > MAX_DISK_SHARE:
            raise SnapshotError("disk_full", f"the manager's disk is nearly full: it has hardly any {what} left")

    def _check_share(self) -> None:
        """Raise SnapshotError where the other rentals of the owner have all of its share: nothing need come then."""
        request = self._request
        if not self._directories.usages.is_room(request.rental_id, request.owner, self._share()):
            raise self._over_share()

    def _share(self) -> Usage:
        return Disk.of(self._directories.copies).share(self._request.owner_share)

    def _over_share(self) -> SnapshotError:
        what = f"the copies of all that its owner rents would take more than {self._request.owner_share:.0%}"
        way_out = "release rentals, or remove files"
        return SnapshotError(OVER_SHARE, f"{what} of the manager's disk, of its bytes or of its inodes: {way_out}")

    def _worker_command(self, direction: str, **more: Any) -> WorkerCommand:
        request = self._request
        command, environment = self._ssh()
        account = (self._directories.ssh_uid, self._directories.ssh_uid)
        identity = {"rental_id": request.rental_id, "epoch": request.epoch, "deadline": self._lifetime.unix_deadline()}
        return WorkerCommand(command, account, environment, direction, identity | more)

    def _ssh(self) -> tuple[list[str], dict[str, str]]:
        """The command that reaches the worker, and its environment."""
        if self._request.host is None:
            raise SnapshotError("invalid_request", "it names no worker")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self._directories.ssh), "LANG": "C.UTF-8"}
        return worker_ssh(self._request.host.host(), self._directories.ssh, SSH_OPTIONS), environment

    def _as_rental(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by a child that is the rental's uid."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _run_as(self._request.uid, work, writing)
        os.close(writing)
        try:
            with os.fdopen(reading, "rb") as pipe:
                content = b""
                while True:
                    self._lifetime.wait_for(pipe.fileno())
                    part = os.read(pipe.fileno(), 1 << 16)
                    if not part:
                        break
                    content += part
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        answer: dict[str, Any] = json.loads(content) if content else {"error": "it ended without a word"}
        if "error" in answer:
            raise SnapshotError(answer.get("code", "failed"), f"the copies could not be kept: {answer['error']}")
        result: T = answer["done"]
        return result


def _run_as(uid: int, work: Callable[[], Any], writing: int) -> None:
    """In a child. Never returns."""
    try:
        _become(uid)
        os.umask(0o077)
        try:
            answer = {"done": work()}
        except OSError as error:
            answer = {"error": str(error), "code": OVER_LIMIT if error.errno == errno.EFBIG else "failed"}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _kill_all_of(uid: int) -> None:
    """SIGKILL to all that runs under a rental's uid, in one step of the kernel, from a uid that it cannot strike."""
    child = os.fork()
    if child == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(UNUSED_IDS_FROM, UNUSED_IDS_FROM, UNUSED_IDS_FROM)
            own = UNUSED_IDS_FROM + os.getpid()  # one for each job: two that end at a time must not hit each other
            os.setresuid(own, uid, own)
            os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
