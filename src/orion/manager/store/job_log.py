"""Reads and writes the job log: the latest jobs of the engine for each rental. Its table is called engine_log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select

from orion.manager.store.database import Row, rows
from orion.manager.store.schema import engine_log

PER_RENTAL = 50
"""Entries that are kept for each rental."""
IN_TOTAL = 100_000
"""Entries that are kept in total."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A job of the engine. `at`: its end in UTC seconds; `seconds`: the time from order to outcome."""

    at: float
    rental_id: str
    epoch: int
    action: str
    worker_id: str
    ok: bool
    seconds: float
    message: str


def add(connection: Connection, entries: Sequence[Entry]) -> None:
    """Add entries; keep the latest PER_RENTAL of each rental, and about IN_TOTAL of all together."""
    if not entries:
        return
    connection.execute(insert(engine_log), [vars(entry) for entry in entries])
    newest = connection.execute(select(func.max(engine_log.c.id))).scalar_one()
    connection.execute(delete(engine_log).where(engine_log.c.id <= newest - IN_TOTAL))
    for rental_id in {entry.rental_id for entry in entries}:
        its = select(engine_log.c.id).where(engine_log.c.rental_id == rental_id).order_by(engine_log.c.id.desc())
        first_too_old = connection.execute(its.offset(PER_RENTAL).limit(1)).scalar()
        if first_too_old is not None:
            old = (engine_log.c.rental_id == rental_id) & (engine_log.c.id <= first_too_old)
            connection.execute(delete(engine_log).where(old))


def of_rental(connection: Connection, rental_id: str) -> list[Row]:
    """Return the entries of a rental, oldest first."""
    query = select(engine_log).where(engine_log.c.rental_id == rental_id).order_by(engine_log.c.id)
    return rows(connection.execute(query))
