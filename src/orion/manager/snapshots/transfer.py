"""One run of rsync between a copy here and a home on a worker, with this process between the two.

The rsync here runs under the rental's own uid, in a directory of that uid, and holds no key and no connection: its
"remote shell" hands its two ends to this process (bridge.py), which carries the bytes to an ssh of another uid and
counts them. The rsync there runs under the renter's uid, by `orion-rental send` or `receive`. So a worker that lies,
and a renter that does, can make rsync do no more than spoil that rental's own copy.
"""

from __future__ import annotations

import json
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
from typing import Any, Self

from orion.manager.domain.snapshots import SnapshotId
from orion.manager.snapshots.lifetime import Lifetime
from orion.manager.snapshots.port import SnapshotError

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
"""The options of rsync for what orion_worker/snapshots/transfer.py calls by these names.
`test_both_sides_mean_the_same` compares them.

What changed is always transferred, whatever its time and size (-I): the worker knows better what changed. Times are
compared to the nanosecond (-1): by default, a directory that changes twice within a second keeps the first time.
"""
MEMORY_BYTES = 1 << 30
NICENESS = 5
BUFFER_BYTES = 1 << 18
MAX_TEXT_BYTES = 1 << 16
LOOK_EVERY_S = 1.0
LISTS_BYTES = 8 << 20
LISTS_BYTES_A_FILE = 1200
"""Bytes of a stream beyond the content of files, and more for each file: names, attributes, what rsync says."""
MAX_ANSWER_BYTES = 1 << 17
"""Bytes of an answer. An honest one may have 20 names of 200 letters in it, of 12 bytes each as JSON writes them."""
MAX_FOLDER_MODES_BYTES = 1 << 15
"""Bytes of the modes of directories: less than a worker takes in a request, which they come back to it in."""
MAX_SKIPPED_NAMES = 20
LONGEST_S = 3600.0
REACHED_WITHIN_S = 20.0
"""Seconds until a worker must have been reached and have said its first line."""
STALL_S = 10.0
"""Seconds in which nothing moves and neither side works, after which a transfer is given up: it holds a place."""
LONG_STALL_S = 60.0
"""The same for what is tried but once or twice."""
PARTIAL = 23
"""The exit status of rsync where something could not be carried whole."""
_CODE = re.compile(r"[a-z_]{1,40}")
_ITEM = re.compile(rb"(?:[<>ch.][fdLDS][ .+?a-zA-Z]{9}|\*deleting  ) (.*)", re.DOTALL)
_ESCAPED = re.compile(rb"\\#([0-7]{3})")
_NAMED = r'[a-z_]+(?: failed to open)? "(?:/home/[^/"]+/)?(.*)"(?: failed)?: .*'
_SKIPPED = re.compile(rf"rsync: \[(?:sender|receiver|generator)\] {_NAMED}")
_NO_ROOM = re.compile(r"No space left|Disk quota exceeded|File too large", re.IGNORECASE)


@dataclass
class RsyncResult:
    """What the rsync here said."""

    status: int = 0
    names: list[bytes] = field(default_factory=list)
    """The paths of what was brought up to date or removed, as they are on the disk."""
    errors: str = ""

    def skipped(self) -> tuple[str, ...]:
        """Return the names of what could not be read or written."""
        names = [match[1] for line in self.errors.splitlines() if (match := _SKIPPED.match(line))]
        return tuple(sorted({name[:200] for name in names})[:MAX_SKIPPED_NAMES])


@dataclass(frozen=True)
class SnapshotAnswer:
    """The worker's answer to a request for a snapshot; nothing in it is believed but about that rental's home."""

    same: bool = False
    """Whether the home is as in the snapshot that was named as its base; then nothing follows."""
    whole: bool = False
    """Whether the whole home follows, because the worker does not know the base."""
    after_s: float = 0.0
    """The seconds from when the worker had read the request until it began; 0 from a worker of an earlier version."""
    pause_s: float = 0.0
    """The seconds for which the programs of the rental stood still."""
    skipped: tuple[str, ...] = ()
    folders: dict[str, int] = field(default_factory=dict)
    """Modes that are to be given to directories again when the home is filled, by path in hexadecimal."""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Self:
        """Raise SnapshotError for what is no such answer."""
        try:
            skipped = tuple(plain(str(name))[:200] for name in list(answer.get("skipped", ()))[:MAX_SKIPPED_NAMES])
            after_s, pause_s = (min(max(0.0, float(answer.get(name, 0))), LONGEST_S) for name in ("after_s", "pause_s"))
            folders = _modes(dict(answer.get("folders", {})))
            return cls(answer.get("same") is True, answer.get("whole") is True, after_s, pause_s, skipped, folders)
        except (TypeError, ValueError, OverflowError) as error:
            raise SnapshotError("unreachable", "the worker cannot be asked: its answer is not one") from error


def _modes(result: dict[Any, Any]) -> dict[str, int]:
    """Return modes of directories by path. Raise ValueError for such as no worker takes that a home is filled on."""
    found = {str(path): int(mode) for path, mode in result.items()}
    for path, mode in found.items():
        names = bytes.fromhex(path).split(b"/")
        if names[0] != b"." or any(name in {b"", b".."} or b"\0" in name for name in names) or path != path.lower():
            raise ValueError("a path is none below a home")
        if not 0 <= mode < 0o10000:
            raise ValueError("a mode is none")
    if len(json.dumps(found)) > MAX_FOLDER_MODES_BYTES:
        raise ValueError("there are too many of them")
    return found


class WorkerCommand:
    """`orion-rental` on the worker, by ssh, for the length of a block: it is asked at once, and heard later."""

    def __init__(
        self,
        ssh: Sequence[str],
        account: tuple[int, int],
        environment: dict[str, str],
        command: str,
        request: dict[str, Any],
    ) -> None:
        self.process = subprocess.Popen(
            [*ssh, f"orion-rental {command}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            env=environment, cwd="/", user=account[0], group=account[1], extra_groups=[], start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin  # noqa: S101 - it was asked for
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def read_answer(self, lifetime: Lifetime) -> dict[str, Any]:
        """Return the answer. Raise SnapshotError with its code for a refusal, and where the worker is not reached in
        time.

        The worker says an empty line as soon as it is reached, and answers when it has made up its mind. An ssh that
        still agrees on keys waits for ever for a worker whose address is gone.
        """
        line = self._line(lifetime, REACHED_WITHIN_S)
        if line == b"\n":
            line = self._line(lifetime)
        try:
            answer = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            said = "its answer is not one" if line else self._last_error_line(lifetime)
            raise SnapshotError("unreachable", f"the worker cannot be asked: {said}") from error
        if answer.get("ok") is not True:
            code, restored = str(answer.get("code")), str(answer.get("restored", ""))
            known = code if _CODE.fullmatch(code) else "refused"
            generation = restored if SnapshotId.parse(restored) else ""
            raise SnapshotError(known, plain(str(answer.get("error", "it was refused"))), generation)
        return answer

    def _line(self, lifetime: Lifetime, within_s: float = float("inf")) -> bytes:
        """Byte by byte: what follows is rsync's."""
        assert self.process.stdout  # noqa: S101
        line = b""
        while not line.endswith(b"\n") and len(line) < MAX_ANSWER_BYTES:
            if not lifetime.wait_for(self.process.stdout.fileno(), within_s):
                raise SnapshotError("unreachable", f"the worker cannot be asked: no answer within {within_s:g} s")
            byte = self.process.stdout.read(1)
            if not byte:
                break
            line += byte
        return line

    def _last_error_line(self, lifetime: Lifetime) -> str:
        assert self.process.stderr  # noqa: S101
        lifetime.wait_for(self.process.stderr.fileno())
        text = os.read(self.process.stderr.fileno(), MAX_TEXT_BYTES).decode(errors="replace")
        return plain((text.strip().splitlines() or ["it said nothing"])[-1])


@dataclass(eq=False)
class ByteStream:
    """Bytes on their way in one direction, not more than `most` of them."""

    source: int
    target: int
    most: float
    closes_source: bool = False
    """Whether the source is closed at the end: an rsync that still writes would wait for ever to be read."""
    waiting: bytearray = field(default_factory=bytearray)
    carried: int = 0
    """Bytes that were read from the source."""
    moved: int = 0
    """Bytes that were read from the source or written to the target."""
    ended: bool = False
    """The source has nothing more, or nobody takes it."""
    done: bool = False

    def end(self) -> None:
        """Carry nothing more: nobody takes it."""
        self.ended = True
        self.waiting.clear()


class StallClock:
    """A clock of the time in which nothing was done; while this process itself does not run, it stands still."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._idle_s = 0.0
        self._seen: tuple[int, float] | None = None

    def is_too_long(self, done: int, now: float) -> bool:
        """Note how much was done by now (monotonic seconds); return whether that has not changed for too long."""
        before, self._seen = self._seen, (done, now)
        if before is None or before[0] != done:
            self._idle_s = 0.0
        else:
            self._idle_s += min(1.5 * LOOK_EVERY_S, now - before[1])
        return self._idle_s >= self._longest_s


class Transfer:
    def __init__(
        self,
        worker: WorkerCommand,
        uid: int,
        lifetime: Lifetime,
        most_bytes: float,
        most_items: float,
        low_priority: bool,
        stalled_s: float = STALL_S,
    ) -> None:
        """`gently`: nobody waits for it. `stalled_s`: it is given up when nothing moves or works for so long."""
        self._low_priority = low_priority
        self._stalled_s = stalled_s
        self._worker = worker
        self._uid = uid
        self._lifetime = lifetime
        self._most_bytes = most_bytes
        self._most_items = most_items
        self._selector = selectors.DefaultSelector()
        self._result = RsyncResult()
        self._line = bytearray()
        self._errors = bytearray()
        self._open = 2  # rsync's output and its errors
        self._worker_error_bytes = 0
        """Bytes that came as complaints: the worker says one for each second in which its rsync works."""

    def run(
        self,
        arguments: Sequence[str],
        check_disk: Callable[[], None],
        largest_file: int | None,
        answer_was_read: bool = False,
    ) -> RsyncResult:
        """Run rsync with these arguments, paths last. `look` is called about once a second, and may raise.

        Unless the worker was heard already, the rsync here starts while the worker makes up its mind; nothing goes to
        it or comes from it before that.
        """
        mine, theirs = socket.socketpair()
        command = ["rsync", "-e", f"{sys.executable} -I -S {BRIDGE} {theirs.fileno()}", *arguments]
        rsync = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}, cwd="/", umask=0o077,
            user=self._uid, group=self._uid, extra_groups=[], start_new_session=True,
            pass_fds=(theirs.fileno(),), preexec_fn=partial(_confine, largest_file, self._low_priority),  # noqa: PLW1509 - one thread
        )  # fmt: skip
        theirs.close()
        try:
            if not answer_was_read:
                self._worker.read_answer(self._lifetime)
            self._carry(rsync, mine, check_disk)
            self._result.status = rsync.wait(max(0.1, self._lifetime.left_s))
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
        worker = self._worker.process
        assert worker.stdin and worker.stdout and worker.stderr and rsync.stdout and rsync.stderr  # noqa: S101, PT018
        self._lifetime.wait_for(control.fileno())
        _, (from_rsync, to_rsync), _, _ = _receive_pipe_ends(control)
        inward = ByteStream(worker.stdout.fileno(), to_rsync, self._most_bytes)
        outward = ByteStream(from_rsync, os.dup(worker.stdin.fileno()), float("inf"), closes_source=True)
        worker.stdin.close()
        self._lifetime.register(self._selector)
        self._register(rsync.stdout.fileno(), self._read_output)
        self._register(rsync.stderr.fileno(), self._read_errors)
        self._register(worker.stderr.fileno(), self._read_worker_errors)
        for flow in (inward, outward):
            os.set_blocking(flow.source, False)
            os.set_blocking(flow.target, False)
            self._update_events(flow)
        looked_at, idle = time.monotonic(), StallClock(self._stalled_s)
        while self._open:
            for key, ready in self._lifetime.events(self._selector):
                key.data(key.fd, ready)
            if inward.done or not self._open:
                control.close()  # the bridge ends, and with it what rsync takes for its remote shell
                if not outward.done:
                    outward.end()
                    self._update_events(outward)
            if time.monotonic() - looked_at > LOOK_EVERY_S:
                check_disk()
                looked_at = time.monotonic()
                done = inward.moved + outward.moved + self._worker_error_bytes + ticks(rsync.pid)
                if idle.is_too_long(done, looked_at):
                    raise SnapshotError("stalled", f"nothing of its files has come or gone for {self._stalled_s:.0f} s")

    def _register(self, descriptor: int, take: Callable[[int, int], None]) -> None:
        os.set_blocking(descriptor, False)
        self._selector.register(descriptor, selectors.EVENT_READ, take)

    def _update_events(self, flow: ByteStream) -> None:
        """Look at what the flow can go on with: its source, its target, or both."""
        for descriptor, event, wanted in (
            (flow.source, selectors.EVENT_READ, not flow.ended and len(flow.waiting) < BUFFER_BYTES),
            (flow.target, selectors.EVENT_WRITE, bool(flow.waiting)),
        ):
            known = descriptor in self._selector.get_map()
            if wanted and not known:
                self._selector.register(descriptor, event, partial(self._move, flow))
            elif known and not wanted:
                self._selector.unregister(descriptor)
        if flow.ended and not flow.waiting and not flow.done:
            flow.done = True
            os.close(flow.target)
            if flow.closes_source:
                os.close(flow.source)

    def _move(self, flow: ByteStream, descriptor: int, _ready: int) -> None:
        try:
            if descriptor == flow.source:
                part = os.read(flow.source, BUFFER_BYTES)
                flow.carried += len(part)
                flow.moved += len(part)
                flow.ended = not part
                flow.waiting += part
            else:
                written = os.write(flow.target, flow.waiting)
                flow.moved += written
                del flow.waiting[:written]
        except BlockingIOError:
            return
        except OSError:  # the other end is gone: rsync, or ssh, will say why
            flow.end()
        if flow.carried > flow.most:
            raise SnapshotError("over_limit", "more was sent than a copy may hold")
        self._update_events(flow)

    def _read_output(self, descriptor: int, _ready: int) -> None:
        *lines, rest = (self._line + self._part(descriptor)).split(b"\n")
        self._line = bytearray(rest[-MAX_TEXT_BYTES:])
        for line in lines:
            if item := _ITEM.fullmatch(line):
                self._result.names.append(_ESCAPED.sub(lambda octal: bytes([int(octal[1], 8) & 0xFF]), item[1]))
        if len(self._result.names) > self._most_items:
            raise SnapshotError("over_limit", "more files were sent than a copy may hold")

    def _read_errors(self, descriptor: int, _ready: int) -> None:
        self._errors += self._part(descriptor)
        del self._errors[MAX_TEXT_BYTES:]

    def _read_worker_errors(self, descriptor: int, _ready: int) -> None:
        """ssh's, and of programs on the worker: read, so that nobody waits to write it, and believed in nothing else
        than that something goes on."""
        with suppress(BlockingIOError):
            part = os.read(descriptor, MAX_TEXT_BYTES)
            self._worker_error_bytes += len(part)
            if not part:
                self._selector.unregister(descriptor)

    def _part(self, descriptor: int) -> bytes:
        try:
            part = os.read(descriptor, MAX_TEXT_BYTES)
        except BlockingIOError:
            return b""
        if not part:
            self._selector.unregister(descriptor)
            self._open -= 1
        return part


def check(result: RsyncResult, here: str) -> None:
    """Raise SnapshotError unless rsync did all that it had to. `here`: what this side is, receiver or sender.

    A snapshot is received whole or not at all. A home is filled with what can be put into it: what it lacks is named.
    """
    if result.status == 0:
        return
    if result.status == PARTIAL and here == "sender" and not _NO_ROOM.search(result.errors):
        return
    if result.status == -signal.SIGXFSZ:
        raise SnapshotError("over_limit", "a file is larger than all that a copy may hold")
    if _NO_ROOM.search(result.errors):
        where = "on the manager" if here == "receiver" else "on the worker"
        raise SnapshotError("disk_full" if here == "receiver" else "failed", f"there is no room for it {where}")
    lines = [line for line in result.errors.splitlines() if line.startswith(("rsync:", "rsync error:"))]
    raise SnapshotError("failed", f"rsync ended with {result.status}: {plain((lines or ['it said nothing'])[0])}")


def plain(text: str) -> str:
    """One line for a person; a worker may have written it, so nothing that moves a cursor."""
    return re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]+", " ", text).strip()[:300]


def ticks(pid: int) -> int:
    """Return the ticks of a processor that a process has used, and all that it has started; 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15])) + sum(ticks(int(child)) for child in children)


def _receive_pipe_ends(control: socket.socket) -> tuple[bytes, tuple[int, int], int, Any]:
    data, descriptors, flags, address = socket.recv_fds(control, 1, 2)
    if len(descriptors) != 2:
        raise SnapshotError("failed", "rsync did not start")
    return data, (descriptors[0], descriptors[1]), flags, address


def _confine(largest_file: int | None, low_priority: bool) -> None:
    """In the child, before it becomes rsync."""
    if low_priority:
        os.nice(NICENESS)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_FSIZE, largest_file),
    ):
        if most is not None:
            resource.setrlimit(kind, (most, most))
