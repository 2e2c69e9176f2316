"""The thaw of a rental that its worker has frozen because its home holds more than it may.

The worker freezes such a rental by itself when it counts the files for a snapshot, and keeps it frozen whatever a
heartbeat's reply says. A thaw gives its owner some minutes to make room, and may be repeated.
"""

from __future__ import annotations

from orion.manager.ansible.port import Action, Engine, Job
from orion.manager.domain import snapshots
from orion.manager.ssh.port import Host
from orion.manager.store.snapshots import SnapshotCatalog
from orion.rental_order import RentalOrder

DEADLINE_S = 30.0


class Thawer:
    def __init__(self, engine: Engine, catalog: SnapshotCatalog) -> None:
        self._engine = engine
        self._catalog = catalog

    async def thaw(self, rental_id: str, actor: str) -> str:
        """Thaw this rental and return why that failed; empty if it is thawed."""
        found = await self._catalog.one(rental_id)
        if found is None:
            return "it does not run on a worker that is ready"
        rental, placement, worker = found
        order = RentalOrder(rental_id=rental.id, username=rental.username, uid=rental.uid, epoch=placement.epoch)
        job = Job(action=Action.THAW, host=Host.of(worker), order=order, deadline_s=DEADLINE_S, owner=rental.owner)
        outcome = await self._engine.run(job)
        if not outcome.ok:
            return outcome.message
        if outcome.report.get("changed"):
            await self._catalog.record(snapshots.thawed(rental, placement, actor))
        return ""
