"""Creates, lists and changes rentals for the API."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from orion.manager.domain.expiry import release, renew
from orion.manager.domain.snapshots import waiting_recovered_snapshot
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
    """The owner has a living rental of this name already."""


class OtherRequest(Exception):
    """The idempotency key was used with another request."""


@dataclass(frozen=True, kw_only=True)
class NewRental:
    """A requested rental."""

    owner: str
    name: str | None
    public_key: str
    made_key: bool
    """Whether the manager made the SSH key; a repeated request then gets a new one."""
    ttl_s: int
    labels: Mapping[str, str]
    key: str | None
    """The idempotency key, if the request has one."""
    request_hash: str
    """The hash of the request, which is compared when the idempotency key is used again."""
    start: str = ""
    comment: str = ""
    """The name of the SSH key, for people; empty: none."""
    key_begins_at: float = field(default_factory=time.time)
    """Unix seconds from which the lifetime of the idempotency key counts."""


def create(connection: Connection, new: NewRental) -> str:
    """Make a queued rental; return its id, or the id of the rental that the idempotency key made before."""
    if (known := _replayed(connection, new)) is not None:
        return known
    identity = new_id(10)
    row = {
        "id": identity,
        "name": new.name or _unused_name(connection, new.owner),
        "owner": new.owner,
        "username": f"r-{identity}",
        "uid": _next_uid(connection),
        "state": RentalState.QUEUED,
        "epoch": 0,
        "public_key": new.public_key,
        "key_comments": keys.comments_after({}, new.public_key, new.public_key, new.comment),
        "ttl_s": new.ttl_s,
        "labels": dict(new.labels),
        "start": new.start,
        "created_at": time.time(),
        "explanation": "it is next",
    }
    try:
        with connection.begin_nested():
            connection.execute(insert(rentals), row)
    except IntegrityError as error:
        raise NameTaken(new.name) from error
    if new.key is not None:
        used = {"owner": new.owner, "key": new.key, "request_hash": new.request_hash}
        connection.execute(insert(idempotency), used | {"rental_id": identity, "created_at": new.key_begins_at})
    touched(connection).rentals.add(identity)
    owner = new.owner
    record(
        connection,
        Event(kind="rental.queued", actor=owner, reason="asked for", owner=owner, rental_id=identity, epoch=0),
    )
    return identity


def forget_keys(connection: Connection, now: float) -> None:
    """Remove the idempotency keys whose lifetime is over at `now` (Unix seconds)."""
    connection.execute(delete(idempotency).where(idempotency.c.created_at < now - KEY_LIFETIME_S))


def _replayed(connection: Connection, new: NewRental) -> str | None:
    if new.key is None:
        return None
    same = and_(idempotency.c.owner == new.owner, idempotency.c.key == new.key)
    row = first(connection.execute(select(idempotency).where(same)))
    if row is None:
        return None
    if row["request_hash"] != new.request_hash:
        raise OtherRequest(new.key)
    if new.made_key:
        rental = state.load_living(connection, row["rental_id"])
        if rental is not None:
            keys.put(connection, rental.id, keys.with_made_anew(rental.public_key, new.public_key))
    return str(row["rental_id"])


def _unused_name(connection: Connection, owner: str) -> str:
    while True:
        name = new_name()
        living = and_(rentals.c.owner == owner, rentals.c.name == name, rentals.c.state.not_in(ENDED))
        if connection.execute(select(rentals.c.id).where(living)).first() is None:
            return name


def _next_uid(connection: Connection) -> int:
    """Return a uid that was never assigned: a reused one would own files that its predecessor left behind."""
    same = counters.c.name == "uid"
    if connection.execute(update(counters).where(same).values(value=counters.c.value + 1)).rowcount == 0:
        connection.execute(insert(counters), {"name": "uid", "value": FIRST_UID})
    return int(connection.execute(select(counters.c.value).where(same)).scalar_one())


def one(connection: Connection, rental_id: str, owner: str | None, wall: float = float("-inf")) -> Row | None:
    """Return a rental with its worker; None if it does not exist or has another owner (`owner` None: any).

    `wall`: the time now (Unix seconds), which decides whether a recovered snapshot is too old to be shown.
    """
    query = _with_worker().where(rentals.c.id == rental_id)
    if owner is not None:
        query = query.where(rentals.c.owner == owner)
    found = first(connection.execute(query))
    return found and _with_recovered(connection, [found], wall)[0]


def page(
    connection: Connection,
    owner: str | None,
    name: str | None,
    ended: bool,
    after: str | None,
    limit: int,
    wall: float = float("-inf"),
) -> list[Row]:
    """Return rentals by id; `owner`, `name` None: any; `ended`: also ended ones; `wall`: see `one`."""
    query = _with_worker().where(rentals.c.id > (after or "")).order_by(rentals.c.id).limit(limit)
    for wanted, column in ((owner, rentals.c.owner), (name, rentals.c.name)):
        if wanted is not None:
            query = query.where(column == wanted)
    if not ended:
        query = query.where(text(LIVING))
    return _with_recovered(connection, rows(connection.execute(query)), wall)


def begin_release(connection: Connection, rental_id: str, actor: str) -> None:
    """Begin to release a living rental; do nothing if it is releasing or has ended."""
    rental = state.load_living(connection, rental_id)
    if rental is not None:
        state.apply(connection, [release(rental, "released", actor, "asked for")])


def extend(connection: Connection, rental_id: str, actor: str, ttl_s: int, counts_from: float | None) -> bool:
    """Renew a living rental as expiry.renew does; return False if it is releasing or has ended."""
    rental = state.load_living(connection, rental_id)
    if rental is None:
        return False
    state.apply(connection, [renew(rental, ttl_s, actor, counts_from)])
    return True


def begin_start(connection: Connection, rental_id: str, actor: str) -> str:
    """Request a run of the rental's start command; return an error code, or an empty string."""
    rental = state.load_living(connection, rental_id)
    if rental is None:
        return "ended"
    if not rental.start:
        return "no_start"
    state.apply(connection, [ask_to_start(rental, actor)])
    on = select(placements.c.worker_id).where(placements.c.rental_id == rental_id, placements.c.state.in_(LIVE))
    touched(connection).workers.update(connection.execute(on).scalars())
    return ""


def _with_recovered(connection: Connection, found: list[Row], wall: float) -> list[Row]:
    """Add to each rental its `salvage`, a recovered snapshot: see domain/snapshots.py, waiting_recovered_snapshot."""
    recovered = snapshots.with_recovered(connection, [row["id"] for row in found])
    for row in found:
        of_it = recovered.get(row["id"])
        row["salvage"] = waiting_recovered_snapshot(of_it, state.rental(row), wall) if of_it else None
    return found


def _with_worker() -> Select[Any]:
    """Return the query of rentals, each with its worker and the state of its live placement.

    Columns: `worker_id`, `address`, `host_keys`, `key_in_place`, `held`, `moving_to`, `start_end`, `start_ended_at`.
    """
    target = placements.alias()
    moving_to = select(target.c.worker_id).where(target.c.rental_id == rentals.c.id, target.c.is_target.is_(True))
    return select(
        rentals,
        *placements.c["worker_id", "quiesced_for", "start_end", "start_ended_at"],
        *workers.c["address", "host_keys"],
        (placements.c.public_key == rentals.c.public_key).label("key_in_place"),
        moving_to.where(target.c.state.in_(LIVE)).scalar_subquery().label("moving_to"),
    ).select_from(state.RENTALS_WITH_WORKERS)
