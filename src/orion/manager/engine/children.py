"""One forked child per job: started, read, and killed with everything that it started.

The parent must have one thread only, or a fork could copy a lock that is held.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Work = Callable[[], bytes]


@dataclass(frozen=True)
class Child:
    pid: int
    pipe: int
    """Reads, without blocking, what the work returned."""


def start(work: Work) -> Child:
    """Run `work` in a child of its own session; what it returns comes through the pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run(work, writing)
    os.close(writing)
    os.set_blocking(reading, False)
    return Child(pid, reading)


def kill(pid: int) -> None:
    """Kill the child and all its descendants.

    Its process group is not enough: Ansible gives each of its own workers a new session. Everybody is stopped
    first, in passes until a pass finds nobody new, so that nobody can fork out of reach meanwhile. An SSH master
    that already went to the background belongs to nobody and stays, for the next job to use.
    """
    stopped: set[int] = set()
    while found := _family(pid) - stopped:
        for member in found:
            _signal(member, signal.SIGSTOP)
        stopped |= found
    for member in stopped:
        _signal(member, signal.SIGKILL)


def _run(work: Work, writing: int) -> None:
    """In the child. Never returns: the code above belongs to the parent."""
    status = 1
    try:
        os.setsid()
        _quiet_signals()
        _only_keep(writing)
        _write_all(writing, work())
        status = 0
    except BaseException:  # nothing may climb into the parent's code
        _write_all(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _quiet_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def _only_keep(writing: int) -> None:
    """Close the parent's sockets and pipes, and silence stdin and stdout; stderr stays for tracebacks."""
    gc.freeze()
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(silence, number)
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        if int(entry) not in (0, 1, 2, writing):
            with suppress(OSError):
                os.close(int(entry))
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _family(pid: int) -> set[int]:
    """The process and its descendants that live."""
    parents = {int(entry.name): _parent(entry) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
    family = {pid} & parents.keys()
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _parent(entry: Path) -> int:
    try:
        # The second field is the program's name in brackets, and may itself hold spaces and brackets.
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
