"""Whose processes the kernel ends first when the container's memory is used up: those of the rental that uses the most.

The kernel ends one process after the other, each time the one that is largest by its memory and its score
(oom_score_adj, in thousandths of the limit). By that alone a rental of many small processes outlives a neighbour with
one that is larger. So the score follows the rental: while more than half of the memory is used, all processes of the
rental that uses the most have FIRST, whose difference to the others' is more than any other rental can weigh.

No limit of memory for each rental stands behind this: that would be a control group for each, and Docker mounts them
read-only into a container (stillness.py). A rental alone on its worker has one, the container's.

What a process holds is what /proc/PID/status tells to everybody. Memory that several processes share counts for each of
them, and memory that none has mapped (memfd_create, /dev/shm) for nobody.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orion_worker.system import cgroup, processes
from orion_worker.system.processes import FIRST_UID

FIRST = 1000
ABOVE_ROOT = 500
"""So much more than the agent's is the score with which sshd, and so each session, begins."""
LOOK_EVERY_S = 0.25
SHORT = 0.5
"""The share of the memory's limit beyond which scores are given. The rest can be filled in some tenths of a second."""
HELD = ("RssAnon", "RssShmem", "VmSwap")


class OomScores:
    """`usual`: the score of all renters' processes that are not to be ended first."""

    def __init__(
        self,
        usual: int,
        say: Callable[[str], None],
        read: cgroup.Read = cgroup.read_file,
        proc: Path = processes.PROC,
    ) -> None:
        self._usual = usual
        self._say = say
        self._read = read
        self._proc = proc
        self._given = False

    def look(self) -> None:
        """Give the scores anew while memory is short, and once more when it is not any more."""
        short = is_short(cgroup.usage(self._read))
        if short or self._given:
            self._give(largest(self._proc) if short else None)
        self._given = short

    def run(self) -> None:
        """For ever."""
        while True:
            try:
                self.look()
            except Exception as fault:
                self._say(f"the scores for when memory is used up: {fault!r}; looking again")
            time.sleep(LOOK_EVERY_S)

    def _give(self, first: int | None) -> None:
        for folder, uid, _ in of_renters(self._proc):
            with suppress(OSError):  # it has ended meanwhile
                _write(folder, FIRST if uid == first else self._usual)


def usual(of_root: int) -> int:
    """Return the score of renters' processes, and of what may become one, where the agent has `of_root`."""
    return min(of_root + ABOVE_ROOT, FIRST)


def is_short(use: cgroup.CgroupUsage) -> bool:
    """Return whether so much memory is used that scores count. Without a limit they would count for the machine."""
    return use.memory_used_bytes > use.memory_limit_bytes * SHORT > 0


def largest(proc: Path) -> int | None:
    """Return the uid of the rental that uses the most memory; None where nobody has a process."""
    used: Counter[int] = Counter()
    for _, uid, held in of_renters(proc):
        used[uid] += held
    return max(used, key=lambda uid: (used[uid], uid), default=None)


def of_renters(proc: Path) -> Iterator[tuple[int, int, int]]:
    """Give each renter's process: its folder, open so that no other process can take its place, uid and bytes."""
    for place in proc.iterdir():
        if not place.name.isdigit():
            continue
        with suppress(OSError), _opened(place) as folder:
            found = renter_memory_of(_read(folder))
            if found:
                yield folder, *found


def renter_memory_of(status: str) -> tuple[int, int] | None:
    """Return uid and bytes of a renter's process by the text of /proc/PID/status; None for anybody else's.

    By the real uid: a program of root's that looks as a renter has that as its effective one.
    """
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    uid = int(fields.get("Uid", "0").split()[0])
    if not FIRST_UID <= uid < processes.FIRST_SENDER:
        return None
    return uid, sum(int(fields[name].split()[0]) for name in HELD if name in fields) << 10


@contextmanager
def _opened(place: Path) -> Iterator[int]:
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


def _read(folder: int) -> str:
    status = os.open("status", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(status, errors="replace") as stream:
        return stream.read()


def _write(folder: int, score: int) -> None:
    flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    place = os.open(processes.SCORE, flags, dir_fd=folder)
    try:
        os.write(place, str(score).encode())
    finally:
        os.close(place)
