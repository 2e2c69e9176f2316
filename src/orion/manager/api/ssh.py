"""The way in for a renter: a WebSocket that carries the bytes of one SSH connection to the rental's sshd."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket

from orion import wire
from orion.manager.api.problems import problem
from orion.manager.api.services import Services, client_address
from orion.manager.gateway.ssh import WorkerUnreachable
from orion.manager.refusals import ApiProblem

router = APIRouter(prefix="/api", tags=["rentals"])


@router.websocket("/rentals/{rental_id}/ssh")
async def ssh(websocket: WebSocket, rental_id: str) -> None:
    """Refusals are HTTP problems, sent before the WebSocket is accepted.

    `?wait_s=` waits for so long while the rental is queued, being made or on the move.
    """
    services: Services = websocket.app.state.services
    try:
        principal = await services.authentication.authenticate(websocket, "client", "admin")
        await services.ssh_sessions.carry(
            websocket, rental_id, principal, client_address(websocket), _wait_s(websocket)
        )
    except ApiProblem as error:
        await websocket.send_denial_response(problem(error.status, error.code, error.detail, error.headers))
    except WorkerUnreachable as error:
        await websocket.send_denial_response(problem(502, "worker_unreachable", str(error)))


def _wait_s(websocket: WebSocket) -> float:
    """Return the seconds to wait. Raise 422 if the query does not name a number of them."""
    try:
        asked = float(websocket.query_params.get("wait_s", "0"))
    except ValueError:
        asked = -1.0
    if not 0 <= asked <= wire.MAX_WAIT_S:
        raise ApiProblem(422, "invalid_request", f"wait_s must be a number from 0 to {wire.MAX_WAIT_S}")
    return asked
