"""Planned migrations: a rental goes from a source to a target placement with every byte that it has written.

The safe order; each line is a committed step, or a task that may be repeated:
1. Reserve, a step: the target placement gets a slot and an epoch that was never given. The source runs.
2. Precopy, a task: the files are copied while the source runs, and put into the target's locked home.
3. Quiesce, a step: from this commit on no heartbeat's reply says `run` for the source.
4. Final sync, a task: the source is frozen, what changed since the precopy is copied to the target's home.
5. Cutover, a step: the rental's epoch rises to that of the target, and the source is stopping.
6. The target is activated and the source is purged, by the same tasks as after a takeover.

A failure before the cutover ends the target and thaws the source; after the cutover the last snapshot is restored
elsewhere. If no worker has a free slot and the source's worker is about to end, the rental is parked: quiesced, frozen,
copied a last time, and queued as after a takeover.

There are never two live copies: the target is not activated before the cutover; the cutover is guarded by the same
migration number as the freeze that was confirmed before it; and the worker refuses a thaw by an order of an earlier
migration than the one that froze the rental, and by a reply to a call from before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from orion.manager.domain.fair_share import Claim
from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.states import LIVE, Health, Intent, MigrationPhase, PlacementState, RentalState, check_phase
from orion.manager.domain.steps import ACTOR, Step, move_placement, move_rental, rental_event, reserve_slot, write
from orion.manager.domain.world import World

MAX_UNDER_WAY = 12
"""The number of planned migrations that drains and evacuations may have under way; one owner has half at most. Each is
two runs of rsync and four orders; with more of them, two processors finish no sooner and each rental pauses longer."""
MAX_REQUESTED = 6
"""The number of migrations under way below which a requested one may begin, so that drains always find a place."""
NOT_MOVED = "could not be moved: "
"""The same text as wire.NOT_MOVED."""
SOURCE_HEALTH = frozenset({Health.READY, Health.QUARANTINED})
"""The health of workers from which a rental can migrate: they answer, or should."""


class NotMigrated(Exception):
    """A rental cannot migrate now, and stays where it is. The message is for a person, `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source placement of a planned migration. `move`: the number of the migration if it is quiesced, else 0."""

    placement_id: str
    worker_id: str
    epoch: int
    move: int = 0

    @staticmethod
    def of(source: Placement) -> Source:
        return Source(placement_id=source.id, worker_id=source.worker_id, epoch=source.epoch, move=source.quiesced_for)


class Placed(Protocol):
    """A placement: its row, or its record in the pool index."""

    @property
    def state(self) -> PlacementState: ...

    @property
    def quiesced_for(self) -> int: ...


def phase_of(rental: Rental, source: Placement, target: Placement | None) -> MigrationPhase:
    """Return the phase of a rental's planned migration from `source` to `target`, which is None if there is none."""
    if source.state is not PlacementState.RUNNING:
        ends = source.state is PlacementState.STOPPING and rental.state is RentalState.MIGRATING
        # A renter that was activated at the migration's number or above was activated after the cutover.
        is_over = rental.activated_epoch >= source.quiesced_for
        return MigrationPhase.NONE if is_over or not ends else MigrationPhase.CUTOVER
    if target is None:
        return MigrationPhase.PARK if source.quiesced_for else MigrationPhase.NONE
    is_prepared = target.state is PlacementState.PREPARING
    if source.quiesced_for:
        return (
            MigrationPhase.FINAL_SYNC if is_prepared and target.epoch == source.quiesced_for else MigrationPhase.STALE
        )
    if not is_prepared:
        return MigrationPhase.RESERVED
    return MigrationPhase.QUIESCE if target.target_snapshot else MigrationPhase.PRECOPY


def is_quiesced(placement: Placed) -> bool:
    """Return whether a placement is the source of a planned migration in one of the phases `states.QUIESCED`."""
    return placement.state is PlacementState.RUNNING and placement.quiesced_for != 0


def as_target(placement: Placement | None) -> Placement | None:
    """Return the placement if it is the target of a planned migration before the cutover, else None."""
    return placement if placement and placement.is_target and placement.state in LIVE else None


def must_leave(worker: Worker, evacuating: Collection[str]) -> str:
    """Return why the rentals of a worker have to migrate; empty if they need not.

    `evacuating`: the workers that are to stop, and wait until they are empty.
    """
    if worker.health not in SOURCE_HEALTH:
        return ""
    if worker.id in evacuating:
        return f"worker {worker.id} is about to stop"
    if worker.intent is Intent.DRAINING:
        return f"worker {worker.id} is being drained"
    if worker.health is Health.QUARANTINED:
        return f"worker {worker.id} is quarantined"
    return ""


def can_migrate(rental: Rental, placement: Placement) -> bool:
    """Return whether a rental is at rest on its worker: nothing makes, restores or ends it."""
    runs = rental.state is RentalState.ACTIVE and placement.state is PlacementState.RUNNING
    return runs and placement.public_key == rental.public_key


def reserve(rental: Rental, placement: Placement, worker: Worker, slot: int, new_id: str, actor: str, why: str) -> Step:
    """Return the step that reserves a target placement on another worker."""
    epoch = rental.next_epoch
    reason = f"{why}: moving to worker {worker.id}; it goes on here meanwhile"
    change = {"last_epoch": epoch, "explanation": reason}
    writes = (
        write(placement, {}, state=PlacementState.RUNNING, quiesced_for=0),
        write(rental, change, state=RentalState.ACTIVE, epoch=rental.epoch, last_epoch=rental.last_epoch),
    )
    started = rental_event("rental.move_started", reason, rental, worker.id, epoch=epoch, actor=actor)
    reserved = reserve_slot(rental, worker, slot, new_id, f"slot {slot}, for a planned migration", is_target=True)
    return Step(writes, (started,)) + reserved


def quiesce(rental: Rental, placement: Placement, target: Placement | None, why: str) -> Step:
    """Return the step that quiesces a source: for its target, or to be parked under a migration number of its own."""
    to = MigrationPhase.FINAL_SYNC if target else MigrationPhase.PARK
    check_phase(rental.id, phase_of(rental, placement, target), to)
    move = target.epoch if target else rental.next_epoch
    guard = (write(target, {}, state=PlacementState.PREPARING),) if target else ()
    quiesced = write(placement, {"quiesced_for": move}, state=PlacementState.RUNNING, quiesced_for=0)
    numbered = write(rental, {} if target else {"last_epoch": move}, state=RentalState.ACTIVE, epoch=rental.epoch)
    event = rental_event("rental.held", why, rental, placement.worker_id, epoch=placement.epoch)
    return Step((quiesced, *guard, numbered), (event,))


def abandon(rental: Rental, placement: Placement, target: Placement | None, why: str) -> Step:
    """Return the step that ends a migration before its cutover: the source runs on, and the target is cleaned up."""
    check_phase(rental.id, phase_of(rental, placement, target), MigrationPhase.NONE)
    worker_id, epoch = placement.worker_id, placement.epoch
    event = rental_event("rental.move_failed", why, rental, worker_id, epoch=epoch)
    change = {"explanation": f"{NOT_MOVED}{why}"}
    step = Step((write(rental, change, state=RentalState.ACTIVE, epoch=rental.epoch),), (event,))
    if placement.quiesced_for:
        released = rental_event("rental.let_go_on", "it goes on here", rental, worker_id, epoch=epoch)
        step += Step(
            (write(placement, {"quiesced_for": 0}, state=PlacementState.RUNNING, quiesced_for=placement.quiesced_for),),
            (released,),
        )
    return step + end_target(target, rental.owner, why) if target else step


def end_target(target: Placement, owner: str | None, why: str) -> Step:
    """Return the step that ends a target before its cutover."""
    to = PlacementState.STOPPED if target.state is PlacementState.RESERVED else PlacementState.FAILED
    return move_placement(target, owner, to, ACTOR, why)


def promote_target(rental: Rental, target: Placement) -> Step:
    """Return the step that makes the target, with the newest snapshot, the placement of a rental without its source."""
    taken = Step((write(target, {"is_target": False, "target_snapshot": ""}, state=target.state, is_target=True),))
    reason = f"being made on worker {target.worker_id}, to which it was migrating"
    if rental.state is RentalState.QUEUED:
        placed = move_rental(rental, RentalState.PROVISIONING, ACTOR, reason, target.worker_id, epoch=target.epoch)
        return placed + taken
    event = rental_event("rental.taken_over", reason, rental, target.worker_id, epoch=target.epoch)
    risen = write(rental, {"epoch": target.epoch}, state=rental.state, epoch=rental.epoch)
    return Step((risen,), (event,)) + taken


def target_problem(target: Placement, rental: Rental, worker: Worker | None, exiting: Collection[str]) -> str:
    """Return why a target cannot be used any more; empty if it can."""
    if target.epoch <= rental.epoch:
        return "the platform went back to a backup meanwhile"
    if worker is None or worker.health not in {Health.READY, Health.SUSPECT} or worker.fault:
        return f"worker {target.worker_id} is not ready any more"
    if worker.intent is not Intent.ACTIVE or worker.id in exiting:
        return f"worker {target.worker_id} is to be emptied itself"
    return ""


def precopied(rental: Rental, target: Placement, snapshot: str) -> Step | None:
    """Return the step that records the end of the precopy; None if the migration is over."""
    if rental.state is not RentalState.ACTIVE or not target.is_target or target.state is not PlacementState.PREPARING:
        return None
    return Step((write(target, {"target_snapshot": snapshot}, state=PlacementState.PREPARING, is_target=True),))


def cut_over(rental: Rental, placement: Placement, target: Placement | None, source: Source, name: str) -> Step | None:
    """Return the step of the cutover: the epoch rises, and the source ends. Without a target the rental is parked.

    `name`: the snapshot of the final sync. Return None if another step came between, which ended the migration.
    """
    phase = phase_of(rental, placement, as_target(target))
    due = MigrationPhase.FINAL_SYNC if target else MigrationPhase.PARK
    if rental.state is not RentalState.ACTIVE or phase is not due or placement.quiesced_for != source.move:
        return None
    check_phase(rental.id, phase, MigrationPhase.CUTOVER)
    where = f"to worker {target.worker_id}" if target else f"away from worker {placement.worker_id}, to wait"
    reason = f"moved {where} with all its files: snapshot {name}"
    quiesced = Step((write(placement, {}, quiesced_for=source.move),))
    ends = quiesced + move_placement(placement, rental.owner, PlacementState.STOPPING, ACTOR, reason)
    if target is None:
        parked = rental_event("rental.parked", reason, rental, placement.worker_id, epoch=placement.epoch)
        waiting = move_rental(rental, RentalState.MIGRATING, ACTOR, reason, placement.worker_id)
        return ends + waiting + Step((), (parked,))
    moved = rental_event("rental.moved", reason, rental, target.worker_id, epoch=target.epoch)
    change = {"is_target": False, "target_snapshot": name}
    taken = Step((write(target, change, state=PlacementState.PREPARING, is_target=True),), (moved,))
    risen = move_rental(rental, RentalState.MIGRATING, ACTOR, reason, target.worker_id, epoch=target.epoch)
    return ends + risen + taken


def under_way(world: World, failed: Collection[str] = ()) -> Counter[Claim]:
    """Return the number of planned migrations that have begun, by their claims.

    `failed`: the rentals whose last migration has failed.
    """
    moving = {p.rental_id for p in world.placements.values() if is_quiesced(p) or as_target(p)}
    return Counter(claim_of(world.rentals.get(rental_id), rental_id in failed) for rental_id in moving)


def claim_of(rental: Rental | None, failed: bool) -> Claim:
    return Claim(rental.owner if rental else "", failed)
