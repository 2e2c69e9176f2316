"""A guard that ends log-ins that their renter has stopped, because nothing else would.

sshd has two processes for each log-in: one of root, and its child with the renter's uid, which has the connection and
notices its end. If a renter stops the child, root's process waits for it although the client has long gone, and counts
for no limit of the renter's: so renters could take all processes of the container.

Log-ins that are stopped because their rental is frozen, paused for a snapshot or without a lease are left alone: a
pause ends before LOOKS looks are over, and a task that has run between two looks is counted anew.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from orion_worker.freezer.stopper import KernelTask, stopped_among
from orion_worker.rental.commands import Rentals
from orion_worker.system import processes

LOOK_EVERY_S = 5.0
LOOKS = 5
"""Looks at which a log-in has to be stopped without having run: more time than PAUSE_ENDS_S (snapshots/maker.py). They
are counted instead of seconds, because time passes while the whole container is paused."""


class StoppedLogIns:
    """The guard; `say` writes one line to the log."""

    def __init__(self, rentals: Rentals, say: Callable[[str], None]) -> None:
        self._rentals = rentals
        self._say = say
        self._seen: dict[KernelTask, int] = {}
        """How many times in a row each stopped task was seen unchanged."""

    def look(self) -> None:
        """End the log-ins that have been stopped for LOOKS looks, while their rental may run."""
        renters = self._renters()
        found = [(task, name) for task in stopped_among(renters) if (name := processes.log_in_name(task.parent))]
        self._seen = {task: self._seen.get(task, 0) + 1 for task, _ in found}
        for task, name in found:
            if self._seen[task] >= LOOKS:
                renter = {uid: each for uid, each in renters.items() if each == name}
                for pid in (task.parent, task.pid):  # the waiting parent first, so that it does nothing more
                    processes.signal_process(pid, renter, signal.SIGKILL)
                self._say(f"{name} has stopped a log-in of its own: the log-in was ended")

    def _renters(self) -> dict[int, str]:
        """Return the names of the renters that may run here, by uid."""
        freezer = self._rentals.freezer
        living = self._rentals.records.all() if freezer.has_lease else []
        return {record.uid: record.username for record in living if not freezer.is_frozen(record.rental_id)}
