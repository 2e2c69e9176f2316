"""Steps: guarded writes with their events, which a decision returns and the store applies whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.states import Health, PlacementState, RentalState, check_transition

Kind = Literal["worker", "rental", "placement"]


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


READ: Mapping[Kind, frozenset[str]] = {
    "worker": frozenset(f.name for f in fields(Worker)),
    "rental": frozenset(f.name for f in fields(Rental)),
    "placement": frozenset(f.name for f in fields(Placement)),
}
"""The fields of each kind of row that a decision reads."""


WRITTEN: Mapping[Kind, frozenset[str]] = {
    "worker": READ["worker"] - {"id"},
    "rental": READ["rental"] - {"id"} | {"last_safe_copy_bytes"},
    "placement": READ["placement"] - {"id"},
}
"""The fields of each kind of row that a step may change; no decision reads the size of the last snapshot."""


class UnknownField(Exception):
    """A write names a field that its kind of row does not have."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """Change a row that is still as expected: `expect` and `change` map field to value. No change: only a guard.

    Raises UnknownField at once when it names another field than the row has, whichever store it is meant for.
    """

    kind: Kind
    id: str
    expect: Mapping[str, Any]
    change: Mapping[str, Any]

    def __post_init__(self) -> None:
        if READ[self.kind].issuperset(self.expect) and WRITTEN[self.kind].issuperset(self.change):
            return
        unknown = sorted((self.expect.keys() - READ[self.kind]) | (self.change.keys() - WRITTEN[self.kind]))
        raise UnknownField(f"a step cannot write {', '.join(unknown)} of {self.kind} {self.id}")


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
    """Return the step that changes a rental's state; `reason` becomes its explanation. Steps of states come from here
    alone. Raise ForbiddenTransition if the table does not have it."""
    check_transition("rental", rental.id, rental.state, to)
    event = Event(
        kind=_RENTAL_EVENTS[to],
        actor=actor,
        reason=reason,
        owner=rental.owner,
        rental_id=rental.id,
        worker_id=worker_id,
        epoch=change.get("epoch", rental.epoch),
    )
    write = Write(
        kind="rental",
        id=rental.id,
        expect={"state": rental.state, "epoch": rental.epoch},
        change={"state": to, "explanation": reason} | change,
    )
    return Step((write,), (event,))


def move_placement(
    placement: Placement,
    owner: str | None,
    to: PlacementState,
    actor: str,
    reason: str,
    details: Mapping[str, Any] | None = None,
    **change: Any,
) -> Step:
    """Return the step that changes a placement's state. Raise ForbiddenTransition if the table does not have it."""
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
    return Step(
        (Write(kind="placement", id=placement.id, expect={"state": placement.state}, change={"state": to} | change),),
        (event,),
    )


def move_worker(worker: Worker, to: Health, reason: str) -> Step:
    """Return the step that changes a worker's health, for the health controller alone. Raise ForbiddenTransition if the
    table does not have it."""
    check_transition("worker", worker.id, worker.health, to)
    event = Event(kind=f"worker.became_{to}", actor="health", reason=reason, worker_id=worker.id)
    expect = {"health": worker.health, "session_id": worker.session_id}
    change = {"health": to, "explanation": "" if to is Health.READY else reason}
    if to is Health.QUARANTINED:
        change["fault"] = worker.fault or reason
    return Step((Write(kind="worker", id=worker.id, expect=expect, change=change),), (event,))


def merge(steps: Iterable[Step]) -> Step:
    """Return one step with all writes and events of several."""
    whole = Step(())
    for step in steps:
        whole = whole + step
    return whole
