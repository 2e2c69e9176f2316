"""Checks that this manager could have written the rows of a backup, because it reads them unchecked after a restore.

SQLite stores values of any type in a column, and a file from elsewhere may lack the constraints of the schema.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Float, Integer, Table

from orion.manager.domain.states import Health, Intent, PlacementState, RentalState
from orion.manager.store.schema import metadata
from orion.wire import Role

LARGEST_NUMBER = 2**53
"""A number above all that the manager writes, and so small that SQLite can add to it."""
LAST_TIME = 1e11
"""Unix seconds, far beyond the year 5000."""
LARGEST_UID = 10**9
_LISTS = {"host_keys", "lineage", "takeovers", "public_ports", "skipped"}


def _one_of(values: Iterable[str]) -> str:
    return "{0} IN (" + ", ".join(f"'{value}'" for value in values) + ")"


_ID = "{0} != '' AND {0} NOT GLOB '*[^a-z0-9-]*'"
_CONDITIONS = {
    "workers.id": _ID,
    "workers.address": "{0} != '' AND {0} NOT GLOB '*[^0-9a-f.:]*'",
    "workers.host_keys": "NOT EXISTS (SELECT 1 FROM json_each({0}) AS key WHERE key.type != 'text'"
    " OR key.value GLOB '*[^A-Za-z0-9@.+/= -]*')",
    "workers.slots": "{0} > 0",
    "workers.health": _one_of(Health),
    "workers.intent": _one_of(Intent),
    "rentals.id": _ID,
    "rentals.username": "{0} = 'r-' || id",
    "rentals.uid": f"{{0}} BETWEEN 100000 AND {LARGEST_UID}",
    "rentals.state": _one_of(RentalState),
    "rentals.epoch": "{0} >= 0",
    "placements.worker_id": _ID,
    "placements.slot": "{0} >= 0",
    "placements.state": _one_of(PlacementState),
    "copies.rental_id": _ID,
    "tokens.role": _one_of(Role),
}


def strange_column(connection: sqlite3.Connection) -> str:
    """Return the name of the first column with a value that this manager never writes; empty if there is none."""
    for table in metadata.sorted_tables:
        conditions = [(name, f"coalesce({condition}, 0)") for name, condition in _expected(table)]
        if not _all_true(connection, table.name, " AND ".join(condition for _, condition in conditions)):
            return next(f"{table}.{name}" for name, one in conditions if not _all_true(connection, table.name, one))
    return ""


def _all_true(connection: sqlite3.Connection, table: str, condition: str) -> bool:
    query = f'SELECT 1 FROM "{table}" WHERE NOT ({condition}) LIMIT 1'  # noqa: S608 - names and conditions of this module
    return connection.execute(query).fetchone() is None


def _expected(table: Table) -> Iterator[tuple[str, str]]:
    """Yield each column with each condition that it must satisfy: first its type, then its value."""
    for column in table.columns:
        quoted = f'"{column.name}"'
        yield column.name, _typed(column).format(quoted)
        if condition := _CONDITIONS.get(f"{table.name}.{column.name}"):
            yield column.name, condition.format(quoted)


def _typed(column: Column[Any]) -> str:
    """Return the SQL condition, with {0} for the column, that a value has the column's type."""
    kind = column.type
    if isinstance(kind, JSON):
        shape = "array" if column.name in _LISTS else "object"
        typed = f"typeof({{0}}) = 'text' AND CASE WHEN json_valid({{0}}) THEN json_type({{0}}) = '{shape}' END"
    elif isinstance(kind, Boolean):
        typed = "typeof({0}) = 'integer' AND {0} IN (0, 1)"
    elif isinstance(kind, Integer):
        typed = f"typeof({{0}}) = 'integer' AND {{0}} BETWEEN -{LARGEST_NUMBER} AND {LARGEST_NUMBER}"
    elif isinstance(kind, Float):
        typed = f"typeof({{0}}) IN ('real', 'integer') AND {{0}} BETWEEN -{LAST_TIME} AND {LAST_TIME}"
    else:
        typed = "typeof({0}) = 'text'"
    return f"({{0}} IS NULL OR {typed})" if column.nullable else typed
