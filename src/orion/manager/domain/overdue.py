"""The workers, rentals and placements that are past their deadlines, with advice, for `orion status`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orion.manager.domain.assignment import AWAITS_FILES
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import TABLES, Health, PlacementState, RentalState
from orion.manager.domain.steps import Kind
from orion.manager.domain.world import World

MAX_SHOWN = 200
"""The most workers of each health that are looked at, and the most rows that are shown."""
QUEUE_NOTICE_S = 300.0
"""Seconds in the queue after which a rental is shown; its deadline is a day."""

WHAT_TO_DO: Mapping[tuple[str, str], str] = {
    ("worker", Health.JOINING): "look at its log; it is quarantined by itself",
    ("worker", Health.SUSPECT): "look at its log and its network; it is ready again or down by itself",
    ("worker", Health.UNKNOWN): "look at its log and its network; it is ready again or down by itself",
    ("worker", Health.QUARANTINED): "look at it, then: orion resume {worker}; or stop it and: orion remove {worker}",
    ("rental", RentalState.QUEUED): "start more workers (make up WORKERS=...), or release rentals that are not needed",
    ("rental", RentalState.PROVISIONING): "look at its worker: orion drain {worker} sends the next ones elsewhere",
    ("rental", RentalState.MIGRATING): "look at its worker: orion drain {worker} sends the next ones elsewhere",
    ("rental", RentalState.RELEASING): "look at its worker; stopping that, then orion remove {worker}, ends it",
    ("placement", PlacementState.RESERVED): "look at the log of manager_app: its reconciler should have settled it",
    ("placement", PlacementState.PREPARING): "look at its worker: it is made elsewhere by itself",
    ("placement", PlacementState.STOPPING): "look at its worker; stopping that, then orion remove {worker}, ends it",
    ("placement", PlacementState.STOPPED): "look at the log of manager_app: its reconciler should have settled it",
    ("placement", PlacementState.FAILED): "look at its worker; stopping that, then orion remove {worker}, ends it",
}
"""The advice for each state with a deadline, and for those that wait for an operator."""


@dataclass(frozen=True, kw_only=True)
class Overdue:
    kind: Kind
    id: str
    name: str
    """The hostname of a worker, or the name of a rental."""
    state: str
    since_s: float
    why: str
    what_to_do: str


def overdue(world: World, ages: Mapping[str, float]) -> list[Overdue]:
    """Return the rows that are overdue, the longest first. `ages`: seconds that each row (by id) is in its state."""
    found = [item for item in _all(world, ages) if item.since_s > _limit_s(item.kind, item.state)]
    return sorted(found, key=lambda item: -item.since_s)


def workers_to_look_at(pool_index: PoolIndex, now: float) -> list[str]:
    """Return the workers that are past their deadline, up to MAX_SHOWN of each health, the longest first."""
    limits_s = {health: _limit_s("worker", health) for health in Health}
    return [w for health, limit_s in limits_s.items() for w in pool_index.longest_in(health, limit_s, now, MAX_SHOWN)]


def _limit_s(kind: Kind, state: str) -> float:
    if (kind, state) == ("worker", Health.QUARANTINED):
        return -1.0  # a quarantined worker waits for a person from the first moment
    if (kind, state) == ("rental", RentalState.QUEUED):
        return QUEUE_NOTICE_S
    deadline_s = TABLES[kind][state].deadline_s
    return float("inf") if deadline_s is None else deadline_s


def _all(world: World, ages: Mapping[str, float]) -> Iterator[Overdue]:
    def item(kind: Kind, row_id: str, name: str, state: str, why: str, worker_id: str) -> Overdue:
        advice = WHAT_TO_DO.get((kind, state), "").format(worker=worker_id)
        if kind == "rental" and why.startswith(AWAITS_FILES):
            advice = f"start its worker again, or begin without its files: orion restore {name} --empty"
        since_s = ages.get(row_id, 0.0)
        return Overdue(kind=kind, id=row_id, name=name, state=state, since_s=since_s, why=why, what_to_do=advice)

    for worker in world.workers.values():
        why = worker.fault or worker.explanation or "it has not been heard, or not been checked yet"
        yield item("worker", worker.id, worker.hostname, worker.health, why, worker.id)
    for rental in world.rentals.values():
        live = world.live_placement(rental.id)
        worker_id = live.worker_id if live else "ITS-WORKER"
        yield item("rental", rental.id, rental.name, rental.state, rental.explanation, worker_id)
    for p in world.placements.values():
        placed = world.rentals.get(p.rental_id)
        why = f"on worker {p.worker_id}" + (f": {placed.explanation}" if placed else "")
        yield item("placement", p.id, placed.name if placed else p.rental_id, p.state, why, p.worker_id)
