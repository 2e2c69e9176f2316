"""What to do next, from a snapshot: steps to commit and tasks to run. Pure; the same at start and on a hint.

The snapshot may be a part of the world (model.World says which); what is decided from it is what the whole world would
have decided about that part: tests/property/test_property_partial_world.py.

Safe order: a placement row is committed before anything is made for it on a worker, and it holds its slot until the
worker says, after looking, that nothing is left. Inventories must be read before the rest of the snapshot: what an
older inventory shows has its row in a newer snapshot, so a rental that was just made is never taken for an orphan.
"""

from __future__ import annotations

from dataclasses import dataclass

from orion.manager.domain import copies, moves, starting, tasks
from orion.manager.domain.facts import Facts
from orion.manager.domain.model import (
    Draft,
    Event,
    Placement,
    Rental,
    Step,
    Worker,
    World,
    Write,
    merge,
    move_placement,
    move_rental,
)
from orion.manager.domain.moves import ACTOR
from orion.manager.domain.places import Places, wait, wait_for_files
from orion.manager.domain.states import (
    CREATE_DEADLINE_S,
    DELETE_DEADLINE_S,
    ENDED,
    HOLDING,
    LIVE,
    QUEUE_DEADLINE_S,
    RESTORE_DEADLINE_S,
    Health,
    Intent,
    PlacementState,
    RentalState,
)
from orion.manager.domain.tasks import Task

MAX_FAILURES = 5
"""A rental that was never active and could not be made so often is failed."""

SALVAGE_WITHIN_S = 150.0
"""Of a worker's joining, which has JOIN_DEADLINE_S in all: what is not copied aside by then is given up. A try that is
under way then ends first (loops/salvaging.py), and then it is purged."""

HOLDS_STRANGERS = "it holds what the database has never placed"

ANSWERING = frozenset({Health.READY, Health.JOINING})
"""Workers that are to blame when a clean-up passes its deadline; a silent one is judged by its lease."""


@dataclass(frozen=True)
class Decision:
    steps: tuple[Step, ...]
    tasks: tuple[Task, ...]


def decide(snapshot: World, facts: Facts) -> Decision:
    """The steps, in the order to commit them, and the tasks that the world after them asks for."""
    world = Draft(snapshot)
    steps: list[Step] = []

    def commit(step: Step | None) -> None:
        if step is not None and step.writes and world.apply(step):
            steps.append(step)

    for worker in list(world.workers.values()):
        commit(_keep_strangers(worker, facts))
    for placement in list(world.placements.values()):
        commit(_settle_placement(world, placement, facts))
    places = Places(world, facts)
    for rental in _queue(world):
        commit(_settle_rental(world, rental, facts, places))
    for placement in sorted(world.placements.values(), key=lambda p: (p.worker_id not in facts.vacating, p.id)):
        commit(_settle_move(world, placement, facts, places))
    for placement in list(world.placements.values()):
        if placement.state is PlacementState.RESERVED:
            commit(_prepare(world, placement))
    for worker in list(world.workers.values()):
        commit(_drained(world, worker))
    held = (moves.Source(p.id, p.worker_id, p.epoch, p.held) for p in snapshot.placements.values() if p.held)
    thaws = (task for task in (tasks.thaw(world, source) for source in held) if task)
    return Decision(tuple(steps), (*tasks.wanted(world, facts), *thaws))


def _settle_placement(world: World, placement: Placement, facts: Facts) -> Step | None:
    """One placement against its worker and its rental, most certain facts first."""
    worker = world.workers.get(placement.worker_id)
    rental = world.rentals.get(placement.rental_id)
    owner = rental.owner if rental else None
    if placement.state is PlacementState.STOPPED:
        return move_placement(placement, owner, PlacementState.PURGED, ACTOR, "nothing was made there")
    if worker is None and placement.state in {PlacementState.FAILED, PlacementState.LOST}:
        return move_placement(placement, owner, PlacementState.PURGED, ACTOR, "its worker was removed")
    if worker is None or worker.health is Health.DOWN:
        return _lose(worker, placement, rental, facts)
    restarted = starting.restarted(rental, placement, worker, facts.wall) if rental else None
    if restarted is not None:
        return restarted
    if placement.state in LIVE and (rental is None or rental.state is RentalState.RELEASING):
        to = PlacementState.STOPPED if placement.state is PlacementState.RESERVED else PlacementState.STOPPING
        return move_placement(placement, owner, to, ACTOR, "its rental is being released")
    within_s = RESTORE_DEADLINE_S if rental and copies.wanted(rental) else CREATE_DEADLINE_S
    if placement.state is PlacementState.PREPARING and facts.age(placement.id) > within_s:
        return give_up(placement, rental, f"it was not made within {within_s:.0f} s")
    if _is_missing(placement, facts):
        return _miss(placement, rental)
    at_fault = worker.health in ANSWERING and facts.age(placement.id) > DELETE_DEADLINE_S
    if placement.state is PlacementState.STOPPING and at_fault:
        failed = move_placement(placement, owner, PlacementState.FAILED, ACTOR, "its clean-up passed its deadline")
        return merge((failed, _blame(worker, placement)))
    if placement.state is PlacementState.FAILED and at_fault and not worker.fault:
        return _blame(worker, placement)
    if worker.health is Health.JOINING and facts.age(worker.id) > SALVAGE_WITHIN_S:
        given_up = _give_up_salvage(placement, rental)
        if given_up is not None:
            return given_up
    if placement.state is PlacementState.LOST and not facts.shows(placement):
        return move_placement(placement, owner, PlacementState.PURGED, ACTOR, "its worker came back without it")
    return starting.ended(rental, placement, facts.start_ends.get(worker.id, ())) if rental else None


def _lose(worker: Worker | None, placement: Placement, rental: Rental | None, facts: Facts) -> Step | None:
    if placement.state not in LIVE | {PlacementState.STOPPING, PlacementState.FAILED}:
        return None
    owner = rental.owner if rental else None
    nothing_to_salvage = placement.state not in starting.MAY_HAVE_RUN
    lost = move_placement(
        placement, owner, PlacementState.LOST, ACTOR, "its worker is down", salvaged=nothing_to_salvage
    )
    if worker is not None:
        # A worker that is not down any more may have been told to run it: then it is lost no more.
        lost = merge((Step((Write("worker", worker.id, {"health": Health.DOWN}, {}),)), lost))
    if rental is None or placement.state not in LIVE or placement.standby:
        return lost
    change, events = starting.after_a_loss(rental, placement, facts.wall)
    told = Step((), events)
    if rental.state is RentalState.ACTIVE:
        reason = f"worker {placement.worker_id} is down: moving to another one"
        moved = move_rental(rental, RentalState.MIGRATING, ACTOR, reason, placement.worker_id, **change)
        return merge((lost, moved, told))
    if rental.state is RentalState.PROVISIONING:
        reason = f"worker {placement.worker_id} went down while it was being made there"
        moved = move_rental(rental, RentalState.QUEUED, ACTOR, reason, placement.worker_id, **change)
        return merge((lost, moved, told))
    if rental.state is RentalState.MIGRATING and change:
        here = {"state": rental.state, "epoch": rental.epoch}
        return merge((lost, Step((Write("rental", rental.id, here, change),), events)))
    return lost


def _give_up_salvage(placement: Placement, rental: Rental | None) -> Step | None:
    """So that its worker is ready in time, whatever keeps its files from being copied aside."""
    if rental is None or not copies.wants_salvage(rental, placement):
        return None
    return copies.not_salvaged(rental, placement, f"it took longer than {SALVAGE_WITHIN_S:.0f} s")


def _is_missing(placement: Placement, facts: Facts) -> bool:
    """Only a restore leaves a running placement without a key: then it is there, or was moved or ended since."""
    return placement.state is PlacementState.RUNNING and not placement.public_key and not facts.shows(placement)


def _miss(placement: Placement, rental: Rental | None) -> Step:
    reason = "its worker does not have it: it was moved or ended after the backup"
    lost = move_placement(placement, rental.owner if rental else None, PlacementState.LOST, ACTOR, reason)
    if rental is None or rental.state is not RentalState.ACTIVE:
        return lost
    return merge((lost, move_rental(rental, RentalState.MIGRATING, ACTOR, reason, placement.worker_id)))


def give_up(placement: Placement, rental: Rental | None, reason: str) -> Step:
    """Making it here failed: clean up here, try elsewhere."""
    failed = move_placement(placement, rental.owner if rental else None, PlacementState.FAILED, ACTOR, reason)
    if rental is None or rental.state not in {RentalState.PROVISIONING, RentalState.MIGRATING}:
        return failed
    queued = move_rental(
        rental,
        RentalState.QUEUED,
        ACTOR,
        f"worker {placement.worker_id}: {reason}",
        placement.worker_id,
        failures=rental.failures + 1,
    )
    return merge((failed, queued))


def _blame(worker: Worker, placement: Placement) -> Step:
    reason = f"rental {placement.rental_id} could not be cleaned up"
    event = Event("worker.cleanup_failed", ACTOR, reason, None, placement.rental_id, worker.id, placement.epoch)
    return _set_fault(worker, reason, event)


def _keep_strangers(worker: Worker, facts: Facts) -> Step | None:
    """What the database has never heard of may be all that is left of a rental: only an operator ends it.

    The worker is set aside for it, until it is given up (orion resume --give-up) or is not there any more.
    """
    if worker.health is Health.DOWN or worker.id not in facts.inventories:
        return None
    found = [i for i in facts.inventories[worker.id] if (i.rental_id, i.epoch) in facts.strangers]
    if found and not worker.fault:
        names = ", ".join(sorted(item.rental_id for item in found)[:5])
        fault = (
            f"{HOLDS_STRANGERS} ({names}): restore a backup that knows them, "
            f"or end them for good: orion resume --give-up {worker.id}"
        )
        return _set_fault(worker, fault, Event("worker.holds_unknown", ACTOR, fault, worker_id=worker.id))
    if not found and worker.fault.startswith(HOLDS_STRANGERS):
        gone = "what the database has never placed is not there any more"
        return _set_fault(worker, "", Event("worker.holds_nothing_unknown", ACTOR, gone, worker_id=worker.id))
    return None


def _set_fault(worker: Worker, fault: str, event: Event) -> Step:
    """With another fault, or none, it must be checked anew before it is ready."""
    expect = {"session_id": worker.session_id, "fault": worker.fault}
    return Step((Write("worker", worker.id, expect, {"fault": fault, "verified_session": None}),), (event,))


def _queue(world: World) -> list[Rental]:
    """Those that were active before first, then by age; one that does not fit blocks nobody."""
    return sorted(
        (r for r in world.rentals.values() if r.state not in ENDED | {RentalState.ACTIVE}),
        key=lambda r: (r.activated_at is None, r.created_at, r.id),
    )


def _settle_rental(world: Draft, rental: Rental, facts: Facts, places: Places) -> Step | None:
    if rental.state is RentalState.RELEASING:
        return _finish_release(world, rental)
    if world.live_placement(rental.id) is not None or _is_being_stopped(world, rental):
        return None
    lost = _may_come_back_with_its_files(world, rental, facts)
    standby = world.standby_of(rental.id)
    if standby is not None:
        problem = moves.problem_of(standby, rental, world.workers.get(standby.worker_id), facts.leaving)
        problem = problem or ("no copy of its files was made for it" if lost else "")
        return moves.end_standby(standby, rental.owner, problem) if problem else moves.promote(rental, standby)
    if rental.state is RentalState.PROVISIONING:
        return move_rental(rental, RentalState.QUEUED, ACTOR, "its place was lost")
    if rental.activated_at is None and rental.failures >= MAX_FAILURES:
        reason = f"it could not be made {rental.failures} times; last: {rental.explanation}"
        return move_rental(rental, RentalState.FAILED, ACTOR, reason)
    if rental.activated_at is None and facts.age(rental.id) > QUEUE_DEADLINE_S:
        return move_rental(rental, RentalState.FAILED, ACTOR, f"no worker was free within {QUEUE_DEADLINE_S:.0f} s")
    at_work = _may_be_at_work(world, rental, facts)
    if at_work is not None:
        return wait(rental, f"waiting until worker {at_work.worker_id} has ended what it may have begun of it")
    if lost is not None:
        return wait_for_files(rental, lost.worker_id, facts.awaits_files_s)
    return places.place(rental)


def _may_come_back_with_its_files(world: Draft, rental: Rental, facts: Facts) -> Placement | None:
    """Return the lost placement whose worker is waited for, because the only files of the rental are there.

    A worker that joins has come back: it has its own deadline (SALVAGE_WITHIN_S) to hand them over.
    """
    if not facts.awaits_files_s or not copies.is_without_copies(rental):
        return None
    for placement in world.placements_of(rental.id):
        worker = world.workers.get(placement.worker_id)
        holds = copies.wants_salvage(rental, placement) and not placement.standby
        if worker is None or not holds or placement.epoch < rental.let_in_epoch:
            continue
        if worker.health is Health.JOINING or facts.age(placement.id) < facts.awaits_files_s:
            return placement
    return None


def _is_being_stopped(world: Draft, rental: Rental) -> bool:
    """It is to begin again from a copy, and what runs of it has not been seen to have ended, or to stand still."""
    ending = {PlacementState.STOPPING, PlacementState.FAILED}
    return rental.state is RentalState.MIGRATING and any(
        p.epoch == rental.epoch and p.state in ending and not p.held for p in world.placements_of(rental.id)
    )


def _may_be_at_work(world: Draft, rental: Rental, facts: Facts) -> Placement | None:
    """Where it was given up, and its start command may be running: how the last try there ended may be unknown.

    Nobody else is led there, so a rental without a command goes on elsewhere at once. A clean-up that passes its
    deadline holds up its worker, and the rental no longer.
    """
    if not rental.start or rental.start_problem:
        return None
    given_up = (p for p in world.placements_of(rental.id) if p.state is PlacementState.FAILED)
    own = (p for p in given_up if not p.standby and not p.held)
    return next((p for p in own if facts.age(p.id) <= DELETE_DEADLINE_S), None)


def _settle_move(world: Draft, placement: Placement, facts: Facts, places: Places) -> Step | None:
    """The next step of a planned move, the first one included: see domain/moves.py."""
    worker, rental = world.workers.get(placement.worker_id), world.rentals.get(placement.rental_id)
    if placement.standby or worker is None or rental is None or not moves.can_move(rental, placement):
        return None
    standby = world.standby_of(rental.id)
    why = moves.must_leave(worker, facts.vacating)
    if placement.held and facts.age(placement.id) > moves.HELD_DEADLINE_S:
        return moves.abandon(rental, placement, standby, f"it stood still for {moves.HELD_DEADLINE_S:.0f} s")
    if standby is not None:
        problem = moves.problem_of(standby, rental, world.workers.get(standby.worker_id), facts.leaving)
        if problem:
            return moves.abandon(rental, placement, standby, problem)
        if standby.state is PlacementState.PREPARING and standby.filled and not placement.held:
            return moves.hold(rental, placement, standby, f"for its move to worker {standby.worker_id}")
        return None
    if placement.held:
        parks = worker.id in facts.vacating
        return None if parks else moves.abandon(rental, placement, None, "where it was to go is not ready any more")
    if not why or rental.id in facts.resting:
        return None
    return places.move(rental, placement, why, parks=worker.id in facts.vacating)


def _finish_release(world: Draft, rental: Rental) -> Step | None:
    """Done when no placement of it can run any more; what a dead worker keeps is purged when it returns."""
    left = [p for p in world.placements_of(rental.id) if p.state is not PlacementState.PURGED]
    if any(p.state in HOLDING for p in left):
        return None
    to = RentalState.EXPIRED if rental.end == "expired" else RentalState.RELEASED
    reason = "nothing of it is left"
    if left:
        away = ", ".join(sorted(p.worker_id for p in left))
        reason = f"it runs nowhere; what it left on {away} is purged when that returns"
    return move_rental(rental, to, ACTOR, reason)


def _prepare(world: World, placement: Placement) -> Step | None:
    rental = world.rentals.get(placement.rental_id)
    if rental is None:
        return None
    return move_placement(placement, rental.owner, PlacementState.PREPARING, ACTOR, "making its account")


def _drained(world: Draft, worker: Worker) -> Step | None:
    if worker.intent is not Intent.DRAINING or not world.is_whole(worker.id) or world.used_on(worker.id):
        return None
    event = Event("worker.drained", ACTOR, "it holds no rental any more", worker_id=worker.id)
    return Step((Write("worker", worker.id, {"intent": Intent.DRAINING}, {"intent": Intent.DRAINED}),), (event,))
