"""Enforcer"""

from __future__ import annotations

import signal
import time

from orion_worker.freezer.stopper import (
    PARENTS_WITHIN_S,
    KernelTask,
    Key,
    all_at_rest,
    any_resists,
    any_woken,
    stop_parents,
    tasks_of,
)
from orion_worker.system import processes

PATIENCE_S = 1.0
"""How long a process may take to stop. On a busy machine it gets no turn to do so; who gets one and goes on, fights."""
BETWEEN_PASSES_S = 0.005
FORGIVEN = 1
"""Times that something may have woken while all was still."""


class Enforcer:
    """Over one rental's processes: `hold` stops them, and every call after that finds who was awake meanwhile."""

    def __init__(self, uid: int, username: str) -> None:
        self._uid = uid
        self._username = username
        self._before: dict[Key, KernelTask] = {}
        self._times_woken = 0

    def enforce(self) -> int:
        """When it returns all stand still, or have been killed for fighting: how many were is returned."""
        if any_woken(self._before, tasks_of(self._uid)):
            self._times_woken += 1
        fights = self._times_woken > FORGIVEN or not self._stop()
        if fights:
            return processes.kill_all({self._uid: self._username}, PATIENCE_S)
        self._before = {task.key: task for task in tasks_of(self._uid)}
        return 0

    def _stop(self) -> bool:
        """Passes until one finds nobody at work. False if somebody fights it."""
        renter = {self._uid: self._username}
        if not self._before:
            stop_parents(self._uid, time.monotonic() + PARENTS_WITHIN_S)
        first: dict[Key, KernelTask] = {}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            reached = processes.signal_all(self._uid, signal.SIGSTOP)
            others = [] if reached else processes.pids_of([self._uid])
            for pid in (*others, *processes.sessions(self._uid, self._username)):
                processes.signal_process(pid, renter, signal.SIGSTOP)
            time.sleep(BETWEEN_PASSES_S)
            now = tasks_of(self._uid)
            if all_at_rest(now):
                return True
            if time.monotonic() > deadline:
                return not any_resists(first, now)
            for task in now:
                first.setdefault(task.key, task)
