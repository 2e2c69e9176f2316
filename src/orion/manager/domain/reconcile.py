"""The decision of the reconciler: from the world and observations to steps to commit and tasks to run. It is pure.

A part of the world that is enough (see world.World) leads to the same decision as the whole.

Safe order: a placement's row is committed before anything is made for it on a worker, and it keeps its slot until the
worker has looked for residue and found none. Inventories must be read before the rows: then every rental that an
inventory shows has its row, and a rental that was just made is never taken for an unknown one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orion.manager.domain import migration, snapshots, start_commands, states, tasks
from orion.manager.domain.assignment import Assignments, wait_for_files, wait_for_worker
from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.observations import Observations
from orion.manager.domain.states import ENDED, HOLDING, LIVE, Health, MigrationPhase, PlacementState, RentalState
from orion.manager.domain.steps import ACTOR, Event, Step, move_placement, move_rental, write, write_rental
from orion.manager.domain.tasks import Task
from orion.manager.domain.world import Draft, World

MAX_FAILURES = 5
"""The number of failed tries to make a rental that was never active, after which it is failed."""
RECOVERY_DEADLINE_S = 150.0
"""Seconds since a worker joined, of JOIN_DEADLINE_S in all, after which its files are purged though they are not
recovered: they must not keep a worker from the pool. A try that is under way ends first (operations/recover.py)."""
HOLDS_UNKNOWN = "it holds what the database has never placed"
ANSWERING = frozenset({Health.READY, Health.JOINING})
"""The health of workers that are to blame when a clean-up passes its deadline; a silent one is judged by its lease."""


@dataclass(frozen=True)
class Decision:
    steps: tuple[Step, ...]
    tasks: tuple[Task, ...]


def decide(loaded: World, observations: Observations) -> Decision:
    """Return the steps, in the order to commit them, and the tasks of the world after them."""
    world = Draft(loaded)
    steps: list[Step] = []

    def commit(step: Step | None) -> None:
        if step is not None and step.writes and world.apply(step):
            steps.append(step)

    for worker in list(world.workers.values()):
        commit(_keep_unknown_rentals(worker, observations))
    for placement in list(world.placements.values()):
        commit(_settle_placement(world, placement, observations))
    assignments = Assignments(world, observations)
    unsettled = (r for r in world.rentals.values() if r.state not in ENDED | {RentalState.ACTIVE})
    # Rentals that were active before come first, then the oldest.
    for rental in sorted(unsettled, key=lambda r: (r.activated_at is None, r.created_at, r.id)):
        commit(_settle_rental(world, rental, observations, assignments))
    evacuating = observations.evacuating
    for placement in sorted(world.placements.values(), key=lambda p: (p.worker_id not in evacuating, p.id)):
        commit(_settle_migration(world, placement, observations, assignments))
    for placement in list(world.placements.values()):
        owned = world.rentals.get(placement.rental_id)
        if owned and placement.state is PlacementState.RESERVED:
            commit(move_placement(placement, owned.owner, PlacementState.PREPARING, ACTOR, "making its account"))
    for worker in list(world.workers.values()):
        commit(_finish_drain(world, worker))
    quiesced = (migration.Source.of(p) for p in loaded.placements.values() if p.quiesced_for)
    thaws = (task for source in quiesced if (task := tasks.thaw(world, source)))
    return Decision(tuple(steps), (*tasks.wanted(world, observations), *thaws))


def _settle_placement(world: World, placement: Placement, observations: Observations) -> Step | None:
    """Return the next step of a placement by its worker and its rental; None: it is settled."""
    worker = world.workers.get(placement.worker_id)
    rental = world.rentals.get(placement.rental_id)
    if worker is None or worker.health is Health.DOWN:
        return _settle_if_down(worker, placement, rental, observations.wall)
    case = PlacementCase(placement=placement, worker=worker, rental=rental, observations=observations)
    return next((step for rule in PLACEMENT_RULES[placement.state] if (step := rule(case))), None)


@dataclass(frozen=True, kw_only=True)
class PlacementCase:
    """A placement whose worker exists and is not down."""

    placement: Placement
    worker: Worker
    rental: Rental | None
    observations: Observations

    def move(self, to: PlacementState, reason: str) -> Step:
        return move_placement(self.placement, self.rental.owner if self.rental else None, to, ACTOR, reason)

    @property
    def passed_clean_up_s(self) -> bool:
        """Whether a worker that answers has had more than the deadline to clean up."""
        return self.worker.health in ANSWERING and self.observations.age(self.placement.id) > states.DELETE_DEADLINE_S


def _settle_if_down(worker: Worker | None, placement: Placement, rental: Rental | None, wall: float) -> Step | None:
    owner, to = rental.owner if rental else None, PlacementState.PURGED
    if placement.state is PlacementState.STOPPED:
        return move_placement(placement, owner, to, ACTOR, "nothing was made there")
    if worker is None and placement.state in {PlacementState.FAILED, PlacementState.LOST}:
        return move_placement(placement, owner, to, ACTOR, "its worker was removed")
    return _lose(worker, placement, rental, wall)


def _nothing_was_made(case: PlacementCase) -> Step:
    # A placement is stopped only where nothing was made, or nothing is left.
    return case.move(PlacementState.PURGED, "nothing was made there")


def _container_restarted(case: PlacementCase) -> Step | None:
    # The start command may be the cause: after several restarts it is run no more.
    rental, wall = case.rental, case.observations.wall
    return start_commands.restarted(rental, case.placement, case.worker, wall) if rental else None


def _rental_ends(case: PlacementCase) -> Step | None:
    # A rental that ends, or has ended, needs no placement.
    if case.rental is not None and case.rental.state is not RentalState.RELEASING:
        return None
    to = PlacementState.STOPPED if case.placement.state is PlacementState.RESERVED else PlacementState.STOPPING
    return case.move(to, "its rental is being released")


def _not_made_in_time(case: PlacementCase) -> Step | None:
    # Another worker may be faster. The deadline is longer if a snapshot is restored first.
    within_s = states.RESTORE_DEADLINE_S if case.rental and snapshots.wanted(case.rental) else states.CREATE_DEADLINE_S
    if case.observations.age(case.placement.id) <= within_s:
        return None
    return give_up(case.placement, case.rental, f"it was not made within {within_s:.0f} s")


def _missing(case: PlacementCase) -> Step | None:
    # Only a restored database has a running placement without a key. Its rental may have migrated or ended since.
    if case.placement.public_key or case.observations.shows(case.placement):
        return None
    reason = "its worker does not have it: it was moved or ended after the backup"
    lost, rental = case.move(PlacementState.LOST, reason), case.rental
    if rental is None or rental.state is not RentalState.ACTIVE:
        return lost
    return lost + move_rental(rental, RentalState.MIGRATING, ACTOR, reason, case.worker.id)


def _command_ended(case: PlacementCase) -> Step | None:
    # The end is recorded for the owner, because the worker does not keep it.
    ends = case.observations.start_ends.get(case.worker.id, ())
    return start_commands.ended(case.rental, case.placement, ends) if case.rental else None


def _not_cleaned_up_in_time(case: PlacementCase) -> Step | None:
    # The rental does not wait for a worker that cannot clean up.
    if not case.passed_clean_up_s:
        return None
    failed = case.move(PlacementState.FAILED, "its clean-up passed its deadline")
    return failed + _fault_after_clean_up(case.worker, case.placement)


def _still_not_cleaned_up(case: PlacementCase) -> Step | None:
    # The deadline begins again when an operator resumes the worker.
    is_late = case.passed_clean_up_s and not case.worker.fault
    return _fault_after_clean_up(case.worker, case.placement) if is_late else None


def _not_recovered_in_time(case: PlacementCase) -> Step | None:
    # The worker must become ready in time, whatever the problem of the recovery is.
    late = case.worker.health is Health.JOINING and case.observations.age(case.worker.id) > RECOVERY_DEADLINE_S
    if not late or case.rental is None or not snapshots.is_to_be_recovered(case.rental, case.placement):
        return None
    return snapshots.not_recovered(case.rental, case.placement, f"it took longer than {RECOVERY_DEADLINE_S:.0f} s")


def _came_back_without_it(case: PlacementCase) -> Step | None:
    # Nothing is left to purge.
    is_shown = case.observations.shows(case.placement)
    return None if is_shown else case.move(PlacementState.PURGED, "its worker came back without it")


PlacementRule = Callable[[PlacementCase], Step | None]
PLACEMENT_RULES: Mapping[PlacementState, tuple[PlacementRule, ...]] = {
    PlacementState.RESERVED: (_rental_ends,),
    PlacementState.PREPARING: (_rental_ends, _not_made_in_time),
    PlacementState.RUNNING: (_container_restarted, _rental_ends, _missing, _command_ended),
    PlacementState.STOPPING: (_not_cleaned_up_in_time,),
    PlacementState.STOPPED: (_nothing_was_made,),
    PlacementState.FAILED: (_still_not_cleaned_up,),
    PlacementState.LOST: (_not_recovered_in_time, _came_back_without_it),
    PlacementState.PURGED: (),
}
"""The first rule that makes a step decides."""


def _lose(worker: Worker | None, placement: Placement, rental: Rental | None, wall: float) -> Step | None:
    if placement.state not in LIVE | {PlacementState.STOPPING, PlacementState.FAILED}:
        return None
    owner, reason = rental.owner if rental else None, "its worker is down"
    nothing_to_recover = placement.state not in start_commands.MAY_HAVE_RUN
    lost = move_placement(placement, owner, PlacementState.LOST, ACTOR, reason, files_recovered=nothing_to_recover)
    if worker is not None:
        # A worker that is not down any more may have been ordered to run the placement, which is not lost then.
        lost = Step((write(worker, {}, health=Health.DOWN),)) + lost
    if rental is None or placement.state not in LIVE or placement.is_target:
        return lost
    change, events = start_commands.after_loss(rental, placement, wall)
    worker_id = placement.worker_id
    if rental.state is RentalState.ACTIVE:
        reason = f"worker {worker_id} is down: moving to another one"
        lost += move_rental(rental, RentalState.MIGRATING, ACTOR, reason, worker_id, **change)
    elif rental.state is RentalState.PROVISIONING:
        reason = f"worker {worker_id} went down while it was being made there"
        lost += move_rental(rental, RentalState.QUEUED, ACTOR, reason, worker_id, **change)
    elif rental.state is RentalState.MIGRATING and change:
        lost += Step((write_rental(rental, change),))
    else:
        return lost
    return lost + Step((), events)


def give_up(placement: Placement, rental: Rental | None, reason: str) -> Step:
    """Return the step that fails a placement that could not be made, and queues its rental for another worker."""
    failed = move_placement(placement, rental.owner if rental else None, PlacementState.FAILED, ACTOR, reason)
    if rental is None or rental.state not in {RentalState.PROVISIONING, RentalState.MIGRATING}:
        return failed
    where, failures = placement.worker_id, rental.failures + 1
    explanation = f"worker {where}: {reason}"
    return failed + move_rental(rental, RentalState.QUEUED, ACTOR, explanation, where, failures=failures)


def _fault_after_clean_up(worker: Worker, placement: Placement) -> Step:
    reason = f"rental {placement.rental_id} could not be cleaned up"
    return _set_fault(worker, reason, "worker.cleanup_failed", reason, placement)


def _keep_unknown_rentals(worker: Worker, observations: Observations) -> Step | None:
    """Return the step that sets or clears the fault of a worker with unknown rentals; None: nothing changes.

    An unknown rental may be all that is left of a rental, so only an operator ends it (orion resume --give-up).
    """
    if worker.health is Health.DOWN or worker.id not in observations.inventories:
        return None
    found = [i for i in observations.inventories[worker.id] if (i.rental_id, i.epoch) in observations.unknown_rentals]
    if found and not worker.fault:
        names = ", ".join(sorted(item.rental_id for item in found)[:5])
        to_do = f"restore a backup that knows them, or end them for good: orion resume --give-up {worker.id}"
        fault = f"{HOLDS_UNKNOWN} ({names}): {to_do}"
        return _set_fault(worker, fault, "worker.holds_unknown", fault)
    if not found and worker.fault.startswith(HOLDS_UNKNOWN):
        gone = "the database knows every rental that it holds"
        return _set_fault(worker, "", "worker.holds_nothing_unknown", gone)
    return None


def _set_fault(worker: Worker, fault: str, kind: str, reason: str, placement: Placement | None = None) -> Step:
    """Return the step that sets the fault of a worker; the worker must be verified again before it is ready."""
    rental_id, epoch = (placement.rental_id, placement.epoch) if placement else (None, None)
    event = Event(kind=kind, actor=ACTOR, reason=reason, rental_id=rental_id, worker_id=worker.id, epoch=epoch)
    change = {"fault": fault, "verified_session": None}
    return Step((write(worker, change, session_id=worker.session_id, fault=worker.fault),), (event,))


def _settle_rental(world: Draft, rental: Rental, observations: Observations, assignments: Assignments) -> Step | None:
    """Return the next step of a rental that is not at rest; None if it waits for a task or needs nothing."""
    if rental.state is RentalState.RELEASING:
        return _finish_release(world, rental)
    if world.live_placement(rental.id) is not None or _is_being_stopped(world, rental):
        return None
    lost = _awaited_files(world, rental, observations)
    target = world.target_of(rental.id)
    if target is not None:
        problem = migration.target_problem(target, rental, world.workers.get(target.worker_id), observations.exiting)
        problem = problem or ("there is no snapshot of its files" if lost else "")
        ended = migration.end_target(target, rental.owner, problem) if problem else None
        return ended or migration.promote_target(rental, target)
    if rental.state is RentalState.PROVISIONING:
        return move_rental(rental, RentalState.QUEUED, ACTOR, "its placement was lost")
    if rental.activated_at is None and rental.failures >= MAX_FAILURES:
        reason = f"it could not be made {rental.failures} times; last: {rental.explanation}"
        return move_rental(rental, RentalState.FAILED, ACTOR, reason)
    if rental.activated_at is None and observations.age(rental.id) > states.QUEUE_DEADLINE_S:
        reason = f"no worker was free within {states.QUEUE_DEADLINE_S:.0f} s"
        return move_rental(rental, RentalState.FAILED, ACTOR, reason)
    failed = _may_run_command(world, rental, observations)
    if failed is not None:
        return wait_for_worker(rental, f"waiting until worker {failed.worker_id} has ended its start command")
    if lost is not None:
        return wait_for_files(rental, lost.worker_id, observations.awaits_files_s)
    return assignments.place(rental)


def _awaited_files(world: Draft, rental: Rental, observations: Observations) -> Placement | None:
    """Return the lost placement whose worker has the only files, so that the rental waits; None: it does not wait.

    A joining worker has come back: the recovery from it has a deadline of its own, RECOVERY_DEADLINE_S.
    """
    if not observations.awaits_files_s or not snapshots.is_without_snapshots(rental):
        return None
    for placement in world.placements_of(rental.id):
        worker = world.workers.get(placement.worker_id)
        holds = snapshots.is_to_be_recovered(rental, placement) and not placement.is_target
        if worker is None or not holds or placement.epoch < rental.activated_epoch:
            continue
        if worker.health is Health.JOINING or observations.age(placement.id) < observations.awaits_files_s:
            return placement
    return None


def _is_being_stopped(world: Draft, rental: Rental) -> bool:
    """Return whether a restore was requested and the current placement may still run: not ended, and not quiesced."""
    ending = {PlacementState.STOPPING, PlacementState.FAILED}
    current = (p for p in world.placements_of(rental.id) if p.epoch == rental.epoch and p.state in ending)
    return rental.state is RentalState.MIGRATING and any(not p.quiesced_for for p in current)


def _may_run_command(world: Draft, rental: Rental, observations: Observations) -> Placement | None:
    """Return a failed placement where the start command may still run, because the end of the last try is unknown.

    A rental without a start command does not wait for such a placement: no renter can reach it. After DELETE_DEADLINE_S
    the rental waits no longer; the worker is at fault then.
    """
    if not rental.start or rental.start_problem:
        return None
    given_up = (p for p in world.placements_of(rental.id) if p.state is PlacementState.FAILED)
    own = (p for p in given_up if not p.is_target and not p.quiesced_for)
    return next((p for p in own if observations.age(p.id) <= states.DELETE_DEADLINE_S), None)


def _settle_migration(
    world: Draft, placement: Placement, observations: Observations, assignments: Assignments
) -> Step | None:
    """Return the next step of a planned migration, or its first step: see domain/migration.py."""
    rental = world.rentals.get(placement.rental_id)
    if rental is None or placement.worker_id not in world.workers:
        return None
    if placement.is_target or not migration.can_migrate(rental, placement):
        return None
    target = world.target_of(rental.id)
    case = MigrationCase(
        world=world, rental=rental, source=placement, target=target, observations=observations, assignments=assignments
    )
    rules = MIGRATION_RULES[migration.phase_of(rental, placement, target)]
    return next((step for rule in rules if (step := rule(case))), None)


@dataclass(frozen=True, kw_only=True)
class MigrationCase:
    """A rental at rest, and the planned migration away from its worker, if one has begun."""

    world: World
    rental: Rental
    source: Placement
    target: Placement | None
    observations: Observations
    assignments: Assignments

    @property
    def is_evacuating(self) -> bool:
        return self.source.worker_id in self.observations.evacuating


def _quiesced_for_too_long(case: MigrationCase) -> Step | None:
    # Whatever the problem of the final sync is, no programs are frozen for longer.
    why = f"it was quiesced for {states.HELD_DEADLINE_S:.0f} s"
    is_late = case.observations.age(case.source.id) > states.HELD_DEADLINE_S
    return migration.abandon(case.rental, case.source, case.target, why) if is_late else None


def _target_is_of_no_use(case: MigrationCase) -> Step | None:
    # A target whose worker is lost, at fault or to be emptied would have to migrate again at once.
    if case.target is None:
        return None
    worker = case.world.workers.get(case.target.worker_id)
    problem = migration.target_problem(case.target, case.rental, worker, case.observations.exiting)
    return migration.abandon(case.rental, case.source, case.target, problem) if problem else None


def _quiesce(case: MigrationCase) -> Step | None:
    # The target has most of the files now, so the final sync is short.
    target = case.target
    why = f"for its move to worker {target.worker_id}" if target else ""
    return migration.quiesce(case.rental, case.source, target, why) if target else None


def _target_was_lost(case: MigrationCase) -> Step | None:
    # On a worker that is about to end the rental stays quiesced, and is parked.
    parks = case.is_evacuating
    why = "its target cannot be used any more"
    return None if parks else migration.abandon(case.rental, case.source, None, why)


def _begin(case: MigrationCase) -> Step | None:
    # A rental whose last migration has failed waits for a while.
    why = migration.must_leave(case.world.workers[case.source.worker_id], case.observations.evacuating)
    if not why or case.rental.id in case.observations.migration_backoff:
        return None
    return case.assignments.migrate(case.rental, case.source, why, parks=case.is_evacuating)


MigrationRule = Callable[[MigrationCase], Step | None]
MIGRATION_RULES: Mapping[MigrationPhase, tuple[MigrationRule, ...]] = {
    MigrationPhase.NONE: (_begin,),
    MigrationPhase.RESERVED: (_target_is_of_no_use,),
    MigrationPhase.PRECOPY: (_target_is_of_no_use,),
    MigrationPhase.QUIESCE: (_target_is_of_no_use, _quiesce),
    MigrationPhase.FINAL_SYNC: (_quiesced_for_too_long, _target_is_of_no_use),
    MigrationPhase.PARK: (_quiesced_for_too_long, _target_was_lost),
    MigrationPhase.CUTOVER: (),
    MigrationPhase.STALE: (_quiesced_for_too_long, _target_is_of_no_use),
}
"""The first rule that makes a step decides. The copying of files in a phase is a task: see tasks.TASK_RULES."""


def _finish_release(world: Draft, rental: Rental) -> Step | None:
    """Return the last step of a release; None while a placement may still run.

    The residue on a worker that is down is purged when that worker returns.
    """
    left = [p for p in world.placements_of(rental.id) if p.state is not PlacementState.PURGED]
    if any(p.state in HOLDING for p in left):
        return None
    to = RentalState.EXPIRED if rental.end == "expired" else RentalState.RELEASED
    away = ", ".join(sorted(p.worker_id for p in left))
    reason = f"it runs nowhere; its residue on {away} is purged when that returns" if left else "nothing of it is left"
    return move_rental(rental, to, ACTOR, reason)


def _finish_drain(world: Draft, worker: Worker) -> Step | None:
    if worker.intent is not states.Intent.DRAINING or not world.is_whole(worker.id) or world.used_on(worker.id):
        return None
    event = Event(kind="worker.drained", actor=ACTOR, reason="it holds no rental any more", worker_id=worker.id)
    return Step((write(worker, {"intent": states.Intent.DRAINED}, intent=states.Intent.DRAINING),), (event,))
