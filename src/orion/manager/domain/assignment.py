"""Where rentals go: what one decision gives to one after the other, and what it says to those that get nothing."""

from __future__ import annotations

from orion.manager.domain import migration
from orion.manager.domain.fair_share import may_take
from orion.manager.domain.migration import ACTOR
from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.observations import Observations
from orion.manager.domain.scheduler import Candidate, Candidates, Chosen, NoWorker
from orion.manager.domain.states import PlacementState, RentalState
from orion.manager.domain.steps import Event, Step, Write, merge, move_rental
from orion.manager.domain.world import Draft, World

AWAITS_FILES = "it waits for its files: "
"""How the explanation of a rental begins that waits for a lost worker."""
MAX_PLACED = 256
"""Rentals that get a place in one decision; the others in the next, so that none takes long."""


class Assignments:
    """Where the rentals of one decision go, one after the other."""

    def __init__(self, world: Draft, observations: Observations) -> None:
        self._world = world
        self._new_ids = observations.new_ids
        self._left = MAX_PLACED
        self._migration_failed = observations.migration_failed
        self._moving = migration.under_way(world, observations.migration_failed)
        known = (w for w in world.workers.values() if world.is_whole(w.id) or w.id in world.taken)
        candidates = (
            Candidate(worker=w, used=world.used_on(w.id), failed_here=False, exiting=w.id in observations.exiting)
            for w in known
        )
        self._pool = Candidates(candidates, world.elsewhere)

    def place(self, rental: Rental) -> Step | None:
        if not self._left:
            return None
        failed = {p.worker_id for p in self._world.placements_of(rental.id) if p.state is PlacementState.FAILED}
        choice = self._pool.choose(failed)
        if isinstance(choice, Chosen):
            self._left -= 1
            self._pool.take(choice)
            return _reserve(self._world.workers[choice.worker_id], rental, choice.slot, next(self._new_ids))
        return wait_for_worker(rental, choice.explanation) if isinstance(choice, NoWorker) else None

    def move(self, rental: Rental, placement: Placement, why: str, parks: bool) -> Step | None:
        """Move a rental to another worker, if one can take it. `parks`: else it is to wait, with all its files.

        Its worker is about to end then: what failed before is not kept waiting for that.
        """
        claim = migration.claim_of(rental, rental.id in self._migration_failed and not parks)
        if not may_take(claim, self._moving, migration.MAX_UNDER_WAY):
            return None
        failed = {p.worker_id for p in self._world.placements_of(rental.id) if p.state is PlacementState.FAILED}
        choice = self._pool.choose(failed, placement.worker_id)
        if isinstance(choice, Chosen):
            self._moving[claim] += 1
            self._pool.take(choice)
            target = self._world.workers[choice.worker_id]
            return migration.reserve(rental, placement, target, choice.slot, next(self._new_ids), ACTOR, why)
        if isinstance(choice, NoWorker) and parks:
            self._moving[claim] += 1
            return migration.quiesce(rental, placement, None, f"{why}, and nothing can take it")
        return None

    def asked(self, rental: Rental, placement: Placement, actor: str) -> Step:
        """The same, because somebody asked for it. Raises moves.NotMigrated."""
        if not may_take(migration.claim_of(rental, False), self._moving, migration.MAX_REQUESTED):
            raise migration.NotMigrated("too_many_moves", "others are being moved just now: try again in a minute")
        choice = self._pool.choose((), placement.worker_id)
        if isinstance(choice, Chosen):
            target, new_id = self._world.workers[choice.worker_id], next(self._new_ids)
            return migration.reserve(rental, placement, target, choice.slot, new_id, actor, "asked for")
        why = choice.counted if choice else "the pool is changing: try again"
        raise migration.NotMigrated("nowhere_to_go", f"no other worker can take it, so it goes on where it is: {why}")


def request_migration(world: World, rental_id: str, actor: str, observations: Observations) -> Step | None:
    """Begin a planned move that somebody asked for; None when it is under way. Raises moves.NotMigrated."""
    draft = Draft(world)
    rental, placement = draft.rentals.get(rental_id), draft.live_placement(rental_id)
    if draft.target_of(rental_id) is not None:
        return None
    if rental is None or placement is None or not migration.can_move(rental, placement):
        state = f"it is {rental.state}: {rental.explanation}" if rental else "it has ended"
        raise migration.NotMigrated("not_active", state)
    worker = draft.workers.get(placement.worker_id)
    if worker is None or worker.health not in migration.SOURCE_HEALTH:
        raise migration.NotMigrated(
            "worker_not_ready", "its worker does not answer just now: nothing can be copied from it"
        )
    return Assignments(draft, observations).asked(rental, placement, actor)


def wait_for_worker(rental: Rental, explanation: str) -> Step | None:
    """It has no place yet; None where that is said already."""
    if rental.state is RentalState.MIGRATING:
        return move_rental(rental, RentalState.QUEUED, ACTOR, explanation)
    if rental.explanation == explanation:
        return None
    expect = {"state": rental.state, "epoch": rental.epoch}
    return Step((Write(kind="rental", id=rental.id, expect=expect, change={"explanation": explanation}),))


def wait_for_files(rental: Rental, worker_id: str, within_s: float) -> Step | None:
    """Return the step that says that it waits for a lost worker, which has its only files; None: it is said already."""
    within = f"{within_s / 60:.0f} min" if within_s >= 120 else f"{within_s:.0f} s"
    explanation = (
        f"{AWAITS_FILES}worker {worker_id} was lost before the first copy of them. It begins again when that worker is "
        f"started and has handed them over; without them after {within}, or now by: orion restore {rental.name} --empty"
    )
    step = wait_for_worker(rental, explanation)
    if step is None:
        return None
    event = Event(
        kind="rental.files_awaited",
        actor=ACTOR,
        reason=explanation,
        owner=rental.owner,
        rental_id=rental.id,
        worker_id=worker_id,
        epoch=rental.epoch,
    )
    return step + Step((), (event,))


def _reserve(worker: Worker, rental: Rental, slot: int, placement_id: str) -> Step:
    placement = Placement(
        id=placement_id,
        rental_id=rental.id,
        worker_id=worker.id,
        slot=slot,
        epoch=rental.next_epoch,
        state=PlacementState.RESERVED,
    )
    as_chosen = {"health": worker.health, "intent": worker.intent, "slots": worker.slots}
    still_fit = Write(kind="worker", id=worker.id, expect=as_chosen, change={})
    reserved = Event(
        kind="placement.reserved",
        actor=ACTOR,
        reason=f"slot {slot}",
        owner=rental.owner,
        rental_id=rental.id,
        worker_id=worker.id,
        epoch=placement.epoch,
    )
    if rental.state is RentalState.MIGRATING:
        expect = {"state": rental.state, "epoch": rental.epoch}
        raised = Write(kind="rental", id=rental.id, expect=expect, change={"epoch": placement.epoch})
        return Step((still_fit, raised), (reserved,), placement)
    reason = f"being made on worker {worker.id}"
    placed = move_rental(rental, RentalState.PROVISIONING, ACTOR, reason, worker.id, epoch=placement.epoch)
    return merge((placed, Step((still_fit,), (reserved,), placement)))
