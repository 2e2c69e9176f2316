"""Letting a rental go on that its worker has frozen because its home holds more than it may.

The worker freezes it by itself when it counts what a copy would hold, and keeps it frozen whatever a heartbeat's reply
says. Its owner's way out is this order, which gives it some minutes to make room, and may be given as often as need be.
"""

from __future__ import annotations

from orion.manager.ansible.port import Action, Engine, Job
from orion.manager.domain import snapshots
from orion.manager.ssh.port import Host
from orion.manager.store.snapshots import SnapshotCatalog

DEADLINE_S = 30.0


class Thawer:
    def __init__(self, engine: Engine, catalog: SnapshotCatalog) -> None:
        self._engine = engine
        self._book = catalog

    async def thaw(self, rental_id: str, actor: str) -> str:
        """Why it could not be thawed; empty when it goes on."""
        found = await self._book.one(rental_id)
        if found is None:
            return "it does not run on a worker that is ready"
        rental, placement, worker = found
        host = Host(worker.id, worker.address, worker.host_keys, boot_id=worker.ordered_boot_id)
        who = rental.id, rental.username, rental.uid, placement.epoch
        outcome = await self._engine.run(Job(Action.THAW, host, *who, deadline_s=DEADLINE_S, owner=rental.owner))
        if not outcome.ok:
            return outcome.message
        if outcome.report.get("changed"):
            await self._book.record(snapshots.thawed(rental, placement, actor))
        return ""
