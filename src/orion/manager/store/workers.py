"""Registers, lists, drains and removes workers."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, text, update

from orion.manager.domain.model import Item
from orion.manager.domain.states import HOLDING, OUT_OF_SERVICE, SILENT, Health, Intent, PlacementState, RentalState
from orion.manager.domain.steps import Event
from orion.manager.store import state
from orion.manager.store.database import Row, first, record, rows, set_counter, touched
from orion.manager.store.names import new_id
from orion.manager.store.port import ADDRESS_REUSED, REGISTERED_AGAIN, Notes, Registered, Registration
from orion.manager.store.schema import LIVING, counters, placements, rentals, workers
from orion.manager.store.tokens import digest, make_token


def register(connection: Connection, body: Registration, worker_id: str | None, new_token: bool) -> Registered:
    """See `port.Registry.register`."""
    session_id = secrets.token_hex(16)
    observations = vars(body) | {"host_keys": list(body.host_keys), "labels": dict(body.labels)}
    observations |= {"session_id": session_id, "verified_session": None, "last_heartbeat_at": time.time()}
    identity = worker_id or f"w-{new_id(8)}"
    token = make_token("worker", identity) if new_token else None
    if token:
        observations["token_hash"] = digest(token)
    if worker_id is None:
        birth = {"health": Health.JOINING, "intent": Intent.ACTIVE, "load": {}, "registered_at": time.time()}
        connection.execute(insert(workers), observations | birth | {"id": identity})
    else:
        connection.execute(update(workers).where(workers.c.id == worker_id).values(observations))
    touched(connection).workers.add(identity)
    reason = "a new worker called home" if worker_id is None else "it called home again"
    details = {"address": body.address, "hostname": body.hostname}
    event = Event(kind="worker.registered", actor=identity, reason=reason, worker_id=identity, details=details)
    record(connection, event)
    replaced = _remove_replaced(connection, body, identity)
    return Registered(worker_id=identity, session_id=session_id, token=token, replaced=replaced)


def _remove_replaced(connection: Connection, body: Registration, identity: str) -> tuple[str, ...]:
    """Remove workers without placements whose place the registration takes; return their ids.

    Such a worker has the same address, or is the same agent (same host keys and boot id, which others do not know) that
    did not get the answer to an earlier registration.
    """
    with_placements = select(placements.c.worker_id).where(placements.c.state != PlacementState.PURGED)
    others = select(workers.c.id, workers.c.address, workers.c.health, workers.c.host_keys, workers.c.boot_id).where(
        (workers.c.address == body.address) | (workers.c.hostname == body.hostname),
        workers.c.id != identity,
        workers.c.health.in_(SILENT),
        workers.c.intent == Intent.ACTIVE,
        workers.c.id.not_in(with_placements),
    )
    removed = {}
    for other in connection.execute(others.order_by(workers.c.id)):
        if (tuple(other.host_keys), other.boot_id) == (body.host_keys, body.boot_id):
            removed[other.id] = REGISTERED_AGAIN
        elif other.address == body.address and other.health in OUT_OF_SERVICE:
            removed[other.id] = ADDRESS_REUSED
    for worker_id, reason in removed.items():
        _remove(connection, identity, worker_id, reason)
    return tuple(removed)


def _remove(connection: Connection, actor: str, worker_id: str, reason: str) -> None:
    connection.execute(delete(workers).where(workers.c.id == worker_id))
    touched(connection).workers.add(worker_id)
    record(connection, Event(kind="worker.removed", actor=actor, reason=reason, worker_id=worker_id))


def one(connection: Connection, worker_id: str) -> Row | None:
    """Return a worker with `used`, the number of its slots that are taken; None if it does not exist."""
    return first(connection.execute(_with_use().where(workers.c.id == worker_id)))


def page(connection: Connection, after: str | None, limit: int) -> list[Row]:
    """Return workers in the order of their ids, each with `used`, the number of its slots that are taken."""
    return rows(connection.execute(_with_use().where(workers.c.id > (after or "")).order_by(workers.c.id).limit(limit)))


def record_heartbeats(connection: Connection, notes: Notes) -> None:
    """See `port.StateStore.record_heartbeats`."""
    if found := [{"which": worker_id, "last_heartbeat_at": at, "load": dict(load)} for worker_id, at, load in notes]:
        change: dict[str, Any] = {name: bindparam(name) for name in ("last_heartbeat_at", "load")}
        connection.execute(update(workers).where(workers.c.id == bindparam("which")).values(change), found)


def granted_lease(connection: Connection) -> float:
    """Return the longest lease, in seconds, that a former manager may have granted; 0 if there was none."""
    value = connection.execute(select(counters.c.value).where(counters.c.name == "lease_ms")).scalar()
    return (value or 0) / 1000


def grant_lease(connection: Connection, lease_s: float) -> None:
    """Write the longest lease, in seconds, that replies grant from now on; this must precede the first reply."""
    set_counter(connection, "lease_ms", round(lease_s * 1000))


def set_intent(connection: Connection, actor: str, worker_id: str, to: Intent) -> Row | None:
    """Drain or resume a worker, and return its row; None if it does not exist. Repeatable."""
    row = one(connection, worker_id)
    if row is None:
        return None
    resumed = to is Intent.ACTIVE
    already = row["intent"] == to or (to is Intent.DRAINING and row["intent"] == Intent.DRAINED)
    if already and not (resumed and row["fault"]):
        return row
    change: dict[str, Any] = {"intent": to} | ({"fault": "", "verified_session": None} if resumed else {})
    connection.execute(update(workers).where(workers.c.id == worker_id).values(change))
    touched(connection).workers.add(worker_id)
    kind = "worker.resumed" if resumed else "worker.drain_started"
    record(connection, Event(kind=kind, actor=actor, reason="asked for", worker_id=worker_id))
    return one(connection, worker_id)


def drain_together(connection: Connection, actor: str, worker_ids: Iterable[str]) -> list[Row | None]:
    """Drain these workers and return their rows. If one does not exist, its row is None and no worker is changed."""
    found = [one(connection, worker_id) for worker_id in worker_ids]
    return (
        found if None in found else [set_intent(connection, actor, row["id"], Intent.DRAINING) for row in found if row]
    )


def declared_gone(connection: Connection, actor: str, worker_id: str) -> None:
    """Write the event that an operator declared a worker's container gone, and wake the health controller."""
    touched(connection).workers.add(worker_id)
    reason = "an operator says that its container is gone"
    record(connection, Event(kind="worker.declared_gone", actor=actor, reason=reason, worker_id=worker_id))


def give_up(connection: Connection, actor: str, worker_id: str, items: Iterable[Item]) -> None:
    """Let a worker purge the rentals of its inventory that the database never placed: write them as lost placements."""
    unknown_rentals = state.never_placed(connection, list(items))
    for item in (i for i in items if (i.rental_id, i.epoch) in unknown_rentals):
        known = connection.execute(select(rentals.c.id).where(rentals.c.id == item.rental_id)).first()
        if known is None:
            row = {"id": item.rental_id, "username": item.username, "uid": item.uid, "epoch": item.epoch}
            row |= {"name": item.rental_id, "owner": "unknown", "state": RentalState.RELEASED, "end": "released"}
            row |= {"public_key": "", "ttl_s": 0, "labels": {}, "created_at": time.time(), "explanation": "given up"}
            connection.execute(insert(rentals), row)
        place = {"id": f"p-{new_id(12)}", "rental_id": item.rental_id, "worker_id": worker_id, "slot": 0}
        # `files_recovered`: a worker's claim to have an epoch must not become a snapshot of it.
        place |= {"epoch": item.epoch, "state": PlacementState.LOST, "created_at": time.time(), "files_recovered": True}
        connection.execute(insert(placements), place)
        touched(connection).workers.add(worker_id)
        reason = "the database had never placed it; an operator gave it up"
        at: dict[str, Any] = {"rental_id": item.rental_id, "worker_id": worker_id, "epoch": item.epoch}
        record(connection, Event(kind="rental.given_up", actor=actor, reason=reason, **at))


def remove(connection: Connection, actor: str, worker_id: str) -> str | None:
    """Remove a worker; return a code that says why it cannot be removed, or None when it is removed."""
    row = one(connection, worker_id)
    if row is None:
        return "not_found"
    if row["health"] != Health.DOWN and row["used"]:
        return "worker_in_use"
    _remove(connection, actor, worker_id, "asked for")
    return None


@dataclass(frozen=True)
class Pruned:
    """The outcome of `prune`."""

    forgotten: tuple[str, ...]
    """Ids of the workers that were removed."""
    kept: Mapping[str, str]
    """The reason why each other worker that is down was not removed, by its id."""


def prune(connection: Connection, actor: str, worker_ids: Collection[str] | None = None) -> Pruned:
    """See `port.StateStore.forget`; `worker_ids` None means all workers that are down."""
    down = select(workers.c.id, workers.c.intent).where(workers.c.health == Health.DOWN).order_by(workers.c.id)
    found = connection.execute(down).all()
    needed = _names_of_needed(connection)
    forgotten, kept = [], {}
    for worker_id, intent in (row for row in found if worker_ids is None or row.id in worker_ids):
        if worker_id in needed:
            names = ", ".join(sorted(needed[worker_id]))
            kept[worker_id] = (
                f"it may still have what was written last in {names}: start it, or orion remove {worker_id}"
            )
        elif intent != Intent.ACTIVE:
            kept[worker_id] = f"an operator drained it: orion remove {worker_id}, or resume it"
        else:
            forgotten.append(worker_id)
            _remove(connection, actor, worker_id, "it is down, and holds nothing that is needed")
    return Pruned(tuple(forgotten), kept)


def _names_of_needed(connection: Connection) -> dict[str, list[str]]:
    """Return the names of the living rentals whose newest files a worker that is down may hold, by worker id."""
    query = (
        select(placements.c.worker_id, rentals.c.name)
        .join(rentals, rentals.c.id == placements.c.rental_id)
        .join(workers, workers.c.id == placements.c.worker_id)
        .where(
            workers.c.health == Health.DOWN,
            placements.c.state != PlacementState.PURGED,
            placements.c.files_recovered.is_(False),
            text(LIVING),
        )
    )
    found: dict[str, list[str]] = defaultdict(list)
    for worker_id, name in connection.execute(query):
        found[worker_id].append(name)
    return found


def _with_use() -> Any:
    """Return the query of workers with their column `used`; a worker that is down uses no slot."""
    used = (
        select(func.count())
        .where(placements.c.worker_id == workers.c.id, placements.c.state.in_(HOLDING), workers.c.health != Health.DOWN)
        .scalar_subquery()
    )
    return select(workers, used.label("used"))
