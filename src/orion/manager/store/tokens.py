"""Tokens: only their hashes are kept, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from orion.manager.domain.steps import Event
from orion.manager.store.database import Row, record, rows
from orion.manager.store.schema import tokens, workers

_TOKEN = re.compile(r"orion_(admin|client|join|worker)_([a-z0-9-]{1,64})_([A-Za-z0-9]{43})")
REVOKED = "token.revoked"

MARK_LENGTH = 16
_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who a request comes from: `name` is the owner of rentals, `id` the token's or, for a worker, the worker's."""

    role: str
    id: str
    name: str
    mark: str = field(default="", compare=False)
    """The beginning of the token's hash: a token that is made anew in its file keeps its id and not its mark."""
    expires_at: float | None = field(default=None, compare=False)
    """Unix seconds at which the token ends; None: it does not end by itself."""


def make_token(role: str, identity: str) -> str:
    """A new secret token; 43 characters of 62 are 256 bits."""
    return f"orion_{role}_{identity}_{''.join(secrets.choice(_ALPHABET) for _ in range(43))}"


def digest(token: str) -> str:
    """The hash that is kept. Plain SHA-256: a token has 256 random bits, so there is nothing to guess."""
    return hashlib.sha256(token.encode()).hexdigest()


def authenticate(connection: Connection, token: str, now: float) -> Principal | None:
    """Return whose token it is at `now` (Unix seconds); None for anything wrong, expired, revoked or unknown."""
    match = _TOKEN.fullmatch(token)
    if not match:
        return None
    role, identity = match[1], match[2]
    if role == "worker":
        row = connection.execute(select(workers.c.token_hash).where(workers.c.id == identity)).first()
        return (
            Principal(role=role, id=identity, name=identity)
            if row and hmac.compare_digest(row[0], digest(token))
            else None
        )
    kept = connection.execute(select(tokens).where(tokens.c.id == identity)).mappings().first()
    if kept is None or kept["role"] != role or not hmac.compare_digest(kept["hash"], digest(token)):
        return None
    return None if _is_over(kept, now) else _principal(kept)


def why_refused(connection: Connection, token: str) -> str:
    """Return why a token is not valid. Only who has the whole token learns more than that it is unknown."""
    match = _TOKEN.fullmatch(token)
    if not match:
        return "what was sent is no token of Orion: a token is one word, such as orion_client_..."
    kept = connection.execute(select(tokens).where(tokens.c.id == match[2])).mappings().first()
    if kept is None or not hmac.compare_digest(kept["hash"], digest(token)):
        return "this token is not known here: it may be another platform's, or have been replaced"
    return "this token was revoked" if kept["revoked_at"] is not None else "the time of this token is over"


def is_valid(connection: Connection, principal: Principal, now: float) -> bool:
    """Return whether the token by which a person, or an admin, was known is still good, and still the same."""
    known = named(connection, principal.role, principal.id, now)
    return known is not None and known.mark == principal.mark


def named(connection: Connection, role: str, identity: str, now: float) -> Principal | None:
    """Return whose token this is, a person's or an admin's; None for one that is over at `now` or unknown."""
    query = select(tokens).where(tokens.c.id == identity, tokens.c.role == role)
    kept = connection.execute(query).mappings().first()
    return _principal(kept) if kept is not None and not _is_over(kept, now) else None


def install(connection: Connection, role: str, token: str) -> None:
    """Make the token of a secret file the valid one: the file decides, also after it was made anew.

    One that was revoked stays so until its file is made anew.
    """
    match = _TOKEN.fullmatch(token)
    if not match or match[1] != role:
        raise ValueError(f"the {role} token in its file is damaged: remove the file and restart manager_app")
    kept = connection.execute(select(tokens.c.hash).where(tokens.c.id == match[2])).scalar()
    if kept is not None and hmac.compare_digest(kept, digest(token)):
        return
    connection.execute(delete(tokens).where(tokens.c.id == match[2]))
    row = {"id": match[2], "name": match[2], "role": role, "hash": digest(token), "created_at": time.time()}
    connection.execute(insert(tokens), row)


def create(connection: Connection, actor: str, name: str, role: str, ends_at: float | None) -> tuple[Row, str]:
    """A new token's row and the token itself, which is not kept. `ends_at`: Unix seconds; None: not by itself."""
    identity = secrets.token_hex(5)
    token = make_token(role, identity)
    now = time.time()
    row: dict[str, Any] = {"id": identity, "name": name, "role": role, "hash": digest(token), "created_at": now}
    row["expires_at"] = ends_at
    connection.execute(insert(tokens), row)
    record(connection, Event(kind="token.created", actor=actor, reason=f"{role} token {identity} for {name}"))
    return rows(connection.execute(select(tokens).where(tokens.c.id == identity)))[0], token


def _principal(kept: RowMapping) -> Principal:
    return Principal(
        role=kept["role"],
        id=kept["id"],
        name=kept["name"],
        mark=kept["hash"][:MARK_LENGTH],
        expires_at=kept["expires_at"],
    )


def _is_over(kept: RowMapping, now: float) -> bool:
    return kept["revoked_at"] is not None or (kept["expires_at"] is not None and kept["expires_at"] <= now)


def page(connection: Connection, after: str | None, limit: int) -> list[Row]:
    query = select(tokens).order_by(tokens.c.id).limit(limit)
    if after:
        query = query.where(tokens.c.id > after)
    return rows(connection.execute(query))


def revoke(connection: Connection, actor: str, identity: str) -> bool:
    """False when there is no such token; revoking twice is a success."""
    row = connection.execute(select(tokens).where(tokens.c.id == identity)).mappings().first()
    if row is None:
        return False
    if row["revoked_at"] is None:
        connection.execute(update(tokens).where(tokens.c.id == identity).values(revoked_at=time.time()))
        reason = f"{row['role']} token {identity} of {row['name']}"
        record(connection, Event(kind=REVOKED, actor=actor, reason=reason, details={"token_id": identity}))
    return True
