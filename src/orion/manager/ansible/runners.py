"""Runners: forked processes with Ansible loaded, which play one batch after the other.

The parent must have one thread only, because a fork could copy a locked lock. It reaps the processes that its runners
leave behind (`become_subreaper`), so that none of them outlives its run unnoticed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from orion.manager.ansible.protocol import BatchMessage, ResultMessage
from orion.manager.channel import BlockingChannel, decode_as

PR_SET_CHILD_SUBREAPER = 36

ReportResult = Callable[[ResultMessage], None]
Play = Callable[[BatchMessage, ReportResult], None]
"""A function that plays one batch in a runner, and reports each result as soon as it is known."""


def become_subreaper() -> None:
    """Make this process the parent of all orphans among its descendants (see prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this process cannot become a subreaper")


def start(play: Play) -> tuple[int, socket.socket]:
    """Start a runner in a session of its own; return its pid and the socket for batches and results."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _run(play, theirs)
    theirs.close()
    ours.setblocking(False)
    return pid, ours


def kill_strays(known: Collection[int]) -> None:
    """Kill the children of this process that are not in `known`: orphans of runners that died."""
    me = os.getpid()
    children = {int(child) for child in Path(f"/proc/{me}/task/{me}/children").read_text().split()}
    for pid in children - set(known):
        kill(pid)


def kill(pid: int) -> None:
    """Kill the child and all its descendants.

    Killing its process group is not enough, because Ansible starts its workers in new sessions. All processes are first
    stopped, in passes until a pass finds no new one, so that none can fork meanwhile.
    """
    stopped: set[int] = set()
    while found := _family(pid) - stopped:
        for member in found:
            _send_signal(member, signal.SIGSTOP)
        stopped |= found
    for member in stopped:
        _send_signal(member, signal.SIGKILL)


def _run(play: Play, connection: socket.socket) -> None:
    """Play batches until the other end closes, and never return."""
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        _close_all_but(connection.fileno())
        channel = BlockingChannel(connection, max_line_bytes=None)
        while (line := channel.receive()) is not None:
            play(decode_as(BatchMessage, line), channel.send)
            channel.send(ResultMessage(finished=True))
        status = 0
    except BaseException:  # no exception may reach the parent's code
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _close_all_but(descriptor: int) -> None:
    """Close all descriptors except this one and stderr, and connect stdin and stdout to /dev/null."""
    gc.freeze()
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(silence, number)
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - only names are needed
        if int(entry) not in (0, 1, 2, descriptor):
            with suppress(OSError):
                os.close(int(entry))
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115


def _family(pid: int) -> set[int]:
    """Return the process and its descendants that are alive."""
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


def _send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
