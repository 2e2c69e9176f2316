"""Conversion of database rows to replies (orion.wire), where fields keep their released names."""

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


def page(rows: Sequence[T], limit: int, cursor: Callable[[T], str], view: Callable[[T], Any]) -> dict[str, Any]:
    """Return one page from up to `limit` + 1 rows; the last of these only shows that there is a next page."""
    shown = rows[:limit]
    return {"items": [view(row) for row in shown], "next": cursor(shown[-1]) if len(rows) > limit else None}


def time_of(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def rental(row: Row) -> wire.Rental:
    return wire.Rental(**_rental_fields(row))


def rent_reply(row: Row, private_key: str | None) -> wire.RentReply:
    return wire.RentReply(**_rental_fields(row), ssh_private_key=private_key)


def _rental_fields(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "name": row["name"],
        "owner": row["owner"],
        "state": row["state"],
        "epoch": row["epoch"],
        "worker_id": row["worker_id"],
        "moving_to": row["moving_to"],
        "username": row["username"],
        "ssh_host_keys": row["host_keys"] or [],
        "labels": row["labels"],
        "ttl_s": row["ttl_s"],
        "created_at": time_of(row["created_at"]),
        "expires_at": time_of(row["expires_at"]),
        "last_safe_copy_at": time_of(row["last_safe_copy_at"]),
        "last_safe_copy_bytes": row["last_safe_copy_bytes"],
        "copy_problem": row["copy_problem"],
        "home_warning": row["home_warning"],
        "salvage": row["salvage"] and snapshot(row["salvage"]),
        "start": row["start"] or None,
        "start_problem": row["start_problem"],
        "start_end": row["start_end"] or "",
        "start_ended_at": time_of(row["start_ended_at"]),
        "public_ports": row["public_ports"],
        "explanation": row["explanation"],
    }


def snapshot(found: Snapshot) -> wire.Snapshot:
    return wire.Snapshot(
        generation=str(found.generation),
        at=datetime.fromtimestamp(found.at, UTC),
        bytes=found.bytes,
        files=found.files,
        skipped=list(found.skipped),
        salvage=found.salvage,
    )


def worker(row: Row) -> wire.Worker:
    return wire.Worker(
        id=row["id"],
        hostname=row["hostname"],
        address=row["address"],
        health=row["health"],
        intent=row["intent"],
        slots=row["slots"],
        slots_free=max(0, row["slots"] - row["used"]) if row["health"] != "down" else 0,
        labels=row["labels"],
        load=wire.Load(**row["load"]),
        last_heartbeat_at=time_of(row["last_heartbeat_at"]),
        ssh_host_keys=row["host_keys"],
        explanation=row["explanation"],
    )


def log_entry(row: Row) -> wire.LogEntry:
    names = ("epoch", "action", "worker_id", "ok", "seconds", "message")
    return wire.LogEntry(at=time_of(row["at"]), **{name: row[name] for name in names})


def token(row: Row) -> wire.Token:
    return wire.Token(**_token_fields(row))


def token_reply(row: Row, secret: str) -> wire.TokenReply:
    return wire.TokenReply(**_token_fields(row), token=secret)


def _token_fields(row: Row) -> dict[str, Any]:
    times = {name: time_of(row[name]) for name in ("created_at", "expires_at", "revoked_at")}
    return {"id": row["id"], "name": row["name"], "role": row["role"]} | times


def event(row: Row) -> wire.Event:
    return wire.Event(**{**row, "at": time_of(row["at"])})
