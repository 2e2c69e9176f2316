"""Steps that follow from the end of a task. Their guards drop them if another step came between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orion.manager.domain import migration, snapshots, start_commands
from orion.manager.domain.expiry import end_of
from orion.manager.domain.model import Placement, Rental
from orion.manager.domain.reconcile import give_up
from orion.manager.domain.states import MigrationPhase, PlacementState, RentalState
from orion.manager.domain.steps import ACTOR, Event, Step, Write, move_placement, move_rental, rental_event, write
from orion.manager.domain.tasks import Task, TaskEnded, TaskKind
from orion.manager.domain.world import World

MAX_REPORT_CHARS = 4096
"""The most characters of a worker's report that an event keeps: a longer report could fill the database."""
MAX_PROBLEM_CHARS = 300
MAX_ATTEMPTS = 3
"""The number of failed tries to make a rental on one worker, after which it is made on another."""
RECOVERY_ATTEMPTS = 2
"""The number of failed tries to recover the files on a returned worker, after which they are purged."""
WAITS_FOR_ITS_TARGET = frozenset({MigrationPhase.PRECOPY, MigrationPhase.QUIESCE, MigrationPhase.FINAL_SYNC})
"""The phases of a planned migration in which a failed task ends it."""


def follow(world: World, ended: TaskEnded) -> Step | None:
    """Return the step that records the outcome of a task; None if it changes nothing any more."""
    if ended.ok:
        return succeeded(world, ended)
    return failed(world, ended.task, ended.message, ended.attempts)


def succeeded(world: World, ended: TaskEnded) -> Step | None:
    """Return the step that records a success; None if it changes nothing any more."""
    task, report = ended.task, ended.report
    placement, source, rental = _rows(world, task)
    if task.kind is TaskKind.REACH:
        return _verified(task)
    if task.kind is TaskKind.RECOVER:
        return None  # the recovered snapshot was recorded by operations/recover.py
    if task.kind is TaskKind.DELETE:
        return _purged(task, placement, rental, report)
    if rental is None:
        return None
    if task.source is not None:
        return _migrated(task, placement, source, rental, report)
    return _created(rental, placement, ended) if placement else None


def failed(world: World, task: Task, message: str, attempts: int) -> Step | None:
    """Return the step after a failure: the explanation changes, and after MAX_ATTEMPTS another worker is tried."""
    placement, source, rental = _rows(world, task)
    if task.source is not None:
        return _not_migrated(task, placement, source, rental, message, attempts)
    if placement and placement.state is PlacementState.PREPARING and attempts >= MAX_ATTEMPTS:
        return give_up(placement, rental, message)
    if task.kind is not TaskKind.RECOVER:
        return _explained(task, placement, rental, message)
    if placement is None or rental is None or attempts < RECOVERY_ATTEMPTS:
        return None
    is_due = snapshots.is_to_be_recovered(rental, placement)
    return snapshots.not_recovered(rental, placement, message) if is_due else None


def _rows(world: World, task: Task) -> tuple[Placement | None, Placement | None, Rental | None]:
    """Return the placement of a task, the source of its migration, and their rental."""
    placement = world.placements.get(task.placement_id or "")
    source = world.placements.get(task.source.placement_id) if task.source else None
    either = placement or source
    return placement, source, world.rentals.get(either.rental_id) if either else None


def _migrated(
    task: Task, placement: Placement | None, source: Placement | None, rental: Rental, report: Mapping[str, Any]
) -> Step | None:
    if source is None or task.source is None or task.kind is TaskKind.THAW:
        return None
    name = str(report.get("generation", ""))
    if task.kind is TaskKind.PARK:
        return migration.cut_over(rental, source, None, task.source, name)
    if placement is None:
        return None
    if task.kind is TaskKind.PRECOPY:
        return migration.precopied(rental, placement, name)
    return migration.cut_over(rental, source, placement, task.source, name)


def _not_migrated(
    task: Task, placement: Placement | None, source: Placement | None, rental: Rental | None, why: str, attempts: int
) -> Step | None:
    """Return the step that ends a migration after a failure; None while the precopy is tried again.

    A quiesced source runs on at once, after its first failure.
    """
    if task.source is None or source is None or rental is None or not migration.can_migrate(rental, source):
        return None
    tries_again = task.kind is TaskKind.PRECOPY and attempts < MAX_ATTEMPTS
    if task.kind is TaskKind.THAW or source.quiesced_for != task.source.move or tries_again:
        return None
    if task.kind is TaskKind.PARK:
        return migration.abandon(rental, source, None, why)
    target = migration.as_target(placement)
    waits = target is not None and migration.phase_of(rental, source, target) in WAITS_FOR_ITS_TARGET
    return migration.abandon(rental, source, target, why) if waits else None


def _explained(task: Task, placement: Placement | None, rental: Rental | None, message: str) -> Step | None:
    if task.kind is TaskKind.REACH:
        return Step((_write_session(task, {"explanation": message}),))
    if placement is None or rental is None or not _is_awaited(task, placement, rental):
        return None
    change = {"explanation": f"trying again: {message}"}
    return Step((write(rental, change, state=rental.state, epoch=rental.epoch),))


def _is_awaited(task: Task, placement: Placement, rental: Rental) -> bool:
    """Return whether the renter waits for the task: for a creation or a release, and not for another clean-up."""
    if task.kind is TaskKind.CREATE:
        return placement.state is PlacementState.PREPARING
    return rental.state is RentalState.RELEASING


def _verified(task: Task) -> Step:
    reason = "reached by SSH with its pinned host key"
    event = Event(kind="worker.verified", actor=ACTOR, reason=reason, worker_id=task.worker_id)
    return Step((_write_session(task, {"verified_session": task.session_id, "explanation": ""}),), (event,))


def _write_session(task: Task, change: Mapping[str, Any]) -> Write:
    """Return the write of `change` to the worker of a task if its session is still that of the task."""
    return Write(kind="worker", id=task.worker_id, expect={"session_id": task.session_id}, change=change)


def _created(rental: Rental, placement: Placement, ended: TaskEnded) -> Step | None:
    task, report, wall = ended.task, ended.report, ended.wall
    started = _command_started(rental, placement, task, report)
    if placement.state is PlacementState.RUNNING:
        changed = rental_event("rental.key_changed", "its keys are in place", rental, task.worker_id)
        events = (changed,) if placement.public_key != task.public_key else ()
        keyed = write(placement, {"public_key": task.public_key}, state=PlacementState.RUNNING)
        return Step((keyed,), events) + started
    if placement.state is not PlacementState.PREPARING:
        return None
    to, reason = PlacementState.RUNNING, "its account is there"
    running = move_placement(placement, rental.owner, to, ACTOR, reason, public_key=task.public_key)
    if rental.state not in {RentalState.PROVISIONING, RentalState.MIGRATING}:
        return running
    ends_at = end_of(rental.ttl_s, ended.counts_from)
    change: dict[str, Any] = {}
    if rental.activated_at is None:
        change = {"activated_at": wall, "expires_at": ends_at}
    change |= {"restore_from": None} if rental.restore_from else {}
    change |= snapshots.activated(rental, placement.epoch, snapshots.began_with(report))
    reason = f"running on worker {placement.worker_id}{snapshots.lacking(report)}"
    filled = snapshots.filled(rental, placement.worker_id, report, wall)
    restored = Step((), (filled,) if filled else ())
    active = move_rental(rental, RentalState.ACTIVE, ACTOR, reason, placement.worker_id, **change)
    return running + started + restored + active


def _command_started(rental: Rental, placement: Placement, task: Task, report: Mapping[str, Any]) -> Step:
    """Return the step that records the run of the start command, whether it succeeded or not."""
    if not task.start_mark:
        return Step(())
    problem = str(report.get("start_problem", ""))[:MAX_PROBLEM_CHARS]
    event = start_commands.run_event(rental, placement, task.start_mark, problem)
    return Step((write(placement, start_commands.new_run(task.start_mark)),), (event,))


def _purged(task: Task, placement: Placement | None, rental: Rental | None, report: Mapping[str, Any]) -> Step | None:
    details = {"report": dict(report) if len(json.dumps(report)) <= MAX_REPORT_CHARS else {"cut": True}}
    if placement is None:
        rental_id, epoch = (task.item.rental_id, task.item.epoch) if task.item else (None, None)
        event = Event(
            kind="worker.cleaned",
            actor=ACTOR,
            reason="it held a rental that is not its own any more; purged, then looked: nothing is left",
            rental_id=rental_id,
            worker_id=task.worker_id,
            epoch=epoch,
            details=details,
        )
        return Step((), (event,))
    owner = rental.owner if rental else None
    reason = "purged, then looked: nothing is left"
    if placement.state is PlacementState.STOPPING:
        stopped = move_placement(placement, owner, PlacementState.STOPPED, ACTOR, "no process of it is left")
        after = replace(placement, state=PlacementState.STOPPED)
        return stopped + move_placement(after, owner, PlacementState.PURGED, ACTOR, reason, details)
    if placement.state in {PlacementState.FAILED, PlacementState.LOST, PlacementState.STOPPED}:
        return move_placement(placement, owner, PlacementState.PURGED, ACTOR, reason, details)
    return None
