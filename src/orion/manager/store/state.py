"""Loads the world for a decision, and applies the decided steps, each one completely or not at all.

The functions that SqlStateStore runs are documented in store/port.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, Table, bindparam, insert, select, text, update

from orion.manager.domain.model import Item, Origin, Placement, Rental, Worker
from orion.manager.domain.states import ENDED, HOLDING, LIVE, Health, Intent, PlacementState, RentalState
from orion.manager.domain.steps import READ, Kind, Step, Write
from orion.manager.domain.tasks import Follow, TaskEnded
from orion.manager.domain.world import World
from orion.manager.store.database import record, touched
from orion.manager.store.pool_index import OPEN, chunks
from orion.manager.store.port import DUE_AT_ONCE, QUEUED_AT_ONCE
from orion.manager.store.schema import LIVING, STANDBY, placements, rentals, workers

TABLES: dict[Kind, Table] = {"worker": workers, "rental": rentals, "placement": placements}
_COLUMNS = {kind: [(name, table.c[name].name) for name in READ[kind]] for kind, table in TABLES.items()}
"""The fields of each kind of record, each with the released name of its column, which rows have."""
IN_TRANSITION = (RentalState.PROVISIONING, RentalState.MIGRATING, RentalState.RELEASING)

# Queries of the columns that decisions read; labels and loads would cost memory in thousands of rows.
WORKERS, RENTALS, PLACEMENTS = (
    select(*(table.c[field.name] for field in fields(kind)))
    for table, kind in ((workers, Worker), (rentals, Rental), (placements, Placement))
)
OPEN_PLACEMENTS = PLACEMENTS.where(placements.c.state.in_(OPEN))

_LIVE = (placements.c.rental_id == rentals.c.id) & placements.c.state.in_(LIVE) & placements.c.is_target.is_(False)
RENTALS_WITH_WORKERS = rentals.outerjoin(placements, _LIVE).outerjoin(workers, workers.c.id == placements.c.worker_id)
"""The rentals, each with its live placement and the worker of this placement, if it has one."""

T = TypeVar("T")
_Row = RowMapping | Mapping[str, Any]
_Make = Callable[[RowMapping], T]


class _Stale(Exception):
    """A row is not as a step expects it."""


def load(connection: Connection) -> World:
    placed = rentals.c.id.in_(select(placements.c.rental_id).where(placements.c.state != PlacementState.PURGED))
    return World(
        workers=_found(connection, WORKERS, worker),
        rentals=_found(connection, RENTALS.where(rentals.c.state.not_in(ENDED) | placed), rental),
        placements=_found(connection, PLACEMENTS.where(placements.c.state != PlacementState.PURGED), placement),
    )


def never_placed(connection: Connection, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
    shown = {(item.rental_id, item.epoch) for item in items}
    placed: set[tuple[str, int]] = set()
    for some in chunks({rental_id for rental_id, _ in shown}):
        query = select(placements.c.rental_id, placements.c.epoch).where(placements.c.rental_id.in_(some))
        placed |= {(rental_id, epoch) for rental_id, epoch in connection.execute(query)}
    return frozenset(shown - placed)


def load_part(connection: Connection, whole: Collection[str], candidates: Collection[str]) -> World:
    active = _in_queue_order(connection, rentals.c.state.in_(IN_TRANSITION))
    active |= _in_queue_order(connection, rentals.c.state == RentalState.QUEUED, QUEUED_AT_ONCE)
    active |= _in_queue_order(connection, _has_target(connection))
    found = _among(connection, OPEN_PLACEMENTS, placements.c.worker_id, whole, placement)
    found |= _among(connection, OPEN_PLACEMENTS, placements.c.rental_id, active, placement)
    others = {p.rental_id for p in found.values()} - active.keys()
    return World(
        workers=load_workers(connection, {p.worker_id for p in found.values()} | {*whole, *candidates}),
        rentals=active | _among(connection, RENTALS, rentals.c.id, others, rental),
        placements=found,
        whole=frozenset(whole),
        taken=_taken(connection, set(candidates) - set(whole)),
    )


def _has_target(connection: Connection) -> ColumnElement[bool]:
    """Return the condition that a rental has a target placement of a planned migration.

    SQLite would choose the index of states, and read every running placement: the query names the right index.
    """
    by_index = " INDEXED BY uq_placements_standby" if connection.dialect.name == "sqlite" else ""
    return rentals.c.id.in_(select(text("rental_id")).select_from(text(f"placements{by_index}")).where(text(STANDBY)))


def load_workers(connection: Connection, ids: Iterable[str]) -> dict[str, Worker]:
    return _among(connection, WORKERS, workers.c.id, ids, worker)


def load_known_at(connection: Connection, address: str) -> list[Worker]:
    return list(_found(connection, WORKERS.where(workers.c.address == address), worker).values())


def load_due(connection: Connection, wall: float) -> list[Rental]:
    expired = (rentals.c.expires_at <= wall, rentals.c.state != RentalState.RELEASING, text(LIVING))
    due = RENTALS.where(*expired).order_by(rentals.c.expires_at, rentals.c.id).limit(DUE_AT_ONCE)
    return list(_found(connection, due, rental).values())


def load_without_expiry(connection: Connection) -> list[Rental]:
    activated = (rentals.c.expires_at.is_(None), rentals.c.activated_at.is_not(None))
    found = RENTALS.where(*activated, rentals.c.state != RentalState.RELEASING, text(LIVING)).limit(DUE_AT_ONCE)
    return list(_found(connection, found, rental).values())


def load_rental(connection: Connection, rental_id: str) -> Rental:
    """Return the rental; raise NoResultFound if it does not exist."""
    return rental(connection.execute(RENTALS.where(rentals.c.id == rental_id)).mappings().one())


def load_living(connection: Connection, rental_id: str) -> Rental | None:
    """Return the rental; None if it is releasing or has ended."""
    found = load_rental(connection, rental_id)
    return None if found.state in ENDED | {RentalState.RELEASING} else found


def load_placement(connection: Connection, which: ColumnElement[bool]) -> Placement | None:
    row = connection.execute(PLACEMENTS.where(which)).mappings().first()
    return None if row is None else placement(row)


def apply(connection: Connection, steps: Iterable[Step]) -> bool:
    return all(_apply_one(connection, step) for step in steps)


def apply_each(connection: Connection, steps: Iterable[Step]) -> list[bool]:
    applied: list[bool] = []
    for _, group in groupby(steps, key=_shape):
        alike = list(group)
        if len(alike) > 1 and _apply_alike(connection, alike):
            applied += [True] * len(alike)
        else:
            applied += [_apply_one(connection, step) for step in alike]
    return applied


def _shape(step: Step) -> tuple[Any, ...]:
    """Return a key that is equal for steps which one UPDATE statement can apply together."""
    if len(step.writes) != 1 or step.placement:
        return (id(step),)
    (write,) = step.writes
    return write.kind, tuple(write.expect), tuple(write.change)


def _apply_alike(connection: Connection, steps: list[Step]) -> bool:
    """Apply the steps by one statement; return False, with nothing changed, if a row is not as its step expects."""
    if not connection.dialect.supports_sane_multi_rowcount:
        return False
    writes = [step.writes[0] for step in steps]
    table, first = TABLES[writes[0].kind], writes[0]
    guards = [table.c[column].is_not_distinct_from(bindparam(f"was_{column}")) for column in first.expect]
    change: dict[str, Any] = {column: bindparam(f"to_{column}") for column in first.change}
    rows = [
        {"which": w.id} | {f"was_{c}": v for c, v in w.expect.items()} | {f"to_{c}": v for c, v in w.change.items()}
        for w in writes
    ]
    statement = update(table).where(table.c.id == bindparam("which"), *guards).values(change)
    try:
        with connection.begin_nested():
            if connection.execute(statement, rows).rowcount != len(rows):
                raise _Stale
    except _Stale:
        return False
    _touch(connection, writes)
    record(connection, *(event for step in steps for event in step.events))
    return True


def finish(connection: Connection, ended: Sequence[TaskEnded], follow: Follow) -> None:
    wanted = {identity for e in ended for identity in e.task.placement_ids}
    placed = _among(connection, OPEN_PLACEMENTS, placements.c.id, wanted, placement)
    rented = _among(connection, RENTALS, rentals.c.id, {p.rental_id for p in placed.values()}, rental)
    world = World(workers={}, rentals=rented, placements=placed)
    for one in ended:
        step = follow(world, one)
        if step is not None and _apply_one(connection, step):
            world.apply(step)
            for write in step.writes:
                if write.change.get("state") is PlacementState.PURGED:
                    del world.placements[write.id]


def _in_queue_order(connection: Connection, which: ColumnElement[bool], limit: int | None = None) -> dict[str, Rental]:
    order = (rentals.c.activated_at.is_(None), rentals.c.created_at, rentals.c.id)
    return _found(connection, RENTALS.where(which).order_by(*order).limit(limit), rental)


def _among(
    connection: Connection, query: Select[Any], column: ColumnElement[Any], values: Iterable[str], make: _Make[T]
) -> dict[str, T]:
    """Return the results of the query whose column has one of these values, by id."""
    found: dict[str, T] = {}
    for some in chunks(values):
        found |= _found(connection, query.where(column.in_(some)), make)
    return found


def _found(connection: Connection, query: Select[Any], make: _Make[T]) -> dict[str, T]:
    """Return the results of the query, by id."""
    return {row["id"]: make(row) for row in connection.execute(query).mappings()}


def _taken(connection: Connection, ids: set[str]) -> dict[str, frozenset[int]]:
    """Return the numbers of the slots of these workers that are taken."""
    found: dict[str, set[int]] = {worker_id: set() for worker_id in ids}
    for some in chunks(ids):
        query = select(placements.c.worker_id, placements.c.slot)
        taken = query.where(placements.c.worker_id.in_(some), placements.c.state.in_(HOLDING))
        for worker_id, slot in connection.execute(taken):
            found[worker_id].add(slot)
    return {worker_id: frozenset(slots) for worker_id, slots in found.items()}


def _apply_one(connection: Connection, step: Step) -> bool:
    try:
        if len(step.writes) == 1 and not step.placement:
            _write(connection, step.writes[0])  # a single write needs no savepoint
        else:
            with connection.begin_nested():
                for write in step.writes:
                    _write(connection, write)
                if step.placement:
                    connection.execute(insert(placements), vars(step.placement) | {"created_at": time.time()})
    except _Stale:
        return False
    if step.placement:
        touched(connection).workers.add(step.placement.worker_id)
    record(connection, *step.events)
    return True


def _write(connection: Connection, write: Write) -> None:
    """Make one guarded write; raise _Stale if its row is not as it expects."""
    table = TABLES[write.kind]
    guards = [table.c[column].is_not_distinct_from(value) for column, value in write.expect.items()]
    values = dict(write.change) or {"id": write.id}
    result = connection.execute(update(table).where(table.c.id == write.id, *guards).values(values))
    if result.rowcount != 1:
        raise _Stale
    if write.change:
        _touch(connection, [write])


def _touch(connection: Connection, writes: Iterable[Write]) -> None:
    rows = touched(connection)
    ids = {"worker": rows.workers, "rental": rows.rentals, "placement": rows.placements}
    for write in writes:
        ids[write.kind].add(write.id)


def worker(row: _Row) -> Worker:
    enums = {"health": Health(row["health"]), "intent": Intent(row["intent"])}
    return Worker(**_values("worker", row) | enums | {"host_keys": tuple(row["host_keys"])})


def rental(row: _Row) -> Rental:
    lineage = tuple(Origin(*origin) for origin in row["lineage"])
    changed = {"state": RentalState(row["state"]), "lineage": lineage, "takeovers": tuple(row["takeovers"])}
    return Rental(**_values("rental", row) | changed)


def placement(row: _Row) -> Placement:
    return Placement(**_values("placement", row) | {"state": PlacementState(row["state"])})


def _values(kind: Kind, row: _Row) -> dict[str, Any]:
    return {name: row[column] for name, column in _COLUMNS[kind]}
