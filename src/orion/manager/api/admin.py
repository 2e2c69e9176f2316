"""Backup and restore of the database, and the manager's clock, for an administrator."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import IO, Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from orion import wire
from orion.manager.api import views
from orion.manager.api.contract import refusals
from orion.manager.api.services import Admin, given
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.gateway.token_lifetime import Streamed, TokenUses
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.store.backup import Backups, NotABackup

router = APIRouter(prefix="/api/admin", tags=["operations"])

CHUNK_BYTES = 1 << 18
MEDIA_TYPE = "application/vnd.sqlite3"
_BODY = {"requestBody": {"required": True, "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}}


@dataclass(frozen=True, kw_only=True)
class AdminServices:
    database_url: str
    clock: TrustedClock
    token_uses: TokenUses
    restart: Callable[[], None]
    """Stops the manager; the container engine starts it again with the database that is then on the disk."""
    copying: asyncio.Lock = field(default_factory=asyncio.Lock)
    """The lock of the one backup or restore that may run; each needs room beside the database."""


Shared = Annotated[AdminServices, Depends(given(AdminServices))]


@router.get(
    "/backup", response_class=StreamingResponse, responses={200: {"content": {MEDIA_TYPE: {}}}, **refusals(409, 507)}
)
async def backup(admin: Admin, shared: Shared) -> StreamingResponse:
    """Return a consistent copy of the database as one SQLite file. It has hashes of tokens, and no secret."""
    backups = _backups(shared)
    async with shared.copying:
        try:
            copy = await asyncio.to_thread(backups.copy)
        except sqlite3.OperationalError as error:
            detail = f"the backup could not be made: {error}. Free some disk space, and try again"
            raise ApiProblem(507, "no_space", detail) from error
        stream = copy.open("rb")
        copy.unlink()  # the open file stays readable, and no failure from here on leaves it behind
    headers = {"Content-Length": str(stream.seek(0, 2)), "Content-Disposition": 'attachment; filename="orion.db"'}
    return Streamed(
        _chunks(stream), token_uses=shared.token_uses, principal=admin, media_type=MEDIA_TYPE, headers=headers
    )


@router.post("/clock")
async def confirm_clock(admin: Admin, shared: Shared) -> wire.ManagerClock:
    """Confirm that the manager's clock is right after it was doubted; expiry goes on by it. Repeatable."""
    await shared.clock.confirm(admin.name)
    return wire.ManagerClock(problem=shared.clock.problem or None)


@router.post("/restore", openapi_extra=_BODY, responses=refusals(409, 507))
async def examine(request: Request, _: Admin, shared: Shared) -> wire.RestorePlan:
    """Receive a backup and return the plan of its restore. Nothing changes before the plan is accepted."""
    backups = _backups(shared)
    async with shared.copying:
        upload = await asyncio.to_thread(backups.receive)
        try:
            with upload.open("wb") as file:
                async for chunk in request.stream():
                    if file.tell() == 0:
                        backups.refuse_early(chunk)
                    await asyncio.to_thread(file.write, chunk)
            found = await asyncio.to_thread(backups.stage, upload)
            return wire.RestorePlan(**asdict(found) | {"last_event_at": views.time_of(found.last_event_at)})
        except NotABackup as error:
            raise ApiProblem(422, "not_a_backup", f"this file cannot be restored: {error}") from error
        except OSError as error:
            detail = f"the file could not be written: {error.strerror}. Free some disk space, and try again"
            raise ApiProblem(507, "no_space", detail) from error
        finally:
            for leftover in (upload, *(upload.with_name(upload.name + suffix) for suffix in ("-wal", "-shm"))):
                leftover.unlink(missing_ok=True)


@router.post("/restore/{plan_id}", status_code=202, responses=refusals(404, 409))
async def restore(plan_id: str, admin: Admin, shared: Shared) -> wire.Restoring:
    """Accept a plan: the manager restarts with that backup. The former database is kept beside it."""
    backups = _backups(shared)
    async with shared.copying:
        if not await asyncio.to_thread(backups.accept, plan_id, admin.name):
            raise not_found("plan")
    shared.restart()
    return wire.Restoring(kept_as=backups.replaced.name)


def _backups(shared: AdminServices) -> Backups:
    found = Backups.of(shared.database_url)
    if found is None:
        raise ApiProblem(409, "not_sqlite", "this platform's database is PostgreSQL: use pg_dump and pg_restore")
    return found


async def _chunks(stream: IO[bytes]) -> AsyncIterator[bytes]:
    with stream:
        stream.seek(0)
        while chunk := await asyncio.to_thread(stream.read, CHUNK_BYTES):
            yield chunk
