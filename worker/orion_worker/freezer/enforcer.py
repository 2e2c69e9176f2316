"""The enforcer, which keeps the processes of a frozen rental stopped, although the renter may wake or replace them."""

from __future__ import annotations

import signal
import time

from orion_worker.freezer import stopper
from orion_worker.freezer.stopper import KernelTask, Key, tasks_of
from orion_worker.system import processes

PATIENCE_S = 1.0
"""Seconds that a process may take to stop: on a busy machine it stops only when its turn comes."""
BETWEEN_PASSES_S = 0.005
FORGIVEN = 1
"""How many times stopped processes may have run before the enforcer kills: a terminal that hangs up wakes once too."""


class Enforcer:
    """The enforcer of one frozen rental; each call of `enforce` finds the processes that ran since the last one."""

    def __init__(self, uid: int, username: str) -> None:
        self._uid = uid
        self._username = username
        self._before: dict[Key, KernelTask] = {}
        self._times_woken = 0

    def enforce(self) -> int:
        """Stop all processes of the rental, or kill all if they resist; return how many were killed."""
        if stopper.any_woken(self._before, tasks_of(self._uid)):
            self._times_woken += 1
        if self._times_woken > FORGIVEN or not self._stop():
            return processes.kill_all({self._uid: self._username}, PATIENCE_S)
        self._before = {task.key: task for task in tasks_of(self._uid)}
        return 0

    def _stop(self) -> bool:
        """Signal the processes until none runs; return False if one resists."""
        renter = {self._uid: self._username}
        if not self._before:
            stopper.stop_parents(self._uid, time.monotonic() + stopper.PARENTS_WITHIN_S)
        first: dict[Key, KernelTask] = {}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            others = [] if processes.signal_all(self._uid, signal.SIGSTOP) else processes.pids_of([self._uid])
            for pid in (*others, *processes.sessions(self._uid, self._username)):
                processes.signal_process(pid, renter, signal.SIGSTOP)
            time.sleep(BETWEEN_PASSES_S)
            now = tasks_of(self._uid)
            if stopper.all_at_rest(now):
                return True
            if time.monotonic() > deadline:
                return not stopper.any_resists(first, now)
            for task in now:
                first.setdefault(task.key, task)
