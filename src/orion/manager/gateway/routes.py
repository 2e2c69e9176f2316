"""The way in for a renter: a WebSocket that carries the bytes of one SSH connection to the rental's sshd."""

from __future__ import annotations

import structlog
from fastapi import APIRouter, WebSocket

from orion import wire
from orion.manager.api.problems import ApiProblem, not_found, problem
from orion.manager.api.services import Services, authenticate, visible_owner
from orion.manager.engine.port import Host
from orion.manager.gateway.ssh import WorkerUnreachable, connect, relay
from orion.manager.store import rentals

log = structlog.get_logger()

router = APIRouter(prefix="/api", tags=["rentals"])


@router.websocket("/rentals/{rental_id}/ssh")
async def ssh(websocket: WebSocket, rental_id: str) -> None:
    """Refusals are HTTP problems, sent before the WebSocket is accepted."""
    try:
        host = await _where(websocket, websocket.app.state.services, rental_id)
        stream = await connect(host)
    except ApiProblem as error:
        await websocket.send_denial_response(problem(error.status, error.code, error.detail, error.headers))
        return
    except WorkerUnreachable as error:
        await websocket.send_denial_response(problem(502, "worker_unreachable", str(error)))
        return
    relayed = await relay(websocket, stream)
    log.info("relay ended", rental_id=rental_id, **vars(relayed))


async def _where(websocket: WebSocket, services: Services, rental_id: str) -> Host:
    """The worker that the rental runs on. Raises ApiProblem."""
    principal = await authenticate(websocket, services, "client", "admin")
    row = await services.store.read(rentals.one, rental_id, visible_owner(principal))
    if row is None:
        raise not_found("rental")
    if row["state"] != wire.RentalState.ACTIVE:
        raise ApiProblem(409, "not_active", f"the rental is {row['state']}: {row['explanation']}")
    return Host(row["worker_id"], row["address"], tuple(row["host_keys"]))
