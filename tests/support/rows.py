"""Puts a world into a real store, and reads the kinds of its events."""

from __future__ import annotations

from sqlalchemy import Connection, insert

from orion.manager.domain.world import World
from orion.manager.store import events
from orion.manager.store.database import Store
from orion.manager.store.schema import placements, rentals, workers


async def insert_world(store: Store, world: World) -> None:
    await store.write(_insert, world)


async def event_kinds(store: Store) -> list[str]:
    return [row["kind"] for row in await store.read(events.page, None, None, None, 0, 100)]


def _insert(connection: Connection, world: World) -> None:
    """Insert the rows; columns that no decision reads get any value."""
    rest = {"labels": {}, "token_hash": "", "load": {}, "registered_at": 1.0}
    for worker in world.workers.values():
        connection.execute(insert(workers), vars(worker) | {"host_keys": list(worker.host_keys)} | rest)
    for rental in world.rentals.values():
        connection.execute(insert(rentals), vars(rental) | {"labels": {}})
    for placement in world.placements.values():
        connection.execute(insert(placements), vars(placement) | {"created_at": 1.0})
