"""Reads and writes the last moment at which the wall clock was trusted, among the counters."""

from __future__ import annotations

from sqlalchemy import Connection, select

from orion.manager.domain.expiry import Mark
from orion.manager.store.database import set_counter
from orion.manager.store.schema import counters, events

_NAMES = ("clock_wall_s", "clock_boot_s", "clock_boot_id")


def last_known(connection: Connection) -> tuple[Mark | None, float | None]:
    """Return the mark, and the time of the last event (Unix seconds); None for each if there is none."""
    query = select(counters.c.name, counters.c.value).where(counters.c.name.in_(_NAMES))
    found = {str(name): int(value) for name, value in connection.execute(query)}
    mark = Mark(*(found[name] for name in _NAMES)) if len(found) == len(_NAMES) else None
    return mark, connection.execute(select(events.c.at).order_by(events.c.id.desc()).limit(1)).scalar()


def keep(connection: Connection, mark: Mark) -> None:
    """Write the mark in whole numbers, below 2**31 until 2038: the column has 32 bits in PostgreSQL."""
    for name, value in zip(_NAMES, (round(mark.wall), round(mark.boot), mark.boot_id), strict=True):
        set_counter(connection, name, value)
