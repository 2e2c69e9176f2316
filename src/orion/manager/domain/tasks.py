"""The tasks of the reconciler, each on one worker and for one rental at most; outcomes.py records how they end.

A task may be repeated at any time, with the same result on its worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orion.manager.domain import migration, snapshots, start_commands
from orion.manager.domain.model import Item, Placement, Rental, Worker
from orion.manager.domain.observations import Observations
from orion.manager.domain.states import LIVE, Health, MigrationPhase, PlacementState
from orion.manager.domain.steps import Step
from orion.manager.domain.world import Draft, World

REACHABLE = frozenset({Health.READY, Health.SUSPECT, Health.UNKNOWN, Health.QUARANTINED})
"""The health of workers on which a rental may be made or changed; a joining one is only cleaned."""


class TaskKind(StrEnum):
    """The kinds of tasks. The values are labels of the metric of jobs, and stay as they were released."""

    CREATE = "create"
    DELETE = "delete"
    REACH = "reach"
    RECOVER = "salvage"
    """Make a recovered snapshot of a lost placement before it is purged: see snapshots.is_to_be_recovered."""
    PRECOPY = "seed"
    FINAL_SYNC = "finish"
    PARK = "park"
    THAW = "thaw"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work on one worker. `placement_id`: None if the worker is to be reached, or if the rental is in no row."""

    kind: TaskKind
    worker_id: str
    session_id: str | None
    item: Item | None = None
    placement_id: str | None = None
    public_key: str = ""
    restore: str | None = None
    """The snapshot that fills the home before the renter is activated: see snapshots.wanted."""
    start: str = ""
    start_mark: str = ""
    """The mark of the start command to run at the activation, empty for none: see start_commands.due."""
    target_snapshot: str = ""
    """The snapshot that a planned migration has already put into the home."""
    rental_name: str = ""
    """The name that sessions of the rental show; empty if no account is made."""
    source: migration.Source | None = None
    """The source of a planned migration: see migration.py."""
    owner: str = ""
    """The name of the rental's owner; empty if the rental is in no row."""

    @property
    def placement_ids(self) -> tuple[str, ...]:
        """The ids of the placements whose rows the outcome may change."""
        both = self.placement_id, self.source and self.source.placement_id
        return tuple(identity for identity in both if identity)

    @property
    def key(self) -> tuple[str, str]:
        """The worker's id and the rental's id; tasks with the same key never run at the same time."""
        return self.worker_id, self.item.rental_id if self.item else ""


@dataclass(frozen=True, kw_only=True)
class TaskEnded:
    """The end of a task. `attempts`: its failures so far, this one included; `wall`: UTC seconds."""

    task: Task
    ok: bool
    wall: float
    counts_from: float | None
    """UTC seconds from which the time of a rental that begins now is counted; None: see expiry.count."""
    report: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    attempts: int = 0


Follow = Callable[[World, TaskEnded], Step | None]
"""The type of outcomes.follow, which the store gets as an argument."""


def wanted(world: Draft, observations: Observations) -> Iterator[Task]:
    """Return the tasks of the world as it is now; some of them may be under way."""
    yield from filter(None, (_task_of(world, placement, observations) for placement in world.placements.values()))
    for worker in world.workers.values():
        yield from _tasks_of_worker(world, worker, observations)


def thaw(world: World, source: migration.Source) -> Task | None:
    """Return the task that thaws the source of an abandoned migration; None if it is quiesced or does not run.

    The reply to the next heartbeat would thaw the source too, but later.
    """
    placement, worker = world.placements.get(source.placement_id), world.workers.get(source.worker_id)
    if placement is None or placement.quiesced_for or placement.state is not PlacementState.RUNNING:
        return None
    rental = world.rentals.get(placement.rental_id)
    if worker is None or rental is None:
        return None
    return _task(TaskKind.THAW, placement, worker, rental, source=source)


def _task_of(world: World, placement: Placement, observations: Observations) -> Task | None:
    worker = world.workers.get(placement.worker_id)
    rental = world.rentals.get(placement.rental_id)
    if worker is None or worker.health is Health.DOWN or rental is None:
        return None
    case = TaskCase(world=world, placement=placement, worker=worker, rental=rental, observations=observations)
    return next((task(case) for applies, task in TASK_RULES if applies(case)), None)


def _task(kind: TaskKind, placement: Placement, worker: Worker, rental: Rental, **more: Any) -> Task:
    item = Item(rental_id=rental.id, username=rental.username, uid=rental.uid, epoch=placement.epoch)
    return Task(
        kind=kind,
        worker_id=worker.id,
        session_id=worker.session_id,
        item=item,
        placement_id=placement.id,
        owner=rental.owner,
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class TaskCase:
    """A placement with its rental, and its worker, which is not down."""

    world: World
    placement: Placement
    worker: Worker
    rental: Rental
    observations: Observations

    def task(self, kind: TaskKind, **more: Any) -> Task:
        return _task(kind, self.placement, self.worker, self.rental, **more)


def _is_target(case: TaskCase) -> bool:
    # The target is not activated before the cutover, so it gets no other task.
    return migration.as_target(case.placement) is not None


def _is_quiesced(case: TaskCase) -> bool:
    # The source gets no task that would let it run.
    return case.placement.quiesced_for != 0 and case.placement.state in LIVE


def _was_not_shown(case: TaskCase) -> bool:
    # The worker may have lost or purged the placement, and has shown no inventory yet: see reconcile._missing.
    placement = case.placement
    unseen = not placement.public_key and case.observations.inventories.get(case.worker.id) is None
    return placement.state is PlacementState.RUNNING and unseen


def _is_to_be_made(case: TaskCase) -> bool:
    # The account, the keys or the run of the start command are not there yet, or are out of date.
    placement, rental = case.placement, case.rental
    if case.worker.health not in REACHABLE:
        return False
    if placement.state is PlacementState.PREPARING:
        return True
    others = placement.public_key != rental.public_key or bool(start_commands.due(rental, placement, case.worker))
    return placement.state is PlacementState.RUNNING and others


def _is_to_be_recovered(case: TaskCase) -> bool:
    # The worker of a lost placement may have files of which there is no snapshot; a target has no such files.
    return not case.placement.is_target and snapshots.is_to_be_recovered(case.rental, case.placement)


def _is_to_be_purged(case: TaskCase) -> bool:
    # Its residue on the worker is not needed any more.
    return case.placement.state in {PlacementState.STOPPING, PlacementState.FAILED, PlacementState.LOST}


def _fill_target(case: TaskCase) -> Task | None:
    source = case.world.live_placement(case.rental.id)
    if source is None or not migration.can_migrate(case.rental, source):
        return None
    kind = FILLING.get(migration.phase_of(case.rental, source, case.placement))
    if kind is None:
        return None
    rental, of = case.rental, migration.Source.of(source)
    return case.task(kind, public_key=rental.public_key, rental_name=rental.name, source=of)


def _park(case: TaskCase) -> Task | None:
    """Return the task that takes the last snapshot of a rental that is parked; None for every other quiesced source."""
    placement, rental = case.placement, case.rental
    phase = migration.phase_of(rental, placement, case.world.target_of(rental.id))
    ends = case.worker.id in case.observations.evacuating and migration.can_migrate(rental, placement)
    parks = ends and phase is MigrationPhase.PARK
    return case.task(TaskKind.PARK, source=migration.Source.of(placement)) if parks else None


def _create(case: TaskCase) -> Task:
    placement, rental = case.placement, case.rental
    start_mark = start_commands.due(rental, placement, case.worker)
    restore = snapshots.wanted(rental) if placement.state is PlacementState.PREPARING else None
    return case.task(
        TaskKind.CREATE,
        public_key=rental.public_key,
        restore=restore,
        start=rental.start if start_mark else "",
        start_mark=start_mark,
        target_snapshot=placement.target_snapshot if restore == snapshots.NEWEST else "",
        rental_name=rental.name,
    )


FILLING = {MigrationPhase.PRECOPY: TaskKind.PRECOPY, MigrationPhase.FINAL_SYNC: TaskKind.FINAL_SYNC}
"""The tasks that fill the target of a planned migration, by its phase."""
TaskRule = tuple[Callable[[TaskCase], bool], Callable[[TaskCase], Task | None]]
TASK_RULES: tuple[TaskRule, ...] = (
    (_is_target, _fill_target),
    (_is_quiesced, _park),
    (_was_not_shown, lambda _: None),
    (_is_to_be_made, _create),
    (_is_to_be_recovered, lambda case: case.task(TaskKind.RECOVER)),
    (_is_to_be_purged, lambda case: case.task(TaskKind.DELETE)),
)
"""The first rule that applies to a placement decides on its task, if it has one."""


def _tasks_of_worker(world: Draft, worker: Worker, observations: Observations) -> Iterator[Task]:
    """Return the purges of orphans in the inventory, and the check of a joining worker that has nothing stale left."""
    inventory = observations.inventories.get(worker.id)
    if worker.health is Health.DOWN or inventory is None or not world.is_whole(worker.id):
        return
    placed = world.placements_on(worker.id)
    known = {(p.rental_id, p.epoch) for p in placed}
    orphans = [item for item in inventory if (item.rental_id, item.epoch) not in known]
    for item in orphans:
        if (item.rental_id, item.epoch) not in observations.unknown_rentals:
            yield Task(kind=TaskKind.DELETE, worker_id=worker.id, session_id=worker.session_id, item=item)
    stale = any(p.state is PlacementState.LOST for p in placed)
    unverified = worker.verified_session != worker.session_id
    if worker.health is Health.JOINING and unverified and not orphans and not stale and not worker.fault:
        yield Task(kind=TaskKind.REACH, worker_id=worker.id, session_id=worker.session_id)
