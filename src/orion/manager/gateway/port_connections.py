"""Ending of open connections to web ports when their grant ends: a token, or that a port is public.

The worker's port proxy (orion_worker/web/port_proxy.py) carries them, and ends each after the time that its pass names
(gateway/port_keys.py). If a grant ends earlier, the manager sends a message to the port proxies concerned, and repeats
it until each has answered or its worker is gone. After a restart it asks every port proxy for its open connections.

Passes and these messages have rising numbers: a pass gets its number before the database is read, a message after the
database was changed. A pass that was under way then has the lower number, and the port proxy refuses it.
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
"""The grant of a public port. Any other grant is a token's: see `grant_of`."""
PORT_PROXY_PORT = 80
ANSWER_WITHIN_S = 5.0
RETRY_AFTER_S, RETRY_AFTER_AT_MOST_S = 0.5, 15.0
QUERIES_AT_ONCE = 20
LARGEST_ANSWER_BYTES = 1 << 20

EndConnections = Callable[[str, str, int, Sequence[str]], Awaitable[list[str]]]
"""Ends connections at the port proxy at an address, and returns those that are still open there.

The arguments are the address, the secret of the worker's session, the message's number, and the connections to end.
Connections are lines `RENTAL PORT GRANT`; `* * GRANT` are all by that grant. Raises OSError or ValueError."""


def grant_of(principal: Principal) -> str:
    return f"{principal.role}.{principal.id}.{principal.mark}"


async def end_connections(address: str, session_id: str, number: int, over: Sequence[str]) -> list[str]:
    """Implement `EndConnections` by HTTP, as orion_worker/web/port_proxy.py reads it."""
    body = "\n".join(over).encode()
    signed = hmac.new(session_id.encode(), b"end %d " % number + body, hashlib.sha256).hexdigest()
    head = f"POST / HTTP/1.1\r\nX-Orion-End: {number} {signed}\r\nContent-Length: {len(body)}\r\n\r\n"
    async with asyncio.timeout(ANSWER_WITHIN_S):
        reader, writer = await asyncio.open_connection(address, PORT_PROXY_PORT, limit=LARGEST_ANSWER_BYTES)
        try:
            writer.write(head.encode() + body)
            answer = await reader.read(LARGEST_ANSWER_BYTES)
            while part := await reader.read(LARGEST_ANSWER_BYTES):
                answer += part
                if len(answer) > LARGEST_ANSWER_BYTES:
                    raise ValueError("the port proxy's answer is too large")
        finally:
            writer.close()
    head_of_answer, _, lines = answer.partition(b"\r\n\r\n")
    if not head_of_answer.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"the port proxy answers {head_of_answer[:40]!r}")
    return lines.decode("ascii").splitlines()


class PortConnections:
    def __init__(
        self, *, store: Store, pool_index: PoolIndex, end_connections: EndConnections | None, wall: Callable[[], float]
    ) -> None:
        """`end_connections` is None where workers have no port proxy, as in tests. `wall` returns Unix seconds."""
        self._store = store
        self._pool_index = pool_index
        self._end_connections = end_connections
        self._wall = wall
        self._last_number = 0
        self._passes: dict[str, dict[str, set[str]]] = {}
        """The grants by which connections may be open, by the token's id and the worker."""
        self._revoked: set[str] = set()
        """The ids of the tokens that were revoked since the manager started."""
        self._running: set[asyncio.Task[None]] = set()
        store.news.follow(self.on_commit)

    def number(self) -> int:
        """Return a number that is higher than all before, also than those of a former manager."""
        self._last_number = max(self._last_number + 1, int(self._wall() * 1e6))
        return self._last_number

    def note(self, principal: Principal, worker_id: str) -> str:
        """Record that a pass of this token goes to a worker; return its grant. Raise 401 if it was just revoked."""
        if principal.id in self._revoked:
            raise unauthorized(HAS_BEEN_REVOKED)
        grant = grant_of(principal)
        self._passes.setdefault(principal.id, {}).setdefault(worker_id, set()).add(grant)
        return grant

    def on_commit(self, committed: Sequence[Event]) -> None:
        """End the connections whose grants these events end."""
        for event in committed:
            if event.kind == tokens.REVOKED:
                token_id = str(event.details["token_id"])
                self._revoked.add(token_id)
                for worker_id, grants in self._passes.pop(token_id, {}).items():
                    self._begin(self._end_on_worker(worker_id, [f"* * {grant}" for grant in sorted(grants)]))
            elif event.kind == web_ports.CLOSED and event.rental_id:
                self._begin(self._close_port(event.rental_id, int(event.details["port"])))

    def begin(self) -> None:
        """Ask every port proxy once for its open connections, and end those whose grant is over."""
        at_once = asyncio.Semaphore(QUERIES_AT_ONCE)
        for worker_id, _ in list(self._pool_index.items()):
            self._begin(self._check_worker(worker_id, at_once))

    async def stop(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _close_port(self, rental_id: str, port: int) -> None:
        row = await self._store.read(web_ports.look, rental_id)
        if row is not None and row["worker_id"]:
            await self._end_on_worker(row["worker_id"], [f"{rental_id} {port} {PUBLIC}"])

    async def _check_worker(self, worker_id: str, at_once: asyncio.Semaphore) -> None:
        found = await self._end_on_worker(worker_id, [], at_once)
        over = [line for line in found if not await self._may_be_open(worker_id, line)]
        if over:
            await self._end_on_worker(worker_id, over)

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

    async def _end_on_worker(
        self, worker_id: str, over: Sequence[str], semaphore: AbstractAsyncContextManager[Any] | None = None
    ) -> list[str]:
        """End connections on a worker, again until it answers, and return those still open; [] if the worker is gone.

        `semaphore` is left between attempts, so that a worker that does not answer delays no other.
        """
        wait_s = RETRY_AFTER_S
        while self._end_connections is not None:
            known = self._pool_index.worker(worker_id)
            if known is None or not known.session_id or known.health is Health.DOWN:
                break
            try:
                async with semaphore or nullcontext():
                    return await self._end_connections(known.address, known.session_id, self.number(), over)
            except (OSError, ValueError) as error:
                log.info("a worker's port proxy did not answer a message", worker_id=worker_id, reason=str(error))
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_AFTER_AT_MOST_S)
        return []

    def _begin(self, running: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(running)
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        with suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                log.error("connections to web ports may be open that should be closed", exc_info=error)
