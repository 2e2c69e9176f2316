"""Reads and changes the web ports of rentals: which of them are public, and on which worker their rental is."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, and_, select, update

from orion import wire
from orion.manager.domain.states import ENDED, LIVE, RentalState
from orion.manager.domain.steps import Event
from orion.manager.store.database import Row, first, record, touched
from orion.manager.store.schema import placements, rentals, workers

CLOSED = "rental.port_closed"


def look(connection: Connection, rental_id: str) -> Row | None:
    """Return what decides about a request to a port of a rental; None if the rental does not exist.

    The columns of the worker are None while the rental has no live placement.
    """
    live = and_(placements.c.rental_id == rentals.c.id, placements.c.state.in_(LIVE), placements.c.standby.is_(False))
    joined = rentals.outerjoin(placements, live).outerjoin(workers, workers.c.id == placements.c.worker_id)
    wanted = (
        *(rentals.c.id, rentals.c.owner, rentals.c.state, rentals.c.epoch, rentals.c.explanation),
        *(rentals.c.public_ports, placements.c.worker_id, workers.c.address, workers.c.session_id),
    )
    return first(connection.execute(select(*wanted).select_from(joined).where(rentals.c.id == rental_id)))


def expose(connection: Connection, rental_id: str, actor: str, port: int, public: bool) -> str:
    """Make a port public, or open to its owner alone; return an error code, or an empty string. Repeatable."""
    row = connection.execute(select(rentals).where(rentals.c.id == rental_id)).mappings().one()
    if row["state"] in ENDED | {RentalState.RELEASING}:
        return "ended"
    before: list[int] = row["public_ports"]
    if public == (port in before):
        return ""
    if public and len(before) >= wire.MAX_PUBLIC_PORTS:
        return "too_many_ports"
    after = sorted({*before, port} if public else {*before} - {port})
    connection.execute(update(rentals).where(rentals.c.id == rental_id).values(public_ports=after))
    touched(connection).rentals.add(rental_id)
    subject: dict[str, Any] = {"owner": row["owner"], "rental_id": rental_id, "epoch": row["epoch"]}
    kind = "rental.port_published" if public else CLOSED
    record(connection, Event(kind=kind, actor=actor, reason="asked for", details={"port": port}, **subject))
    return ""
