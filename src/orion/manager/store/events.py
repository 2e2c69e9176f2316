"""Reads events, and removes the oldest: a number is kept, not a time span, so that a wrong clock removes nothing."""

from __future__ import annotations

import time

from sqlalchemy import Connection, delete, func, select

from orion.manager.domain.steps import Event
from orion.manager.store.database import Row, record, rows
from orion.manager.store.schema import events

BATCH = 1000
"""Events that one transaction removes; it takes some milliseconds of the writer thread."""
REMOVED = "events.removed"
MISSED = "events.missed"
"""The kind of the row that replaces removed events in a list or a stream."""


def page(
    connection: Connection,
    owner: str | None,
    rental_id: str | None,
    worker_id: str | None,
    after: int,
    limit: int,
    newest_first: bool = False,
) -> list[Row]:
    """Return events with an id above `after`, oldest first; `owner` None: those of all owners.

    With `newest_first`, return the newest first, with an id below `after` unless that is 0. If events after `after`
    were removed, the first row is of the kind MISSED.
    """
    query = select(events).order_by(events.c.id.desc() if newest_first else events.c.id).limit(limit)
    if not newest_first:
        query = query.where(events.c.id > after)
    elif after:
        query = query.where(events.c.id < after)
    for wanted, column in ((owner, events.c.owner), (rental_id, events.c.rental_id), (worker_id, events.c.worker_id)):
        if wanted is not None:
            query = query.where(column == wanted)
    missed = _missed(connection, after) if after and not newest_first else []
    return missed + rows(connection.execute(query))


def last(connection: Connection) -> int:
    """Return the id of the newest event; 0 before the first."""
    return int(connection.execute(select(func.coalesce(func.max(events.c.id), 0))).scalar_one())


def too_old(connection: Connection, kept: int) -> int:
    """Return the id of the newest event that is not among the newest `kept`; 0 if there is none."""
    newest_too_old = select(events.c.id).order_by(events.c.id.desc()).offset(kept).limit(1)
    return connection.execute(newest_too_old).scalar() or 0


def remove_batch(connection: Connection, up_to: int, kept: int) -> bool:
    """Remove the oldest BATCH events with ids up to `up_to`, with an event; return False if there are fewer."""
    oldest = select(events.c.id).where(events.c.id <= up_to).order_by(events.c.id).limit(BATCH)
    ids = connection.execute(oldest).scalars().all()
    if len(ids) < BATCH:
        return False
    connection.execute(delete(events).where(events.c.id <= ids[-1]))
    reason = f"the oldest {BATCH} events, up to number {ids[-1]}, were removed: the newest {kept} are kept"
    details = {"up_to": ids[-1], "number": BATCH}
    record(connection, Event(kind=REMOVED, actor="retention", reason=reason, details=details))
    return True


def _missed(connection: Connection, after: int) -> list[Row]:
    """Return one row, which is not in the database, in place of the removed events after `after`, if there were any."""
    first = connection.execute(select(func.min(events.c.id))).scalar()
    if first is None or first <= after + 1:
        return []
    reason = f"the events from number {after + 1} to {first - 1} were removed: only the newest are kept"
    event = Event(kind=MISSED, actor="retention", reason=reason, details={"from": after + 1, "to": first - 1})
    return [vars(event) | {"id": first - 1, "at": time.time()}]
