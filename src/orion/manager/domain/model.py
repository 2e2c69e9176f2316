"""What decisions are made from and made of: rows as frozen records, and steps, which are guarded writes with events.

A step is one unit: every write finds its row as expected, or the whole step is dropped, because somebody else acted.
`World` applies steps in memory; the store applies the same steps to the database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from orion.manager.domain.states import (
    HOLDING,
    LIVE,
    Health,
    Intent,
    PlacementState,
    RentalState,
    check_transition,
)

Kind = Literal["worker", "rental", "placement"]
BOOT = "boot"
"""The word in an agent's version by which orders to it may name a boot id (orion_worker/agent/node.py)."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    id: str
    hostname: str
    address: str
    host_keys: tuple[str, ...]
    slots: int
    health: Health
    intent: Intent
    session_id: str | None
    boot_id: str
    verified_session: str | None = None
    """The session for which the manager reached it by SSH and found nothing stale; ready only while it is current."""
    fault: str = ""
    """What is wrong with it, until an operator resumes it: a clean-up that passed its deadline, flapping."""
    explanation: str = ""
    agent_version: str = ""
    """The version of its agent. Words behind a plus sign, with dots between them, say which orders it takes besides."""

    @property
    def ordered_boot_id(self) -> str:
        """The boot id that orders to it name; empty for a worker from before that, which would refuse these orders."""
        return self.boot_id if BOOT in self.agent_version.partition("+")[2].split(".") else ""


class Origin(NamedTuple):
    """What a rental's home was filled with before its renter was let in at one epoch."""

    epoch: int
    generation: str
    """The name of the copy; empty: the home was empty."""
    asked: bool
    """Somebody had asked for this copy, or for an empty home; else it was the newest known."""


@dataclass(frozen=True, kw_only=True)
class Rental:
    id: str
    name: str
    owner: str
    username: str
    uid: int
    state: RentalState
    epoch: int
    public_key: str
    """The keys that open it, one a line."""
    ttl_s: int
    created_at: float
    activated_at: float | None = None
    expires_at: float | None = None
    end: Literal["released", "expired"] | None = None
    failures: int = 0
    explanation: str = ""
    last_safe_copy_at: float | None = None
    """UTC seconds at which the last complete copy of its files was begun."""
    copy_problem: str = ""
    """Why its files cannot be copied at present."""
    home_warning: str = ""
    """The warning that its owner should see of its home: see copies.nearly_full and copies.copied_rarely."""
    restore_from: str | None = None
    """What its next placement begins with, where that is not the newest copy: see domain/copies.py."""
    let_in_epoch: int = 0
    """The latest epoch at which its renter was let in, as far as the manager was told."""
    began_with: str = ""
    """The copy of its files that it began with at that epoch, or that was made of its end; empty: none is known."""
    lineage: tuple[Origin, ...] = ()
    """The origins of its latest epochs, oldest first; none is known of an epoch from before these were written down."""
    start: str = ""
    """Its start command, a line for its shell; empty: it has none. See domain/starting.py."""
    start_run: int = 1
    """Which run of it is wanted: one more each time that its owner asks for it."""
    start_problem: str = ""
    """Why it is not run any more."""
    takeovers: tuple[float, ...] = ()
    """UTC seconds at which it lately lost a worker on which its start command may have been run."""
    last_epoch: int = 0
    """The highest number that a planned move of it was given; see domain/moves.py."""

    @property
    def next_epoch(self) -> int:
        """Never given before: workers remember those of moves that came to nothing, too."""
        return max(self.epoch, self.last_epoch) + 1


@dataclass(frozen=True, kw_only=True)
class Placement:
    id: str
    rental_id: str
    worker_id: str
    slot: int
    epoch: int
    state: PlacementState
    public_key: str = ""
    """The keys that were last put on the worker; others in the rental mean that they must be put there again."""
    started: str = ""
    """The run of the start command that it has had there: see domain/starting.py."""
    start_end: str = ""
    """How that run ended, as CommandEnd.how; empty: it goes on, as far as is known."""
    start_ended_at: float | None = None
    salvaged: bool = False
    """Of a lost one: what its worker still has of it was copied aside, or was given up."""
    standby: bool = False
    """It is being filled beside the one that runs; it becomes its rental's with the step that raises the epoch."""
    held: int = 0
    """The planned move for which it stands still; 0: none. Once it is stopping: that it stood still before."""
    filled: str = ""
    """The copy that a standby was filled with."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A rental as a worker's inventory tells it: believed only about that worker."""

    rental_id: str
    username: str
    uid: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class CommandEnd:
    """How a run of a start command ended, as its worker tells it: believed only about what is placed on that worker."""

    rental_id: str
    epoch: int
    run: str
    """As Placement.started."""
    how: str
    """`status N`, `signal N` or `unseen`."""
    at: float
    """UTC seconds."""


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
"""The fields of each kind of row that a step may change; no decision reads the size of the last copy."""


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
    """The one way a rental changes its state. `reason` becomes its explanation too."""
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
    """The one way a placement changes its state."""
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
    """The one way a worker's health changes; only the health loop uses it."""
    check_transition("worker", worker.id, worker.health, to)
    event = Event(kind=f"worker.became_{to}", actor="health", reason=reason, worker_id=worker.id)
    expect = {"health": worker.health, "session_id": worker.session_id}
    change = {"health": to, "explanation": "" if to is Health.READY else reason}
    if to is Health.QUARANTINED:
        change["fault"] = worker.fault or reason
    return Step((Write(kind="worker", id=worker.id, expect=expect, change=change),), (event,))


@dataclass(kw_only=True)
class World:
    """Workers, living rentals and placements that are not purged, by id. Decisions work on a copy of their own.

    It may be a part of the whole, but then a part that is enough: each placement comes with its worker and its rental,
    each rental that is not at rest with all its placements, each that has a standby too, and each worker in `whole`
    with all of its own.
    """

    workers: dict[str, Worker]
    rentals: dict[str, Rental]
    placements: dict[str, Placement]
    whole: frozenset[str] | None = None
    """The workers of which everything is here; None: all."""
    taken: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """The slots in use of workers that are candidates for a rental and not in `whole`."""
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    """Why each worker that is no candidate here can take nothing, counted: see placement.Pool."""

    def copy(self) -> World:
        return replace(self, workers=dict(self.workers), rentals=dict(self.rentals), placements=dict(self.placements))

    def is_whole(self, worker_id: str) -> bool:
        return self.whole is None or worker_id in self.whole

    def apply(self, step: Step) -> bool:
        """Apply all of a step or nothing of it; False when a row was not as expected."""
        tables: dict[str, dict[str, Any]] = {
            "worker": self.workers,
            "rental": self.rentals,
            "placement": self.placements,
        }
        changed: dict[tuple[str, str], Any] = {}
        for write in step.writes:
            row = changed.get((write.kind, write.id), tables[write.kind].get(write.id))
            if row is None or any(getattr(row, column) != value for column, value in write.expect.items()):
                return False
            read = {column: value for column, value in write.change.items() if column in READ[write.kind]}
            changed[write.kind, write.id] = replace(row, **read)
        for (kind, identity), row in changed.items():
            tables[kind][identity] = row
        if step.placement:
            self.placements[step.placement.id] = step.placement
        return True

    def live_placement(self, rental_id: str) -> Placement | None:
        return next((p for p in self.placements_of(rental_id) if p.state in LIVE and not p.standby), None)

    def standby_of(self, rental_id: str) -> Placement | None:
        return next((p for p in self.placements_of(rental_id) if p.state in LIVE and p.standby), None)

    def placements_of(self, rental_id: str) -> list[Placement]:
        return [p for p in self.placements.values() if p.rental_id == rental_id]

    def used_slots(self) -> dict[str, set[int]]:
        """The slots in use, by worker id."""
        used = {worker_id: set(self.taken.get(worker_id, ())) for worker_id in self.workers}
        for placement in self.placements.values():
            if placement.state in HOLDING:
                used.setdefault(placement.worker_id, set()).add(placement.slot)
        return used


class Draft(World):
    """A world that a decision changes step by step, with what it asks again and again kept at hand."""

    def __init__(self, snapshot: World) -> None:
        super().__init__(**vars(snapshot.copy()))
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
        held = {p.slot for p in self.placements_on(worker_id) if p.state in HOLDING}
        return frozenset(held | self.taken.get(worker_id, frozenset()))

    def _note(self, placement: Placement) -> None:
        self._of_rental.setdefault(placement.rental_id, []).append(placement.id)
        self._on_worker.setdefault(placement.worker_id, []).append(placement.id)


def merge(steps: Iterable[Step]) -> Step:
    """Several steps as one unit."""
    whole = Step(())
    for step in steps:
        whole = whole + step
    return whole
