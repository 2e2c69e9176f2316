"""Reading events, oldest first."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from orion.manager.store.database import Row, rows
from orion.manager.store.schema import events


def page(
    connection: Connection, owner: str | None, rental_id: str | None, worker_id: str | None, after: int, limit: int
) -> list[Row]:
    """Events with an id above `after`. `owner` None: everybody's."""
    query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
    for wanted, column in ((owner, events.c.owner), (rental_id, events.c.rental_id), (worker_id, events.c.worker_id)):
        if wanted is not None:
            query = query.where(column == wanted)
    return rows(connection.execute(query))


def last(connection: Connection) -> int:
    """The id of the newest event; 0 before the first."""
    return int(connection.execute(select(func.coalesce(func.max(events.c.id), 0))).scalar_one())
