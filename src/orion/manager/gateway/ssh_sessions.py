"""A renter's SSH connection, from its WebSocket to the sshd of the rental's worker, as a recorded session."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from starlette.websockets import WebSocket

from orion.manager.ansible.port import Job
from orion.manager.domain.leases import Leases
from orion.manager.gateway.relay import (
    NOTICE_HEADER,
    REMARK_HEADER,
    Ending,
    SshStream,
    WorkerUnreachable,
    connect,
    open_unless,
    relay,
)
from orion.manager.gateway.running_rental import RunningRentals, job_of, remarks
from orion.manager.gateway.sessions import Session, Sessions
from orion.manager.gateway.token_lifetime import TokenUses
from orion.manager.store.database import Row
from orion.manager.store.tokens import Principal

log = structlog.get_logger()

LONGEST_NOTICE = 500
"""Characters of a notice in a header."""


@dataclass(frozen=True, kw_only=True)
class SshSessions:
    rentals: RunningRentals
    sessions: Sessions
    token_uses: TokenUses
    leases: Leases
    certify: Callable[[Job], Awaitable[None]]
    """Makes a rental's worker present a certificate for the rental (operations/host_certificates.py)."""
    monotonic: Callable[[], float]

    async def carry(
        self, websocket: WebSocket, rental_id: str, principal: Principal, address: str, wait_s: float
    ) -> None:
        """Relay bytes between the WebSocket and the rental's sshd until one of them ends.

        Wait up to `wait_s` for a rental that is not active yet. Raise ApiProblem or WorkerUnreachable before the
        WebSocket is accepted.
        """
        deadline = self.monotonic() + wait_s
        async with self.token_uses.by(principal) as use:
            with self.sessions.registered(rental_id, principal.name, use, {"from": address}) as session:
                await self._connect_and_relay(websocket, principal, session, deadline)

    async def _connect_and_relay(
        self, websocket: WebSocket, principal: Principal, session: Session, deadline: float
    ) -> None:
        while True:
            row = await self.rentals.wait_for(principal, deadline, session)
            with self.sessions.counted(session):
                if other := self.leases.displaced_by(row["worker_id"]):
                    raise WorkerUnreachable(
                        f"the rental's worker {row['worker_id']} is gone, and {other} has its address now: the rental "
                        "is taken over when the lease of the lost worker has passed"
                    )
                job = job_of(row)
                await self.certify(job)
                stream = await open_unless(session.over, connect(job.host), lambda late: late.writer.close())
                if stream is not None:
                    await self._relay(websocket, session, stream, _headers(row))
                    return

    async def _relay(self, websocket: WebSocket, session: Session, stream: SshStream, headers: dict[str, str]) -> None:
        self.sessions.note_begin(session)
        ending = Ending(0, "the manager ended it")
        try:
            ending = await relay(websocket, stream, session.over, headers)
        finally:
            self.sessions.note_end(session, ending.reason, stream.to_worker, stream.to_client)
        figures = {"to_worker": stream.to_worker, "to_client": stream.to_client}
        log.info("relay ended", rental_id=session.rental_id, **figures, **vars(ending))


def _headers(row: Row) -> dict[str, str]:
    """Return the headers with the reason why no snapshots are taken of the rental, if any, and with its remarks.

    A rental without snapshots may be frozen, and then its sshd says only that permission is denied.
    """
    notice = f"{row['name']} is not copied: {row['copy_problem']}" if row["copy_problem"] else ""
    texts = {NOTICE_HEADER: notice[:LONGEST_NOTICE], REMARK_HEADER: remarks(row)[:LONGEST_NOTICE]}
    return {name: re.sub(r"[^ -~]", "?", text) for name, text in texts.items() if text}
