"""Workers, rentals and placements that are past their deadlines, why, and what a person can do: for `orion status`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from orion.manager.domain.assignment import AWAITS_FILES
from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import TABLES, Health, PlacementState, RentalState
from orion.manager.domain.world import World

MAX_SHOWN = 200
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
    kind: Literal["worker", "rental", "placement"]
    id: str
    name: str
    """The hostname of a worker, the name of a rental."""
    state: str
    since_s: float
    why: str
    what_to_do: str


def overdue(world: World, ages: Mapping[str, float]) -> list[Overdue]:
    """Return what is overdue, the longest first. `ages`: seconds that each row (by id) has been in its state."""
    found = [item for item in _all(world, ages) if item.since_s > _limit_s(item)]
    return sorted(found, key=lambda item: -item.since_s)


def workers_to_look_at(pool_index: PoolIndex, now: float) -> list[str]:
    """Return the workers that are past their deadline, up to MAX_SHOWN of each health, the longest first."""
    healths = (health for health in Health if _worker_limit_s(health) < float("inf"))
    return [w for health in healths for w in pool_index.longest_in(health, _worker_limit_s(health), now, MAX_SHOWN)]


def _worker_limit_s(health: Health) -> float:
    if health is Health.QUARANTINED:
        return -1.0  # it waits for a person from the first moment
    deadline_s = TABLES["worker"][health].deadline_s
    return float("inf") if deadline_s is None else deadline_s


def _limit_s(item: Overdue) -> float:
    if item.kind == "worker":
        return _worker_limit_s(Health(item.state))
    if (item.kind, item.state) == ("rental", RentalState.QUEUED):
        return QUEUE_NOTICE_S
    deadline_s = TABLES[item.kind][item.state].deadline_s
    return float("inf") if deadline_s is None else deadline_s


def _all(world: World, ages: Mapping[str, float]) -> Iterator[Overdue]:
    for worker in world.workers.values():
        yield _worker(worker, ages.get(worker.id, 0.0))
    for rental in world.rentals.values():
        live = world.live_placement(rental.id)
        yield _rental(rental, live, ages.get(rental.id, 0.0))
    for placement in world.placements.values():
        yield _placement(placement, world.rentals.get(placement.rental_id), ages.get(placement.id, 0.0))


def _worker(worker: Worker, since_s: float) -> Overdue:
    what = _what_to_do("worker", worker.health, worker.id)
    why = worker.fault or worker.explanation or "it has not been heard, or not been checked yet"
    return Overdue(
        kind="worker",
        id=worker.id,
        name=worker.hostname,
        state=worker.health,
        since_s=since_s,
        why=why,
        what_to_do=what,
    )


def _rental(rental: Rental, live: Placement | None, since_s: float) -> Overdue:
    what = _what_to_do("rental", rental.state, live.worker_id if live else "ITS-WORKER")
    if rental.explanation.startswith(AWAITS_FILES):
        what = f"start its worker again, or begin without its files: orion restore {rental.name} --empty"
    return Overdue(
        kind="rental",
        id=rental.id,
        name=rental.name,
        state=rental.state,
        since_s=since_s,
        why=rental.explanation,
        what_to_do=what,
    )


def _placement(placement: Placement, rental: Rental | None, since_s: float) -> Overdue:
    what = _what_to_do("placement", placement.state, placement.worker_id)
    name = rental.name if rental else placement.rental_id
    why = f"on worker {placement.worker_id}" + (f": {rental.explanation}" if rental else "")
    return Overdue(
        kind="placement", id=placement.id, name=name, state=placement.state, since_s=since_s, why=why, what_to_do=what
    )


def _what_to_do(kind: str, state: str, worker_id: str) -> str:
    return WHAT_TO_DO.get((kind, state), "").format(worker=worker_id)
