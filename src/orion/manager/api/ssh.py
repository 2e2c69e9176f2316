"""The route of the relay: a WebSocket that carries the bytes of one SSH connection to the rental's sshd."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, WebSocket

from orion import wire
from orion.manager.api.problems import problem, refused
from orion.manager.api.services import client_address, given, provided
from orion.manager.authentication import Authentication
from orion.manager.gateway.relay import WorkerUnreachable
from orion.manager.gateway.ssh_sessions import SshSessions
from orion.manager.refusals import ApiProblem

router = APIRouter(prefix="/api", tags=["rentals"])


@router.websocket("/rentals/{rental_id}/ssh")
async def ssh(
    websocket: WebSocket, rental_id: str, sessions: Annotated[SshSessions, Depends(given(SshSessions))]
) -> None:
    """Relay one SSH connection. Refusals are HTTP problems, sent before the WebSocket is accepted.

    `?wait_s=` is the time in seconds to wait for a rental that is queued, provisioning or migrating.
    """
    try:
        principal = await provided(websocket.scope, Authentication).authenticate(websocket, "client", "admin")
        await sessions.carry(websocket, rental_id, principal, client_address(websocket), _wait_s(websocket))
    except ApiProblem as error:
        await websocket.send_denial_response(refused(error))
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
