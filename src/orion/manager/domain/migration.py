"""Planned moves: a rental goes on elsewhere with every byte that it has written.

The safe order; each is a committed step, or a task that may be repeated:
1. begin: a standby is reserved on the target, under an epoch that was never given. The rental goes on where it is.
2. Precopy, the task `seed`: its files are copied while it runs, and put into the standby's locked home.
3. Quiesce, `hold`: from this commit on no heartbeat's reply says `run` for what runs.
4. Final sync, the task `finish`: it is frozen, what changed since is copied, and put into the standby's home.
5. Cutover, `switch`: one step. The epoch rises to the standby's, what was quiesced is stopping.
6. The standby is let in, and what was quiesced is purged, as after any other move.

`phase_of` derives from the rows how far a migration is; states.MIGRATION_TABLE says what may follow.

What fails before the switch ends the standby, clears the hold and thaws; after it the last copy is restored elsewhere.
Where there is nowhere to go and the worker is about to end, the rental is parked: held, frozen, copied a last time, and
then it waits for a place as after a takeover.

Why never two live: nobody is let in before the switch; the switch rests on the same hold as the freeze that was
confirmed before it; and the worker refuses to thaw for an order of an earlier move than the one that froze it, and for
a reply to a call from before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from orion.manager.domain.fair_share import Claim
from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.states import (
    LIVE,
    Health,
    Intent,
    MigrationPhase,
    PlacementState,
    RentalState,
    check_phase,
)
from orion.manager.domain.steps import Event, Step, Write, merge, move_placement, move_rental
from orion.manager.domain.world import World

ACTOR = "reconciler"
MAX_UNDER_WAY = 12
"""Planned moves that drains and goodbyes may have under way, of one owner half: each copies, and stands still for a
moment."""
MAX_REQUESTED = 6
"""The same of those that are asked for, with all that are under way: nobody's asking keeps a worker from being emptied.
"""
NOT_MOVED = "could not be moved: "
"""As wire.NOT_MOVED."""

SOURCE_HEALTH = frozenset({Health.READY, Health.QUARANTINED})
"""Workers that a rental can be moved away from: they answer, or should."""


class NotMigrated(Exception):
    """It cannot be moved now, and goes on where it is; the message is for a person, `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is being moved away: a placement that runs, and the number of its hold, if it stands still."""

    placement_id: str
    worker_id: str
    epoch: int
    move: int = 0


class Placed(Protocol):
    """A placement, as a row or as the roster knows it."""

    @property
    def state(self) -> PlacementState: ...

    @property
    def held(self) -> int: ...


def phase_of(rental: Rental, source: Placement, target: Placement | None) -> MigrationPhase:
    """Return how far a rental's planned migration away from `source` is. `target`: its standby, if it has one."""
    if source.state is not PlacementState.RUNNING:
        ends = source.state is PlacementState.STOPPING and rental.state is RentalState.MIGRATING
        return MigrationPhase.CUTOVER if source.held and ends else MigrationPhase.NONE
    if target is None:
        return MigrationPhase.PARK if source.held else MigrationPhase.NONE
    is_prepared = target.state is PlacementState.PREPARING
    if source.held:
        return MigrationPhase.FINAL_SYNC if is_prepared and target.epoch == source.held else MigrationPhase.STALE
    if not is_prepared:
        return MigrationPhase.RESERVED
    return MigrationPhase.QUIESCE if target.filled else MigrationPhase.PRECOPY


def is_quiesced(placement: Placed) -> bool:
    """Return whether a placement is the source of a planned migration in one of the phases `states.QUIESCED`."""
    return placement.state is PlacementState.RUNNING and placement.held != 0


def as_target(placement: Placement | None) -> Placement | None:
    """Return the placement if it is the target of a planned migration before the cutover, else None."""
    return placement if placement and placement.standby and placement.state in LIVE else None


def must_leave(worker: Worker, evacuating: Collection[str]) -> str:
    """Why what runs on this worker is to be moved; empty when it is not. `vacating`: those that were told to stop."""
    if worker.health not in SOURCE_HEALTH:
        return ""
    if worker.id in evacuating:
        return f"worker {worker.id} was told to stop"
    if worker.intent is Intent.DRAINING:
        return f"worker {worker.id} is being drained"
    if worker.health is Health.QUARANTINED:
        return f"worker {worker.id} is quarantined"
    return ""


def can_move(rental: Rental, placement: Placement) -> bool:
    """It is at rest where it is: what is restored, ended or made is not moved meanwhile."""
    return (
        rental.state is RentalState.ACTIVE
        and placement.state is PlacementState.RUNNING
        and placement.public_key == rental.public_key
    )


def reserve(rental: Rental, placement: Placement, target: Worker, slot: int, new_id: str, actor: str, why: str) -> Step:
    """Reserve a standby on another worker."""
    epoch = rental.next_epoch
    standby = Placement(
        id=new_id,
        rental_id=rental.id,
        worker_id=target.id,
        slot=slot,
        epoch=epoch,
        state=PlacementState.RESERVED,
        standby=True,
    )
    reason = f"{why}: moving to worker {target.id}; it goes on here meanwhile"
    writes = (
        Write(
            kind="worker",
            id=target.id,
            expect={"health": target.health, "intent": target.intent, "slots": target.slots},
            change={},
        ),
        Write(kind="placement", id=placement.id, expect={"state": PlacementState.RUNNING, "held": 0}, change={}),
        _rental_write(rental, {"last_epoch": epoch, "explanation": reason}, last_epoch=rental.last_epoch),
    )
    started = _event("rental.move_started", reason, rental, target.id, epoch, actor)
    reserved = _event("placement.reserved", f"slot {slot}, as a standby", rental, target.id, epoch)
    return Step(writes, (started, reserved), standby)


def quiesce(rental: Rental, placement: Placement, standby: Placement | None, why: str) -> Step:
    """It is about to stand still: for its standby, or to be parked under a number of its own."""
    to = MigrationPhase.FINAL_SYNC if standby else MigrationPhase.PARK
    check_phase(rental.id, phase_of(rental, placement, standby), to)
    move = standby.epoch if standby else rental.next_epoch
    guard = (
        ()
        if standby is None
        else (Write(kind="placement", id=standby.id, expect={"state": PlacementState.PREPARING}, change={}),)
    )
    numbered = {} if standby else {"last_epoch": move}
    held = Write(
        kind="placement", id=placement.id, expect={"state": PlacementState.RUNNING, "held": 0}, change={"held": move}
    )
    event = _event("rental.held", why, rental, placement.worker_id, placement.epoch)
    return Step((held, *guard, _rental_write(rental, numbered)), (event,))


def abandon(rental: Rental, placement: Placement, standby: Placement | None, why: str) -> Step:
    """It goes on where it is; what was made of its standby is cleaned up."""
    check_phase(rental.id, phase_of(rental, placement, standby), MigrationPhase.NONE)
    reason = f"{NOT_MOVED}{why}"
    told = _rental_write(rental, {"explanation": reason})
    event = _event("rental.move_failed", why, rental, placement.worker_id, placement.epoch)
    step = Step((told,), (event,))
    if placement.held:
        held = {"state": PlacementState.RUNNING, "held": placement.held}
        released = _event("rental.let_go_on", "it goes on here", rental, placement.worker_id, placement.epoch)
        step += Step((Write(kind="placement", id=placement.id, expect=held, change={"held": 0}),), (released,))
    return step if standby is None else merge((step, end_target(standby, rental.owner, why)))


def end_target(standby: Placement, owner: str | None, why: str) -> Step:
    to = PlacementState.STOPPED if standby.state is PlacementState.RESERVED else PlacementState.FAILED
    return move_placement(standby, owner, to, ACTOR, why)


def promote_target(rental: Rental, standby: Placement) -> Step:
    """What it stood by for has been lost: it takes over, with the newest copy."""
    taken = Write(
        kind="placement",
        id=standby.id,
        expect={"state": standby.state, "standby": True},
        change={"standby": False, "filled": ""},
    )
    reason = f"being made on worker {standby.worker_id}, where it was to be moved"
    if rental.state is RentalState.QUEUED:
        placed = move_rental(rental, RentalState.PROVISIONING, ACTOR, reason, standby.worker_id, epoch=standby.epoch)
        return placed + Step((taken,))
    expect = {"state": rental.state, "epoch": rental.epoch}
    event = _event("rental.taken_over", reason, rental, standby.worker_id, standby.epoch)
    return Step((Write(kind="rental", id=rental.id, expect=expect, change={"epoch": standby.epoch}), taken), (event,))


def target_problem(standby: Placement, rental: Rental, target: Worker | None, exiting: Collection[str]) -> str:
    """Why a standby is of no use any more; empty while it is."""
    if standby.epoch <= rental.epoch:
        return "the platform went back to a backup meanwhile"
    if target is None or target.health not in {Health.READY, Health.SUSPECT} or target.fault:
        return f"worker {standby.worker_id} is not ready any more"
    if target.intent is not Intent.ACTIVE or target.id in exiting:
        return f"worker {standby.worker_id} is to be emptied itself"
    return ""


def precopied(rental: Rental, standby: Placement, generation: str) -> Step | None:
    """Its standby has its files, as they were a moment ago."""
    if rental.state is not RentalState.ACTIVE or not standby.standby or standby.state is not PlacementState.PREPARING:
        return None
    expect = {"state": PlacementState.PREPARING, "standby": True}
    return Step((Write(kind="placement", id=standby.id, expect=expect, change={"filled": generation}),))


def cut_over(
    rental: Rental, placement: Placement, standby: Placement | None, source: Source, generation: str
) -> Step | None:
    """It is where it was to go: the epoch rises, and what was held ends. Without a standby it waits for a place.

    None: somebody acted meanwhile, and nothing is to be switched any more.
    """
    phase = phase_of(rental, placement, as_target(standby))
    due = MigrationPhase.FINAL_SYNC if standby else MigrationPhase.PARK
    if rental.state is not RentalState.ACTIVE or phase is not due or placement.held != source.move:
        return None
    check_phase(rental.id, phase, MigrationPhase.CUTOVER)
    where = f"to worker {standby.worker_id}" if standby else f"away from worker {placement.worker_id}, to wait"
    reason = f"moved {where} with all its files: copy {generation}"
    held = Step((Write(kind="placement", id=placement.id, expect={"held": source.move}, change={}),))
    stopping = move_placement(placement, rental.owner, PlacementState.STOPPING, ACTOR, reason)
    if standby is None:
        waiting = move_rental(rental, RentalState.MIGRATING, ACTOR, reason, placement.worker_id)
        parked = _event("rental.parked", reason, rental, placement.worker_id, placement.epoch)
        return merge((held, stopping, waiting, Step((), (parked,))))
    expect = {"state": PlacementState.PREPARING, "standby": True}
    taken = Write(kind="placement", id=standby.id, expect=expect, change={"standby": False, "filled": generation})
    risen = move_rental(rental, RentalState.MIGRATING, ACTOR, reason, standby.worker_id, epoch=standby.epoch)
    moved = _event("rental.moved", reason, rental, standby.worker_id, standby.epoch)
    return merge((held, stopping, risen, Step((taken,), (moved,))))


def under_way(world: World, failed: Collection[str] = ()) -> Counter[Claim]:
    """Return the planned moves that have begun, by the claim of each. `failed`: rentals whose last move has failed."""
    moving = {p.rental_id for p in world.placements.values() if is_quiesced(p) or as_target(p)}
    return Counter(claim_of(world.rentals.get(rental_id), rental_id in failed) for rental_id in moving)


def claim_of(rental: Rental | None, failed: bool) -> Claim:
    """Return the claim of a rental to a place among planned moves."""
    return Claim(rental.owner if rental else "", failed)


def _rental_write(rental: Rental, change: Mapping[str, object], **expect: object) -> Write:
    """Only while it is active, at the epoch at which it was looked at."""
    return Write(
        kind="rental", id=rental.id, expect={"state": RentalState.ACTIVE, "epoch": rental.epoch} | expect, change=change
    )


def _event(kind: str, reason: str, rental: Rental, worker_id: str, epoch: int, actor: str = ACTOR) -> Event:
    return Event(
        kind=kind, actor=actor, reason=reason, owner=rental.owner, rental_id=rental.id, worker_id=worker_id, epoch=epoch
    )
