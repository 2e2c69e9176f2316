"""Reads and changes the web ports of rentals: which of them are public, and on which worker their rental is."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select, update

from orion import wire
from orion.manager.domain.states import ENDED, RentalState
from orion.manager.domain.steps import Event
from orion.manager.store import state
from orion.manager.store.database import Row, first, record, touched
from orion.manager.store.schema import placements, rentals, workers

CLOSED = "rental.port_closed"


def look(connection: Connection, rental_id: str) -> Row | None:
    """Return what decides about a request to a port of a rental; None if the rental does not exist.

    The columns of the worker are None while the rental has no live placement.
    """
    of_rental = rentals.c["id", "owner", "state", "epoch", "explanation", "public_ports"]
    query = select(*of_rental, placements.c.worker_id, *workers.c["address", "session_id"])
    query = query.select_from(state.RENTALS_WITH_WORKERS).where(rentals.c.id == rental_id)
    return first(connection.execute(query))


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
