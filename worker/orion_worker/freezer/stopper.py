"""Keeping a renter's processes still though they fight it, and letting them go on.

Why signals: the kernel's own freezer, cgroup.freeze, is not ours to write. Docker mounts the control groups read-only
into a container without CAP_SYS_ADMIN, the renters' processes share the agent's group, and version 1 has no such file.
So every process is sent SIGSTOP, which none can catch, by kill(-1) as its own uid, which reaches all at once.

SIGCONT undoes it. When all are stopped no process of the renter can send it, and no other account may; but the kernel
can, by a timer (timer_create: seen), a descriptor (F_SETSIG) or the death of a parent that the renter prepared. A
stopped task does not run, so the kernel's count of its turns stands still: whoever has run since it was seen stopped
has been woken. Once is forgiven, as a hang-up does it too; whoever does it again, or never stops, is killed with all
the rental's processes. Its files are left.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orion_worker.system import processes

STOPPED = frozenset("Tt")
AT_REST = STOPPED | frozenset("ZXD")
"""Dead, or in the kernel without an end: what comes back from there finds its SIGSTOP before anything else."""
BETWEEN_STOPS_S = 0.001
"""The same for a pause, which its renter notices."""
PARENTS_WITHIN_S = 0.2
"""How long all parents together may take to stop before everybody is stopped at once."""

Key = tuple[int, int, int]


@dataclass(frozen=True)
class KernelTask:
    """A thread of a renter's process, as the kernel shows it."""

    pid: int
    tid: int
    parent: int
    started: int
    """In ticks since the machine's start: a number that was given to another is another task."""
    state: str
    stopping: bool
    """SIGSTOP waits for its next turn."""
    turns: tuple[int, ...]
    """How often it gave up a processor or lost it, and the ticks that it used."""

    @property
    def key(self) -> Key:
        return self.pid, self.tid, self.started


def parse_task(pid: int, stat: str, status: str) -> KernelTask:
    """From the texts of stat and status in /proc/PID/task/TID. The name in the former is the renter's to choose."""
    tid, _, rest = stat.partition(" (")
    fields = rest.rpartition(")")[2].split()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    pending = int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)
    switches = (int(lines["voluntary_ctxt_switches"]), int(lines["nonvoluntary_ctxt_switches"]))
    ticks = int(fields[11]) + int(fields[12])
    stopping = bool(pending & 1 << signal.SIGSTOP - 1)
    return KernelTask(pid, int(tid), int(fields[1]), int(fields[19]), fields[0], stopping, (*switches, ticks))


def tasks_of(uid: int) -> list[KernelTask]:
    """All tasks of all processes of this uid."""
    found = []
    for pid in processes.pids_of([uid]):
        with suppress(OSError):  # it has ended meanwhile
            for place in (processes.PROC / str(pid) / "task").iterdir():
                with suppress(OSError):
                    found.append(read_task(pid, place))
    return found


def all_at_rest(tasks: Iterable[KernelTask]) -> bool:
    return all(task.state in AT_REST for task in tasks)


def any_resists(before: Mapping[Key, KernelTask], now: Iterable[KernelTask]) -> bool:
    """Whether one has had a turn since `before` and goes on all the same; a task that got none is only waiting."""
    return any(
        task.state not in AT_REST and not task.stopping and task.turns != before.get(task.key, task).turns
        for task in now
    )


def any_woken(before: Mapping[Key, KernelTask], now: Iterable[KernelTask]) -> bool:
    """Whether one that stood stopped has run since."""
    return any(
        task.key in before and before[task.key].state in STOPPED and before[task.key].turns != task.turns
        for task in now
    )


def parents(tasks: Iterable[KernelTask]) -> list[int]:
    """The numbers of those that have children among them, the oldest first."""
    leaders = {task.pid: task for task in tasks if task.pid == task.tid}
    found = {task.parent for task in leaders.values()} & leaders.keys()
    return sorted(found, key=lambda pid: (leaders[pid].started, pid))


def stopped_processes(uid: int) -> frozenset[tuple[int, int]]:
    """(pid, start) of those that are stopped: before a freeze, those that are to stay so after it."""
    return frozenset((t.pid, t.started) for t in tasks_of(uid) if t.pid == t.tid and t.state == "T")


def stopped_among(uids: Collection[int]) -> list[KernelTask]:
    """Return the first tasks of those processes of these uids that are stopped, by one look through all processes."""
    found = []
    for pid in processes.pids_of(uids) if uids else ():
        with suppress(OSError):  # it has ended meanwhile
            found.append(read_task(pid, processes.PROC / str(pid) / "task" / str(pid)))
    return [task for task in found if task.state in STOPPED]


def stop(uid: int, username: str, within_s: float) -> list[KernelTask] | None:
    """Stop all processes of a renter for a moment; return their tasks as they stand, None if they do not in time.

    The processes of sshd that belong to root go on: they write no file of the renter's, and nothing is hung up.
    """
    deadline = time.monotonic() + within_s
    stop_parents(uid, min(deadline, time.monotonic() + PARENTS_WITHIN_S))
    while True:
        if not processes.signal_all(uid, signal.SIGSTOP):
            for pid in processes.pids_of([uid]):
                processes.signal_process(pid, {uid: username}, signal.SIGSTOP)
        found = tasks_of(uid)
        if all_at_rest(found):
            return found
        if time.monotonic() > deadline:
            return None
        time.sleep(BETWEEN_STOPS_S)


def has_run(before: Iterable[KernelTask], now: Iterable[KernelTask]) -> bool:
    """Return whether a task is new, or one that stood stopped has had a turn since."""
    known = {task.key: task for task in before}
    found = list(now)
    return any_woken(known, found) or any(task.key not in known for task in found)


def stop_parents(uid: int, deadline: float) -> None:
    """The oldest first, each before its children, until that moment (monotonic seconds).

    A shell that saw its child stop would take it for suspended by its user, and say so when it goes on. It is a
    courtesy, and bounded: everybody is stopped at once after it, and who fights it gets nothing by it.
    """
    if time.monotonic() > deadline:
        return
    for parent in parents(tasks_of(uid)):
        processes.signal_process(parent, {uid: ""}, signal.SIGSTOP)
        while not _is_at_rest(parent):
            if time.monotonic() > deadline:
                return
            time.sleep(0.0005)


def wake(uid: int, username: str, stay: frozenset[tuple[int, int]]) -> None:
    """Let all go on but those that were stopped before.

    The youngest first: a shell that woke before its child would find it stopped, and take it for suspended by its user.
    """
    renter = {uid: username}
    found = {(task.started, task.pid) for task in tasks_of(uid) if task.pid == task.tid}
    for started, pid in sorted(found, reverse=True):
        if (pid, started) not in stay:
            processes.signal_process(pid, renter, signal.SIGCONT)
    for pid in processes.log_ins([username]):
        processes.signal_process(pid, renter, signal.SIGCONT)


def _is_at_rest(pid: int) -> bool:
    try:
        return read_task(pid, processes.PROC / str(pid) / "task" / str(pid)).state in AT_REST
    except OSError:
        return True


def read_task(pid: int, place: Path) -> KernelTask:
    stat, status = (place / "stat").read_text(errors="replace"), (place / "status").read_text(errors="replace")
    return parse_task(pid, stat, status)
