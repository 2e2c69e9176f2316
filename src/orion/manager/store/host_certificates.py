"""Reads the rentals that the host certificate of a worker names."""

from __future__ import annotations

from sqlalchemy import Connection, and_, select

from orion.manager.domain.host_certificates import CURRENT, NAMED
from orion.manager.store.schema import placements, rentals


def current_on(connection: Connection, worker_id: str) -> frozenset[str]:
    """Return the ids of the rentals whose current placement is on this worker and is not ending."""
    same_epoch = and_(rentals.c.id == placements.c.rental_id, rentals.c.epoch == placements.c.epoch)
    query = select(rentals.c.id).select_from(placements.join(rentals, same_epoch))
    here = and_(placements.c.worker_id == worker_id, placements.c.state.in_(CURRENT), rentals.c.state.in_(NAMED))
    return frozenset(connection.execute(query.where(here)).scalars())
