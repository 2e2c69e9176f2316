"""The jobs of the snapshot service. Each runs in a process that is forked for it.

The process may change its uid, but may not read files of other uids: a child with the rental's uid (rental_process.py)
reads, writes and removes what is in the rental's directory.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orion.manager.domain.pacing import LONGEST_PAUSE_S
from orion.manager.domain.snapshots import SnapshotId, described
from orion.manager.snapshots import directory
from orion.manager.snapshots.disk import OwnerShare, Usage, Usages
from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import NO_BASE, NO_SUCH_SNAPSHOT, SnapshotError
from orion.manager.snapshots.protocol import SnapshotAction, SnapshotReply, SnapshotRequest
from orion.manager.snapshots.rental_process import kill_all_of, run_as
from orion.manager.snapshots.transfer import LONG_STALL_S, OPTIONS, STALL_S, RsyncResult, Transfer, checked
from orion.manager.snapshots.worker_command import SnapshotAnswer, WorkerCommand
from orion.manager.ssh.options import worker_ssh

LOCK_WAIT_S = 5.0
TIDY_WITHIN_S = 60.0
RECOVER_LOCK_WAIT_S = 45.0
"""The recovery of a lost home is not urgent, so it waits longer for a snapshot of the same rental to end."""
SSH_OPTIONS = ("ControlMaster=auto", "ControlPersist=60s", "ServerAliveInterval=5", "LogLevel=ERROR")
T = TypeVar("T")


@dataclass(frozen=True)
class Directories:
    """The directories of the snapshot service."""

    copies: Path = Path("/var/lib/orion/copies")
    """The directory of all snapshots, owned by root, 0711. It holds one directory for each rental, owned by the
    rental's uid, 0700, and the file of usages, owned by root, 0600."""
    run: Path = Path("/run/orion-vault")
    """The directory of the socket, the locks, and `ssh` with the key, owned by root, 0711; `ssh` is `ssh_uid`'s."""
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
    """One request to the snapshot service, from its start to its reply."""

    def __init__(self, request: SnapshotRequest, directories: Directories, lifetime: Lifetime) -> None:
        self._request = request
        self._directories = directories
        self._lifetime = lifetime
        self._folder = directories.copies / request.rental_id
        self._leftovers = ""
        """The pattern of what the job leaves in the rental's directory; empty if it leaves nothing."""
        self._room = OwnerShare(directories.copies, directories.usages, request)

    def run(self) -> SnapshotReply:
        """Return the reply. Raise SnapshotError if the job fails, and Abandoned if the client disconnects."""
        if self._request.action is SnapshotAction.RENTALS:
            names = {place.name for place in self._directories.copies.iterdir()}
            return SnapshotReply(ok=True, rentals=sorted(name for name in names if not name.startswith(".")))
        if self._request.action is SnapshotAction.SHORT_OF_ROOM:
            return SnapshotReply(ok=True, owners=self._directories.usages.refused())
        if self._request.action is SnapshotAction.CONNECT:
            return self._connect()
        with self._locked():
            if self._request.action is SnapshotAction.RESTORE:
                return self._restore()
            if self._request.action is SnapshotAction.LIST:
                return SnapshotReply(ok=True, copies=self._found())
            if self._request.action is SnapshotAction.REMOVE:
                return self._remove()
            return self._copy()

    def tidy(self) -> None:
        """Remove what the job left behind. This runs after the reply, so that no client waits for it.

        The next snapshot removes what is not removed within TIDY_WITHIN_S, or before another job takes the lock.
        """
        if self._leftovers and self._folder.exists():
            unused_end, other_end = socket.socketpair()
            with unused_end, other_end, suppress(SnapshotError):
                self._lifetime = Lifetime(unused_end, TIDY_WITHIN_S)
                with self._locked():
                    self._as_rental(lambda: directory.remove(self._folder, self._leftovers))

    def _copy(self) -> SnapshotReply:
        """Take a snapshot: hard links to the last one, brought up to date with what has changed on the worker."""
        request = self._request
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._own_folder()
        self._leftovers = directory.INCOMING
        recovers = request.action is SnapshotAction.RECOVER
        base = self._as_rental(lambda: directory.begin(self._folder, request.epoch, recovers))
        self._room.check_disk()
        mark = secrets.token_hex(16)
        limits = {"max_files": request.max_files, "max_bytes": request.max_bytes}
        payload = limits | {"base": base["mark"], "mark": mark, "moving": request.for_migration}
        if request.pause_s < LONGEST_PAUSE_S:  # workers of all versions assume LONGEST_PAUSE_S
            payload["pause_s"] = request.pause_s
        asked_at = time.time()
        with self._worker_command("salvage" if recovers else "send", **payload) as worker:
            answer = SnapshotAnswer.of(worker.read_answer(self._lifetime))
            # The snapshot began at this moment or later. The time that the answer took must not count, or the
            # snapshot would look younger than it is.
            at = min(asked_at + answer.after_s, time.time())
            result = RsyncResult()
            if not answer.same:
                self._room.check_room()
                if not answer.whole:
                    self._as_rental(lambda: directory.clone(self._folder, base["generation"]))
                result = self._receive(worker, answer, base["generation"])
            elif not base["same_epoch"]:
                self._as_rental(lambda: directory.clone(self._folder, base["generation"]))
        if answer.same and base["same_epoch"]:
            done, *copies = self._renew(base["generation"], at)
        else:
            folders = base["folders"] if answer.same else answer.folders
            made = directory.NewSnapshot(
                at=at,
                mark=base["mark"] if answer.same else mark,
                skipped=answer.skipped,
                folders=folders,
                recovered=recovers,
            )
            done, *copies = self._finish(made, base, None if answer.whole else result.names)
        self._leftovers = ""
        return SnapshotReply(ok=True, done=done, copies=copies, pause_s=answer.pause_s)

    def _renew(self, generation: str, at: float) -> list[dict[str, Any]]:
        """Give a snapshot a new time; return it and all that stay. Older ones are removed if the owner lacks room."""
        protected = SnapshotId.parse(self._request.generation)

        def renew() -> list[Any]:
            done = directory.renew(self._folder, generation, at)
            return [directory.choices(self._folder, protected), described(done), *self._listed()]

        choices, *found = self._as_rental(renew)
        # A recovery may have found an old snapshot to be the same, which must stay.
        is_recovery = self._request.action is SnapshotAction.RECOVER
        choice = 0 if is_recovery else self._room.choose([Usage(*each) for each in choices])
        if choice != 0:
            fewer = len(choices) - 1 if choice is None else choice
            self._as_rental(lambda: directory.make_room(self._folder, protected, fewer))
            found[1:] = self._found()
        return found

    def _finish(
        self, made: directory.NewSnapshot, base: dict[str, Any], changed: list[bytes] | None
    ) -> list[dict[str, Any]]:
        """Complete the received snapshot; return it and all that stay. Raise SnapshotError if there is no room."""
        request, protected = self._request, SnapshotId.parse(self._request.generation)

        def describe() -> list[Usage]:
            limits = request.max_files, request.max_bytes
            directory.describe(self._folder, request.epoch, made, limits, base["generation"], changed)
            return directory.choices(self._folder, protected)

        choice = self._room.choose([Usage(*each) for each in self._as_rental(describe)])
        if choice is None:
            raise self._room.refusal()

        def finish() -> list[dict[str, Any]]:
            done = directory.finish(self._folder, protected, choice, in_haste=base["prepared"])
            return [described(done), *self._listed()]

        return self._as_rental(finish)

    def _receive(self, worker: WorkerCommand, answer: SnapshotAnswer, base: str) -> RsyncResult:
        request = self._request
        kind = "whole" if answer.whole else "send"
        before = (f"--link-dest={self._folder / base / 'home'}",) if answer.whole and base else ()
        listing = ("-ii", "--out-format=%i %n", "--info=nonreg0")
        target = f"{self._folder / directory.INCOMING / 'home'}/"
        stalled_s = LONG_STALL_S if request.for_migration or request.action is SnapshotAction.RECOVER else STALL_S
        transfer = Transfer(
            worker=worker,
            uid=request.uid,
            lifetime=self._lifetime,
            max_files=request.max_files,
            max_bytes=request.max_bytes,
            low_priority=not request.for_migration,
            stalled_s=stalled_s,
        )
        arguments = (*OPTIONS[kind], *before, *listing, "worker:.", target)
        return checked(transfer.run(arguments, self._room.check_disk, answer_was_read=True), "receiver")

    def _restore(self) -> SnapshotReply:
        complete = {each["generation"]: each for each in self._found()}
        newest = next((name for name, each in reversed(complete.items()) if not each["salvage"]), "")
        wanted = self._request.generation or newest
        if not complete or not wanted:
            return SnapshotReply(ok=True)
        if wanted not in complete:
            raise SnapshotError(NO_SUCH_SNAPSHOT, f"there is no snapshot {wanted}; there are {', '.join(complete)}")
        result = self._fill(wanted)
        if self._request.precopy:
            with suppress(SnapshotError):  # the home is filled; the next snapshot makes up for what was not prepared
                self._as_rental(lambda: directory.prepare(self._folder, wanted))
        else:
            self._leftovers = f"{directory.OLD}*"
        done = complete[wanted] | {"skipped": [*complete[wanted]["skipped"], *result.skipped()]}
        return SnapshotReply(ok=True, done=done, copies=list(complete.values()))

    def _fill(self, wanted: str) -> RsyncResult:
        """Fill the home with a snapshot. If the home holds the previous one, send only what has changed since."""
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
            transfer = Transfer(worker=worker, uid=self._request.uid, lifetime=self._lifetime)
            return checked(transfer.run((*OPTIONS[kind], *more, source, "worker:."), lambda: None), "sender")

    def _connect(self) -> SnapshotReply:
        """Open a connection to the worker, which stays open for the next job (ControlPersist)."""
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

    def _remove(self) -> SnapshotReply:
        if self._folder.exists():
            self._own_folder()
            self._as_rental(lambda: directory.remove(self._folder, "*"))
            self._folder.rmdir()
        self._directories.usages.forget(self._request.rental_id)
        return SnapshotReply(ok=True)

    def _found(self) -> list[dict[str, Any]]:
        if not self._folder.exists():
            return []
        self._own_folder()
        return self._as_rental(self._listed)

    def _listed(self) -> list[dict[str, Any]]:
        """Return all complete snapshots. This must run under the rental's uid."""
        return [described(copy) for copy in directory.found(self._folder)]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Run one job for a rental at a time, and kill all processes of the rental's uid at its end."""
        with (self._directories.locks / self._request.rental_id).open("w") as lock:
            wait_s = RECOVER_LOCK_WAIT_S if self._request.action is SnapshotAction.RECOVER else LOCK_WAIT_S
            last_moment = time.monotonic() + min(wait_s, self._lifetime.left_s)
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() >= last_moment:
                    raise SnapshotError("busy", "another job for this rental is still at work")
                time.sleep(0.02)
            try:
                yield
            finally:
                kill_all_of(self._request.uid)

    def _own_folder(self) -> None:
        """Make the rental's uid the owner of a directory that this job or a killed one has made as root."""
        status = self._folder.lstat()
        if status.st_uid == os.geteuid() != self._request.uid:
            os.chown(self._folder, self._request.uid, self._request.uid, follow_symlinks=False)
        elif status.st_uid != self._request.uid:
            raise SnapshotError("conflict", f"the snapshots of {self._request.rental_id} belong to another uid")

    def _worker_command(self, direction: str, **more: Any) -> WorkerCommand:
        request = self._request
        command, environment = self._ssh()
        deadline = time.time() + self._lifetime.left_s
        identity = {"rental_id": request.rental_id, "epoch": request.epoch, "deadline": deadline}
        return WorkerCommand(
            ssh=command,
            uid=self._directories.ssh_uid,
            environment=environment,
            command=direction,
            request=identity | more,
        )

    def _ssh(self) -> tuple[list[str], dict[str, str]]:
        """Return the ssh command that reaches the worker, and its environment."""
        if self._request.host is None:
            raise SnapshotError("invalid_request", "the request names no worker")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self._directories.ssh), "LANG": "C.UTF-8"}
        return worker_ssh(self._request.host.host(), self._directories.ssh, SSH_OPTIONS), environment

    def _as_rental(self, work: Callable[[], T]) -> T:
        return run_as(self._request.uid, work, self._lifetime)
