"""Observations: the inputs of a decision, as of one moment, that are in no row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orion.manager.domain.model import CommandEnd, Item, Placement


@dataclass(frozen=True, kw_only=True)
class Observations:
    inventories: Mapping[str, tuple[Item, ...]]
    """The last inventory of each worker that has shown one."""
    exiting: frozenset[str]
    """Workers that are to stop."""
    ages: Mapping[str, float]
    """Seconds that a placement, a rental or a joining worker (by id) has been in its state."""
    new_ids: Iterator[str]
    """Ids for new placements."""
    unknown_rentals: frozenset[tuple[str, int]] = frozenset()
    """Rentals in inventories, as (rental id, epoch), that the database never placed. A placement is committed before it
    is made, so the database is older than the workers, or was lost."""
    wall: float = 0.0
    """UTC seconds now."""
    evacuating: frozenset[str] = frozenset()
    """Workers among `exiting` that wait until their rentals have migrated."""
    migration_backoff: frozenset[str] = frozenset()
    """Rentals whose planned migration has failed lately; no other begins yet."""
    migration_failed: frozenset[str] = frozenset()
    """Rentals whose last planned migration has failed; another may begin for some of them."""
    awaits_files_s: float = 0.0
    """Seconds that a rental without a snapshot waits for the lost worker that has its files; 0: it does not wait."""
    start_ends: Mapping[str, tuple[CommandEnd, ...]] = field(default_factory=dict)
    """The ends of start commands that each worker reports."""

    def age(self, identity: str) -> float:
        return self.ages.get(identity, 0.0)

    def shows(self, placement: Placement) -> bool:
        """Return whether the worker's inventory has the placement, or there is no inventory yet."""
        inventory = self.inventories.get(placement.worker_id)
        return inventory is None or any(
            (item.rental_id, item.epoch) == (placement.rental_id, placement.epoch) for item in inventory
        )
