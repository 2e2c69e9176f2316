"""The orders of a heartbeat's reply for the rentals in the inventory: run, hold or purge."""

from __future__ import annotations

from collections.abc import Iterable

from orion.manager.domain import migration
from orion.manager.domain.model import Item, Placement
from orion.manager.domain.pool_index import IndexedPlacement
from orion.manager.domain.states import LIVE, PlacementState


def orders(items: Iterable[Item], placed: Iterable[Placement | IndexedPlacement], down: bool) -> list[tuple[Item, str]]:
    """Return the order for each item: `run`, `hold` (quiesce) or `purge`. `placed`: the placements on that worker.

    `down`: the worker was declared down and has just called home. Its rentals are on `hold` until the reconciler has
    decided whether they are taken over. The source of a planned migration is on `hold` too: see migration.py.

    A placement that is being made gets no order: its playbook unlocks it, and a reply that arrives after that must not
    lock it again.
    """
    known = {(p.rental_id, p.epoch): p for p in placed}
    found = []
    for item in items:
        placement = known.get((item.rental_id, item.epoch))
        if placement is None or placement.state not in LIVE:
            found.append((item, "purge"))
        elif placement.state is PlacementState.RUNNING:
            found.append((item, "hold" if down or migration.is_quiesced(placement) else "run"))
    return found
