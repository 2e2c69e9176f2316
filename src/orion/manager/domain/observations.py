"""What decisions rest on besides the rows: inventories, ages, who is about to leave. Data, as of one moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orion.manager.domain.model import CommandEnd, Item, Placement


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What the snapshot does not hold. `ages`: seconds that a placement, a rental or a worker that joins (by id) has
    been in its state.

    `strangers`: what inventories show and the database has never placed anywhere, as (rental id, epoch). Nothing of
    ours can make one, for a placement is committed first: the database is older than the world, or it was lost.
    """

    inventories: Mapping[str, tuple[Item, ...]]
    exiting: frozenset[str]
    ages: Mapping[str, float]
    new_ids: Iterator[str]
    unknown_rentals: frozenset[tuple[str, int]] = frozenset()
    wall: float = 0.0
    """UTC seconds: only start commands are counted by it."""
    evacuating: frozenset[str] = frozenset()
    """Workers that were told to stop, and wait for their rentals to be taken away. They are among `leaving`."""
    migration_backoff: frozenset[str] = frozenset()
    """Rentals whose planned move has failed lately, and that are not to be moved yet."""
    migration_failed: frozenset[str] = frozenset()
    """Rentals whose last planned move has failed, also where they may be moved again."""
    awaits_files_s: float = 0.0
    """Seconds that a rental of which there is no copy waits for the worker that was lost with its files; 0: none."""

    start_ends: Mapping[str, tuple[CommandEnd, ...]] = field(default_factory=dict)
    """How start commands ended, as each worker tells it."""

    def age(self, identity: str) -> float:
        return self.ages.get(identity, 0.0)

    def shows(self, placement: Placement) -> bool:
        """Whether its worker still shows it, or has not shown anything yet."""
        inventory = self.inventories.get(placement.worker_id)
        return inventory is None or any(
            (item.rental_id, item.epoch) == (placement.rental_id, placement.epoch) for item in inventory
        )
