"""What a heartbeat's reply tells a worker to do with each rental that it shows."""

from __future__ import annotations

from collections.abc import Iterable

from orion.manager.domain import migration
from orion.manager.domain.model import Item, Placement
from orion.manager.domain.pool_index import IndexedPlacement
from orion.manager.domain.states import LIVE, PlacementState


def orders(
    items: Iterable[Item], placements: Iterable[Placement | IndexedPlacement], down: bool
) -> list[tuple[Item, str]]:
    """`run` what runs there, `purge` what has no business there; `placements` are that worker's own.

    `down`: the worker was declared down and has only just called home. What runs there by the book is about to be
    taken away, or will be left to it: it must `hold` until that is decided.

    A placement that is being made is not mentioned: its playbook unlocks it, and a reply that crosses it on the way
    must not lock it again. One that stands still for a planned move must `hold`: see domain/migration.py.
    """
    known = {(p.rental_id, p.epoch): p for p in placements}
    found = []
    for item in items:
        placement = known.get((item.rental_id, item.epoch))
        if placement is None or placement.state not in LIVE:
            found.append((item, "purge"))
        elif placement.state is PlacementState.RUNNING:
            found.append((item, "hold" if down or migration.is_quiesced(placement) else "run"))
    return found
