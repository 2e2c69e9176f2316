"""The way in for a browser: a ticket by the token, then a WebSocket by the ticket, which carries a terminal.

A page cannot give a WebSocket an Authorization header, and what stands in an address is logged: so the ticket comes as
a subprotocol. A browser also says which page opens the connection (Origin): only the platform's own may.
"""

from __future__ import annotations

import asyncio
from typing import Annotated
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, Query, WebSocket

from orion import wire
from orion.manager.api.contract import refusals
from orion.manager.api.problems import ApiProblem, problem
from orion.manager.api.rentals import find
from orion.manager.api.services import Client, Services, Shared, client_address
from orion.manager.engine.port import Login, Shell, ShellUnreachable
from orion.manager.gateway.openings import Opening
from orion.manager.gateway.routes import active, job_of, remarks
from orion.manager.gateway.sessions import Session
from orion.manager.gateway.ssh import NORMAL, REVOKED, Ending
from orion.manager.gateway.terminal import COME_AGAIN, LARGEST_SIZE, OVER, TIME_OVER, Page, carry, serve
from orion.manager.gateway.tickets import LIFETIME_S, Resume
from orion.manager.store import tokens
from orion.manager.store.database import Row
from orion.manager.store.tokens import Principal

SUBPROTOCOL = "orion.terminal"
Size = Annotated[int, Query(ge=1, le=LARGEST_SIZE)]

log = structlog.get_logger()

router = APIRouter(prefix="/api", tags=["rentals"])


@router.post("/rentals/{rental_id}/terminal", status_code=201, responses=refusals(404, 409, 503))
async def ticket(rental_id: str, principal: Client, shared: Shared) -> wire.TerminalTicket:
    """A ticket for a terminal in a browser: good once, for a minute, as the second subprotocol of the WebSocket."""
    row = await find(shared, rental_id, principal)
    if row["state"] != wire.RentalState.ACTIVE:
        raise ApiProblem(409, "not_active", f"the rental is {row['state']}: {row['explanation']}")
    shared.terminals.check(rental_id, principal.name)
    issued = shared.terminals.tickets.issue(rental_id, principal)
    return wire.TerminalTicket(ticket=issued, expires_in_s=LIFETIME_S)


@router.websocket("/rentals/{rental_id}/terminal")
async def terminal(websocket: WebSocket, rental_id: str, columns: Size = 80, rows: Size = 24) -> None:
    """Refusals are HTTP problems, sent before the WebSocket is accepted."""
    services: Services = websocket.app.state.services
    try:
        _check_origin(websocket)
        resume = await _redeem(websocket, services, rental_id)
        resumes = services.terminals.resumes
        with services.terminals.opened(rental_id, resume.principal.name), resumes.used(resume):
            await websocket.accept(SUBPROTOCOL)
            page = Page(websocket, services.terminals.terms, (columns, rows), services.monotonic() - resume.began_at)
            ending = await serve(page, _visits(services, page, resume, client_address(websocket)))
            if ending.code in {NORMAL, OVER, TIME_OVER}:
                resumes.forget(resume)
    except ApiProblem as error:
        await websocket.send_denial_response(problem(error.status, error.code, error.detail, error.headers))
        return
    log.info("terminal ended", rental_id=rental_id, code=ending.code, reason=ending.reason)


def _check_origin(websocket: WebSocket) -> None:
    """Of the proxy's address as the browser knows it, port and all. Programs send none, and have a ticket or not."""
    origin = websocket.headers.get("origin")
    if origin is None:
        return
    host = websocket.headers.get("x-forwarded-host", "")
    try:
        theirs = urlsplit(origin).netloc
    except ValueError:
        theirs = ""
    if not host or theirs.lower() != host.lower():
        raise ApiProblem(403, "cross_site", "a terminal is opened from the platform's own pages alone")


async def _redeem(websocket: WebSocket, services: Services, rental_id: str) -> Resume:
    """Return the right to open this terminal: a ticket makes a new one, a resume key belongs to one."""
    offered = websocket.scope["subprotocols"]
    if len(offered) != 2 or offered[0] != SUBPROTOCOL:
        raise ApiProblem(401, "no_ticket", f"offer two subprotocols: {SUBPROTOCOL}, and a ticket")
    terminals = services.terminals
    principal = terminals.tickets.redeem(offered[1], rental_id)
    if principal is None:
        resume = terminals.resumes.redeem(offered[1], rental_id)
    else:
        resume = terminals.resumes.begin(rental_id, principal)
    now = services.clock.wall_of_tokens()
    if resume is None or not await services.store.read(tokens.is_valid, resume.principal, now):
        detail = f"a ticket is good once, for {LIFETIME_S:.0f} s, for its own rental: ask for a new one"
        raise ApiProblem(401, "no_ticket", detail)
    return resume


async def _visits(services: Services, page: Page, resume: Resume, where_from: str) -> Ending:
    """Open one shell after the other, wherever the rental is, until one ends by itself, the rental or the token."""
    try:
        async with services.openings.by(resume.principal) as opening:
            return await _visit(services, page, resume, where_from, opening)
    except ApiProblem as error:
        return Ending(OVER, error.detail)


async def _visit(services: Services, page: Page, resume: Resume, where_from: str, opening: Opening) -> Ending:
    rental_id, principal = resume.rental_id, resume.principal
    await page.tell("connecting", "Opening a shell")
    no_later = services.monotonic() + services.terminals.terms.total_s
    while True:
        with services.sessions.beginning(rental_id) as session:
            session.opened_by(opening)
            try:
                row = await active(services, rental_id, principal, no_later, session)
            except ApiProblem as error:
                return Ending(OVER, error.detail)
            session.who, session.where_from, session.owner = principal.name, where_from, row["owner"]
            session.worker_id, session.epoch, session.also = row["worker_id"], row["epoch"], {"by": "browser terminal"}
            try:
                with services.sessions.carried(session):
                    shell = await _open(services, page, row, principal, session)
                    about = {"name": row["name"], "resume": resume.key}
                    about |= {"notice": said} if (said := remarks(row)) else {}
                    if shell and (how := await _use(services, page, shell, session, about)):
                        return Ending(NORMAL, how)
            except ApiProblem as error:
                return Ending(COME_AGAIN, error.detail)
        if session.over.done():
            if session.over.result().code == REVOKED:
                return Ending(OVER, session.over.result().reason)
            await page.tell("waiting", f"The rental has left its worker: {session.over.result().reason}")
        else:
            await asyncio.sleep(services.terminals.terms.again_after_s)


async def _open(services: Services, page: Page, row: Row, principal: Principal, session: Session) -> Shell | None:
    """None: not now; the page was told."""
    login = Login(row["username"], row["id"], row["epoch"], principal.name)
    opening = asyncio.create_task(services.shells.open(job_of(row).host, login, page.size))
    wanted = False
    try:
        await asyncio.wait((opening, session.over), return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            shell, wanted = opening.result(), True
            return shell
    except ShellUnreachable as error:
        await page.tell("waiting", f"No shell yet: {error}")
    finally:
        if not wanted:
            opening.add_done_callback(_close)
            opening.cancel()
    return None


def _close(opened: asyncio.Task[Shell]) -> None:
    """Nobody waits for it any more."""
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()


async def _use(services: Services, page: Page, shell: Shell, session: Session, about: dict[str, str]) -> str | None:
    """How it ended; None: it is lost, and the page was told."""
    services.sessions.note_begin(session)
    reason = "the page was closed"
    page.attach(True)
    try:
        shell.resize(*page.size)
        await page.tell("connected", "", **about)
        how = await carry(page, shell, session.over)
        lost = "the connection to the worker broke"
        reason = how or (session.over.result().reason if session.over.done() else lost)
        if how is None and not session.over.done():
            await page.tell("waiting", f"{lost.capitalize()}. What ran in the shell may be lost")
        return how
    finally:
        shell.close()
        services.sessions.note_end(session, reason, page.taken, page.shown)
        page.attach(False)
