"""Finding the processes of a renter, and signalling all of them at once although they fork meanwhile.

A renter may stop each process that has its uid, even one that root has started for it. Only SIGKILL ends a stopped
process. So root waits for such a child until a deadline, and then ends it with `kill_group`.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from orion_worker.system.files import closing

PROC = Path("/proc")
SCORE = "oom_score_adj"
"""The file of a process with the score by which the kernel ends processes when memory is short (limits/scores.py)."""
END_WITHIN_S = 10.0
FIRST_UID = 100_000
"""The lowest uid of a renter."""
FIRST_SENDER = 1 << 31
"""The lowest uid of the accounts that send the files of rentals; every renter's uid is below it."""
NOT_BEGUN = 128
"""The exit status, less the number of the error, of a child that could not begin its work."""
LOWEST_PRIORITY = 19
"""The highest niceness: with it, 22 processes get as much of a processor as one process of another renter."""
_NOBODYS_ID = 4_000_000_000
"""A number above every uid that a renter can have, which no account has."""
_DIES_WITH_PARENT = 1
"""prctl(2), PR_SET_PDEATHSIG."""


def is_renter(uid: int) -> bool:
    """Return whether an account of a renter has this uid."""
    return FIRST_UID <= uid < FIRST_SENDER


def fields_of(status: str) -> dict[str, str]:
    """Return the fields in the text of /proc/PID/status by name."""
    return dict(line.split(":", 1) for line in status.splitlines() if ":" in line)


def owners(status: str) -> set[int]:
    """Return the real, effective, saved and file-system uid in the text of /proc/PID/status; none for a zombie.

    A process whose first thread has ended looks like a zombie while its other threads run.
    """
    fields = fields_of(status)
    if fields.get("State", "").strip().startswith(("Z", "X")) and int(fields.get("Threads", 1)) < 2:
        return set()
    return {int(uid) for uid in fields.get("Uid", "").split()}


def pids_of(uids: Collection[int]) -> list[int]:
    """Return the living processes that have one of these uids as any of their four."""
    return [pid for pid in _all() if not owners(_status(pid)).isdisjoint(uids)]


def log_ins(usernames: Collection[str]) -> list[int]:
    """Return sshd's processes of root for the log-ins of these renters; each has the name in its title."""
    return [pid for pid in _all() if log_in_name(pid) in usernames]


def uids_from(first: int) -> set[int]:
    """Return the uids from `first` on that have a process, without the uids that send files (transfer.sender_uid)."""
    return {uid for pid in _all() for uid in owners(_status(pid)) if first <= uid < FIRST_SENDER}


def sessions(uid: int, username: str) -> list[int]:
    """Return sshd's processes of root that hold authenticated log-ins of this renter."""
    parents = {parent_of(_status(pid)) for pid in pids_of([uid])}
    return [pid for pid in log_ins([username]) if pid in parents]


def parent_of(status: str) -> int:
    """Return the parent in the text of /proc/PID/status; 0 where there is none."""
    return int(fields_of(status).get("PPid", 0))


def ticks(pid: int) -> int:
    """Return the ticks of a processor that a process and its children have used; 0 where there is no such process."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        children = (PROC / str(pid) / "task" / str(pid) / "children").read_text().split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15])) + sum(ticks(int(child)) for child in children)


def kill_all(renters: dict[int, str], within_s: float = END_WITHIN_S) -> int:
    """Kill all processes of these renters (uid: username) and wait until none is left; return how many were seen.

    A process that has not gone in time, such as one that the kernel cannot interrupt, is left for the caller to find.
    """
    found = [*pids_of(renters), *log_ins(renters.values())]
    seen = set(found)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for uid in renters:
            signal_all(uid, signal.SIGKILL)
        for pid in found:
            signal_process(pid, renters, signal.SIGKILL)
        found = [*pids_of(renters), *log_ins(renters.values())]
        if not found:
            break
        seen.update(found)
        time.sleep(0.01)
    return len(seen)


def begin_child(work: Callable[[], object]) -> int:
    """Begin a child that does this work and ends; return its number. The child leads a process group (`kill_group`)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            work()
        except OSError as error:
            status = NOT_BEGUN + (error.errno or 0)
        finally:
            os._exit(status)
    return child


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, which has that number, ends.

    A change of uid makes the kernel forget this, so call it when this process has the uid that it keeps.
    """
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def has_ended(child: int, within_s: float) -> bool:
    """Return whether a child has ended within that time. Its status is still to be taken then."""
    with closing(os.pidfd_open(child)) as ended:
        return bool(select.select([ended], [], [], max(0.0, within_s))[0])


def kill_group(child: int) -> int:
    """Kill a child and all that it has started in its group, stopped or not; return its exit status as `os` codes it.

    The status is taken last, because until then no other process gets the number.
    """
    for kill in (os.killpg, os.kill):  # the child may not lead its group yet
        with suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Event(ctypes.Structure):
    """The event at the end of a timer: sigevent(3type)."""

    _fields_ = [("value", ctypes.c_void_p), ("number", ctypes.c_int), ("how", ctypes.c_int), ("_", ctypes.c_int * 12)]


def be_killed_after(seconds: float) -> bool:
    """Have the kernel kill this process then, even if it waits or is stopped; return False if there is no such timer.

    Neither a child nor a program that takes the place of this one inherits the timer.
    """
    libc = ctypes.CDLL(None)
    event, timer = _Event(number=signal.SIGKILL), ctypes.c_void_p()
    seconds = max(0.001, seconds)  # 0 would stop the timer
    moment = (ctypes.c_long * 4)(0, 0, int(seconds), int(seconds % 1 * 1e9))
    if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        return False
    return not libc.timer_settime(timer, 0, moment, None)


def signal_all(uid: int, number: signal.Signals) -> bool:
    """Send a signal to every process of this uid in one step of the kernel, as that uid itself could.

    Return False where no process could be made to send it: then the caller signals the processes one by one.

    It is not enough to look for processes and kill those found: a program that continues in its child and ends the
    parent has always gone by then (seen). kill(-1) holds the kernel's list of processes, and a fork under way gets the
    signal too. The sender has the uid as its effective one only, so that the renter cannot signal the sender first.
    """
    return act_as(uid, lambda: os.kill(-1, number))


def lower_priority(uid: int) -> bool:
    """Give all processes of this uid the lowest priority in one step of the kernel, in the way of `signal_all`.

    Root itself would need a capability for it that a worker does not have.
    """
    return act_as(uid, lambda: os.setpriority(os.PRIO_USER, uid, LOWEST_PRIORITY))


def act_as(uid: int, act: Callable[[], object]) -> bool:
    """Do what this uid may do, in a child that its processes cannot signal; return False if no child could be made."""
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODYS_ID, _NOBODYS_ID, _NOBODYS_ID)
            own = _NOBODYS_ID + os.getpid()  # a different one for each sender, so that none signals another
            os.setresuid(own, uid, own)
            act()
        os._exit(0)
    while os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
        os.kill(child, signal.SIGCONT)  # if anything stopped it, this process must not wait forever
    return True


def signal_process(pid: int, renters: Mapping[int, str], number: signal.Signals) -> None:
    """Signal a process if it belongs to one of these renters (uid: username).

    The descriptor is opened before the last look at the owner, so that another process that got the number is not
    signalled.
    """
    try:
        opened = os.pidfd_open(pid)
    except OSError:
        return
    with closing(opened) as descriptor, suppress(ProcessLookupError):
        theirs = not owners(_status(pid)).isdisjoint(renters)
        if theirs or log_in_name(pid) in renters.values():
            signal.pidfd_send_signal(descriptor, number)


def own_score() -> int:
    return int((PROC / "self" / SCORE).read_text())


def give_score(pid: int, score: int) -> None:
    """Set the score of a process of root. Raise OSError where it has ended, or where the kernel refuses."""
    (PROC / str(pid) / SCORE).write_text(str(score))


def name_of(pid: int) -> str:
    """Return the name of a process, or "gone"."""
    return _read(pid, "comm").strip() or "gone"


def log_in_name(pid: int) -> str | None:
    """Return the renter's name in the title of sshd's process of root, `sshd-session: r-abc [priv]`; None if none."""
    title = _read(pid, "cmdline").rstrip("\0")
    if not title.startswith("sshd-session: ") or owners(_status(pid)) != {0}:
        return None
    return title.removeprefix("sshd-session: ").split(" ")[0].split("@")[0]


def _all() -> list[int]:
    return [int(place.name) for place in PROC.iterdir() if place.name.isdigit()]


def _status(pid: int) -> str:
    return _read(pid, "status")


def _read(pid: int, name: str) -> str:
    """Return the text of a file of a process; empty if the process has ended."""
    try:
        return (PROC / str(pid) / name).read_text(errors="replace")
    except OSError:
        return ""
