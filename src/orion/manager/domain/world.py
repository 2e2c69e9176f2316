"""The world of a decision: workers, rentals that have not ended, and placements, as of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.states import HOLDING, LIVE
from orion.manager.domain.steps import READ, Step


@dataclass(kw_only=True)
class World:
    """Workers, rentals that have not ended, and placements that are not purged, by id.

    A world may be a part of the whole that is enough for a decision: each placement comes with its worker and its
    rental; each rental that is not at rest, or has a target, and each worker in `whole` comes with all its placements.
    """

    workers: dict[str, Worker]
    rentals: dict[str, Rental]
    placements: dict[str, Placement]
    whole: frozenset[str] | None = None
    """The workers whose placements are all in this part; None: all workers."""
    taken: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """The slots in use, by worker id, of candidates that are not in `whole`."""
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    """The number of workers outside of this part that each filter refuses: see scheduler.Candidates."""

    def copy(self) -> World:
        return replace(self, workers=dict(self.workers), rentals=dict(self.rentals), placements=dict(self.placements))

    def is_whole(self, worker_id: str) -> bool:
        return self.whole is None or worker_id in self.whole

    def apply(self, step: Step) -> bool:
        """Apply all of a step; return False, with nothing applied, if a row is not as expected."""
        rows: dict[str, dict[str, Any]] = {"worker": self.workers, "rental": self.rentals, "placement": self.placements}
        changed: dict[tuple[str, str], Any] = {}
        for write in step.writes:
            row = changed.get((write.kind, write.id), rows[write.kind].get(write.id))
            if row is None or any(getattr(row, column) != value for column, value in write.expect.items()):
                return False
            read = {column: value for column, value in write.change.items() if column in READ[write.kind]}
            changed[write.kind, write.id] = replace(row, **read)
        for (kind, identity), row in changed.items():
            rows[kind][identity] = row
        if step.placement:
            self.placements[step.placement.id] = step.placement
        return True

    def live_placement(self, rental_id: str) -> Placement | None:
        return next((p for p in self.placements_of(rental_id) if p.state in LIVE and not p.is_target), None)

    def target_of(self, rental_id: str) -> Placement | None:
        return next((p for p in self.placements_of(rental_id) if p.state in LIVE and p.is_target), None)

    def placements_of(self, rental_id: str) -> list[Placement]:
        return [p for p in self.placements.values() if p.rental_id == rental_id]

    def used_slots(self) -> dict[str, set[int]]:
        """Return the slots in use, by worker id."""
        used = {worker_id: set(self.taken.get(worker_id, ())) for worker_id in self.workers}
        for placement in self.placements.values():
            if placement.state in HOLDING:
                used.setdefault(placement.worker_id, set()).add(placement.slot)
        return used


class Draft(World):
    """A world that a decision changes step by step, with indexes of placements by rental and by worker."""

    def __init__(self, loaded: World) -> None:
        super().__init__(**vars(loaded.copy()))
        self._of_rental: dict[str, list[str]] = {}
        self._on_worker: dict[str, list[str]] = {}
        for placement in self.placements.values():
            self._note(placement)

    def apply(self, step: Step) -> bool:
        applied = super().apply(step)
        if applied and step.placement:
            self._note(step.placement)
        return applied

    def placements_of(self, rental_id: str) -> list[Placement]:
        return [self.placements[identity] for identity in self._of_rental.get(rental_id, ())]

    def placements_on(self, worker_id: str) -> list[Placement]:
        return [self.placements[identity] for identity in self._on_worker.get(worker_id, ())]

    def used_on(self, worker_id: str) -> frozenset[int]:
        in_use = {p.slot for p in self.placements_on(worker_id) if p.state in HOLDING}
        return frozenset(in_use | self.taken.get(worker_id, frozenset()))

    def _note(self, placement: Placement) -> None:
        self._of_rental.setdefault(placement.rental_id, []).append(placement.id)
        self._on_worker.setdefault(placement.worker_id, []).append(placement.id)
