"""Loading the world for a decision, and applying the steps that were decided, each whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, and_, insert, select, update

from orion.manager.domain import outcomes
from orion.manager.domain.model import Item, Placement, Rental, Step, Worker, World
from orion.manager.domain.reconcile import Task
from orion.manager.domain.states import ENDED, Health, Intent, PlacementState, RentalState
from orion.manager.store.database import record
from orion.manager.store.schema import placements, rentals, workers

TABLES: dict[str, Table] = {"worker": workers, "rental": rentals, "placement": placements}


class _Dropped(Exception):
    """A row was not as a step expected it."""


def load(connection: Connection) -> World:
    """All workers, living rentals, placements that are not purged, and the rentals of those."""
    open_placements = connection.execute(select(placements).where(placements.c.state != PlacementState.PURGED))
    found = {row["id"]: placement(row) for row in open_placements.mappings()}
    living = rentals.c.state.not_in(ENDED)
    of_open = rentals.c.id.in_(select(placements.c.rental_id).where(placements.c.state != PlacementState.PURGED))
    return World(
        {row["id"]: worker(row) for row in connection.execute(select(workers)).mappings()},
        {row["id"]: rental(row) for row in connection.execute(select(rentals).where(living | of_open)).mappings()},
        found,
    )


def never_placed(connection: Connection, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
    """Of what inventories show, what was never placed on any worker, as (rental id, epoch)."""
    shown = {(item.rental_id, item.epoch) for item in items}
    ids = sorted({rental_id for rental_id, _ in shown})
    placed: set[tuple[str, int]] = set()
    for start in range(0, len(ids), 500):  # an inventory may be longer than a statement's list of values
        query = select(placements.c.rental_id, placements.c.epoch)
        found = connection.execute(query.where(placements.c.rental_id.in_(ids[start : start + 500])))
        placed |= {(row[0], row[1]) for row in found}
    return frozenset(shown - placed)


def load_workers(connection: Connection) -> dict[str, Worker]:
    return {row["id"]: worker(row) for row in connection.execute(select(workers)).mappings()}


def load_known_at(connection: Connection, address: str) -> list[Worker]:
    """The workers, dead or alive, that are known at an address."""
    at = select(workers).where(workers.c.address == address)
    return [worker(row) for row in connection.execute(at).mappings()]


def load_due(connection: Connection, wall: float) -> list[Rental]:
    """Living rentals whose time is over at `wall` (UTC seconds)."""
    due = select(rentals).where(rentals.c.expires_at <= wall, rentals.c.state.not_in(ENDED))
    return [rental(row) for row in connection.execute(due).mappings()]


def apply(connection: Connection, steps: Iterable[Step]) -> bool:
    """Apply the steps in one transaction, up to the first that finds a row not as it expected; False if there is one.

    That one leaves no trace, and neither do those after it: they were decided in the belief that it had happened.
    """
    return all(_apply_one(connection, step) for step in steps)


def record_success(connection: Connection, task: Task, report: Mapping[str, Any], wall: float) -> None:
    """Write what follows from a task that succeeded, if that is still of any use. `wall`: UTC seconds."""
    step = outcomes.succeeded(load(connection), task, report, wall)
    if step is not None:
        apply(connection, [step])


def record_failure(connection: Connection, task: Task, message: str, attempts: int) -> None:
    step = outcomes.failed(load(connection), task, message, attempts)
    if step is not None:
        apply(connection, [step])


def _apply_one(connection: Connection, step: Step) -> bool:
    try:
        with connection.begin_nested():
            for write in step.writes:
                _write(connection, TABLES[write.kind], write.id, dict(write.expect), dict(write.change))
            if step.placement:
                connection.execute(insert(placements), vars(step.placement) | {"created_at": time.time()})
    except _Dropped:
        return False
    record(connection, *step.events)
    return True


def _write(connection: Connection, table: Table, identity: str, expect: dict[str, Any], change: dict[str, Any]) -> None:
    guards = [table.c[column].is_not_distinct_from(value) for column, value in expect.items()]
    values = change or {"id": identity}
    result = connection.execute(update(table).where(and_(table.c.id == identity, *guards)).values(values))
    if result.rowcount != 1:
        raise _Dropped


def worker(row: RowMapping) -> Worker:
    return Worker(
        id=row["id"],
        hostname=row["hostname"],
        address=row["address"],
        host_keys=tuple(row["host_keys"]),
        slots=row["slots"],
        health=Health(row["health"]),
        intent=Intent(row["intent"]),
        session_id=row["session_id"],
        boot_id=row["boot_id"],
        verified_session=row["verified_session"],
        fault=row["fault"],
        explanation=row["explanation"],
    )


def rental(row: RowMapping) -> Rental:
    return Rental(
        id=row["id"],
        name=row["name"],
        owner=row["owner"],
        username=row["username"],
        uid=row["uid"],
        state=RentalState(row["state"]),
        epoch=row["epoch"],
        public_key=row["public_key"],
        ttl_s=row["ttl_s"],
        created_at=row["created_at"],
        activated_at=row["activated_at"],
        expires_at=row["expires_at"],
        end=row["end"],
        failures=row["failures"],
        explanation=row["explanation"],
    )


def placement(row: RowMapping) -> Placement:
    return Placement(
        id=row["id"],
        rental_id=row["rental_id"],
        worker_id=row["worker_id"],
        slot=row["slot"],
        epoch=row["epoch"],
        state=PlacementState(row["state"]),
        public_key=row["public_key"],
    )
