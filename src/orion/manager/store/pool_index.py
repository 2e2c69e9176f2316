"""Reads the changes for the pool index (domain/pool_index.py): rows as a transaction leaves them, before it commits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Select, String, and_, cast, select

from orion.manager.domain.pool_index import NO_PLACEMENTS, Changes, IndexedPlacement, IndexedWorker
from orion.manager.domain.states import ENDED, Health, Intent, PlacementState, RentalState
from orion.manager.store.schema import placements, rentals, workers

SOME = 500
"""The largest number of values in the list of one statement."""
OPEN = tuple(state for state in PlacementState if state is not PlacementState.PURGED)
LIVING = tuple(state for state in RentalState if state not in ENDED)

_HEALTH = {str(health): health for health in Health}
_INTENT = {str(intent): intent for intent in Intent}
_PLACEMENT_STATE = {str(state): state for state in PlacementState}
_RENTAL_STATE = {str(state): state for state in RentalState}

_WORKERS = select(
    *workers.c["id", "token_hash", "health", "intent", "slots", "session_id", "verified_session", "fault", "address"]
)
_PLACEMENTS = (
    select(
        *placements.c["worker_id", "id", "rental_id", "epoch", "state"],
        placements.c.public_key == rentals.c.public_key,
        placements.c.public_key == "",
        and_(
            rentals.c.start != "",
            rentals.c.start_problem == "",
            placements.c.start_mark != cast(rentals.c.start_run, String) + "@" + workers.c.boot_id,
        ),
        placements.c.start_end != "",
        placements.c.is_target,
        placements.c.quiesced_for,
    )
    .join_from(placements, rentals, rentals.c.id == placements.c.rental_id)
    .outerjoin(workers, workers.c.id == placements.c.worker_id)
    .where(placements.c.state.in_(OPEN))
)
_RENTALS = select(rentals.c.id, rentals.c.state).where(rentals.c.state.in_(LIVING))


@dataclass(kw_only=True)
class Touched:
    """The ids of the rows that a transaction has changed."""

    workers: set[str] = field(default_factory=set)
    rentals: set[str] = field(default_factory=set)
    placements: set[str] = field(default_factory=set)
    everything: bool = False

    def __bool__(self) -> bool:
        return any(vars(self).values())


def changes(connection: Connection, touched: Touched) -> Changes:
    """Return the touched rows as they are now."""
    if touched.everything:
        return everything(connection)
    ids = set(touched.workers)
    for some in chunks(touched.placements):
        ids |= set(connection.execute(select(placements.c.worker_id).where(placements.c.id.in_(some))).scalars())
    known: dict[str, IndexedWorker | None] = dict.fromkeys(ids)
    placed: dict[str, list[IndexedPlacement]] = defaultdict(list)
    states: dict[str, RentalState | None] = dict.fromkeys(touched.rentals)
    for some in chunks(ids):
        known.update(_known(connection, _WORKERS.where(workers.c.id.in_(some))))
        _add_placements(connection, _PLACEMENTS.where(placements.c.worker_id.in_(some)), placed, {})
    for some in chunks(touched.rentals):
        found = connection.execute(_RENTALS.where(rentals.c.id.in_(some)))
        states.update((rental_id, _RENTAL_STATE[state]) for rental_id, state in found)
    return Changes({w: (known[w], tuple(placed.get(w, NO_PLACEMENTS))) for w in ids}, states)


def chunks(values: Iterable[str]) -> Iterator[list[str]]:
    """Yield the values, sorted, in lists that a statement can take."""
    ordered = iter(sorted(values))
    while some := list(islice(ordered, SOME)):
        yield some


def everything(connection: Connection) -> Changes:
    """Return all workers with their placements, and all living rentals."""
    known = dict(_known(connection, _WORKERS))
    states = {rental_id: _RENTAL_STATE[state] for rental_id, state in connection.execute(_RENTALS)}
    placed: dict[str, list[IndexedPlacement]] = defaultdict(list)
    # One string object for each id saves memory in a large pool.
    _add_placements(connection, _PLACEMENTS, placed, {identity: identity for identity in (*known, *states)})
    return Changes({w: (known.get(w), tuple(placed.get(w, NO_PLACEMENTS))) for w in {**known, **placed}}, states)


def _known(connection: Connection, query: Select[Any]) -> Iterator[tuple[str, IndexedWorker]]:
    for identity, token_hash, health, intent, slots, session, verified, fault, address in connection.execute(query):
        known = IndexedWorker(
            token_hash=token_hash,
            health=_HEALTH[health],
            intent=_INTENT[intent],
            slots=slots,
            session_id=session,
            verified=session is not None and verified == session,
            fault=fault,
            address=address,
        )
        yield identity, known


def _add_placements(
    connection: Connection, query: Select[Any], placed: dict[str, list[IndexedPlacement]], same: dict[str, str]
) -> None:
    for worker_id, identity, rental_id, epoch, state, *flags, is_target, quiesced_for in connection.execute(query):
        keyed, blank, start_due, ended = map(bool, flags)
        found = IndexedPlacement(
            id=identity,
            rental_id=same.get(rental_id, rental_id),
            epoch=epoch,
            state=_PLACEMENT_STATE[state],
            keyed=keyed,
            blank=blank,
            start_due=start_due,
            is_target=is_target,
            quiesced_for=quiesced_for,
            start_ended=ended,
        )
        placed[same.get(worker_id, worker_id)].append(found)
