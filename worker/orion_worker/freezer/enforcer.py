"""Enforcer"""

from __future__ import annotations

import signal
import time

from orion_worker.freezer.stopper import PARENTS_WITHIN_S, Key, Task, restless, still, stop_parents, tasks_of, woken
from orion_worker.system import processes

PATIENCE_S = 1.0
"""How long a process may take to stop. On a busy machine it gets no turn to do so; who gets one and goes on, fights."""
BETWEEN_PASSES_S = 0.005
FORGIVEN = 1
"""Times that something may have woken while all was still."""


class Vigil:
    """Over one rental's processes: `hold` stops them, and every call after that finds who was awake meanwhile."""

    def __init__(self, uid: int, username: str) -> None:
        self._uid = uid
        self._username = username
        self._before: dict[Key, Task] = {}
        self._wakings = 0

    def hold(self) -> int:
        """When it returns all stand still, or have been killed for fighting: how many were is returned."""
        if woken(self._before, tasks_of(self._uid)):
            self._wakings += 1
        fights = self._wakings > FORGIVEN or not self._stop()
        if fights:
            return processes.end({self._uid: self._username}, PATIENCE_S)
        self._before = {task.key: task for task in tasks_of(self._uid)}
        return 0

    def _stop(self) -> bool:
        """Passes until one finds nobody at work. False if somebody fights it."""
        renter = {self._uid: self._username}
        if not self._before:
            stop_parents(self._uid, time.monotonic() + PARENTS_WITHIN_S)
        first: dict[Key, Task] = {}
        last_moment = time.monotonic() + PATIENCE_S
        while True:
            reached = processes.strike(self._uid, signal.SIGSTOP)
            others = [] if reached else processes.of([self._uid])
            for pid in (*others, *processes.sessions(self._uid, self._username)):
                processes.send(pid, renter, signal.SIGSTOP)
            time.sleep(BETWEEN_PASSES_S)
            now = tasks_of(self._uid)
            if still(now):
                return True
            if time.monotonic() > last_moment:
                return not restless(first, now)
            for task in now:
                first.setdefault(task.key, task)
