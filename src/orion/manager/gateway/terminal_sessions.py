"""A browser's terminal, from its ticket to its end: one shell after the other, on whichever worker the rental is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.websockets import WebSocket

from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.gateway.relay import NORMAL, TOKEN_OVER, Ending, open_unless
from orion.manager.gateway.running_rental import RunningRentals, job_of, remarks
from orion.manager.gateway.sessions import Session, Sessions
from orion.manager.gateway.terminal import OVER, TIME_OVER, TRY_AGAIN, TerminalPage, carry, serve
from orion.manager.gateway.tickets import LIFETIME_S, Resume, Terminals
from orion.manager.gateway.token_lifetime import TokenUse, TokenUses
from orion.manager.refusals import ApiProblem
from orion.manager.ssh.port import Shell, ShellLogin, Shells, ShellUnreachable
from orion.manager.store import tokens
from orion.manager.store.database import Row, Store
from orion.manager.store.tokens import Principal


@dataclass(frozen=True, kw_only=True)
class TerminalSessions:
    store: Store
    clock: TrustedClock
    rentals: RunningRentals
    sessions: Sessions
    token_uses: TokenUses
    terminals: Terminals
    shells: Shells
    monotonic: Callable[[], float]

    async def redeem(self, offered: str, rental_id: str) -> Resume:
        """Return the right to open the rental's terminal: a new one for a ticket, the existing one for a resume key.

        Raise ApiProblem if `offered` is neither, or if its token is over.
        """
        principal = self.terminals.tickets.redeem(offered, rental_id)
        if principal is None:
            resume = self.terminals.resumes.redeem(offered, rental_id)
        else:
            resume = self.terminals.resumes.begin(rental_id, principal)
        now = self.clock.wall_of_tokens()
        if resume is None or not await self.store.read(tokens.is_valid, resume.principal, now):
            detail = f"a ticket is valid once, for {LIFETIME_S:.0f} s, for its own rental: ask for a new one"
            raise ApiProblem(401, "no_ticket", detail)
        return resume

    async def serve(
        self, websocket: WebSocket, subprotocol: str, size: tuple[int, int], resume: Resume, address: str
    ) -> Ending:
        """Accept the WebSocket and serve its page until it ends. Raise ApiProblem before, if there are too many."""
        resumes = self.terminals.resumes
        with self.terminals.opened(resume.rental_id, resume.principal.name), resumes.used(resume):
            await websocket.accept(subprotocol)
            open_for_s = self.monotonic() - resume.began_at
            page = TerminalPage(websocket=websocket, terms=self.terminals.terms, size=size, open_for_s=open_for_s)
            ending = await serve(page, self._visits(page, resume, address))
            if ending.code in {NORMAL, OVER, TIME_OVER}:
                resumes.forget(resume)
        return ending

    async def _visits(self, page: TerminalPage, resume: Resume, address: str) -> Ending:
        """Open one shell after the other until one exits, the rental ends or the token is over."""
        try:
            async with self.token_uses.by(resume.principal) as use:
                return await self._visit(page, resume, address, use)
        except ApiProblem as error:
            return Ending(OVER, error.detail)

    async def _visit(self, page: TerminalPage, resume: Resume, address: str, use: TokenUse) -> Ending:
        principal, details = resume.principal, {"from": address, "by": "browser terminal"}
        await page.send_state("connecting", "Opening a shell")
        no_later = self.monotonic() + self.terminals.terms.total_s
        while True:
            with self.sessions.registered(resume.rental_id, principal.name, use, details) as session:
                row = await self.rentals.wait_for(principal, no_later, session)
                try:
                    with self.sessions.counted(session):
                        shell = await self._open(page, row, principal, session)
                        about = {"name": row["name"], "resume": resume.key}
                        about |= {"notice": text} if (text := remarks(row)) else {}
                        if shell and (how := await self._use(page, shell, session, about)):
                            return Ending(NORMAL, how)
                except ApiProblem as error:
                    return Ending(TRY_AGAIN, error.detail)
            if session.over.done():
                if session.over.result().code == TOKEN_OVER:
                    return Ending(OVER, session.over.result().reason)
                await page.send_state("waiting", f"The rental has left its worker: {session.over.result().reason}")
            else:
                await asyncio.sleep(self.terminals.terms.again_after_s)

    async def _open(self, page: TerminalPage, row: Row, principal: Principal, session: Session) -> Shell | None:
        """Return a shell, or None if none can be opened now; tell the page why."""
        login = ShellLogin(username=row["username"], rental_id=row["id"], epoch=row["epoch"], who=principal.name)
        opening = self.shells.open(job_of(row).host, login, page.size)
        try:
            return await open_unless(session.over, opening, lambda late: late.close())
        except ShellUnreachable as error:
            await page.send_state("waiting", f"No shell yet: {error}")
        return None

    async def _use(self, page: TerminalPage, shell: Shell, session: Session, about: dict[str, str]) -> str | None:
        """Return how the shell ended, or None if it is lost; tell the page so."""
        self.sessions.note_begin(session)
        reason = "the page was closed"
        page.attach(True)
        try:
            shell.resize(*page.size)
            await page.send_state("connected", "", **about)
            how = await carry(page, shell, session.over)
            lost = "the connection to the worker broke"
            reason = how or (session.over.result().reason if session.over.done() else lost)
            if how is None and not session.over.done():
                await page.send_state("waiting", f"{lost.capitalize()}. What ran in the shell may be lost")
            return how
        finally:
            shell.close()
            self.sessions.note_end(session, reason, page.taken, page.shown)
            page.attach(False)
