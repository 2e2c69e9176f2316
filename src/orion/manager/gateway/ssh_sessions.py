"""One renter's SSH connection from its WebSocket to the sshd of the rental's worker, and its record in the sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog
from starlette.websockets import WebSocket

from orion.manager.ansible.port import Job
from orion.manager.domain.leases import Leases
from orion.manager.gateway.relay import (
    NOTICE_HEADER,
    REMARK_HEADER,
    Ending,
    Relayed,
    SshStream,
    WorkerUnreachable,
    connect,
    relay,
)
from orion.manager.gateway.running_rental import RunningRentals, job_of, remarks
from orion.manager.gateway.sessions import Session, Sessions
from orion.manager.gateway.token_lifetime import TokenUses
from orion.manager.ssh.port import Host
from orion.manager.store.database import Row
from orion.manager.store.tokens import Principal

log = structlog.get_logger()

LONGEST_NOTICE = 500
"""Letters."""


class SshSessions:
    def __init__(
        self,
        *,
        rentals: RunningRentals,
        sessions: Sessions,
        token_uses: TokenUses,
        leases: Leases,
        certify: Callable[[Job], Awaitable[None]],
        monotonic: Callable[[], float],
    ) -> None:
        """`certify` has the worker of a rental show a certificate that names it (operations/host_certificates.py)."""
        self._rentals = rentals
        self._sessions = sessions
        self._openings = token_uses
        self._leases = leases
        self._certify = certify
        self._monotonic = monotonic

    async def carry(
        self, websocket: WebSocket, rental_id: str, principal: Principal, where_from: str, wait_s: float
    ) -> None:
        """Relay the WebSocket's bytes to the rental's sshd and back, until one of the two ends.

        Raise ApiProblem or WorkerUnreachable before the WebSocket is accepted; wait up to `wait_s` for a rental that
        is not active yet.
        """
        deadline = self._monotonic() + wait_s
        with self._sessions.beginning(rental_id) as session:
            session.who, session.where_from = principal.name, where_from
            async with self._openings.by(principal) as opening:
                session.opened_by(opening)
                await self._bring_in(websocket, principal, session, deadline)

    async def _bring_in(self, websocket: WebSocket, principal: Principal, session: Session, deadline: float) -> None:
        while True:
            row = await self._rentals.wait_for(session.rental_id, principal, deadline, session)
            session.owner, session.worker_id, session.epoch = row["owner"], row["worker_id"], row["epoch"]
            with self._sessions.carried(session):
                other = self._leases.displaced_by(row["worker_id"])
                if other:
                    raise WorkerUnreachable(
                        f"its worker {row['worker_id']} is gone, and {other} has its address now: the rental is taken "
                        "over as soon as the lease of the lost one has passed"
                    )
                job = job_of(row)
                await self._certify(job)
                stream = await _connected(job.host, session.over)
                if stream is not None:
                    await self._relay(websocket, session, stream, _notice(row) | _remark(row))
                    return

    async def _relay(self, websocket: WebSocket, session: Session, stream: SshStream, headers: dict[str, str]) -> None:
        self._sessions.note_begin(session)
        relayed = Relayed(0, 0, 0, "the manager ended it")
        try:
            relayed = await relay(websocket, stream, session.over, headers)
        finally:
            self._sessions.note_end(session, relayed.reason, stream.to_worker, stream.to_client)
        log.info("relay ended", rental_id=session.rental_id, **vars(relayed))


async def _connected(host: Host, over: asyncio.Future[Ending]) -> SshStream | None:
    """Return the connection; None where the rental left that worker while the worker did not answer."""
    connecting = asyncio.create_task(connect(host))
    waiting: list[asyncio.Future[Any]] = [connecting, over]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if connecting.done():
        return connecting.result()
    connecting.cancel()
    with suppress(asyncio.CancelledError, WorkerUnreachable):
        (await connecting).close()
    return None


def _notice(row: Row) -> dict[str, str]:
    """Return a header for whoever logs in to a rental that is not copied.

    Such a rental may be frozen, and then its sshd says only that permission is denied.
    """
    if not row["copy_problem"]:
        return {}
    said = f"{row['name']} is not copied: {row['copy_problem']}"[:LONGEST_NOTICE]
    return {NOTICE_HEADER: _printable(said)}


def _remark(row: Row) -> dict[str, str]:
    said = remarks(row)[:LONGEST_NOTICE]
    return {REMARK_HEADER: _printable(said)} if said else {}


def _printable(said: str) -> str:
    return "".join(letter if " " <= letter <= "~" else "?" for letter in said)
