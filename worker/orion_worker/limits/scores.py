"""Scores that make the kernel end the rental that uses the most memory first, when the container's memory is used up.

The kernel ends one process after the other, each time the one whose memory and score (oom_score_adj, in thousandths of
the limit) are the largest together. Without scores, a rental of many small processes outlives another that has one
larger process. So the score follows the rental: while more than half of the memory is used, all processes of the rental
that uses the most have FIRST, which is higher than the others' score by more than any other rental can weigh.

There is no limit of memory for each rental: that would need a control group for each, and Docker mounts them read-only
into a container (freezer/stopper.py). The only limit is that of the container.

What a process uses is in /proc/PID/status, which everybody may read. Memory that several processes share counts for
each of them, and memory that none has mapped (memfd_create, /dev/shm) for none.
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
"""The score of the processes that the kernel is to end first; the highest that there is."""
ABOVE_ROOT = 500
"""The difference between the agent's score and that of sshd, and so of each session."""
LOOK_EVERY_S = 0.25
"""Seconds between two looks at the memory."""
SHORT = 0.5
"""The share of the memory's limit beyond which scores are given. The rest can be filled in some tenths of a second."""
HELD = ("RssAnon", "RssShmem", "VmSwap")
"""The lines of /proc/PID/status whose sum is the memory of a process."""


class OomScores:
    """`usual` is the score of all renters' processes that are not to be ended first; `say` writes one line to the
    log."""

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
        """Give the scores anew while memory is short, and once more when it no longer is."""
        short = is_short(cgroup.usage(self._read))
        if short or self._given:
            self._give(largest(self._proc) if short else None)
        self._given = short

    def run(self) -> None:
        """Look forever."""
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
    """Return the score of renters' processes, and of sshd from which they descend, where the agent has `of_root`."""
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
    """Give each renter's process: its folder, opened so that no other process can take its place, its uid and its
    bytes."""
    for place in proc.iterdir():
        if not place.name.isdigit():
            continue
        with suppress(OSError), _opened(place) as folder:
            found = renter_memory_of(_read(folder))
            if found:
                yield folder, *found


def renter_memory_of(status: str) -> tuple[int, int] | None:
    """Return uid and bytes of a renter's process by the text of /proc/PID/status; None for a process of anybody else.

    The real uid counts: a program of root's that acts as a renter has that uid as its effective one only.
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
