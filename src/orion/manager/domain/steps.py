"""Steps: guarded writes with their events, which a decision returns and the store applies whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.states import Health, PlacementState, RentalState, check_transition

ACTOR = "reconciler"
"""The actor of most events about rentals and placements."""
Kind = Literal["worker", "rental", "placement"]
KINDS: Mapping[type, Kind] = {Worker: "worker", Rental: "rental", Placement: "placement"}


@dataclass(frozen=True, kw_only=True)
class Event:
    kind: str
    actor: str
    reason: str
    owner: str | None = None
    rental_id: str | None = None
    worker_id: str | None = None
    epoch: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


READ: Mapping[Kind, frozenset[str]] = {kind: frozenset(f.name for f in fields(row)) for row, kind in KINDS.items()}
"""The fields of each kind of row that a decision reads."""
WRITTEN: Mapping[Kind, frozenset[str]] = {
    "worker": READ["worker"] - {"id"},
    "rental": READ["rental"] - {"id"} | {"last_snapshot_bytes"},
    "placement": READ["placement"] - {"id"},
}
"""The fields of each kind of row that a step may change; no decision reads the size of the last snapshot."""


class UnknownField(Exception):
    """A write names a field that its kind of row does not have."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """A change of a row that is still as expected: `expect` and `change` map field to value. No change: only a guard.

    Its constructor raises UnknownField for a field that the row does not have.
    """

    kind: Kind
    id: str
    expect: Mapping[str, Any]
    change: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = (self.expect.keys() - READ[self.kind]) | (self.change.keys() - WRITTEN[self.kind])
        if unknown:
            raise UnknownField(f"a step cannot write {', '.join(sorted(unknown))} of {self.kind} {self.id}")


@dataclass(frozen=True)
class Step:
    writes: tuple[Write, ...]
    events: tuple[Event, ...] = ()
    placement: Placement | None = None
    """A new placement to insert, after the writes."""

    def __add__(self, other: Step) -> Step:
        if self.placement and other.placement:
            raise ValueError("a step inserts at most one placement")
        return Step(self.writes + other.writes, self.events + other.events, self.placement or other.placement)


def write(row: Worker | Rental | Placement, change: Mapping[str, Any], /, **expect: Any) -> Write:
    """Return the write of `change` to a row whose fields are still as in `expect`."""
    return Write(kind=KINDS[type(row)], id=row.id, expect=expect, change=change)


def write_rental(rental: Rental, change: Mapping[str, Any], /, **expect: Any) -> Write:
    """Return the write of `change` to a rental whose state, epoch and fields in `expect` are still the same."""
    return write(rental, change, **{"state": rental.state, "epoch": rental.epoch} | expect)


def rental_event(
    kind: str,
    reason: str,
    rental: Rental,
    worker_id: str | None = None,
    *,
    epoch: int | None = None,
    actor: str = ACTOR,
    details: Mapping[str, Any] | None = None,
) -> Event:
    """Return an event about a rental; without `epoch` it has the epoch of the rental."""
    return Event(
        kind=kind,
        actor=actor,
        reason=reason,
        owner=rental.owner,
        rental_id=rental.id,
        worker_id=worker_id,
        epoch=rental.epoch if epoch is None else epoch,
        details=details or {},
    )


_RENTAL_EVENTS = {
    RentalState.QUEUED: "rental.queued",
    RentalState.PROVISIONING: "rental.placed",
    RentalState.ACTIVE: "rental.activated",
    RentalState.MIGRATING: "rental.migration_started",
    RentalState.RELEASING: "rental.release_started",
    RentalState.RELEASED: "rental.released",
    RentalState.EXPIRED: "rental.expired",
    RentalState.FAILED: "rental.failed",
}


def move_rental(
    rental: Rental, to: RentalState, actor: str, reason: str, worker_id: str | None = None, **change: Any
) -> Step:
    """Return the step that changes a rental's state; `reason` becomes its explanation.

    No other function returns such a step. Raise ForbiddenTransition if the table does not have the transition.
    """
    check_transition("rental", rental.id, rental.state, to)
    event = rental_event(_RENTAL_EVENTS[to], reason, rental, worker_id, epoch=change.get("epoch"), actor=actor)
    return Step((write_rental(rental, {"state": to, "explanation": reason} | change),), (event,))


def move_placement(
    placement: Placement,
    owner: str | None,
    to: PlacementState,
    actor: str,
    reason: str,
    details: Mapping[str, Any] | None = None,
    **change: Any,
) -> Step:
    """Return the step that changes a placement's state. Raise ForbiddenTransition if the table does not have that."""
    check_transition("placement", placement.id, placement.state, to)
    event = Event(
        kind=f"placement.{to}",
        actor=actor,
        reason=reason,
        owner=owner,
        rental_id=placement.rental_id,
        worker_id=placement.worker_id,
        epoch=placement.epoch,
        details=details or {},
    )
    return Step((write(placement, {"state": to} | change, state=placement.state),), (event,))


def reserve_slot(rental: Rental, worker: Worker, slot: int, new_id: str, reason: str, is_target: bool = False) -> Step:
    """Return the step that inserts a placement on a worker that is still as it was chosen; it gets the next epoch."""
    placement = Placement(
        id=new_id,
        rental_id=rental.id,
        worker_id=worker.id,
        slot=slot,
        epoch=rental.next_epoch,
        state=PlacementState.RESERVED,
        is_target=is_target,
    )
    as_chosen = write(worker, {}, health=worker.health, intent=worker.intent, slots=worker.slots)
    event = rental_event("placement.reserved", reason, rental, worker.id, epoch=placement.epoch)
    return Step((as_chosen,), (event,), placement)


def move_worker(worker: Worker, to: Health, reason: str) -> Step:
    """Return the step that changes a worker's health, for the health controller alone.

    Raise ForbiddenTransition if the table does not have the transition.
    """
    check_transition("worker", worker.id, worker.health, to)
    event = Event(kind=f"worker.became_{to}", actor="health", reason=reason, worker_id=worker.id)
    change = {"health": to, "explanation": "" if to is Health.READY else reason}
    if to is Health.QUARANTINED:
        change["fault"] = worker.fault or reason
    return Step((write(worker, change, health=worker.health, session_id=worker.session_id),), (event,))
