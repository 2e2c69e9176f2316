"""Open connections of web ports end with what opened them: a token, or that a port is public.

The manager carries none of their bytes. Each pass (gateway/port_keys.py) therefore says by what it opens a port, and
for how long that is good; the worker's door (orion_worker/web/port_proxy.py) ends a connection by itself when that time
is over. What ends earlier is told to the doors concerned, again and again until each has heard of it or its worker is
gone. After a restart every door is asked once what is open there.

Passes and these messages have rising numbers, taken before the database is read and after it was changed. So a pass
that was on its way in that moment has the lower number, and the door refuses it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

import structlog

from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import Health
from orion.manager.domain.steps import Event
from orion.manager.gateway.token_lifetime import HAS_BEEN_REVOKED
from orion.manager.refusals import unauthorized
from orion.manager.store import tokens, web_ports
from orion.manager.store.database import Store
from orion.manager.store.tokens import Principal

log = structlog.get_logger()

PUBLIC = "public"
"""The grant of a port that everybody may open. Any other grant is a token's: see `grant_of`."""
DOOR_PORT = 80
ANSWER_WITHIN_S = 5.0
AGAIN_AFTER_S, AGAIN_AT_MOST_S = 0.5, 15.0
ASKED_AT_ONCE = 20
LARGEST_ANSWER_BYTES = 1 << 20

Tell = Callable[[str, str, int, Sequence[str]], Awaitable[list[str]]]
"""Tells the door at an address, by the secret of its worker's session and a number, what is over; returns what is open
there. Both are lines `RENTAL PORT GRANT`; `* * GRANT` means everything by that grant. Raises OSError or ValueError."""


def grant_of(principal: Principal) -> str:
    return f"{principal.role}.{principal.id}.{principal.mark}"


async def tell_door(address: str, session_id: str, number: int, over: Sequence[str]) -> list[str]:
    """Implements `Tell` by HTTP, as orion_worker/web/port_proxy.py reads it."""
    body = "\n".join(over).encode()
    signed = hmac.new(session_id.encode(), b"end %d " % number + body, hashlib.sha256).hexdigest()
    head = f"POST / HTTP/1.1\r\nX-Orion-End: {number} {signed}\r\nContent-Length: {len(body)}\r\n\r\n"
    async with asyncio.timeout(ANSWER_WITHIN_S):
        reader, writer = await asyncio.open_connection(address, DOOR_PORT, limit=LARGEST_ANSWER_BYTES)
        try:
            writer.write(head.encode() + body)
            answer = await reader.read(LARGEST_ANSWER_BYTES)
            while part := await reader.read(LARGEST_ANSWER_BYTES):
                answer += part
                if len(answer) > LARGEST_ANSWER_BYTES:
                    raise ValueError("the door says too much")
        finally:
            writer.close()
    told, _, lines = answer.partition(b"\r\n\r\n")
    if not told.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"the door answers {told[:40]!r}")
    return lines.decode("ascii").splitlines()


class PortConnections:
    def __init__(self, store: Store, pool_index: PoolIndex, tell: Tell | None, wall: Callable[[], float]) -> None:
        """`tell` None: there are no doors, as in tests without one. `wall`: Unix time, by which tokens end."""
        self._store = store
        self._roster = pool_index
        self._tell = tell
        self._wall = wall
        self._last_number = 0
        self._passes: dict[str, dict[str, set[str]]] = {}
        """By the token's id, then by worker: the grants by which connections may be open there."""
        self._revoked: set[str] = set()
        """The ids of the tokens that were revoked since the start."""
        self._telling: set[asyncio.Task[None]] = set()
        store.news.follow(self.hear)

    def number(self) -> int:
        """Return a number that is higher than all before."""
        self._last_number = max(self._last_number + 1, int(self._wall() * 1e6))
        return self._last_number

    def note(self, principal: Principal, worker_id: str) -> str:
        """Remember that a pass by this token leads to a worker; return its grant. Raise 401 if it was just revoked."""
        if principal.id in self._revoked:
            raise unauthorized(HAS_BEEN_REVOKED)
        grant = grant_of(principal)
        self._passes.setdefault(principal.id, {}).setdefault(worker_id, set()).add(grant)
        return grant

    def hear(self, committed: Sequence[Event]) -> None:
        """Tell the doors of what these events end."""
        for event in committed:
            if event.kind == tokens.REVOKED:
                token_id = str(event.details["token_id"])
                self._revoked.add(token_id)
                for worker_id, grants in self._passes.pop(token_id, {}).items():
                    self._begin(self._until_told(worker_id, [f"* * {grant}" for grant in sorted(grants)]))
            elif event.kind == web_ports.CLOSED and event.rental_id:
                self._begin(self._close_port(event.rental_id, int(event.details["port"])))

    def begin(self) -> None:
        """Ask every door once what is open there, and end what has no right to be."""
        asking = asyncio.Semaphore(ASKED_AT_ONCE)
        for worker_id, _ in list(self._roster.items()):
            self._begin(self._look_at(worker_id, asking))

    async def stop(self) -> None:
        telling = list(self._telling)
        for task in telling:
            task.cancel()
        await asyncio.gather(*telling, return_exceptions=True)

    async def _close_port(self, rental_id: str, port: int) -> None:
        row = await self._store.read(web_ports.look, rental_id)
        if row is not None and row["worker_id"]:
            await self._until_told(row["worker_id"], [f"{rental_id} {port} {PUBLIC}"])

    async def _look_at(self, worker_id: str, asking: asyncio.Semaphore) -> None:
        found = await self._until_told(worker_id, [], asking)
        over = [line for line in found if not await self._may_be_open(worker_id, line)]
        if over:
            await self._until_told(worker_id, over)

    async def _may_be_open(self, worker_id: str, line: str) -> bool:
        rental_id, port, grant = line.split(" ")
        row = await self._store.read(web_ports.look, rental_id)
        if row is None:
            return False
        if grant == PUBLIC:
            return int(port) in row["public_ports"]
        role, token_id, _ = grant.split(".")
        principal = await self._store.read(tokens.named, role, token_id, self._wall())
        if principal is None or grant_of(principal) != grant:
            return False
        self._passes.setdefault(token_id, {}).setdefault(worker_id, set()).add(grant)
        return token_id not in self._revoked

    async def _until_told(
        self, worker_id: str, over: Sequence[str], place: AbstractAsyncContextManager[Any] | None = None
    ) -> list[str]:
        """Return what is open there; nothing, where the worker is gone and its rentals stand still.

        `place`: what is entered for each try, and not while another is waited for: a door that does not answer keeps
        nobody else's from being asked.
        """
        wait_s = AGAIN_AFTER_S
        while self._tell is not None:
            known = self._roster.worker(worker_id)
            if known is None or not known.session_id or known.health is Health.DOWN:
                break
            try:
                async with place or nullcontext():
                    return await self._tell(known.address, known.session_id, self.number(), over)
            except (OSError, ValueError) as error:
                log.info("a worker's door for web ports was not told", worker_id=worker_id, reason=str(error))
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, AGAIN_AT_MOST_S)
        return []

    def _begin(self, telling: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(telling)
        self._telling.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._telling.discard(task)
        with suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                log.error("web connections may be open that should be closed", exc_info=error)
