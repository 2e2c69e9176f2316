"""The fence: it freezes all rentals as soon as this worker has no right to run them, whatever else the agent does.

Its own thread makes no call and looks up no name, so nothing that the agent waits for delays it. It looks at the lease
every LOOK_EVERY_S, and so at once when the container, or the agent alone, wakes from a pause: CLOCK_BOOTTIME counts
that time. It never thaws: only a reply that says `run` does.

When the lease is lost, the fence first stops all processes of all renters, which needs no disk, and locks the keys;
then it notes that there is no lease, which `unlock` and `thaw` look at last; then it writes the marks. After that it
repeats the freezing every AGAIN_EVERY_S as long as a mark exists, for processes that came in meanwhile.

A rental that was never activated at its epoch is not frozen, because no reply would ever thaw it. Its uid runs a
transfer of its files, which would hold the rental's lock while it is stopped, or what is left of an earlier epoch; so
the fence ends that, and the manager begins a transfer again. It also ends the processes of a retired rental.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial

from orion_worker.freezer.enforcer import Enforcer
from orion_worker.freezer.marks import FENCE_WAITS_S
from orion_worker.freezer.stopper import PARENTS_WITHIN_S, stop_parents
from orion_worker.records import RentalRecord
from orion_worker.rental.commands import Rentals
from orion_worker.system import processes
from orion_worker.system.processes import FIRST_UID

LOOK_EVERY_S = 0.1
AGAIN_EVERY_S = 0.2


class Fence:
    """The fence. `may_run` returns whether rentals may run here now; `say` writes one line to the log."""

    def __init__(self, rentals: Rentals, may_run: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._rentals = rentals
        self._freezer = rentals.freezer
        self._may_run = may_run
        self._say = say
        self._looking = threading.Lock()
        self._has_lease = False
        self._stopped_before: dict[int, frozenset[tuple[int, int]]] | None = None
        """(pid, start) of processes that were stopped before the lease was lost, by uid; None: it is not lost."""
        self._enforcers: dict[tuple[str, int], Enforcer] = {}
        self._repeat_at = 0.0

    def begin(self) -> None:
        """Remove all marks at the start of the container, before any rental can be activated."""
        self._freezer.begin()
        self._rentals.discard_staging()

    def lease_renewed(self) -> None:
        """Note that there is a lease, if that is still true: a reply may be from before a sleep of the machine."""
        with self._looking:
            if self._may_run() and not self._has_lease:
                if self._stopped_before is not None:
                    self._mark()  # rentals that could not be marked then: nothing would wake their processes
                self._freezer.set_lease(True)
                self._has_lease, self._stopped_before = True, None

    def look(self) -> None:
        """Freeze all rentals if there is no right to run, and repeat earlier freezes when that is due."""
        with self._looking:
            if self._has_lease and not self._may_run():
                self._freeze_all()
            if time.monotonic() >= self._repeat_at:
                self._repeat_at = time.monotonic() + AGAIN_EVERY_S
                self._repeat_freezes()

    def _freeze_all(self) -> None:
        self._stopped_before = self._stopped_before or {}
        deadline = time.monotonic() + PARENTS_WITHIN_S
        with self._freezer.locked(FENCE_WAITS_S):
            for uid in processes.uids_from(FIRST_UID):
                self._stopped_before.setdefault(uid, self._freezer.stopped_before(uid))
                stop_parents(uid, deadline)
                processes.signal_all(uid, signal.SIGSTOP)
            self._lock_all()  # a rename succeeds on a full disk, where nothing below does
            self._freezer.set_lease(False)
            self._has_lease = False
            marked = self._mark()
        self._repeat_at = 0.0
        self._say(f"no right to run: {marked} rentals frozen")

    def _lock_all(self) -> list[RentalRecord]:
        living = self._rentals.records.all()
        for record in living:
            self._rentals.lock_at_once(record)
        return living

    def _mark(self) -> int:
        marked = 0
        for record in self._lock_all():
            if record.activated and not record.retired:
                marked += self._freezer.mark(record, (self._stopped_before or {}).get(record.uid, frozenset()))
            else:  # an activation after this look finds that there is no lease
                processes.signal_all(record.uid, signal.SIGKILL)
        return marked

    def _repeat_freezes(self) -> None:
        if self._stopped_before is not None:
            for uid in processes.uids_from(FIRST_UID):
                processes.signal_all(uid, signal.SIGSTOP)
            self._mark()
        for rental_id in self._freezer.overdue(time.clock_gettime(time.CLOCK_BOOTTIME)):
            self._freezer.resume(rental_id)
            self._say(f"rental {rental_id} was paused for a snapshot that did not end; it runs on")
        frozen = self._freezer.frozen()
        living = {record.rental_id: record for record in self._rentals.records.all()} if frozen else {}
        enforcers: dict[tuple[str, int], Enforcer] = {}
        for rental_id in frozen:
            record = living.get(rental_id)
            if record is None or record.retired:
                self._freezer.forget(rental_id)  # it was purged or retired meanwhile
                continue
            key = (rental_id, record.uid)
            enforcers[key] = self._enforcers.get(key) or Enforcer(record.uid, record.username)
            killed = self._freezer.refreeze(rental_id, enforcers[key], partial(self._rentals.lock_at_once, record))
            if killed:
                self._say(f"rental {rental_id} resisted being frozen: {killed} of its processes were ended")
        self._enforcers = enforcers
