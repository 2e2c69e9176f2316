"""The fence: what runs here stands still as soon as this worker has no right to run it, whatever else goes on.

It has a thread of its own, which asks nobody and looks up no name, so nothing that the agent waits for delays it. It
looks at the lease every LOOK_EVERY_S, and so at once when the container, or the agent alone, wakes from a pause: the
sleep is over by then, and CLOCK_BOOTTIME has gone on. It never thaws: that takes a reply that says `run`.

The order on the way down: first everything of every renter is stopped, which needs no disk; then it is written down
that there is no lease, which `unlock` and `thaw` look at last; then the keys go and the marks are made; then come the
passes, for who came in meanwhile, and again every AGAIN_EVERY_S as long as a mark stands.

A rental that nobody was let into yet is not frozen: no reply would ever thaw it. What runs under its uid is a transfer
of its files, which would hold the rental's lock for as long as it stands; so that is ended, and begun again by the
manager. (Or it is left of an earlier epoch, and must not run any more at all.) Nor is one that is laid down to be
salvaged: what runs of it is ended, as by the salvage itself.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from orion_worker.freezer.enforcer import Vigil
from orion_worker.freezer.marks import FENCE_WAITS_S
from orion_worker.freezer.stopper import PARENTS_WITHIN_S, stop_parents
from orion_worker.records import Record
from orion_worker.rental.commands import Rentals
from orion_worker.system import processes
from orion_worker.system.processes import FIRST_UID

LOOK_EVERY_S = 0.1
AGAIN_EVERY_S = 0.2


class Fence:
    """`may_run`: whether this worker may run rentals now, by its own clock."""

    def __init__(self, rentals: Rentals, may_run: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._rentals = rentals
        self._freezer = rentals.freezer
        self._may_run = may_run
        self._say = say
        self._looking = threading.Lock()
        self._has_lease = False
        self._stay: dict[int, frozenset[tuple[int, int]]] | None = None
        """What was stopped already when the lease was lost, by uid; None: nothing was lost since it was last held."""
        self._vigils: dict[tuple[str, int], Vigil] = {}
        self._again_at = 0.0

    def begin(self) -> None:
        """At the start of the container, before anybody can be let in."""
        self._freezer.begin()
        self._rentals.begin()

    def renewed(self) -> None:
        """Rentals may be let in again, if it is still true: a reply may be from before a sleep."""
        with self._looking:
            if self._may_run() and not self._has_lease:
                if self._stay is not None:
                    self._mark()  # whatever could not be marked then: else its processes would be forgotten
                self._freezer.set_lease(True)
                self._has_lease, self._stay = True, None

    def look(self) -> None:
        """Freeze if there is no right to run, and hold what is frozen."""
        with self._looking:
            if self._has_lease and not self._may_run():
                self._fall()
            if time.monotonic() >= self._again_at:
                self._again_at = time.monotonic() + AGAIN_EVERY_S
                self._again()

    def run(self) -> None:
        """For ever."""
        while True:
            try:
                self.look()
            except Exception as fault:
                # A full disk, a file that nobody thought of: the next look does what this one could not.
                self._say(f"the fence: {fault!r}; looking again")
            time.sleep(LOOK_EVERY_S)

    def _fall(self) -> None:
        self._stay = self._stay or {}
        last_moment = time.monotonic() + PARENTS_WITHIN_S
        with self._freezer.locked(FENCE_WAITS_S):
            for uid in processes.uids_from(FIRST_UID):
                self._stay.setdefault(uid, self._freezer.stopped_before(uid))
                stop_parents(uid, last_moment)
                processes.strike(uid, signal.SIGSTOP)
            self._shut()  # a rename succeeds on a full disk, where nothing below does
            self._freezer.set_lease(False)
            self._has_lease = False
            marked = self._mark()
        self._again_at = 0.0
        self._say(f"no right to run: {marked} rentals frozen")

    def _shut(self) -> list[Record]:
        living = self._rentals.ledger.all_living()
        for record in living:
            self._rentals.shut(record)
        return living

    def _mark(self) -> int:
        marked = 0
        for record in self._shut():
            if record.let_in and not record.laid_down:
                marked += self._freezer.mark(record, (self._stay or {}).get(record.uid, frozenset()))
            else:  # whoever lets it in after this look finds that there is no lease
                processes.strike(record.uid, signal.SIGKILL)
        return marked

    def _again(self) -> None:
        if self._stay is not None:
            for uid in processes.uids_from(FIRST_UID):
                processes.strike(uid, signal.SIGSTOP)
            self._mark()
        for rental_id in self._freezer.overdue(time.clock_gettime(time.CLOCK_BOOTTIME)):
            self._freezer.resume(rental_id)
            self._say(f"rental {rental_id} was paused for a snapshot that did not end; it goes on")
        frozen = self._freezer.frozen()
        living = {record.rental_id: record for record in self._rentals.ledger.all_living()} if frozen else {}
        held: dict[tuple[str, int], Vigil] = {}
        for rental_id in frozen:
            record = living.get(rental_id)
            if record is None or record.laid_down:
                self._freezer.forget(rental_id)  # it was purged or laid down meanwhile
                continue
            key = (rental_id, record.uid)
            held[key] = self._vigils.get(key) or Vigil(record.uid, record.username)
            self._hold(record, held[key])
        self._vigils = held

    def _hold(self, record: Record, vigil: Vigil) -> None:
        killed = self._freezer.again(record.rental_id, vigil, lambda: self._rentals.shut(record))
        if killed:
            self._say(f"rental {record.rental_id} fought being frozen: {killed} of its processes were ended")
