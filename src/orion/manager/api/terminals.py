"""The routes of browser terminals: a token buys a ticket, and the ticket opens a WebSocket that carries a terminal.

A page cannot set an Authorization header on a WebSocket, and addresses are logged, so the ticket is sent as a
subprotocol. The Origin header says which page opens the connection; only the platform's own pages may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Query, WebSocket

from orion import wire
from orion.manager.api.contract import refusals
from orion.manager.api.problems import refused
from orion.manager.api.services import Client, client_address, given, is_from_another_origin
from orion.manager.api.visible_rentals import VisibleRentals
from orion.manager.gateway.terminal import LARGEST_SIZE
from orion.manager.gateway.terminal_sessions import TerminalSessions
from orion.manager.gateway.tickets import LIFETIME_S
from orion.manager.refusals import ApiProblem

SUBPROTOCOL = "orion.terminal"
Size = Annotated[int, Query(ge=1, le=LARGEST_SIZE)]

log = structlog.get_logger()

router = APIRouter(prefix="/api", tags=["rentals"])


@dataclass(frozen=True, kw_only=True)
class TerminalServices:
    rentals: VisibleRentals
    sessions: TerminalSessions


Shared = Annotated[TerminalServices, Depends(given(TerminalServices))]


@router.post("/rentals/{rental_id}/terminal", status_code=201, responses=refusals(404, 409, 503))
async def ticket(rental_id: str, principal: Client, shared: Shared) -> wire.TerminalTicket:
    """Return a ticket for a browser terminal: valid once, for a minute, as second subprotocol of the WebSocket."""
    row = await shared.rentals.find(rental_id, principal)
    if row["state"] != wire.RentalState.ACTIVE:
        raise ApiProblem(409, "not_active", f"the rental is {row['state']}: {row['explanation']}")
    terminals = shared.sessions.terminals
    terminals.check(rental_id, principal.name)
    return wire.TerminalTicket(ticket=terminals.tickets.issue(rental_id, principal), expires_in_s=LIFETIME_S)


@router.websocket("/rentals/{rental_id}/terminal")
async def terminal(websocket: WebSocket, rental_id: str, shared: Shared, columns: Size = 80, rows: Size = 24) -> None:
    """Serve a browser terminal. Refusals are HTTP problems, sent before the WebSocket is accepted."""
    try:
        if is_from_another_origin(websocket):
            raise ApiProblem(403, "cross_site", "a terminal can be opened only from the platform's own pages")
        resume = await shared.sessions.redeem(_offered(websocket), rental_id)
        ending = await shared.sessions.serve(websocket, SUBPROTOCOL, (columns, rows), resume, client_address(websocket))
    except ApiProblem as error:
        await websocket.send_denial_response(refused(error))
        return
    log.info("terminal ended", rental_id=rental_id, code=ending.code, reason=ending.reason)


def _offered(websocket: WebSocket) -> str:
    """Return the ticket or resume key, which is the second subprotocol. Raise 401 if there is none."""
    offered = websocket.scope["subprotocols"]
    if len(offered) != 2 or offered[0] != SUBPROTOCOL:
        raise ApiProblem(401, "no_ticket", f"offer two subprotocols: {SUBPROTOCOL}, and a ticket")
    ticket: str = offered[1]
    return ticket
