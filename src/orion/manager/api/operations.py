"""The routes of tokens, events, status, metrics and the health check."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from orion import __version__, wire
from orion.manager.api import views
from orion.manager.api.contract import refusals
from orion.manager.api.event_streams import EventStreams
from orion.manager.api.event_streams import Filter as Shown
from orion.manager.api.metrics import MEDIA_TYPE, Metrics
from orion.manager.api.services import Admin, Client, given
from orion.manager.authentication import visible_owner
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.overdue import Overdue
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.gateway.token_lifetime import Streamed, TokenUses
from orion.manager.refusals import not_found
from orion.manager.store import events, tokens
from orion.manager.store.database import Store

router = APIRouter()

_EVENT_ID = re.compile(r"[0-9]{1,15}")
EventId = Annotated[int, Query(ge=0, lt=2**53)]
Filter = Annotated[str | None, Query(max_length=64)]


@dataclass(frozen=True, kw_only=True)
class OperationServices:
    store: Store
    pool_index: PoolIndex
    clock: TrustedClock
    brake: Callable[[], str | None]
    """Returns why the brake is on; None while it is off."""
    snapshots_paused: Callable[[], str | None]
    """Returns why no snapshots are taken at present; None while they are taken."""
    overdue: Callable[[], Awaitable[list[Overdue]]]
    """Returns the rentals and workers that have been in a state for too long."""
    metrics: Metrics
    event_streams: EventStreams
    token_uses: TokenUses


Shared = Annotated[OperationServices, Depends(given(OperationServices))]


@router.get("/healthz", tags=["operations"])
async def healthz() -> JSONResponse:
    return JSONResponse({"status": "ok"})


@router.get("/api/status", tags=["operations"])
async def status(principal: Client, shared: Shared) -> wire.Status:
    slots, free = shared.pool_index.slots()
    waiting = await shared.overdue() if principal.role == "admin" else []
    return wire.Status(
        version=__version__,
        brake=shared.brake(),
        workers=shared.pool_index.by_health(),
        rentals=shared.pool_index.by_state(),
        slots=slots,
        slots_free=free,
        copies_paused=shared.snapshots_paused(),
        clock=shared.clock.problem or None,
        overdue=[wire.Overdue(**vars(item)) for item in waiting],
    )


@router.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
async def show_metrics(_: Admin, shared: Shared) -> Response:
    """Return the metrics in the text format of Prometheus."""
    shared.metrics.last_event = await shared.store.read(events.last)
    return Response(shared.metrics.text(), media_type=MEDIA_TYPE)


@router.post("/api/tokens", status_code=201, tags=["tokens"])
async def create_token(body: wire.TokenRequest, admin: Admin, shared: Shared) -> wire.TokenReply:
    ends_at = None if body.ttl_s is None else shared.clock.wall_of_tokens() + body.ttl_s
    row, secret = await shared.store.write(tokens.create, admin.name, body.name, body.role, ends_at)
    return views.token_reply(row, secret)


@router.get("/api/tokens", tags=["tokens"])
async def list_tokens(
    _: Admin, shared: Shared, after: views.After = None, limit: views.Limit = 100
) -> wire.Page[wire.Token]:
    rows = await shared.store.read(tokens.page, after, limit + 1)
    return views.page(rows, limit, views.token)


@router.delete("/api/tokens/{token_id}", status_code=204, tags=["tokens"], responses=refusals(404))
async def revoke_token(token_id: str, admin: Admin, shared: Shared) -> None:
    if not await shared.store.write(tokens.revoke, admin.name, token_id):
        raise not_found("token")


@router.get(
    "/api/events",
    tags=["events"],
    response_model=wire.Page[wire.Event],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def list_events(
    principal: Client,
    shared: Shared,
    after: EventId = 0,
    newest_first: Annotated[
        bool, Query(description="Newest events first; `after` then continues with older ones. Not for a stream")
    ] = False,
    limit: views.Limit = 100,
    rental_id: Filter = None,
    worker_id: Filter = None,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str, Header(max_length=20)] = "",
) -> Response:
    """Return a page of events, or with `Accept: text/event-stream` a live stream that resumes by Last-Event-ID.

    Old events are removed. If some of those after `after` were removed, the first item has the kind `events.missed` and
    says which; its id is that of the last removed event, so a client may continue from it.
    """
    owner = visible_owner(principal)
    if "text/event-stream" in accept:
        start = int(last_event_id) if _EVENT_ID.fullmatch(last_event_id) else after
        stream = shared.event_streams.lines(Shown(owner, rental_id, worker_id), start)
        return Streamed(
            stream,
            token_uses=shared.token_uses,
            principal=principal,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
            last_chunk=": the token is over\n\n",
            while_open=shared.event_streams.counted(principal.id),
        )
    rows = await shared.store.read(events.page, owner, rental_id, worker_id, after, limit + 1, newest_first)
    return Response(views.page(rows, limit, views.event).model_dump_json(), media_type="application/json")
