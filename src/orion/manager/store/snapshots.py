"""What is known of the copies of homes. The copies themselves are the vault's; what it says is there is written here.

`SqlSnapshotCatalog` is the real one, `MemorySnapshotCatalog` the shipped fake; tests/unit/test_store_snapshots.py holds
both.
"""

from __future__ import annotations

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
    newest,
    wants_salvage,
    was_let_in,
)
from orion.manager.domain.states import ENDED, LIVE, Health, PlacementState, RentalState
from orion.manager.domain.steps import Step
from orion.manager.store import state
from orion.manager.store.database import Store
from orion.manager.store.memory import MemoryStateStore
from orion.manager.store.pool_index import chunks
from orion.manager.store.schema import copies, placements, rentals, workers

standbys = placements.alias()
COPIED_FROM = (Health.READY, Health.QUARANTINED)
"""Workers whose rentals are copied every so often: a quarantined one runs what it has, and answers."""


class Running(NamedTuple):
    """An active rental with the placement that runs, on a worker that can be asked, and is not being moved away."""

    rental: Rental
    placement: Placement
    worker: Worker


class SnapshotCatalog(Protocol):
    """Each call is one transaction."""

    async def running(self) -> dict[str, tuple[int, str]]:
        """Return the rentals that can be copied now, each with its epoch and its owner."""
        ...

    async def one(self, rental_id: str) -> Running | None:
        """None: it cannot be copied now."""
        ...

    async def migrating(self, rental_id: str) -> Running | None:
        """The same for a planned move, whose worker need not be ready. None: it does not run any more."""
        ...

    async def accept(self, step: Step, rental_id: str, there: Sequence[Snapshot]) -> bool:
        """Apply the step of a new copy, and with it what copies there are now; False, and nothing, when it is late."""
        ...

    async def record(self, step: Step) -> None: ...

    async def of(self, rental_id: str) -> list[Snapshot]:
        """The copies of a rental, oldest first."""
        ...

    async def newest(self, rental_id: str) -> Snapshot | None:
        """That with which it begins again by itself."""
        ...

    async def to_recover(self, placement_id: str) -> tuple[Rental, Placement] | None:
        """A placement of which something is to be salvaged; None: it is not any more."""
        ...

    async def removable(
        self, rental_ids: Iterable[str], wall: float, short_of_room: Collection[str] = ()
    ) -> list[tuple[str, int]]:
        """Return of these rentals those that have ended and whose copies are kept no longer, with their uids.

        `short_of_room`: owners of whom nothing is kept that has ended.
        """
        ...

    async def forget(self, rental_id: str) -> None:
        """Its copies are gone."""
        ...


class SqlSnapshotCatalog:
    """Implements `SnapshotCatalog`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def running(self) -> dict[str, tuple[int, str]]:
        return await self._store.read(load_running)

    async def one(self, rental_id: str) -> Running | None:
        return await self._store.read(load_one, rental_id)

    async def migrating(self, rental_id: str) -> Running | None:
        return await self._store.read(load_migrating, rental_id)

    async def accept(self, step: Step, rental_id: str, there: Sequence[Snapshot]) -> bool:
        return await self._store.write(_accept, step, rental_id, there)

    async def record(self, step: Step) -> None:
        await self._store.write(state.apply, [step])

    async def of(self, rental_id: str) -> list[Snapshot]:
        return await self._store.read(snapshots_of, rental_id)

    async def newest(self, rental_id: str) -> Snapshot | None:
        return await self._store.read(newest_of, rental_id)

    async def to_recover(self, placement_id: str) -> tuple[Rental, Placement] | None:
        return await self._store.read(load_to_recover, placement_id)

    async def removable(
        self, rental_ids: Iterable[str], wall: float, short_of_room: Collection[str] = ()
    ) -> list[tuple[str, int]]:
        return await self._store.read(load_removable, list(rental_ids), wall, short_of_room)

    async def forget(self, rental_id: str) -> None:
        await self._store.write(forget, rental_id)


class MemorySnapshotCatalog:
    """Implements `SnapshotCatalog` over a ledger in memory."""

    def __init__(self, world: MemoryStateStore) -> None:
        self._ledger = world
        self.copies: dict[str, list[Snapshot]] = {}

    async def running(self) -> dict[str, tuple[int, str]]:
        return {one.rental.id: (one.rental.epoch, one.rental.owner) for one in self._running()}

    async def one(self, rental_id: str) -> Running | None:
        return next((one for one in self._running() if one.rental.id == rental_id), None)

    async def migrating(self, rental_id: str) -> Running | None:
        world, rental = self._ledger.world, self._ledger.world.rentals.get(rental_id)
        live = world.live_placement(rental_id)
        if rental is None or live is None or rental.state is not RentalState.ACTIVE:
            return None
        worker = world.workers.get(live.worker_id)
        return Running(rental, live, worker) if worker and live.state is PlacementState.RUNNING else None

    def _running(self) -> list[Running]:
        world = self._ledger.world
        moving = {p.rental_id for p in world.placements.values() if p.state in LIVE and (p.standby or p.held)}
        running = [p for p in world.placements.values() if p.state is PlacementState.RUNNING]
        running = [p for p in running if p.rental_id not in moving]
        placed = [p for p in running if p.worker_id in world.workers]
        found = [Running(world.rentals[p.rental_id], p, world.workers[p.worker_id]) for p in placed]
        return [r for r in found if r.rental.state is RentalState.ACTIVE and r.worker.health in COPIED_FROM]

    async def accept(self, step: Step, rental_id: str, there: Sequence[Snapshot]) -> bool:
        if not await self._ledger.apply([step]):
            return False
        self.copies[rental_id] = list(there)
        return True

    async def record(self, step: Step) -> None:
        await self._ledger.apply([step])

    async def of(self, rental_id: str) -> list[Snapshot]:
        return list(self.copies.get(rental_id, ()))

    async def newest(self, rental_id: str) -> Snapshot | None:
        return newest(await self.of(rental_id), self._ledger.world.rentals[rental_id])

    async def to_recover(self, placement_id: str) -> tuple[Rental, Placement] | None:
        placement = self._ledger.world.placements.get(placement_id)
        rental = self._ledger.world.rentals.get(placement.rental_id) if placement else None
        return (rental, placement) if rental and placement and wants_salvage(rental, placement) else None

    async def removable(
        self, rental_ids: Iterable[str], wall: float, short_of_room: Collection[str] = ()
    ) -> list[tuple[str, int]]:
        known = [self._ledger.world.rentals[each] for each in rental_ids if each in self._ledger.world.rentals]
        return [(rental.id, rental.uid) for rental in known if _is_over(rental, wall, short_of_room)]

    async def forget(self, rental_id: str) -> None:
        self.copies.pop(rental_id, None)


def load_running(connection: Connection) -> dict[str, tuple[int, str]]:
    rows = connection.execute(_running(rentals.c.id, rentals.c.epoch, rentals.c.owner))
    return {row.id: (row.epoch, row.owner) for row in rows}


def load_one(connection: Connection, rental_id: str) -> Running | None:
    return _load(connection, _running(rentals.c.id, placements.c.id, workers.c.id), rental_id)


def load_migrating(connection: Connection, rental_id: str) -> Running | None:
    return _load(connection, _placed(rentals.c.id, placements.c.id, workers.c.id), rental_id)


def _load(connection: Connection, query: Any, rental_id: str) -> Running | None:
    found = connection.execute(query.where(rentals.c.id == rental_id)).first()
    if found is None:
        return None
    # Their columns have the same names, hence three queries.
    rental, placement, worker = (
        connection.execute(select(table).where(table.c.id == identity)).mappings().one()
        for table, identity in zip((rentals, placements, workers), found, strict=True)
    )
    return Running(state.rental(rental), state.placement(placement), state.worker(worker))


def _running(*columns: Column[Any]) -> Any:
    """Select of active rentals whose placement runs on a worker that can be asked; a planned move copies for itself."""
    moving = select(standbys.c.rental_id).where(standbys.c.standby.is_(True), standbys.c.state.in_(LIVE))
    at_rest = (placements.c.held == 0, workers.c.health.in_(COPIED_FROM), rentals.c.id.not_in(moving))
    return _placed(*columns).where(*at_rest)


def _placed(*columns: Column[str]) -> Any:
    """Select of active rentals whose placement runs."""
    joined = placements.join(rentals, rentals.c.id == placements.c.rental_id).join(
        workers, workers.c.id == placements.c.worker_id
    )
    runs = (placements.c.state == PlacementState.RUNNING, rentals.c.state == RentalState.ACTIVE)
    return select(*columns).select_from(joined).where(*runs)


def _accept(connection: Connection, step: Step, rental_id: str, there: Sequence[Snapshot]) -> bool:
    if not state.apply(connection, [step]):
        return False
    forget(connection, rental_id)
    if there:
        connection.execute(insert(copies), [_row(rental_id, copy) for copy in there])
    return True


def snapshots_of(connection: Connection, rental_id: str) -> list[Snapshot]:
    query = select(copies).where(copies.c.rental_id == rental_id).order_by(copies.c.epoch, copies.c.number)
    return [_copy(row) for row in connection.execute(query).mappings()]


def with_recovered(connection: Connection, rental_ids: Iterable[str]) -> dict[str, list[Snapshot]]:
    """Return all copies of those of these rentals that have a salvage among them."""
    found: dict[str, list[Snapshot]] = {}
    salvages = copies.alias()
    for some in chunks(rental_ids):
        have = select(salvages.c.rental_id).where(salvages.c.rental_id.in_(some), salvages.c.salvage.is_(True))
        for row in connection.execute(select(copies).where(copies.c.rental_id.in_(have))).mappings():
            found.setdefault(row["rental_id"], []).append(_copy(row))
    return found


def _copy(row: RowMapping) -> Snapshot:
    generation, skipped = SnapshotId(row["epoch"], row["number"]), tuple(row["skipped"])
    return Snapshot(
        generation=generation,
        at=row["at"],
        bytes=row["bytes"],
        files=row["files"],
        skipped=skipped,
        salvage=bool(row["salvage"]),
    )


def newest_of(connection: Connection, rental_id: str) -> Snapshot | None:
    row = connection.execute(select(rentals).where(rentals.c.id == rental_id)).mappings().one()
    return newest(snapshots_of(connection, rental_id), state.rental(row))


def load_to_recover(connection: Connection, placement_id: str) -> tuple[Rental, Placement] | None:
    row = connection.execute(select(placements).where(placements.c.id == placement_id)).mappings().first()
    if row is None:
        return None
    placement = state.placement(row)
    found = connection.execute(select(rentals).where(rentals.c.id == placement.rental_id)).mappings().one()
    rental = state.rental(found)
    return (rental, placement) if wants_salvage(rental, placement) else None


def load_removable(
    connection: Connection, rental_ids: Sequence[str], wall: float, short_of_room: Collection[str]
) -> list[tuple[str, int]]:
    found = []
    for start in range(0, len(rental_ids), 500):
        some = select(rentals).where(rentals.c.id.in_(rental_ids[start : start + 500]), rentals.c.state.in_(ENDED))
        rows = [state.rental(row) for row in connection.execute(some).mappings()]
        found += [(rental.id, rental.uid) for rental in rows if _is_over(rental, wall, short_of_room)]
    return found


def begin_restore(connection: Connection, rental_id: str, actor: str, source: str) -> str:
    """Make a rental begin anew with `source`; why it cannot, as a stable word, empty when it was done."""
    rental = state.rental(connection.execute(select(rentals).where(rentals.c.id == rental_id)).mappings().one())
    if rental.state in ENDED | {RentalState.RELEASING}:
        return "ended"
    if not was_let_in(rental):
        return "not_active_yet"
    if source != EMPTY and source not in {str(copy.generation) for copy in snapshots_of(connection, rental_id)}:
        return "no_such_snapshot"
    runs = and_(placements.c.rental_id == rental_id, placements.c.state == PlacementState.RUNNING)
    row = connection.execute(select(placements).where(runs)).mappings().first()
    running = state.placement(row) if row is not None and rental.state is RentalState.ACTIVE else None
    state.apply(connection, [ask_to_restore(rental, running, source, actor)])
    return ""


def forget(connection: Connection, rental_id: str) -> None:
    connection.execute(delete(copies).where(copies.c.rental_id == rental_id))


def _is_over(rental: Rental, wall: float, short_of_room: Collection[str]) -> bool:
    kept_s = 0.0 if rental.owner in short_of_room else EXPIRED_KEPT_S
    if rental.state is RentalState.EXPIRED:
        return wall > (rental.expires_at or 0.0) + kept_s
    return rental.state in ENDED


def _row(rental_id: str, copy: Snapshot) -> dict[str, object]:
    named = {"rental_id": rental_id, "epoch": copy.generation.epoch, "number": copy.generation.number}
    told = {"at": copy.at, "bytes": copy.bytes, "files": copy.files, "skipped": list(copy.skipped)}
    return named | told | {"salvage": copy.salvage}
