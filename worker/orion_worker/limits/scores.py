"""Scores that make the kernel end the rental that uses the most memory first, when the container's memory is used up.

The kernel ends one process after the other, each time the one whose memory and score (oom_score_adj, in thousandths of
the limit) are the largest together. Without scores, a rental of many small processes outlives another that has one
larger process. So the score follows the rental: while more than half of the memory is used, all processes of the rental
that uses the most have FIRST, which exceeds the others' score by more than any other rental can weigh.

No rental has a limit of memory: that would need a control group for each, and Docker mounts them read-only into a
container (freezer/stopper.py). Memory that several processes share counts for each of them, and memory that none has
mapped (memfd_create, /dev/shm) for none.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from orion_worker.system import cgroup, processes
from orion_worker.system.files import closing

FIRST = 1000
"""The score of the processes that the kernel is to end first; the highest that there is."""
ABOVE_ROOT = 500
"""The difference between the agent's score and that of sshd, and so of each session."""
LOOK_EVERY_S = 0.25
"""Seconds between two looks at the memory."""
SHORT = 0.5
"""The share of the limit beyond which scores are given. A renter can fill the rest in some tenths of a second."""
MEMORY = ("RssAnon", "RssShmem", "VmSwap")
"""The lines of /proc/PID/status whose sum is the memory of a process."""


class OomScores:
    """The guard that gives the scores; `usual`: the score of renters' processes that are not to be ended first."""

    def __init__(self, usual: int, read: cgroup.Read = cgroup.read_file, proc: Path = processes.PROC) -> None:
        self._usual = usual
        self._read = read
        self._proc = proc
        self._given = False

    def look(self) -> None:
        """Give the scores anew while memory is short, and once more when it no longer is."""
        short = is_short(cgroup.usage(self._read))
        if short or self._given:
            self._give(largest(self._proc) if short else None)
        self._given = short

    def _give(self, first: int | None) -> None:
        for folder, uid, _ in of_renters(self._proc):
            with suppress(OSError):  # it has ended meanwhile
                _write(folder, FIRST if uid == first else self._usual)


def usual(of_root: int) -> int:
    """Return the score of renters' processes, and of sshd from which they descend, where the agent has `of_root`."""
    return min(of_root + ABOVE_ROOT, FIRST)


def is_short(use: cgroup.CgroupUsage) -> bool:
    """Return whether more than SHORT of the limit is used. Without a limit, scores would count for the machine."""
    return use.memory_used_bytes > use.memory_limit_bytes * SHORT > 0


def largest(proc: Path) -> int | None:
    """Return the uid of the rental that uses the most memory; None if no renter has a process."""
    used: Counter[int] = Counter()
    for _, uid, size in of_renters(proc):
        used[uid] += size
    return max(used, key=lambda uid: (used[uid], uid), default=None)


def of_renters(proc: Path) -> Iterator[tuple[int, int, int]]:
    """Give folder, uid and bytes of each renter's process. The folder is open, so that it stays that process's."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    for place in proc.iterdir():
        if place.name.isdigit():
            with suppress(OSError), closing(os.open(place, flags)) as folder:
                found = renter_memory_of(_read(folder))
                if found:
                    yield folder, *found


def renter_memory_of(status: str) -> tuple[int, int] | None:
    """Return uid and bytes of a renter's process by the text of /proc/PID/status; None if it is not a renter's.

    The real uid counts: a program of root's that acts as a renter has that uid as its effective one only.
    """
    fields = processes.fields_of(status)
    uid = int(fields.get("Uid", "0").split()[0])
    if not processes.is_renter(uid):
        return None
    return uid, sum(int(fields[name].split()[0]) for name in MEMORY if name in fields) << 10


def _read(folder: int) -> str:
    status = os.open("status", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(status, errors="replace") as stream:
        return stream.read()


def _write(folder: int, score: int) -> None:
    flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with closing(os.open(processes.SCORE, flags, dir_fd=folder)) as file:
        os.write(file, str(score).encode())
