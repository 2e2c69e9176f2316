"""Copying aside what a worker that came back still has of a placement that was lost, before it is purged there.

Only where the database says that the rental was placed on that worker, at the epoch that it had there, and only as a
copy of that epoch, whatever the worker says. The note of the copy and that nothing more is to be salvaged are one
transaction: killed before it, all is begun again, and a home that has not changed makes no second copy. Only a few
salvages are kept, but what the rental is to begin with again stays: it may be one of them, and older than all others.
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
from orion.manager.snapshots.port import (
    NOTHING_TO_RECOVER,
    OVER_LIMIT,
    RECOVER_DEADLINE_S,
    Home,
    SnapshotError,
    SnapshotService,
)
from orion.manager.ssh.port import Host
from orion.manager.store.snapshots import SnapshotCatalog

AT_ONCE = 16
"""Salvages of all owners; one owner has half of them at most."""
LONGEST_TRY_S = RECOVER_DEADLINE_S + 5.0
"""With the time that it waits for its turn."""
FOR_GOOD = frozenset((OVER_LIMIT, "unreadable_home", "no_home", "purged", "stale_epoch", "unknown_rental", "conflict"))
"""Another try would find the same."""
TRIES = "tries"
"""In the report of a failure: how many it counts for."""


class Recoverer:
    def __init__(self, snapshot_service: SnapshotService, catalog: SnapshotCatalog, limits: SnapshotLimits) -> None:
        self._vault = snapshot_service
        self._book = catalog
        self._limits = limits
        self._shares = FairQueue(AT_ONCE)

    async def salvage(self, host: Host, item: Item, placement_id: str, owner: str) -> Outcome:
        home = Home(item.rental_id, item.uid, item.epoch, host, owner)
        try:
            async with asyncio.timeout(LONGEST_TRY_S), self._shares.place(Claim(owner)):
                found = await self._book.to_recover(placement_id)
                if found is None:
                    return Outcome(ok=True)  # somebody else has acted
                rental, placement = found
                copied = await self._vault.salvage(home, self._limits, protected=await self._needed(rental))
        except TimeoutError:
            return Outcome(ok=False, message=f"it was not copied within {LONGEST_TRY_S:.0f} s")
        except SnapshotError as error:
            if error.code == NOTHING_TO_RECOVER:
                await self._book.record(snapshots.not_recovered(rental, placement, ""))
                return Outcome(ok=True)
            tries = RECOVERY_ATTEMPTS if error.code in FOR_GOOD else 1
            return Outcome(ok=False, message=str(error), report={TRIES: tries})
        await self._book.accept(
            snapshots.recovered(rental, placement, copied.copy, copied.kept), rental.id, copied.kept
        )
        return Outcome(ok=True)

    async def _needed(self, rental: Rental) -> SnapshotId | None:
        """With which it begins again."""
        newest = await self._book.newest(rental.id)
        return SnapshotId.parse(rental.restore_from or "") or (newest.generation if newest else None)
