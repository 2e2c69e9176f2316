"""The way in for a renter: a WebSocket that carries the bytes of one SSH connection to the rental's sshd."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import structlog
from fastapi import APIRouter, WebSocket

from orion import wire
from orion.manager.api.problems import ApiProblem, not_found, problem
from orion.manager.api.services import Services, authenticate, client_address, visible_owner
from orion.manager.domain.states import ENDED
from orion.manager.engine.port import Action, Host, Job
from orion.manager.gateway.sessions import Session
from orion.manager.gateway.ssh import NOTICE, REMARK, Ending, Relayed, SshStream, WorkerUnreachable, connect, relay
from orion.manager.store import rentals
from orion.manager.store.database import Row
from orion.manager.store.tokens import Principal

log = structlog.get_logger()

router = APIRouter(prefix="/api", tags=["rentals"])

LONGEST_NOTICE = 500
"""Letters."""
_OVER = frozenset({*ENDED, wire.RentalState.RELEASING})


@router.websocket("/rentals/{rental_id}/ssh")
async def ssh(websocket: WebSocket, rental_id: str) -> None:
    """Refusals are HTTP problems, sent before the WebSocket is accepted.

    `?wait_s=` waits for so long while the rental is queued, being made or on the move.
    """
    services: Services = websocket.app.state.services
    try:
        await _let_through(websocket, services, rental_id)
    except ApiProblem as error:
        await websocket.send_denial_response(problem(error.status, error.code, error.detail, error.headers))
    except WorkerUnreachable as error:
        await websocket.send_denial_response(problem(502, "worker_unreachable", str(error)))


async def _let_through(websocket: WebSocket, services: Services, rental_id: str) -> None:
    principal = await authenticate(websocket, services, "client", "admin")
    deadline = services.monotonic() + _wait_s(websocket)
    with services.sessions.beginning(rental_id) as session:
        session.who, session.where_from = principal.name, client_address(websocket)
        async with services.openings.by(principal) as opening:
            session.opened_by(opening)
            await _bring_in(websocket, services, principal, session, deadline)


async def _bring_in(
    websocket: WebSocket, services: Services, principal: Principal, session: Session, deadline: float
) -> None:
    rental_id = session.rental_id
    while True:
        row = await active(services, rental_id, principal, deadline, session)
        session.owner, session.worker_id, session.epoch = row["owner"], row["worker_id"], row["epoch"]
        with services.sessions.carried(session):
            other = services.leases.displaced_by(row["worker_id"])
            if other:
                raise WorkerUnreachable(
                    f"its worker {row['worker_id']} is gone, and {other} has its address now: the rental is taken "
                    "over as soon as the lease of the lost one has passed"
                )
            job = job_of(row)
            await services.recognisable(job)
            stream = await _connected(job.host, session.over)
            if stream is not None:
                await _carry(websocket, services, session, stream, _notice(row) | _remark(row))
                return


async def _connected(host: Host, over: asyncio.Future[Ending]) -> SshStream | None:
    """None where the rental left that worker while it did not answer: to wait for it any longer is of no use."""
    connecting = asyncio.create_task(connect(host))
    waiting: list[asyncio.Future[Any]] = [connecting, over]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if connecting.done():
        return connecting.result()
    connecting.cancel()
    with suppress(asyncio.CancelledError, WorkerUnreachable):
        (await connecting).close()
    return None


async def _carry(
    websocket: WebSocket, services: Services, session: Session, stream: SshStream, headers: dict[str, str]
) -> None:
    services.sessions.note_begin(session)
    relayed = Relayed(0, 0, 0, "the manager ended it")
    try:
        relayed = await relay(websocket, stream, session.over, headers)
    finally:
        services.sessions.note_end(session, relayed.reason, stream.to_worker, stream.to_client)
    log.info("relay ended", rental_id=session.rental_id, **vars(relayed))


async def active(services: Services, rental_id: str, principal: Principal, deadline: float, session: Session) -> Row:
    """The rental with the worker that it runs on. Raises ApiProblem, after `deadline` (monotonic) at the latest."""
    with services.store.news.listen(rental_id) as changed:
        session.opening.wakes(changed)
        while True:
            changed.clear()
            session.opening.check()
            session.again()
            row = await services.store.read(
                rentals.one, rental_id, visible_owner(principal), services.clock.wall_of_removals()
            )
            if row is None:
                raise not_found("rental")
            left_s = deadline - services.monotonic()
            if row["state"] == wire.RentalState.ACTIVE and not row["held"]:
                if not session.over.done():
                    return row
                continue  # something ended while it was read: look again
            if row["state"] in _OVER or left_s <= 0:
                raise _not_active(row)
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await changed.wait()


def _not_active(row: Row) -> ApiProblem:
    """With Retry-After where it is worth waiting for."""
    again = {} if row["state"] in _OVER else {"Retry-After": "5"}
    if row["state"] == wire.RentalState.ACTIVE:
        return ApiProblem(409, "not_active", "the rental is being moved: it stands still for a moment", again)
    return ApiProblem(409, "not_active", f"the rental is {row['state']}: {row['explanation']}", again)


def _notice(row: Row) -> dict[str, str]:
    """What somebody who comes in should know: a rental that is not copied may be frozen, and then its sshd says only
    that permission is denied.
    """
    if not row["copy_problem"]:
        return {}
    said = f"{row['name']} is not copied: {row['copy_problem']}"[:LONGEST_NOTICE]
    return {NOTICE: _printable(said)}


def _remark(row: Row) -> dict[str, str]:
    said = remarks(row)[:LONGEST_NOTICE]
    return {REMARK: _printable(said)} if said else {}


def remarks(row: Row) -> str:
    """Return what its owner should know of its files at a log-in, in a line; empty: there is nothing."""
    found = [row["home_warning"]] if row["home_warning"] and not row["copy_problem"] else []
    if row["salvage"]:
        restore = f"orion restore {row['name']} --from {row['salvage'].generation}"
        found.append(f"it does not have what a lost worker still had of it: {restore}")
    return f"{row['name']}: {'; '.join(found)}" if found else ""


def _printable(said: str) -> str:
    return "".join(letter if " " <= letter <= "~" else "?" for letter in said)


def job_of(row: Row) -> Job:
    host = Host(row["worker_id"], row["address"], tuple(row["host_keys"]))
    return Job(Action.CERTIFY, host, row["id"], row["username"], row["uid"], row["epoch"], owner=row["owner"])


def _wait_s(websocket: WebSocket) -> float:
    try:
        asked = float(websocket.query_params.get("wait_s", "0"))
    except ValueError:
        asked = -1.0
    if not 0 <= asked <= wire.MAX_WAIT_S:
        raise ApiProblem(422, "invalid_request", f"wait_s must be a number from 0 to {wire.MAX_WAIT_S}")
    return asked
