"""A copy of the database for an administrator, and going back to one."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from orion import wire
from orion.manager.api import views
from orion.manager.api.contract import refusals
from orion.manager.api.services import Admin, given
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.gateway.token_lifetime import Streamed, TokenUses
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.store.backup import Backups, Examined, NotABackup

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
    """Ends the manager, which is started again with what is then on the disk."""
    copying: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One backup or restore at a time: each needs room beside the database."""


Shared = Annotated[AdminServices, Depends(given(AdminServices))]


@router.get(
    "/backup", response_class=StreamingResponse, responses={200: {"content": {MEDIA_TYPE: {}}}, **refusals(409, 507)}
)
async def backup(admin: Admin, shared: Shared) -> StreamingResponse:
    """A consistent copy of the database, as one SQLite file. Holds hashes of tokens, and no secret."""
    backups = _backups(shared)
    async with shared.copying:
        try:
            copy = await asyncio.to_thread(backups.copy)
        except sqlite3.OperationalError as error:
            raise ApiProblem(507, "no_space", f"the copy could not be made: {error}") from error
        stream = copy.open("rb")
        copy.unlink()  # what is open stays readable, and nothing is left whatever happens now
    size = stream.seek(0, 2)
    headers = {"Content-Length": str(size), "Content-Disposition": 'attachment; filename="orion.db"'}
    return Streamed(_chunks(stream), shared.token_uses, admin, MEDIA_TYPE, headers)


@router.post("/clock")
async def confirm_clock(admin: Admin, shared: Shared) -> wire.ManagerClock:
    """Believe the manager's clock as it is, where it was not: then what is over by it ends. Repeatable."""
    await shared.clock.confirm(admin.name)
    return wire.ManagerClock(problem=shared.clock.problem or None)


@router.post("/restore", openapi_extra=_BODY, responses=refusals(409, 507))
async def examine(request: Request, _: Admin, shared: Shared) -> wire.RestorePlan:
    """Take a backup and say what restoring it would do. Nothing changes before its plan is accepted."""
    backups = _backups(shared)
    async with shared.copying:
        upload = await asyncio.to_thread(backups.receive)
        try:
            with upload.open("wb") as file:
                async for chunk in request.stream():
                    if file.tell() == 0:
                        backups.refuse_early(chunk)
                    await asyncio.to_thread(file.write, chunk)
            return _plan(await asyncio.to_thread(backups.stage, upload))
        except NotABackup as error:
            raise ApiProblem(422, "not_a_backup", f"this file cannot be restored: {error}") from error
        except OSError as error:
            raise ApiProblem(507, "no_space", f"the file could not be kept: {error.strerror}") from error
        finally:
            for leftover in (upload, *(upload.with_name(upload.name + suffix) for suffix in ("-wal", "-shm"))):
                leftover.unlink(missing_ok=True)


@router.post("/restore/{plan_id}", status_code=202, responses=refusals(404, 409))
async def restore(plan_id: str, admin: Admin, shared: Shared) -> wire.Restoring:
    """Go back to it: the manager restarts with it. The former database is kept beside it."""
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


def _plan(found: Examined) -> wire.RestorePlan:
    fields: dict[str, Any] = vars(found) | {"last_event_at": views.time_of(found.last_event_at)}
    for name in ("forgotten", "revived"):
        fields[name] = [wire.RentalName(**vars(rental)) for rental in fields[name]]
    return wire.RestorePlan(**fields)
