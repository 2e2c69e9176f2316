"""Loads the world for a decision, and applies the decided steps, each one completely or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any, TypeVar

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Table,
    and_,
    bindparam,
    insert,
    literal_column,
    select,
    text,
    update,
)

from orion.manager.domain.model import Item, Origin, Placement, Rental, Worker
from orion.manager.domain.states import ENDED, HOLDING, Health, Intent, PlacementState, RentalState
from orion.manager.domain.steps import Step, Write
from orion.manager.domain.tasks import Follow, TaskEnded
from orion.manager.domain.world import World
from orion.manager.store.database import record, touched
from orion.manager.store.pool_index import OPEN, chunks
from orion.manager.store.port import DUE_AT_ONCE, QUEUED_AT_ONCE
from orion.manager.store.schema import LIVING, STANDBY, placements, rentals, workers

TABLES: dict[str, Table] = {"worker": workers, "rental": rentals, "placement": placements}
IN_TRANSITION = (RentalState.PROVISIONING, RentalState.MIGRATING, RentalState.RELEASING)
COLUMNS = {
    table.name: select(*(table.c[field.name] for field in fields(kind)))
    for table, kind in ((workers, Worker), (rentals, Rental), (placements, Placement))
}
"""Queries of the columns that decisions read; labels and loads would cost memory in thousands of rows."""

T = TypeVar("T")


class _Stale(Exception):
    """A row is not as a step expects it."""


def load(connection: Connection) -> World:
    """See `port.StateStore.load`."""
    open_placements = connection.execute(select(placements).where(placements.c.state != PlacementState.PURGED))
    found = {row["id"]: placement(row) for row in open_placements.mappings()}
    living = rentals.c.state.not_in(ENDED)
    of_open = rentals.c.id.in_(select(placements.c.rental_id).where(placements.c.state != PlacementState.PURGED))
    return World(
        workers={row["id"]: worker(row) for row in connection.execute(select(workers)).mappings()},
        rentals={
            row["id"]: rental(row) for row in connection.execute(select(rentals).where(living | of_open)).mappings()
        },
        placements=found,
    )


def never_placed(connection: Connection, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
    """See `port.StateStore.never_placed`."""
    shown = {(item.rental_id, item.epoch) for item in items}
    ids = sorted({rental_id for rental_id, _ in shown})
    placed: set[tuple[str, int]] = set()
    for start in range(0, len(ids), 500):  # an inventory may be longer than the list of values that a statement takes
        query = select(placements.c.rental_id, placements.c.epoch)
        found = connection.execute(query.where(placements.c.rental_id.in_(ids[start : start + 500])))
        placed |= {(row[0], row[1]) for row in found}
    return frozenset(shown - placed)


def load_part(connection: Connection, whole: Collection[str], candidates: Collection[str]) -> World:
    """See `port.StateStore.load_part`."""
    active = _rentals(connection, rentals.c.state.in_(IN_TRANSITION))
    active |= _rentals(connection, rentals.c.state == RentalState.QUEUED, QUEUED_AT_ONCE)
    active |= _rentals(connection, _has_target(connection))
    found = _in(connection, placements.c.worker_id, whole, placement)
    found |= _in(connection, placements.c.rental_id, active, placement)
    others = {p.rental_id for p in found.values()} - active.keys()
    known = {p.worker_id for p in found.values()} | {*whole, *candidates}
    return World(
        workers=load_workers(connection, known),
        rentals=active | _by_id(connection, rentals, others, rental),
        placements=found,
        whole=frozenset(whole),
        taken=_taken(connection, set(candidates) - set(whole)),
    )


def _has_target(connection: Connection) -> ColumnElement[bool]:
    """Return the condition that a rental has a target placement of a planned migration.

    SQLite would choose the index of states, and read every running placement: the query names the right index.
    """
    by_index = " INDEXED BY uq_placements_standby" if connection.dialect.name == "sqlite" else ""
    targets: Select[Any] = (
        select(literal_column("rental_id")).select_from(text(f"placements{by_index}")).where(text(STANDBY))
    )
    return rentals.c.id.in_(targets)


def load_workers(connection: Connection, ids: Iterable[str]) -> dict[str, Worker]:
    """See `port.StateStore.workers`."""
    return _by_id(connection, workers, ids, worker)


def load_known_at(connection: Connection, address: str) -> list[Worker]:
    """See `port.Registry.known_at`."""
    at = select(workers).where(workers.c.address == address)
    return [worker(row) for row in connection.execute(at).mappings()]


def load_due(connection: Connection, wall: float) -> list[Rental]:
    """See `port.StateStore.due`."""
    expired = (rentals.c.expires_at <= wall, rentals.c.state != RentalState.RELEASING, text(LIVING))
    due = select(rentals).where(*expired).order_by(rentals.c.expires_at, rentals.c.id).limit(DUE_AT_ONCE)
    return [rental(row) for row in connection.execute(due).mappings()]


def load_without_expiry(connection: Connection) -> list[Rental]:
    """See `port.StateStore.without_expiry`."""
    activated = (rentals.c.expires_at.is_(None), rentals.c.activated_at.is_not(None))
    found = select(rentals).where(*activated, rentals.c.state != RentalState.RELEASING, text(LIVING)).limit(DUE_AT_ONCE)
    return [rental(row) for row in connection.execute(found).mappings()]


def apply(connection: Connection, steps: Iterable[Step]) -> bool:
    """See `port.StateStore.apply`. Steps after a stale one are not applied: they were decided as if it had been."""
    return all(_apply_one(connection, step) for step in steps)


def apply_each(connection: Connection, steps: Iterable[Step]) -> list[bool]:
    """See `port.StateStore.apply_each`."""
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
    statement = update(table).where(and_(table.c.id == bindparam("which"), *guards)).values(change)
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
    """See `port.StateStore.finish`."""
    wanted = {identity for e in ended for identity in e.task.placement_ids}
    placed = _by_id(connection, placements, wanted, placement)
    placed = {identity: p for identity, p in placed.items() if p.state is not PlacementState.PURGED}
    world = World(
        workers={},
        rentals=_by_id(connection, rentals, {p.rental_id for p in placed.values()}, rental),
        placements=placed,
    )
    for one in ended:
        step = follow(world, one)
        if step is not None and _apply_one(connection, step):
            world.apply(step)
            for write in step.writes:
                if write.change.get("state") is PlacementState.PURGED:
                    del world.placements[write.id]


def _rentals(connection: Connection, which: ColumnElement[bool], limit: int | None = None) -> dict[str, Rental]:
    """Return rentals in the order of the queue."""
    order = (rentals.c.activated_at.is_(None), rentals.c.created_at, rentals.c.id)
    query = COLUMNS["rentals"].where(which).order_by(*order).limit(limit)
    return {row["id"]: rental(row) for row in connection.execute(query).mappings()}


def _in(
    connection: Connection, column: Column[Any], values: Iterable[str], make: Callable[[RowMapping], Placement]
) -> dict[str, Placement]:
    """Return the placements that are not purged and whose column has one of these values."""
    found: dict[str, Placement] = {}
    for some in chunks(values):
        query = COLUMNS["placements"].where(column.in_(some), placements.c.state.in_(OPEN))
        found.update((row["id"], make(row)) for row in connection.execute(query).mappings())
    return found


def _by_id(connection: Connection, table: Table, ids: Iterable[str], make: Callable[[RowMapping], T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for some in chunks(ids):
        query = COLUMNS[table.name].where(table.c.id.in_(some))
        found.update((row["id"], make(row)) for row in connection.execute(query).mappings())
    return found


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
    result = connection.execute(update(table).where(and_(table.c.id == write.id, *guards)).values(values))
    if result.rowcount != 1:
        raise _Stale
    if write.change:
        _touch(connection, [write])


def _touch(connection: Connection, writes: Iterable[Write]) -> None:
    rows = touched(connection)
    ids = {"worker": rows.workers, "rental": rows.rentals, "placement": rows.placements}
    for write in writes:
        ids[write.kind].add(write.id)


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
        agent_version=row["agent_version"],
    )


def rental(row: RowMapping | Mapping[str, Any]) -> Rental:
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
        last_safe_copy_at=row["last_safe_copy_at"],
        copy_problem=row["copy_problem"],
        home_warning=row["home_warning"],
        restore_from=row["restore_from"],
        let_in_epoch=row["let_in_epoch"],
        began_with=row["began_with"],
        lineage=tuple(Origin(*origin) for origin in row["lineage"]),
        start=row["start"],
        start_run=row["start_run"],
        start_problem=row["start_problem"],
        takeovers=tuple(row["takeovers"]),
        last_epoch=row["last_epoch"],
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
        started=row["started"],
        start_end=row["start_end"],
        start_ended_at=row["start_ended_at"],
        salvaged=bool(row["salvaged"]),
        standby=row["standby"],
        held=row["held"],
        filled=row["filled"],
    )
