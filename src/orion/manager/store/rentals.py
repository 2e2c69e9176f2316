"""Rentals as the API asks for them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from orion.manager.domain.expiry import release, renew
from orion.manager.domain.snapshots import waiting_salvage
from orion.manager.domain.start_commands import ask_to_start
from orion.manager.domain.states import ENDED, LIVE, RentalState
from orion.manager.domain.steps import Event
from orion.manager.store import keys, snapshots, state
from orion.manager.store.database import Row, first, record, rows, touched
from orion.manager.store.names import new_id, new_name
from orion.manager.store.schema import LIVING, counters, idempotency, placements, rentals, workers

FIRST_UID = 100_000
KEY_LIFETIME_S = 24 * 3600.0


class NameTaken(Exception):
    """The owner has a living rental of this name."""


class OtherRequest(Exception):
    """This idempotency key was used with another request."""


@dataclass(frozen=True, kw_only=True)
class NewRental:
    """A rent as asked for; `request_hash` is compared when its idempotency key comes again."""

    owner: str
    name: str | None
    public_key: str
    made_key: bool
    """The manager made the key, so a replay brings a new one."""
    ttl_s: int
    labels: Mapping[str, str]
    key: str | None
    request_hash: str
    start: str = ""
    comment: str = ""
    """The name of its key, for people; empty: it has none."""
    key_begins_at: float = field(default_factory=time.time)
    """Unix seconds from which the lifetime of its idempotency key counts."""


def create(connection: Connection, wish: NewRental) -> str:
    """The id of the new rental, or of the one that this idempotency key made before.

    Raises NameTaken and OtherRequest.
    """
    known = _replayed(connection, wish)
    if known is not None:
        return known
    now = time.time()
    identity = new_id(10)
    row = {
        "id": identity,
        "name": wish.name or _unused_name(connection, wish.owner),
        "owner": wish.owner,
        "username": f"r-{identity}",
        "uid": _next_uid(connection),
        "state": RentalState.QUEUED,
        "epoch": 0,
        "public_key": wish.public_key,
        "key_comments": keys.comments_after({}, wish.public_key, wish.public_key, wish.comment),
        "ttl_s": wish.ttl_s,
        "labels": dict(wish.labels),
        "start": wish.start,
        "created_at": now,
        "explanation": "it is next",
    }
    try:
        with connection.begin_nested():
            connection.execute(insert(rentals), row)
    except IntegrityError as error:
        raise NameTaken(wish.name) from error
    if wish.key is not None:
        used = {"owner": wish.owner, "key": wish.key, "request_hash": wish.request_hash}
        connection.execute(insert(idempotency), used | {"rental_id": identity, "created_at": wish.key_begins_at})
    touched(connection).rentals.add(identity)
    record(
        connection,
        Event(
            kind="rental.queued", actor=wish.owner, reason="asked for", owner=wish.owner, rental_id=identity, epoch=0
        ),
    )
    return identity


def forget_keys(connection: Connection, now: float) -> None:
    """Remove the idempotency keys whose lifetime is over at `now` (Unix seconds)."""
    connection.execute(delete(idempotency).where(idempotency.c.created_at < now - KEY_LIFETIME_S))


def _replayed(connection: Connection, wish: NewRental) -> str | None:
    if wish.key is None:
        return None
    same = and_(idempotency.c.owner == wish.owner, idempotency.c.key == wish.key)
    row = connection.execute(select(idempotency).where(same)).mappings().first()
    if row is None:
        return None
    if row["request_hash"] != wish.request_hash:
        raise OtherRequest(wish.key)
    if wish.made_key:
        living = and_(rentals.c.id == row["rental_id"], rentals.c.state.not_in({*ENDED, RentalState.RELEASING}))
        before = connection.execute(select(rentals.c.public_key).where(living)).scalar()
        if before is not None:
            keys.put(connection, row["rental_id"], keys.with_made_anew(before, wish.public_key))
    return str(row["rental_id"])


def _unused_name(connection: Connection, owner: str) -> str:
    while True:
        name = new_name()
        living = and_(rentals.c.owner == owner, rentals.c.name == name, rentals.c.state.not_in(ENDED))
        if connection.execute(select(rentals.c.id).where(living)).first() is None:
            return name


def _next_uid(connection: Connection) -> int:
    """Given once, never used again: a number that comes back would own what its predecessor left behind."""
    same = counters.c.name == "uid"
    if connection.execute(update(counters).where(same).values(value=counters.c.value + 1)).rowcount == 0:
        connection.execute(insert(counters), {"name": "uid", "value": FIRST_UID})
    return int(connection.execute(select(counters.c.value).where(same)).scalar_one())


def one(connection: Connection, rental_id: str, owner: str | None, wall: float = float("-inf")) -> Row | None:
    """A rental with its worker; None when there is none or it is another owner's (`owner` None: anybody's).

    `wall`: the time now (Unix seconds), by which a salvage is too old to be shown; less than all times: all are shown.
    """
    query = _with_worker().where(rentals.c.id == rental_id)
    if owner is not None:
        query = query.where(rentals.c.owner == owner)
    found = first(connection.execute(query))
    return found and _with_salvage(connection, [found], wall)[0]


def page(
    connection: Connection,
    owner: str | None,
    name: str | None,
    ended: bool,
    after: str | None,
    limit: int,
    wall: float = float("-inf"),
) -> list[Row]:
    """Rentals by id. `owner` None: everybody's; `ended`: those that ended too; `wall` as for `one`."""
    query = _with_worker().order_by(rentals.c.id).limit(limit)
    for wanted, column in ((owner, rentals.c.owner), (name, rentals.c.name)):
        if wanted is not None:
            query = query.where(column == wanted)
    if not ended:
        query = query.where(text(LIVING))
    if after:
        query = query.where(rentals.c.id > after)
    return _with_salvage(connection, rows(connection.execute(query)), wall)


def begin_release(connection: Connection, rental_id: str, actor: str) -> None:
    """Begin to release a living rental; nothing happens to one that is already ending or has ended."""
    row = connection.execute(select(rentals).where(rentals.c.id == rental_id)).mappings().one()
    rental = state.rental(row)
    if rental.state not in ENDED | {RentalState.RELEASING}:
        state.apply(connection, [release(rental, "released", actor, "asked for")])


def extend(connection: Connection, rental_id: str, actor: str, ttl_s: int, counts_from: float | None) -> bool:
    """Renew a living rental, as expiry.renew; return False when it is ending or has ended."""
    row = connection.execute(select(rentals).where(rentals.c.id == rental_id)).mappings().one()
    rental = state.rental(row)
    if rental.state in ENDED | {RentalState.RELEASING}:
        return False
    state.apply(connection, [renew(rental, ttl_s, actor, counts_from)])
    return True


def begin_start(connection: Connection, rental_id: str, actor: str) -> str:
    """Have its start command run; why that cannot be, as a stable word, empty when it was asked for."""
    row = connection.execute(select(rentals).where(rentals.c.id == rental_id)).mappings().one()
    rental = state.rental(row)
    if rental.state in ENDED | {RentalState.RELEASING}:
        return "ended"
    if not rental.start:
        return "no_start"
    state.apply(connection, [ask_to_start(rental, actor)])
    on = select(placements.c.worker_id).where(placements.c.rental_id == rental_id, placements.c.state.in_(LIVE))
    touched(connection).workers.update(connection.execute(on).scalars())
    return ""


def _with_salvage(connection: Connection, found: list[Row], wall: float) -> list[Row]:
    """Add to each rental its `salvage`: see copies.waiting_salvage."""
    some = snapshots.with_recovered(connection, [row["id"] for row in found])
    for row in found:
        of_it = some.get(row["id"])
        row["salvage"] = waiting_salvage(of_it, state.rental(row), wall) if of_it else None
    return found


def _with_worker() -> Select[Any]:
    """Return the query of rentals, each with the worker that it is on and what is known of it there.

    Columns: `worker_id`, `address`, `host_keys`, `key_in_place`, `held`, `moving_to`, `start_end`, `start_ended_at`.
    """
    of_it = and_(placements.c.rental_id == rentals.c.id, placements.c.state.in_(LIVE))
    live = and_(of_it, placements.c.standby.is_(False))
    joined = rentals.outerjoin(placements, live).outerjoin(workers, workers.c.id == placements.c.worker_id)
    standby = placements.alias()
    moving_to = select(standby.c.worker_id).where(standby.c.rental_id == rentals.c.id, standby.c.standby.is_(True))
    return select(
        rentals,
        placements.c.worker_id,
        workers.c.address,
        workers.c.host_keys,
        placements.c.held,
        placements.c.start_end,
        placements.c.start_ended_at,
        (placements.c.public_key == rentals.c.public_key).label("key_in_place"),
        moving_to.where(standby.c.state.in_(LIVE)).scalar_subquery().label("moving_to"),
    ).select_from(joined)
