"""Conversion of database rows to replies (orion.wire), where fields keep their released names.

A reply takes the fields that it declares and ignores the others of its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Query

from orion import wire
from orion.manager.domain.snapshots import Snapshot

Row = Mapping[str, Any]
T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=wire.MAX_PAGE)]
After = Annotated[str | None, Query(max_length=64)]
WaitSeconds = Annotated[float, Query(ge=0, le=wire.MAX_WAIT_S)]


def page(rows: Sequence[Row], limit: int, view: Callable[[Row], T]) -> wire.Page[T]:
    """Return one page from up to `limit` + 1 rows; the last of these only shows that there is a next page."""
    shown = rows[:limit]
    return wire.Page(items=[view(row) for row in shown], next=str(shown[-1]["id"]) if len(rows) > limit else None)


def time_of(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def rental(row: Row) -> wire.Rental:
    return wire.Rental(**_rental_fields(row))


def rent_reply(row: Row, private_key: str | None) -> wire.RentReply:
    return wire.RentReply(**_rental_fields(row), ssh_private_key=private_key)


def _rental_fields(row: Row) -> dict[str, Any]:
    return {
        **_with_times(row, "created_at", "expires_at", "last_safe_copy_at", "start_ended_at"),
        "ssh_host_keys": row["host_keys"] or [],
        "salvage": row["salvage"] and snapshot(row["salvage"]),
        "start": row["start"] or None,
        "start_end": row["start_end"] or "",
    }


def snapshot(found: Snapshot) -> wire.Snapshot:
    return wire.Snapshot(**_with_times(vars(found), "at") | {"generation": str(found.id), "salvage": found.recovered})


def worker(row: Row) -> wire.Worker:
    free = max(0, row["slots"] - row["used"]) if row["health"] != "down" else 0
    shown = _with_times(row, "last_heartbeat_at")
    return wire.Worker(**shown | {"slots_free": free, "ssh_host_keys": row["host_keys"]})


def log_entry(row: Row) -> wire.LogEntry:
    return wire.LogEntry(**_with_times(row, "at"))


def token(row: Row) -> wire.Token:
    return wire.Token(**_token_fields(row))


def token_reply(row: Row, secret: str) -> wire.TokenReply:
    return wire.TokenReply(**_token_fields(row) | {"token": secret})


def _token_fields(row: Row) -> dict[str, Any]:
    return _with_times(row, "created_at", "expires_at", "revoked_at")


def event(row: Row) -> wire.Event:
    return wire.Event(**_with_times(row, "at"))


def _with_times(row: Row, *names: str) -> dict[str, Any]:
    """Return the row with these Unix seconds as times."""
    return {**row, **{name: time_of(row[name]) for name in names}}
