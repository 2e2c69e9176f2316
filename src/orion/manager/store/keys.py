"""Changes the SSH keys of a rental. The reconciler sends changed keys to its worker.

They are one text, a key per line, because they are always put in place, compared and migrated together.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, select, update

from orion import wire
from orion.manager.domain.model import Rental
from orion.manager.domain.steps import Event
from orion.manager.store import state
from orion.manager.store.database import record, touched
from orion.manager.store.schema import placements, rentals


def with_made_anew(before: str, made: str) -> str:
    """Return the keys after a repeated rent for which the manager made the key `made`.

    `made` replaces the one key of the rental, or is added to its keys if it has several.
    """
    known = before.splitlines()
    return made if len(known) == 1 else "\n".join([*known[-(wire.MAX_KEYS - 1) :], made])


def comments_after(before: Mapping[str, str], keys: str, key: str, comment: str) -> dict[str, str]:
    """Return the comments of the keys, by key id, with `comment` for `key`; an empty comment changes nothing."""
    ids = {wire.key_id(each) for each in keys.splitlines()}
    named = {**before, wire.key_id(key): comment} if comment else before
    return {key_id: name for key_id, name in named.items() if key_id in ids}


def add(connection: Connection, rental_id: str, actor: str, key: str, comment: str = "") -> str:
    """Add a key with a name for people, which no worker gets; return an error code, or an empty string. Repeatable."""
    rental = state.load_living(connection, rental_id)
    if rental is None:
        return "ended"
    keys, known = rental.public_key, rental.public_key.splitlines()
    if key not in known:
        if len(known) >= wire.MAX_KEYS:
            return "too_many_keys"
        keys = "\n".join([*known, key])
        put(connection, rental_id, keys)
        _record(connection, "rental.key_added", rental, actor, key)
    _keep_comments(connection, rental_id, keys, key, comment)
    return ""


def remove(connection: Connection, rental_id: str, actor: str, key_id: str) -> str:
    """Remove a key, but never the last one of a rental; return an error code, or an empty string."""
    rental = state.load_living(connection, rental_id)
    if rental is None:
        return "ended"
    known = rental.public_key.splitlines()
    removed = next((key for key in known if wire.key_id(key) == key_id), None)
    if removed is None:
        return "no_such_key"
    if len(known) == 1:
        return "last_key"
    left = "\n".join(key for key in known if key != removed)
    put(connection, rental_id, left)
    _keep_comments(connection, rental_id, left)
    _record(connection, "rental.key_removed", rental, actor, removed)
    return ""


def put(connection: Connection, rental_id: str, keys: str) -> None:
    """Write the keys of a rental, and wake the reconciler for its workers."""
    connection.execute(update(rentals).where(rentals.c.id == rental_id).values(public_key=keys))
    on = select(placements.c.worker_id).where(placements.c.rental_id == rental_id)
    touched(connection).rentals.add(rental_id)
    touched(connection).workers.update(connection.execute(on).scalars())


def _keep_comments(connection: Connection, rental_id: str, keys: str, key: str = "", comment: str = "") -> None:
    this = rentals.c.id == rental_id
    before = connection.execute(select(rentals.c.key_comments).where(this)).scalar_one()
    now = comments_after(before, keys, key, comment)
    if now != before:
        connection.execute(update(rentals).where(this).values(key_comments=now))


def _record(connection: Connection, kind: str, rental: Rental, actor: str, key: str) -> None:
    reason = wire.fingerprint(key)
    event = Event(kind=kind, actor=actor, reason=reason, owner=rental.owner, rental_id=rental.id, epoch=rental.epoch)
    record(connection, event)
