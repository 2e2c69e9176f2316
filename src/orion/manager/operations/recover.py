"""Recovered snapshots: the files of a lost placement are copied when its worker is back, before they are purged there.

A home is copied only if the database, and not only the worker, says that the rental was placed there at that epoch. One
transaction records the snapshot and that nothing is left to recover. After a kill before it the home is copied again,
and an unchanged home makes no second snapshot. The snapshot that the rental is to be restored from is never removed to
make room. On the wire and in the database the word for this is `salvage`.
"""

from __future__ import annotations

import asyncio

from orion.manager.ansible.port import Outcome
from orion.manager.domain import snapshots
from orion.manager.domain.fair_share import Claim
from orion.manager.domain.model import Item, Rental
from orion.manager.domain.outcomes import RECOVERY_ATTEMPTS
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import SnapshotId
from orion.manager.queues import FairQueue
from orion.manager.snapshots import port
from orion.manager.snapshots.port import Home, SnapshotError, SnapshotService
from orion.manager.ssh.port import Host
from orion.manager.store.snapshots import SnapshotCatalog

AT_ONCE = 16
"""Homes that are copied at a time, on all workers; one owner has at most half of them."""
LONGEST_TRY_S = port.RECOVER_DEADLINE_S + 5.0
"""Seconds, the wait for its turn included."""
FOR_GOOD = frozenset(
    (port.OVER_LIMIT, "unreadable_home", "no_home", "purged", "stale_epoch", "unknown_rental", "conflict")
)
"""Codes of errors that another try would meet again."""
TRIES = "tries"
"""The key in the report of a failure for the number of attempts that it counts for."""


class Recoverer:
    def __init__(self, snapshot_service: SnapshotService, catalog: SnapshotCatalog, limits: SnapshotLimits) -> None:
        self._snapshot_service = snapshot_service
        self._catalog = catalog
        self._limits = limits
        self._shares = FairQueue(AT_ONCE)

    async def recover(self, host: Host, item: Item, placement_id: str, owner: str) -> Outcome:
        """Take a recovered snapshot of this lost placement, and have the database accept it."""
        home = Home(rental_id=item.rental_id, uid=item.uid, epoch=item.epoch, host=host, owner=owner)
        try:
            async with asyncio.timeout(LONGEST_TRY_S), self._shares.place(Claim(owner)):
                found = await self._catalog.to_recover(placement_id)
                if found is None:
                    return Outcome(ok=True)  # another transaction has settled it
                rental, placement = found
                taken = await self._snapshot_service.recover(home, self._limits, protected=await self._needed(rental))
        except TimeoutError:
            return Outcome(ok=False, message=f"it was not copied within {LONGEST_TRY_S:.0f} s")
        except SnapshotError as error:
            if error.code == port.NOTHING_TO_RECOVER:
                await self._catalog.record(snapshots.not_recovered(rental, placement, ""))
                return Outcome(ok=True)
            tries = RECOVERY_ATTEMPTS if error.code in FOR_GOOD else 1
            return Outcome(ok=False, message=str(error), report={TRIES: tries})
        step = snapshots.recovered(rental, placement, taken.snapshot, taken.kept)
        await self._catalog.accept(step, rental.id, taken.kept)
        return Outcome(ok=True)

    async def _needed(self, rental: Rental) -> SnapshotId | None:
        """Return the snapshot that the rental is to be restored from, if there is one."""
        newest = await self._catalog.newest(rental.id)
        return SnapshotId.parse(rental.restore_from or "") or (newest.id if newest else None)
