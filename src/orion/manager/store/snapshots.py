"""The snapshot catalog: the rows about the snapshots that the snapshot service keeps.

`SqlSnapshotCatalog` is the real one, `MemorySnapshotCatalog` the shipped fake; tests/unit/test_store_snapshots.py is
the contract of both. The table of snapshots is `copies`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Column, Connection, RowMapping, and_, delete, insert, select

from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.snapshots import (
    EMPTY,
    EXPIRED_KEPT_S,
    Snapshot,
    SnapshotId,
    ask_to_restore,
    is_to_be_recovered,
    newest,
    was_activated,
)
from orion.manager.domain.states import ENDED, LIVE, Health, PlacementState, RentalState
from orion.manager.domain.steps import Step
from orion.manager.store import state
from orion.manager.store.database import Store
from orion.manager.store.memory import MemoryStateStore
from orion.manager.store.pool_index import chunks
from orion.manager.store.schema import copies, placements, rentals, workers

_targets = placements.alias()
_IDS = (rentals.c.id, placements.c.id, workers.c.id)
REACHABLE = (Health.READY, Health.QUARANTINED)
"""Health of the workers from which snapshots are taken regularly: a quarantined worker runs its rentals and answers."""


class Running(NamedTuple):
    """An active rental with its running placement and the worker of the placement."""

    rental: Rental
    placement: Placement
    worker: Worker


class SnapshotCatalog(Protocol):
    """The port to the rows of snapshots. Each call is one transaction."""

    async def running(self) -> dict[str, tuple[int, str]]:
        """Return epoch and owner of each rental of which a snapshot can be taken now, by rental id.

        Such a rental is active, on a reachable worker, and in no planned migration.
        """

    async def one(self, rental_id: str) -> Running | None:
        """Return the rental if a snapshot of it can be taken now, as in `running`; None if not."""

    async def migrating(self, rental_id: str) -> Running | None:
        """Return a migrating rental, whatever its worker's health; None unless it is active and running."""

    async def accept(self, step: Step, rental_id: str, kept: Sequence[Snapshot]) -> bool:
        """Apply the step of a new snapshot, and replace the rental's snapshots by `kept`.

        Return False, with nothing changed, if the step comes too late.
        """

    async def record(self, step: Step) -> None:
        """Apply a step that adds no snapshot, such as a problem, unless it comes too late."""

    async def of(self, rental_id: str) -> list[Snapshot]:
        """Return the snapshots of a rental, oldest first."""

    async def newest(self, rental_id: str) -> Snapshot | None:
        """Return the snapshot that a takeover restores; None if there is none."""

    async def to_recover(self, placement_id: str) -> tuple[Rental, Placement] | None:
        """Return a lost placement and its rental if its files are to be recovered; None if not, or not any more."""

    async def removable(
        self, rental_ids: Iterable[str], wall: float, short_of_room: Collection[str] = ()
    ) -> list[tuple[str, int]]:
        """Return id and uid of those of these rentals that have ended and whose snapshots are not kept any longer.

        `wall`: the time now in Unix seconds; `short_of_room`: owners whose ended rentals keep no snapshots.
        """

    async def forget(self, rental_id: str) -> None:
        """Remove the rows of a rental's snapshots."""


class SqlSnapshotCatalog:
    """Implements `SnapshotCatalog`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def running(self) -> dict[str, tuple[int, str]]:
        return await self._store.read(_load_running)

    async def one(self, rental_id: str) -> Running | None:
        return await self._store.read(_load, _running(*_IDS), rental_id)

    async def migrating(self, rental_id: str) -> Running | None:
        return await self._store.read(_load, _placed(*_IDS), rental_id)

    async def accept(self, step: Step, rental_id: str, kept: Sequence[Snapshot]) -> bool:
        return await self._store.write(_accept, step, rental_id, kept)

    async def record(self, step: Step) -> None:
        await self._store.write(state.apply, [step])

    async def of(self, rental_id: str) -> list[Snapshot]:
        return await self._store.read(snapshots_of, rental_id)

    async def newest(self, rental_id: str) -> Snapshot | None:
        return await self._store.read(_newest_of, rental_id)

    async def to_recover(self, placement_id: str) -> tuple[Rental, Placement] | None:
        return await self._store.read(_load_to_recover, placement_id)

    async def removable(
        self, rental_ids: Iterable[str], wall: float, short_of_room: Collection[str] = ()
    ) -> list[tuple[str, int]]:
        return await self._store.read(_load_removable, list(rental_ids), wall, short_of_room)

    async def forget(self, rental_id: str) -> None:
        await self._store.write(forget, rental_id)


class MemorySnapshotCatalog:
    """Implements `SnapshotCatalog` over a state store in memory."""

    def __init__(self, state_store: MemoryStateStore) -> None:
        self._state_store = state_store
        self.snapshots: dict[str, list[Snapshot]] = {}

    async def running(self) -> dict[str, tuple[int, str]]:
        return {one.rental.id: (one.rental.epoch, one.rental.owner) for one in self._running()}

    async def one(self, rental_id: str) -> Running | None:
        return next((one for one in self._running() if one.rental.id == rental_id), None)

    async def migrating(self, rental_id: str) -> Running | None:
        world, rental = self._state_store.world, self._state_store.world.rentals.get(rental_id)
        live = world.live_placement(rental_id)
        if rental is None or live is None or rental.state is not RentalState.ACTIVE:
            return None
        worker = world.workers.get(live.worker_id)
        return Running(rental, live, worker) if worker and live.state is PlacementState.RUNNING else None

    def _running(self) -> list[Running]:
        world = self._state_store.world
        migrating = {
            p.rental_id for p in world.placements.values() if p.state in LIVE and (p.is_target or p.quiesced_for)
        }
        running = (p for p in world.placements.values() if p.state is PlacementState.RUNNING)
        placed = (p for p in running if p.rental_id not in migrating and p.worker_id in world.workers)
        found = (Running(world.rentals[p.rental_id], p, world.workers[p.worker_id]) for p in placed)
        return [r for r in found if r.rental.state is RentalState.ACTIVE and r.worker.health in REACHABLE]

    async def accept(self, step: Step, rental_id: str, kept: Sequence[Snapshot]) -> bool:
        if not await self._state_store.apply([step]):
            return False
        self.snapshots[rental_id] = list(kept)
        return True

    async def record(self, step: Step) -> None:
        await self._state_store.apply([step])

    async def of(self, rental_id: str) -> list[Snapshot]:
        return list(self.snapshots.get(rental_id, ()))

    async def newest(self, rental_id: str) -> Snapshot | None:
        return newest(await self.of(rental_id), self._state_store.world.rentals[rental_id])

    async def to_recover(self, placement_id: str) -> tuple[Rental, Placement] | None:
        placement = self._state_store.world.placements.get(placement_id)
        rental = self._state_store.world.rentals.get(placement.rental_id) if placement else None
        return (rental, placement) if rental and placement and is_to_be_recovered(rental, placement) else None

    async def removable(
        self, rental_ids: Iterable[str], wall: float, short_of_room: Collection[str] = ()
    ) -> list[tuple[str, int]]:
        rentals = self._state_store.world.rentals
        known = [rentals[each] for each in rental_ids if each in rentals]
        return [(rental.id, rental.uid) for rental in known if _is_removable(rental, wall, short_of_room)]

    async def forget(self, rental_id: str) -> None:
        self.snapshots.pop(rental_id, None)


def _load_running(connection: Connection) -> dict[str, tuple[int, str]]:
    rows = connection.execute(_running(rentals.c.id, rentals.c.epoch, rentals.c.owner))
    return {row.id: (row.epoch, row.owner) for row in rows}


def _load(connection: Connection, query: Any, rental_id: str) -> Running | None:
    found = connection.execute(query.where(rentals.c.id == rental_id)).first()
    if found is None:
        return None
    _, placement_id, worker_id = found
    # Each row has its own query, because the columns of the tables have the same names.
    placement = state.load_placement(connection, placements.c.id == placement_id)
    worker = state.load_workers(connection, [worker_id])[worker_id]
    return Running(state.load_rental(connection, rental_id), placement, worker) if placement else None


def _running(*columns: Column[Any]) -> Any:
    """Return the query of the rentals of which regular snapshots are taken; a planned migration takes its own ones."""
    migrating = select(_targets.c.rental_id).where(_targets.c.is_target.is_(True), _targets.c.state.in_(LIVE))
    ordinary = (placements.c.quiesced_for == 0, workers.c.health.in_(REACHABLE), rentals.c.id.not_in(migrating))
    return _placed(*columns).where(*ordinary)


def _placed(*columns: Column[str]) -> Any:
    """Return the query of active rentals whose placement is running."""
    joined = select(*columns).join_from(placements, rentals, rentals.c.id == placements.c.rental_id)
    runs = (placements.c.state == PlacementState.RUNNING, rentals.c.state == RentalState.ACTIVE)
    return joined.join(workers, workers.c.id == placements.c.worker_id).where(*runs)


def _accept(connection: Connection, step: Step, rental_id: str, kept: Sequence[Snapshot]) -> bool:
    if not state.apply(connection, [step]):
        return False
    forget(connection, rental_id)
    if kept:
        connection.execute(insert(copies), [_row(rental_id, snapshot) for snapshot in kept])
    return True


def snapshots_of(connection: Connection, rental_id: str) -> list[Snapshot]:
    query = select(copies).where(copies.c.rental_id == rental_id).order_by(copies.c.epoch, copies.c.number)
    return [_snapshot(row) for row in connection.execute(query).mappings()]


def with_recovered(connection: Connection, rental_ids: Iterable[str]) -> dict[str, list[Snapshot]]:
    """Return, by rental id, all snapshots of those of these rentals that have a recovered one."""
    found: dict[str, list[Snapshot]] = defaultdict(list)
    recovered = copies.alias()
    for some in chunks(rental_ids):
        have = select(recovered.c.rental_id).where(recovered.c.rental_id.in_(some), recovered.c.recovered.is_(True))
        for row in connection.execute(select(copies).where(copies.c.rental_id.in_(have))).mappings():
            found[row["rental_id"]].append(_snapshot(row))
    return found


def _snapshot(row: RowMapping) -> Snapshot:
    values = {name: row[name] for name in ("at", "bytes", "files")}
    snapshot_id, skipped = SnapshotId(row["epoch"], row["number"]), tuple(row["skipped"])
    return Snapshot(id=snapshot_id, skipped=skipped, recovered=row["salvage"], **values)


def _newest_of(connection: Connection, rental_id: str) -> Snapshot | None:
    return newest(snapshots_of(connection, rental_id), state.load_rental(connection, rental_id))


def _load_to_recover(connection: Connection, placement_id: str) -> tuple[Rental, Placement] | None:
    placement = state.load_placement(connection, placements.c.id == placement_id)
    if placement is None:
        return None
    rental = state.load_rental(connection, placement.rental_id)
    return (rental, placement) if is_to_be_recovered(rental, placement) else None


def _load_removable(
    connection: Connection, rental_ids: Sequence[str], wall: float, short_of_room: Collection[str]
) -> list[tuple[str, int]]:
    found = []
    for some in chunks(rental_ids):
        ended = state.RENTALS.where(rentals.c.id.in_(some), rentals.c.state.in_(ENDED))
        found += [state.rental(row) for row in connection.execute(ended).mappings()]
    return [(rental.id, rental.uid) for rental in found if _is_removable(rental, wall, short_of_room)]


def begin_restore(connection: Connection, rental_id: str, actor: str, source: str) -> str:
    """Restart a rental from the snapshot `source`, or EMPTY; return an error code, or an empty string."""
    rental = state.load_living(connection, rental_id)
    if rental is None:
        return "ended"
    if not was_activated(rental):
        return "not_active_yet"
    if source != EMPTY and source not in {str(one.id) for one in snapshots_of(connection, rental_id)}:
        return "no_such_snapshot"
    runs = and_(placements.c.rental_id == rental_id, placements.c.state == PlacementState.RUNNING)
    running = state.load_placement(connection, runs) if rental.state is RentalState.ACTIVE else None
    state.apply(connection, [ask_to_restore(rental, running, source, actor)])
    return ""


def forget(connection: Connection, rental_id: str) -> None:
    connection.execute(delete(copies).where(copies.c.rental_id == rental_id))


def _is_removable(rental: Rental, wall: float, short_of_room: Collection[str]) -> bool:
    kept_s = 0.0 if rental.owner in short_of_room else EXPIRED_KEPT_S
    if rental.state is RentalState.EXPIRED:
        return wall > (rental.expires_at or 0.0) + kept_s
    return rental.state in ENDED


def _row(rental_id: str, snapshot: Snapshot) -> dict[str, object]:
    values = {name: getattr(snapshot, name) for name in ("at", "bytes", "files", "recovered")}
    return values | vars(snapshot.id) | {"rental_id": rental_id, "skipped": list(snapshot.skipped)}
