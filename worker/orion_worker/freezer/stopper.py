"""The stopper: it stops the processes of a renter with signals, and wakes them.

The kernel's own freezer, cgroup.freeze, is not available: Docker mounts the control groups read-only into a container
without CAP_SYS_ADMIN, the renters' processes share the agent's group, and version 1 has no such file. So every process
is sent SIGSTOP, which none can catch, by kill(-1) as its own uid, which reaches all at once.

SIGCONT undoes SIGSTOP. When all processes are stopped, no process of the renter can send it, and no other account may;
but the kernel can, by a timer (timer_create: seen), a descriptor (F_SETSIG) or the death of a parent that the renter
prepared. The kernel's counters of a task's turns change only when it runs: a task whose counters changed since it was
seen stopped has been woken. The enforcer forgives that once, because a hang-up does it too; a rental whose tasks are
woken again, or never stop, loses all its processes. Its files are kept.
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
"""The states of a stopped task."""
AT_REST = STOPPED | frozenset("ZXD")
"""The states of a task that does not run: stopped, dead, or waiting in the kernel, from which it returns to SIGSTOP."""
BETWEEN_STOPS_S = 0.001
"""Seconds between two looks at the processes: little, because the renter notices the pause."""
PARENTS_WITHIN_S = 0.2
"""Seconds within which all parents together are stopped one by one, before all processes are stopped at once."""

Key = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class KernelTask:
    """A thread of a renter's process, as the kernel shows it."""

    pid: int
    tid: int
    parent: int
    started: int
    """Ticks since the machine's start: a task that has the same number and another start is another task."""
    state: str
    stopping: bool
    """Whether SIGSTOP is pending and takes effect when the task runs next."""
    turns: tuple[int, ...]
    """How often the task gave up a processor, how often it lost it, and the ticks that it used."""

    @property
    def key(self) -> Key:
        """Return what no other task has."""
        return self.pid, self.tid, self.started


def parse_task(pid: int, stat: str, status: str) -> KernelTask:
    """Return the task in the texts of stat and status in /proc/PID/task/TID. A renter chooses the name in `stat`."""
    tid, _, rest = stat.partition(" (")
    fields = rest.rpartition(")")[2].split()
    lines = processes.fields_of(status)
    pending = int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)
    switches = int(lines["voluntary_ctxt_switches"]), int(lines["nonvoluntary_ctxt_switches"])
    turns, stopping = (*switches, int(fields[11]) + int(fields[12])), bool(pending & 1 << signal.SIGSTOP - 1)
    return KernelTask(
        pid=pid,
        tid=int(tid),
        parent=int(fields[1]),
        started=int(fields[19]),
        state=fields[0],
        stopping=stopping,
        turns=turns,
    )


def tasks_of(uid: int) -> list[KernelTask]:
    """Return all tasks of all processes of this uid."""
    found = []
    for pid in processes.pids_of([uid]):
        with suppress(OSError):  # it has ended meanwhile
            for place in (processes.PROC / str(pid) / "task").iterdir():
                with suppress(OSError):
                    found.append(read_task(pid, place))
    return found


def all_at_rest(tasks: Iterable[KernelTask]) -> bool:
    """Return whether none of these tasks runs."""
    return all(task.state in AT_REST for task in tasks)


def any_resists(before: Mapping[Key, KernelTask], now: Iterable[KernelTask]) -> bool:
    """Return whether a task has run since `before` and runs on. One that has not run is waiting for a processor."""
    return any(
        task.state not in AT_REST and not task.stopping and task.turns != before.get(task.key, task).turns
        for task in now
    )


def any_woken(before: Mapping[Key, KernelTask], now: Iterable[KernelTask]) -> bool:
    """Return whether a task that was stopped has run since."""
    return any(
        task.key in before and before[task.key].state in STOPPED and before[task.key].turns != task.turns
        for task in now
    )


def parents(tasks: Iterable[KernelTask]) -> list[int]:
    """Return the processes that have children among these tasks, the oldest first."""
    leaders = {task.pid: task for task in tasks if task.pid == task.tid}
    found = {task.parent for task in leaders.values()} & leaders.keys()
    return sorted(found, key=lambda pid: (leaders[pid].started, pid))


def stopped_processes(uid: int) -> frozenset[tuple[int, int]]:
    """Return (pid, start) of the stopped processes of this uid."""
    return frozenset((t.pid, t.started) for t in tasks_of(uid) if t.pid == t.tid and t.state == "T")


def stopped_among(uids: Collection[int]) -> list[KernelTask]:
    """Return the first tasks of those processes of these uids that are stopped, by one look through all processes."""
    found = []
    for pid in processes.pids_of(uids) if uids else ():
        with suppress(OSError):  # it has ended meanwhile
            found.append(first_task(pid))
    return [task for task in found if task.state in STOPPED]


def stop(uid: int, username: str, within_s: float) -> list[KernelTask] | None:
    """Stop all processes of a renter for a moment; return their tasks as they are then, None if not all stop in time.

    sshd's processes of root run on: they write no file of the renter's, and no connection is hung up.
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
    """Return whether a task is new, or a stopped one has run since."""
    known = {task.key: task for task in before}
    found = list(now)
    return any_woken(known, found) or any(task.key not in known for task in found)


def stop_parents(uid: int, deadline: float) -> None:
    """Stop the parents among the processes of this uid, the oldest first, each before its children.

    A shell that sees its child stop takes it for suspended by its user, and says so when it runs on. To avoid that is a
    courtesy, which ends at the deadline (monotonic seconds): then all processes are stopped at once.
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
    """Let all processes of a renter run on, but those that the renter had stopped.

    The youngest are woken first: a shell that woke before its child would take it for suspended by its user.
    """
    found = {(task.started, task.pid) for task in tasks_of(uid) if task.pid == task.tid}
    woken = [pid for started, pid in sorted(found, reverse=True) if (pid, started) not in stay]
    for pid in (*woken, *processes.log_ins([username])):
        processes.signal_process(pid, {uid: username}, signal.SIGCONT)


def _is_at_rest(pid: int) -> bool:
    try:
        return first_task(pid).state in AT_REST
    except OSError:
        return True


def first_task(pid: int) -> KernelTask:
    """Return the first task of a process. Raise OSError if it has ended."""
    return read_task(pid, processes.PROC / str(pid) / "task" / str(pid))


def read_task(pid: int, place: Path) -> KernelTask:
    """Return a task from its directory in /proc. Raise OSError if it has ended."""
    stat, status = (place / "stat").read_text(errors="replace"), (place / "status").read_text(errors="replace")
    return parse_task(pid, stat, status)
