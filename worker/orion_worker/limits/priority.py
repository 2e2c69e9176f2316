"""A guard that gives the lowest priority to a renter with many processes that all want a processor.

The kernel shares a worker's processors among processes, not among rentals, and root's orders over SSH get the same part
as each of them. So where one renter with 112 processes lets them fork without end, an order of root's takes ten seconds
instead of one (seen), and with 448 it does not end within thirty. A control group for each rental is not available
(limits/scores.py); but one step of the kernel gives all processes of a uid the lowest priority, for good, and their
children with them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orion_worker.system import processes

LOOK_EVERY_S = 1.0
CROWD = 16
"""Tasks that want a processor at once, beyond which a renter gets the lowest priority."""


def lower_crowds(lower: Callable[[int], object] = processes.lower_priority, proc: Path = processes.PROC) -> None:
    """Lower the priority of each renter that has a crowd now."""
    for uid, count in tasks_waiting(proc).items():
        if count > CROWD:
            lower(uid)


def tasks_waiting(proc: Path) -> Counter[int]:
    """Return how many tasks of each renter want a processor, by uid, for renters that have enough tasks for a crowd."""
    tasks: Counter[int] = Counter()
    found: list[tuple[int, Path]] = []
    for place in proc.iterdir():
        if place.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                uid, threads = uid_and_threads_of((place / "status").read_text(errors="replace"))
                if processes.is_renter(uid):
                    found.append((uid, place))
                    tasks[uid] += threads
    waiting: Counter[int] = Counter()
    for uid, place in found:
        if tasks[uid] > CROWD:
            waiting[uid] += _running(place)
    return waiting


def uid_and_threads_of(status: str) -> tuple[int, int]:
    """Return the real uid and the number of tasks in the text of /proc/PID/status; 0 for each that is not there."""
    fields = processes.fields_of(status)
    return int(fields.get("Uid", "0").split()[0]), int(fields.get("Threads", 0))


def _running(process: Path) -> int:
    """Return how many tasks of a process run or wait for a processor."""
    running = 0
    with suppress(OSError):  # it has ended meanwhile
        for task in os.listdir(process / "task"):  # noqa: PTH208 - only the names are used
            with suppress(OSError):
                state = (process / "task" / task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                running += state == "R"
    return running
