"""The routes of rentals: rent, list, show, renew, release, start, thaw, migrate."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import asyncssh
from fastapi import APIRouter, Depends, Header, Query, Response

from orion import wire
from orion.manager.api import views
from orion.manager.api.contract import refusals
from orion.manager.api.metrics import Metrics
from orion.manager.api.problems import refuse_conflict
from orion.manager.api.services import Client, given
from orion.manager.api.visible_rentals import VisibleRentals
from orion.manager.authentication import visible_owner
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.migration import NotMigrated
from orion.manager.refusals import ApiProblem
from orion.manager.store import rentals
from orion.manager.store.database import Row, Store

router = APIRouter(prefix="/api", tags=["rentals"])

ENDED = {wire.RentalState.RELEASED, wire.RentalState.EXPIRED, wire.RentalState.FAILED}
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]


@dataclass(frozen=True, kw_only=True)
class RentalServices:
    rentals: VisibleRentals
    store: Store
    clock: TrustedClock
    monotonic: Callable[[], float]
    wall: Callable[[], float]
    metrics: Metrics
    wake_reconciler: Callable[[], None]
    thaw: Callable[[str, str], Awaitable[str]]
    """Thaws a rental that is over its limits, in the name of an actor; returns why it could not, or an empty string."""
    migrate: Callable[[str, str, str], Awaitable[None]]
    """Begins a planned migration of a rental from a worker, in the name of an actor. Raises NotMigrated."""
    engine_log: Callable[[str], Awaitable[list[Row]]]
    """Returns the log of the engine's jobs for a rental, oldest first."""


Shared = Annotated[RentalServices, Depends(given(RentalServices))]


@router.post("/rent", status_code=201, responses={202: {"model": wire.RentReply}, **refusals(409)})
async def rent(
    body: wire.RentRequest,
    principal: Client,
    shared: Shared,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> wire.RentReply:
    """Rent an environment: 201 when it is active, 202 if it is not active yet after `wait_s`."""
    began = shared.monotonic()
    comment = wire.comment_of(body.ssh_public_key or "")
    if body.ssh_public_key:  # the key's comment is not part of the request's identity
        body = body.model_copy(update={"ssh_public_key": wire.one_public_key(body.ssh_public_key)})
    private_key, public_key = (None, body.ssh_public_key) if body.ssh_public_key else _new_key()
    # A field that older versions did not have counts only if it is used, so that their hashes stay valid.
    unhashed = {"wait_s"} if body.start else {"wait_s", "start"}
    new = rentals.NewRental(
        owner=principal.name,
        name=body.name,
        public_key=public_key,
        made_key=private_key is not None,
        ttl_s=body.ttl_s,
        labels=body.labels,
        key=idempotency_key,
        request_hash=hashlib.sha256(body.model_dump_json(exclude=unhashed).encode()).hexdigest(),
        start=body.start or "",
        comment=comment,
        # The later of both clocks: an Idempotency-Key that is removed too early lets a repeated rent make a second one.
        key_begins_at=max(shared.wall(), shared.clock.wall_of_tokens()),
    )
    try:
        rental_id = await shared.store.write(rentals.create, new)
    except rentals.NameTaken as error:
        shared.metrics.refused("name_taken")
        detail = f"you have a rental named {body.name}: choose another name, or end it with: orion release {body.name}"
        raise ApiProblem(409, "name_taken", detail) from error
    except rentals.OtherRequest as error:
        shared.metrics.refused("idempotency_conflict")
        detail = "this Idempotency-Key was used with another request within 24 h: use a new one"
        raise ApiProblem(409, "idempotency_conflict", detail) from error
    shared.wake_reconciler()
    row = await shared.rentals.wait_for(principal, rental_id, body.wait_s, lambda r: _is_open(r) or r["state"] in ENDED)
    response.status_code = 201 if _is_open(row) else 202
    response.headers["Location"] = f"/api/rentals/{rental_id}"
    shared.metrics.rented(response.status_code, shared.monotonic() - began)
    return views.rent_reply(row, private_key)


@router.get("/rentals")
async def list_rentals(
    principal: Client,
    shared: Shared,
    name: Annotated[str | None, Query(max_length=64)] = None,
    ended: bool = False,
    mine: Annotated[bool, Query(description="Only those of the token's own name, to an admin as well")] = False,
    after: views.After = None,
    limit: views.Limit = 100,
) -> wire.Page[wire.Rental]:
    """Return rentals that have not ended, with `ended` all of them: to a client its own, to an admin everybody's."""
    owner = principal.name if mine else visible_owner(principal)
    rows = await shared.store.read(rentals.page, owner, name, ended, after, limit + 1, shared.clock.wall_of_removals())
    return views.page([shared.rentals.with_snapshot_problem(row) for row in rows], limit, views.rental)


@router.get("/rentals/{rental_id}", responses=refusals(404))
async def show(
    rental_id: str,
    principal: Client,
    shared: Shared,
    state: Annotated[wire.RentalState | None, Query(description="Wait until it is in this state, or has ended")] = None,
    wait_s: views.WaitSeconds = 0,
) -> wire.Rental:
    await shared.rentals.find(rental_id, principal)
    row = await shared.rentals.wait_for(
        principal, rental_id, wait_s if state else 0, lambda r: r["state"] in {state, *ENDED}
    )
    return views.rental(row)


@router.post("/rentals/{rental_id}/renew", responses=refusals(404, 409))
async def renew(rental_id: str, body: wire.RenewRequest, principal: Client, shared: Shared) -> wire.Rental:
    """Let the rental expire `ttl_s` from now."""
    await shared.rentals.find(rental_id, principal)
    if not await shared.store.write(rentals.extend, rental_id, principal.name, body.ttl_s, shared.clock.counts_from()):
        refuse_conflict("ended")
    return views.rental(await shared.rentals.find(rental_id, principal))


@router.delete("/rentals/{rental_id}", status_code=202, responses={200: {"model": wire.Rental}, **refusals(404)})
async def release(
    rental_id: str, principal: Client, shared: Shared, response: Response, wait_s: views.WaitSeconds = 0
) -> wire.Rental:
    """Release the rental: 202 while its worker is being cleaned, 200 when it has ended. Repeatable."""
    await shared.rentals.find(rental_id, principal)
    await shared.store.write(rentals.begin_release, rental_id, principal.name)
    shared.wake_reconciler()
    row = await shared.rentals.wait_for(principal, rental_id, wait_s, lambda r: r["state"] in ENDED)
    response.status_code = 200 if row["state"] in ENDED else 202
    return views.rental(row)


@router.post("/rentals/{rental_id}/start", status_code=202, responses=refusals(404, 409))
async def start(rental_id: str, principal: Client, shared: Shared) -> wire.Rental:
    """Run the start command now, also one that was given up. Processes of former runs are not stopped."""
    await shared.rentals.find(rental_id, principal)
    refuse_conflict(await shared.store.write(rentals.begin_start, rental_id, principal.name))
    shared.wake_reconciler()
    return views.rental(await shared.rentals.find(rental_id, principal))


@router.post("/rentals/{rental_id}/thaw", responses=refusals(404, 409))
async def thaw(rental_id: str, principal: Client, shared: Shared) -> wire.Rental:
    """Thaw a rental whose home is over its limits; its renter has ten minutes to make room. Repeatable."""
    await shared.rentals.find(rental_id, principal)
    problem = await shared.thaw(rental_id, principal.name)
    if problem:
        raise ApiProblem(409, "not_thawed", f"the rental cannot be thawed now: {problem}")
    return views.rental(await shared.rentals.find(rental_id, principal))


@router.post(
    "/rentals/{rental_id}/migrate", status_code=202, responses={200: {"model": wire.Rental}, **refusals(404, 409)}
)
async def migrate(
    rental_id: str, principal: Client, shared: Shared, response: Response, wait_s: views.WaitSeconds = 0
) -> wire.Rental:
    """Migrate the rental with all its files: 200 when it runs on another worker, 202 while it migrates. Repeatable.

    It runs on its worker until the copy is nearly complete, and then stops for a moment. A migration that fails leaves
    it running where it is.
    """
    before = await shared.rentals.find(rental_id, principal)
    try:
        await shared.migrate(rental_id, before["worker_id"] or "", principal.name)
    except NotMigrated as refusal:
        raise ApiProblem(409, refusal.code, str(refusal)) from refusal
    row = await shared.rentals.wait_for(principal, rental_id, wait_s, _is_settled)
    if _is_settled(row) and row["worker_id"] == before["worker_id"]:
        raise ApiProblem(409, "not_moved", f"the rental was not migrated and runs where it is: {row['explanation']}")
    response.status_code = 200 if _is_settled(row) else 202
    return views.rental(row)


@router.get("/rentals/{rental_id}/log", responses=refusals(404))
async def log(rental_id: str, principal: Client, shared: Shared) -> wire.Page[wire.LogEntry]:
    """Return the latest 50 jobs of the engine for the rental, oldest first."""
    await shared.rentals.find(rental_id, principal)
    return wire.Page(items=[views.log_entry(row) for row in await shared.engine_log(rental_id)])


def _is_open(row: views.Row) -> bool:
    """Return whether the rental is active and its worker has its keys."""
    return row["state"] == wire.RentalState.ACTIVE and bool(row["key_in_place"])


def _is_settled(row: views.Row) -> bool:
    """Return whether the rental does not migrate: it is active without a target, or has ended."""
    return row["state"] in ENDED or (row["state"] == wire.RentalState.ACTIVE and row["moving_to"] is None)


def _new_key() -> tuple[str, str]:
    pair: Any = asyncssh.generate_private_key("ssh-ed25519")
    public_key = wire.one_public_key(pair.export_public_key("openssh").decode())
    return pair.export_private_key("openssh").decode(), public_key
