"""One run of rsync between a snapshot and a home on a worker, with this process between the two.

The local rsync runs under the rental's uid, in a directory of that uid, and has neither key nor connection: its "remote
shell" (bridge.py) passes its two pipes to this process, which carries the bytes to an ssh of another uid and counts
them. The remote rsync runs under the renter's uid, by `orion-rental send` or `receive`. So a lying worker or renter can
do no more through rsync than spoil that rental's own snapshot.
"""

from __future__ import annotations

import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import SnapshotError
from orion.manager.snapshots.worker_command import MAX_MESSAGE, MAX_SKIPPED_NAMES, MAX_TEXT_BYTES, WorkerCommand
from orion.manager.ssh.options import plain

BRIDGE = Path(__file__).with_name("bridge.py")
_ALWAYS = (
    *("-lptgo", "-H", "-S", "-X", "-A", "--specials", "--numeric-ids", "--fake-super"),
    *("--modify-window=-1", "--stderr=client"),
)
_CHANGES = ("-I", "--from0", "--delete-missing-args", "--force")
OPTIONS = {
    "send": (*_ALWAYS, "-M--fake-super", *_CHANGES, "--files-from=:../list"),
    "whole": (*_ALWAYS, "-M--fake-super", "-r", "-c"),
    "receive": (*_ALWAYS, "-r", "--delete"),
    "update": (*_ALWAYS, *_CHANGES),
}
"""The options of rsync, by kind of transfer. orion_worker/snapshots/transfer.py has its own half of each kind, and
`test_worker_and_snapshot_service_use_the_same_arguments_of_rsync` compares the two.

All listed files are transferred, whatever their time and size (-I), because the worker knows what changed. Times are
compared to the nanosecond (-1): otherwise a directory that changes twice within a second would keep the first time.
Set-id bits are transferred: a renter could set them again, and they have no effect on a worker (no-new-privileges).
"""
MEMORY_BYTES = 1 << 30
NICENESS = 5
BUFFER_BYTES = 1 << 18
LOOK_EVERY_S = 1.0
LISTS_BYTES = 8 << 20
LISTS_BYTES_A_FILE = 1200
"""Bytes of a stream beyond the content of files, in all and for each file: names, attributes, rsync's messages."""
STALL_S = 10.0
"""Seconds without progress after which a transfer is given up, so that it does not use up one of MAX_TRANSFERS."""
LONG_STALL_S = 60.0
"""Seconds without progress for migrations and recoveries, which are tried only once or twice."""
PARTIAL = 23
"""rsync's exit status if some files could not be transferred completely."""
_ITEM = re.compile(rb"(?:[<>ch.][fdLDS][ .+?a-zA-Z]{9}|\*deleting  ) (.*)", re.DOTALL)
_ESCAPED = re.compile(rb"\\#([0-7]{3})")
_NAMED = r'[a-z_]+(?: failed to open)? "(?:/home/[^/"]+/)?(.*)"(?: failed)?: .*'
_SKIPPED = re.compile(rf"rsync: \[(?:sender|receiver|generator)\] {_NAMED}")
_NO_ROOM = re.compile(r"No space left|Disk quota exceeded|File too large", re.IGNORECASE)


@dataclass
class RsyncResult:
    """The exit status and output of the local rsync."""

    status: int = 0
    names: list[bytes] = field(default_factory=list)
    """The paths that were changed or removed, as bytes on the disk."""
    errors: str = ""

    def skipped(self) -> tuple[str, ...]:
        """Return the names of files that could not be read or written."""
        names = [match[1] for line in self.errors.splitlines() if (match := _SKIPPED.match(line))]
        return tuple(sorted({name[:200] for name in names})[:MAX_SKIPPED_NAMES])


@dataclass(eq=False, kw_only=True)
class ByteStream:
    """Bytes that are carried in one direction, from `source` to `target`, `most` at most."""

    source: int
    target: int
    most: float
    closes_source: bool = False
    """Whether to close the source at the end. An rsync that still writes into it would else block for ever."""
    waiting: bytearray = field(default_factory=bytearray)
    carried: int = 0
    """Bytes that were read from the source."""
    moved: int = 0
    """Bytes that were read from the source or written to the target."""
    ended: bool = False
    """Whether the source has ended, or the target takes no more."""
    done: bool = False

    def end(self) -> None:
        """Drop what is waiting, and carry nothing more."""
        self.ended = True
        self.waiting.clear()


@dataclass
class StallClock:
    """A clock of the time without progress. Time in which this process did not run does not count."""

    longest_s: float
    _idle_s: float = 0.0
    _seen: tuple[int, float] | None = None

    def is_too_long(self, done: int, now: float) -> bool:
        """Return whether `done` has not changed for too long. `now`: monotonic seconds."""
        before, self._seen = self._seen, (done, now)
        if before is None or before[0] != done:
            self._idle_s = 0.0
        else:
            self._idle_s += min(1.5 * LOOK_EVERY_S, now - before[1])
        return self._idle_s >= self.longest_s


@dataclass(eq=False, kw_only=True)
class Transfer:
    """One transfer between the local rsync and the one on a worker, within its limits."""

    worker: WorkerCommand
    uid: int
    lifetime: Lifetime
    max_files: int = 0
    max_bytes: int = 0
    """The limit of a received snapshot in bytes; 0 if the home of a rental is filled."""
    low_priority: bool = False
    stalled_s: float = STALL_S
    """Seconds without progress after which the transfer is given up."""
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _result: RsyncResult = field(default_factory=RsyncResult)
    _line: bytearray = field(default_factory=bytearray)
    _errors: bytearray = field(default_factory=bytearray)
    _open: set[int] = field(default_factory=set)
    """The descriptors of rsync's output and errors that have not ended."""
    _worker_error_bytes: int = 0
    """Bytes of the worker's stderr: it writes a line in each second in which its rsync works."""

    def run(
        self, arguments: Sequence[str], check_disk: Callable[[], None], answer_was_read: bool = False
    ) -> RsyncResult:
        """Run rsync with these arguments, paths last. `check_disk` is called about once a second, and may raise.

        If the worker's answer was not read yet, the local rsync starts meanwhile, and no byte is carried before it.
        """
        mine, theirs = socket.socketpair()
        command = ["rsync", "-e", f"{sys.executable} -I -S {BRIDGE} {theirs.fileno()}", *arguments]
        rsync = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}, cwd="/", umask=0o077,
            user=self.uid, group=self.uid, extra_groups=[], start_new_session=True,
            pass_fds=(theirs.fileno(),), preexec_fn=partial(_confine, self.max_bytes, self.low_priority),  # noqa: PLW1509 - one thread
        )  # fmt: skip
        theirs.close()
        try:
            if not answer_was_read:
                self.worker.read_answer(self.lifetime)
            self._carry(rsync, mine, check_disk)
            self._result.status = rsync.wait(max(0.1, self.lifetime.left_s))
        except subprocess.TimeoutExpired as error:
            raise SnapshotError("timed_out", "it took longer than it may") from error
        finally:
            mine.close()
            with suppress(ProcessLookupError):
                os.killpg(rsync.pid, signal.SIGKILL)
            rsync.wait()
        self._result.errors = self._errors.decode(errors="replace")
        return self._result

    def _carry(self, rsync: subprocess.Popen[bytes], control: socket.socket, check_disk: Callable[[], None]) -> None:
        worker = self.worker.process
        assert worker.stdin and worker.stdout and worker.stderr and rsync.stdout and rsync.stderr  # noqa: S101, PT018
        self.lifetime.wait_for(control.fileno())
        from_rsync, to_rsync = _receive_pipe_ends(control)
        most = self.max_bytes + LISTS_BYTES + LISTS_BYTES_A_FILE * self.max_files
        inward = ByteStream(source=worker.stdout.fileno(), target=to_rsync, most=most)
        outward = ByteStream(
            source=from_rsync, target=os.dup(worker.stdin.fileno()), most=float("inf"), closes_source=True
        )
        worker.stdin.close()
        self.lifetime.register(self._selector)
        self._open = {rsync.stdout.fileno(), rsync.stderr.fileno()}
        for descriptor, take in (
            (rsync.stdout.fileno(), self._read_output),
            (rsync.stderr.fileno(), self._read_errors),
            (worker.stderr.fileno(), self._read_worker_errors),
        ):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, take)
        for stream in (inward, outward):
            os.set_blocking(stream.source, False)
            os.set_blocking(stream.target, False)
            self._update_events(stream)
        looked_at, idle = time.monotonic(), StallClock(self.stalled_s)
        while self._open:
            for key in self.lifetime.ready_keys(self._selector):
                key.data(key.fd)
            if inward.done or not self._open:
                control.close()  # this ends the bridge, which is rsync's remote shell
                if not outward.done:
                    outward.end()
                    self._update_events(outward)
            if time.monotonic() - looked_at > LOOK_EVERY_S:
                check_disk()
                looked_at = time.monotonic()
                done = inward.moved + outward.moved + self._worker_error_bytes + ticks(rsync.pid)
                if idle.is_too_long(done, looked_at):
                    raise SnapshotError("stalled", f"nothing of its files has come or gone for {self.stalled_s:.0f} s")

    def _update_events(self, stream: ByteStream) -> None:
        """Register what the stream waits for: its source to be readable, its target to be writable, or both."""
        for descriptor, event, wanted in (
            (stream.source, selectors.EVENT_READ, not stream.ended and len(stream.waiting) < BUFFER_BYTES),
            (stream.target, selectors.EVENT_WRITE, bool(stream.waiting)),
        ):
            known = descriptor in self._selector.get_map()
            if wanted and not known:
                self._selector.register(descriptor, event, partial(self._move, stream))
            elif known and not wanted:
                self._selector.unregister(descriptor)
        if stream.ended and not stream.waiting and not stream.done:
            stream.done = True
            os.close(stream.target)
            if stream.closes_source:
                os.close(stream.source)

    def _move(self, stream: ByteStream, descriptor: int) -> None:
        try:
            if descriptor == stream.source:
                part = os.read(stream.source, BUFFER_BYTES)
                stream.carried += len(part)
                stream.moved += len(part)
                stream.ended = not part
                stream.waiting += part
            else:
                written = os.write(stream.target, stream.waiting)
                stream.moved += written
                del stream.waiting[:written]
        except BlockingIOError:
            return
        except OSError:  # the other end is gone, and rsync or ssh reports why
            stream.end()
        if stream.carried > stream.most:
            raise SnapshotError("over_limit", "more was sent than a snapshot may hold")
        self._update_events(stream)

    def _read_output(self, descriptor: int) -> None:
        *lines, rest = (self._line + self._part(descriptor)).split(b"\n")
        self._line = bytearray(rest[-MAX_TEXT_BYTES:])
        for line in lines:
            if item := _ITEM.fullmatch(line):
                self._result.names.append(_ESCAPED.sub(lambda octal: bytes([int(octal[1], 8) & 0xFF]), item[1]))
        if (
            self.max_files and len(self._result.names) > 2 * self.max_files + 2
        ):  # rsync lists removed entries too, so each one twice
            raise SnapshotError("over_limit", "more files were sent than a snapshot may hold")

    def _read_errors(self, descriptor: int) -> None:
        self._errors += self._part(descriptor)
        del self._errors[MAX_TEXT_BYTES:]

    def _read_worker_errors(self, descriptor: int) -> None:
        """Read the stderr of ssh and of the worker's programs, so that they never block. Only its length is used."""
        self._worker_error_bytes += len(self._part(descriptor))

    def _part(self, descriptor: int) -> bytes:
        try:
            part = os.read(descriptor, MAX_TEXT_BYTES)
        except BlockingIOError:
            return b""
        if not part:
            self._selector.unregister(descriptor)
            self._open.discard(descriptor)
        return part


def checked(result: RsyncResult, here: str) -> RsyncResult:
    """Return the result. Raise SnapshotError if rsync failed. `here`: the local side, receiver or sender.

    A snapshot must be complete. A home may lack files that cannot be written there, which the reply names.
    """
    has_no_room = _NO_ROOM.search(result.errors)
    if result.status == 0 or (result.status == PARTIAL and here == "sender" and not has_no_room):
        return result
    if result.status == -signal.SIGXFSZ:
        raise SnapshotError("over_limit", "a file is larger than a whole snapshot may be")
    if has_no_room:
        code, where = ("disk_full", "manager") if here == "receiver" else ("failed", "worker")
        raise SnapshotError(code, f"there is no room for it on the {where}")
    lines = [line for line in result.errors.splitlines() if line.startswith(("rsync:", "rsync error:"))]
    message = plain((lines or ["it said nothing"])[0])[:MAX_MESSAGE]
    raise SnapshotError("failed", f"rsync ended with {result.status}: {message}")


def ticks(pid: int) -> int:
    """Return the processor ticks that a process and its descendants have used; 0 if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15])) + sum(ticks(int(child)) for child in children)


def _receive_pipe_ends(control: socket.socket) -> list[int]:
    """Return the two pipes that bridge.py passes: what rsync reads from the worker's side, and what it writes."""
    descriptors = socket.recv_fds(control, 1, 2)[1]
    if len(descriptors) != 2:
        raise SnapshotError("failed", "rsync did not start")
    return descriptors


def _confine(largest_file: int, low_priority: bool) -> None:
    """Set the limits of rsync; `largest_file` 0: files of any size. This runs in the child before exec."""
    if low_priority:
        os.nice(NICENESS)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_NOFILE: 256}
    if largest_file:
        limits[resource.RLIMIT_FSIZE] = largest_file
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
