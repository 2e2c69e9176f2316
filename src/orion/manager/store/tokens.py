"""Makes, finds and revokes tokens. Only their hashes are kept, and they are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, insert, select, update

from orion.manager.domain.steps import Event
from orion.manager.store.database import Row, first, record, rows
from orion.manager.store.schema import tokens, workers

_TOKEN = re.compile(r"orion_(admin|client|join|worker)_([a-z0-9-]{1,64})_([A-Za-z0-9]{43})")
REVOKED = "token.revoked"

MARK_LENGTH = 16
_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, kw_only=True)
class Principal:
    """The sender of a request."""

    role: str
    id: str
    """The id of the token, or of the worker."""
    name: str
    """The owner of its rentals."""
    mark: str = field(default="", compare=False)
    """The beginning of the token's hash, which differs when the token was made again in its file, with the same id."""
    expires_at: float | None = field(default=None, compare=False)
    """Unix seconds at which the token expires; None: never."""


def make_token(role: str, identity: str) -> str:
    """Return a new secret token; 43 characters of 62 are 256 bits."""
    return f"orion_{role}_{identity}_{''.join(secrets.choice(_ALPHABET) for _ in range(43))}"


def digest(token: str) -> str:
    """Return the hash that is kept. Plain SHA-256 is enough, because a token has 256 random bits."""
    return hashlib.sha256(token.encode()).hexdigest()


def authenticate(connection: Connection, token: str, now: float) -> Principal | None:
    """Return the principal of a token at `now` (Unix seconds); None if it is malformed, expired, revoked or unknown."""
    match = _TOKEN.fullmatch(token)
    if not match:
        return None
    role, identity = match[1], match[2]
    if role == "worker":
        kept = connection.execute(select(workers.c.token_hash).where(workers.c.id == identity)).scalar()
        same = kept is not None and hmac.compare_digest(kept, digest(token))
        return Principal(role=role, id=identity, name=identity) if same else None
    row = _row(connection, identity)
    if row is None or row["role"] != role or not hmac.compare_digest(row["hash"], digest(token)):
        return None
    return None if _is_over(row, now) else _principal(row)


def why_refused(connection: Connection, token: str) -> str:
    """Return why a token is not valid; if its secret part is wrong, say only that it is unknown."""
    match = _TOKEN.fullmatch(token)
    if not match:
        return "this is no token of Orion: a token is one word, such as orion_client_..."
    kept = _row(connection, match[2])
    if kept is None or not hmac.compare_digest(kept["hash"], digest(token)):
        return "this token is not known here: it may be another platform's, or have been replaced"
    return "this token was revoked" if kept["revoked_at"] is not None else "the time of this token is over"


def is_valid(connection: Connection, principal: Principal, now: float) -> bool:
    """Return whether the token of a client or an admin is still valid at `now`, and the same one."""
    known = named(connection, principal.role, principal.id, now)
    return known is not None and known.mark == principal.mark


def named(connection: Connection, role: str, identity: str, now: float) -> Principal | None:
    """Return the principal of a client's or admin's token by its id; None if it is expired, revoked or unknown."""
    kept = _row(connection, identity)
    return _principal(kept) if kept and kept["role"] == role and not _is_over(kept, now) else None


def install(connection: Connection, role: str, token: str) -> None:
    """Make the token of a secret file the valid one, also after the file was made again.

    A revoked token stays revoked until its file is made again.
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
    """Make a token; return its row and the token, which is not kept. `ends_at`: Unix seconds; None: never."""
    identity = secrets.token_hex(5)
    token = make_token(role, identity)
    row: Row = {"id": identity, "name": name, "role": role, "hash": digest(token), "created_at": time.time()}
    row |= {"expires_at": ends_at, "revoked_at": None}
    connection.execute(insert(tokens), row)
    record(connection, Event(kind="token.created", actor=actor, reason=f"{role} token {identity} for {name}"))
    return row, token


def page(connection: Connection, after: str | None, limit: int) -> list[Row]:
    return rows(
        connection.execute(select(tokens).where(tokens.c.id > (after or "")).order_by(tokens.c.id).limit(limit))
    )


def revoke(connection: Connection, actor: str, identity: str) -> bool:
    """Revoke a token; return False if it does not exist. Repeatable."""
    row = _row(connection, identity)
    if row is None:
        return False
    if row["revoked_at"] is None:
        connection.execute(update(tokens).where(tokens.c.id == identity).values(revoked_at=time.time()))
        reason = f"{row['role']} token {identity} of {row['name']}"
        record(connection, Event(kind=REVOKED, actor=actor, reason=reason, details={"token_id": identity}))
    return True


def _row(connection: Connection, identity: str) -> Row | None:
    return first(connection.execute(select(tokens).where(tokens.c.id == identity)))


def _principal(kept: Row) -> Principal:
    mark = kept["hash"][:MARK_LENGTH]
    return Principal(role=kept["role"], id=kept["id"], name=kept["name"], mark=mark, expires_at=kept["expires_at"])


def _is_over(kept: Row, now: float) -> bool:
    return kept["revoked_at"] is not None or (kept["expires_at"] is not None and kept["expires_at"] <= now)
