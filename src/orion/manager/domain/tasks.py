"""Work that the world asks for: on one worker, about one rental at most. What follows from its end: outcomes.py.

A task may be begun again at any time: what it makes or ends on a worker is the same then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from orion.manager.domain import copies, moves, starting
from orion.manager.domain.facts import Facts
from orion.manager.domain.model import Draft, Item, Placement, Rental, Worker, World
from orion.manager.domain.states import LIVE, Health, PlacementState

REACHABLE = frozenset({Health.READY, Health.SUSPECT, Health.UNKNOWN, Health.QUARANTINED})
"""Workers on which a rental may be made or changed; a joining one is only cleaned."""


class TaskKind(StrEnum):
    CREATE = "create"
    DELETE = "delete"
    REACH = "reach"
    SALVAGE = "salvage"
    """Copy aside what is left of a lost placement, before it is purged: see copies.wants_salvage."""
    SEED = "seed"
    FINISH = "finish"
    PARK = "park"
    THAW = "thaw"


@dataclass(frozen=True)
class Task:
    """Work on one worker. `placement_id` is None for reaching it and for what only its inventory knows."""

    kind: TaskKind
    worker_id: str
    session_id: str | None
    item: Item | None = None
    placement_id: str | None = None
    public_key: str = ""
    restore: str | None = None
    """What its home is filled with before its renter is let in: see copies.wanted."""
    start: str = ""
    start_mark: str = ""
    """The start command to run when its renter is let in, and the run that it is: see starting.due."""
    filled: str = ""
    """The copy that is in its home already, put there by a planned move."""
    rental_name: str = ""
    """The name that the rental's own sessions are told, where an account is made."""
    source: moves.Source | None = None
    """What a planned move takes away: see domain/moves.py."""
    owner: str = ""
    """The name of the rental's owner; empty for what only an inventory knows."""

    @property
    def placement_ids(self) -> tuple[str, ...]:
        """What its outcome is about."""
        both = self.placement_id, self.source and self.source.placement_id
        return tuple(identity for identity in both if identity)

    @property
    def key(self) -> tuple[str, str]:
        """Tasks with the same key never run at the same time: one worker, one rental."""
        return self.worker_id, self.item.rental_id if self.item else ""


def wanted(world: Draft, facts: Facts) -> Iterator[Task]:
    """All that is to be done now; some of it may be under way."""
    for placement in world.placements.values():
        task = _task_of(world, placement, facts)
        if task is not None:
            yield replace(task, owner=world.rentals[placement.rental_id].owner)
    for worker in world.workers.values():
        yield from _tasks_of_worker(world, worker, facts)


def thaw(world: World, source: moves.Source) -> Task | None:
    """What has just been let go on need not wait for its worker's next heartbeat, which would thaw it too."""
    placement, worker = world.placements.get(source.placement_id), world.workers.get(source.worker_id)
    rental = world.rentals.get(placement.rental_id) if placement else None
    if placement is None or worker is None or rental is None:
        return None
    if placement.held or placement.state is not PlacementState.RUNNING:
        return None
    item = Item(rental.id, rental.username, rental.uid, placement.epoch)
    return Task(TaskKind.THAW, worker.id, worker.session_id, item, placement.id, source=source, owner=rental.owner)


def _task_of(world: World, placement: Placement, facts: Facts) -> Task | None:
    worker = world.workers.get(placement.worker_id)
    rental = world.rentals.get(placement.rental_id)
    if worker is None or worker.health is Health.DOWN or rental is None:
        return None
    item = Item(rental.id, rental.username, rental.uid, placement.epoch)
    start_mark = starting.due(rental, placement, worker)
    wants_key = placement.state is PlacementState.PREPARING or (
        placement.state is PlacementState.RUNNING and (placement.public_key != rental.public_key or bool(start_mark))
    )
    if placement.standby or placement.held:
        task = _task_of_move(world, worker, rental, placement, item, facts)
        if task is not None or placement.state in LIVE:
            return task
    unseen = not placement.public_key and facts.inventories.get(worker.id) is None
    if placement.state is PlacementState.RUNNING and unseen:
        return None  # not made anew on a worker that may have lost or purged it: see reconcile._is_missing
    if wants_key and worker.health in REACHABLE:
        restore = copies.wanted(rental) if placement.state is PlacementState.PREPARING else None
        filled = placement.filled if restore == copies.NEWEST else ""
        start = rental.start if start_mark else ""
        key, fill = rental.public_key, (restore, start, start_mark, filled, rental.name)
        return Task(TaskKind.CREATE, worker.id, worker.session_id, item, placement.id, key, *fill)
    if not placement.standby and copies.wants_salvage(rental, placement):
        return Task(TaskKind.SALVAGE, worker.id, worker.session_id, item, placement.id)
    if placement.state in {PlacementState.STOPPING, PlacementState.FAILED, PlacementState.LOST}:
        return Task(TaskKind.DELETE, worker.id, worker.session_id, item, placement.id)
    return None


def _task_of_move(
    world: World, worker: Worker, rental: Rental, placement: Placement, item: Item, facts: Facts
) -> Task | None:
    if placement.standby:
        placed = world.live_placement(rental.id)
        if placement.state is not PlacementState.PREPARING or placed is None or not moves.can_move(rental, placed):
            return None
        if placed.held and placed.held != placement.epoch:
            return None
        kind = TaskKind.FINISH if placed.held else TaskKind.SEED
        if not placed.held and placement.filled:
            return None
        source = moves.Source(placed.id, placed.worker_id, placed.epoch, placed.held)
        key, name = rental.public_key, rental.name
        return Task(kind, worker.id, worker.session_id, item, placement.id, key, rental_name=name, source=source)
    stands_alone = placement.state is PlacementState.RUNNING and world.standby_of(rental.id) is None
    if stands_alone and worker.id in facts.vacating and moves.can_move(rental, placement):
        source = moves.Source(placement.id, worker.id, placement.epoch, placement.held)
        return Task(TaskKind.PARK, worker.id, worker.session_id, item, placement.id, source=source)
    return None


def _tasks_of_worker(world: Draft, worker: Worker, facts: Facts) -> Iterator[Task]:
    """Purge what only the inventory knows; reach a joining worker once nothing stale is left on it."""
    inventory = facts.inventories.get(worker.id)
    if worker.health is Health.DOWN or inventory is None or not world.is_whole(worker.id):
        return
    placed = world.placements_on(worker.id)
    known = {(p.rental_id, p.epoch) for p in placed}
    orphans = [item for item in inventory if (item.rental_id, item.epoch) not in known]
    for item in orphans:
        if (item.rental_id, item.epoch) in facts.strangers:
            continue
        yield Task(TaskKind.DELETE, worker.id, worker.session_id, item)
    stale = any(p.state is PlacementState.LOST for p in placed)
    unverified = worker.verified_session != worker.session_id
    if worker.health is Health.JOINING and unverified and not orphans and not stale and not worker.fault:
        yield Task(TaskKind.REACH, worker.id, worker.session_id)
