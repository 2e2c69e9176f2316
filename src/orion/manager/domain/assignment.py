"""The assignments of one decision: the worker and slot of each rental, and the explanations of those that wait."""

from __future__ import annotations

from orion.manager.domain import migration
from orion.manager.domain.fair_share import may_take
from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.observations import Observations
from orion.manager.domain.scheduler import Candidate, Candidates, Chosen, NoWorker
from orion.manager.domain.states import PlacementState, RentalState
from orion.manager.domain.steps import ACTOR, Step, move_rental, rental_event, reserve_slot, write_rental
from orion.manager.domain.world import Draft, World

AWAITS_FILES = "it waits for its files: "
"""The beginning of the explanation of a rental that waits for a lost worker."""
MAX_PLACED = 256
"""The number of rentals that get a slot in one decision; the next decisions take the others, so none takes long."""


class Assignments:
    """The assignments of one decision; each takes a slot from the next."""

    def __init__(self, world: Draft, observations: Observations) -> None:
        self._world, self._new_ids, self._left = world, observations.new_ids, MAX_PLACED
        self._migration_failed = observations.migration_failed
        self._moving = migration.under_way(world, observations.migration_failed)
        exiting = observations.exiting
        candidates = (
            Candidate(worker=w, used=world.used_on(w.id), failed_here=False, exiting=w.id in exiting)
            for w in world.workers.values()
            if world.is_whole(w.id) or w.id in world.taken
        )
        self._pool = Candidates(candidates, world.elsewhere)

    def place(self, rental: Rental) -> Step | None:
        """Return the step that gives a rental a slot, or that says why it waits; None: nothing changes."""
        if not self._left:
            return None
        choice = self._pool.choose(self._failed_on(rental))
        if isinstance(choice, Chosen):
            self._left -= 1
            self._pool.take(choice)
            return _reserve(self._world.workers[choice.worker_id], rental, choice.slot, next(self._new_ids))
        return wait_for_worker(rental, choice.explanation) if isinstance(choice, NoWorker) else None

    def migrate(self, rental: Rental, placement: Placement, why: str, parks: bool) -> Step | None:
        """Return the step that begins a planned migration; None if none can begin now.

        `parks`: the worker is about to end. The rental is then parked if no worker can take it, and a failure of its
        last migration does not make it wait.
        """
        claim = migration.claim_of(rental, rental.id in self._migration_failed and not parks)
        if not may_take(claim, self._moving, migration.MAX_UNDER_WAY):
            return None
        choice = self._pool.choose(self._failed_on(rental), placement.worker_id)
        if isinstance(choice, Chosen):
            self._moving[claim] += 1
            self._pool.take(choice)
            target = self._world.workers[choice.worker_id]
            return migration.reserve(rental, placement, target, choice.slot, next(self._new_ids), ACTOR, why)
        if isinstance(choice, NoWorker) and parks:
            self._moving[claim] += 1
            return migration.quiesce(rental, placement, None, f"{why}, and nothing can take it")
        return None

    def _failed_on(self, rental: Rental) -> set[str]:
        return {p.worker_id for p in self._world.placements_of(rental.id) if p.state is PlacementState.FAILED}

    def request(self, rental: Rental, placement: Placement, actor: str) -> Step:
        """Return the step that begins a requested migration. Raise NotMigrated if none can begin now."""
        if not may_take(migration.claim_of(rental, False), self._moving, migration.MAX_REQUESTED):
            raise migration.NotMigrated("too_many_moves", "too many migrations are under way: try again in a minute")
        choice = self._pool.choose((), placement.worker_id)
        if isinstance(choice, Chosen):
            target, new_id = self._world.workers[choice.worker_id], next(self._new_ids)
            return migration.reserve(rental, placement, target, choice.slot, new_id, actor, "asked for")
        why = choice.counted if choice else "the pool is changing: try again"
        raise migration.NotMigrated("nowhere_to_go", f"no other worker can take it, so it stays where it is: {why}")


def request_migration(world: World, rental_id: str, actor: str, observations: Observations) -> Step | None:
    """Return the step that begins a requested migration; None if one is under way. Raise NotMigrated if none can."""
    draft = Draft(world)
    rental, placement = draft.rentals.get(rental_id), draft.live_placement(rental_id)
    if draft.target_of(rental_id) is not None:
        return None
    if rental is None or placement is None or not migration.can_migrate(rental, placement):
        state = f"it is {rental.state}: {rental.explanation}" if rental else "it has ended"
        raise migration.NotMigrated("not_active", state)
    worker = draft.workers.get(placement.worker_id)
    if worker is None or worker.health not in migration.SOURCE_HEALTH:
        why = "its worker does not answer just now: nothing can be copied from it"
        raise migration.NotMigrated("worker_not_ready", why)
    return Assignments(draft, observations).request(rental, placement, actor)


def wait_for_worker(rental: Rental, explanation: str) -> Step | None:
    """Return the step that explains why a rental waits for a worker; None if it has this explanation already."""
    if rental.state is RentalState.MIGRATING:
        return move_rental(rental, RentalState.QUEUED, ACTOR, explanation)
    if rental.explanation == explanation:
        return None
    return Step((write_rental(rental, {"explanation": explanation}),))


def wait_for_files(rental: Rental, worker_id: str, within_s: float) -> Step | None:
    """Return the step that explains that a rental waits for the lost worker that has its only files; else None."""
    within = f"{within_s / 60:.0f} min" if within_s >= 120 else f"{within_s:.0f} s"
    explanation = (
        f"{AWAITS_FILES}worker {worker_id} was lost before the first snapshot of them. It goes on when that worker is "
        f"started and its files are recovered; without them after {within}, or now by: orion restore {rental.name} "
        "--empty"
    )
    step = wait_for_worker(rental, explanation)
    event = rental_event("rental.files_awaited", explanation, rental, worker_id)
    return step + Step((), (event,)) if step else None


def _reserve(worker: Worker, rental: Rental, slot: int, placement_id: str) -> Step:
    reserved, epoch = reserve_slot(rental, worker, slot, placement_id, f"slot {slot}"), rental.next_epoch
    if rental.state is RentalState.MIGRATING:
        return Step((write_rental(rental, {"epoch": epoch}),)) + reserved
    reason = f"being made on worker {worker.id}"
    return move_rental(rental, RentalState.PROVISIONING, ACTOR, reason, worker.id, epoch=epoch) + reserved
