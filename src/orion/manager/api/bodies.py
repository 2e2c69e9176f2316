"""The bodies of requests: each is whole in time, and strangers get little of it.

The proxy passes a body on as it comes (manager_proxy/to_manager.conf), so what was sent of one waits here.
"""

from __future__ import annotations

import asyncio

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orion.manager.api.problems import problem
from orion.manager.api.services import provided
from orion.manager.authentication import Authentication
from orion.manager.refusals import ApiProblem

WHOLE_WITHIN_S = 15.0
UNKNOWN_WITHIN_S = 1.0
"""A body that is not whole by then is waited for only if its caller has a token. Most are whole at once."""
LARGE_BYTES = 16 << 10
"""A larger body is not begun to be read before its caller is known."""
AS_SLOW_AS_IT_IS = "/api/admin/"
"""Restores of databases are large; their routes know the caller before they read."""


class Bodies:
    """Stands before all routes."""

    def __init__(
        self, app: ASGIApp, whole_within_s: float = WHOLE_WITHIN_S, unknown_within_s: float = UNKNOWN_WITHIN_S
    ) -> None:
        self._app = app
        self._whole_within_s = whole_within_s
        self._unknown_within_s = unknown_within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = 0 if scope["type"] != "http" or scope["path"].startswith(AS_SLOW_AS_IT_IS) else announced(scope)
        if length == 0:
            await self._app(scope, receive, send)
            return
        is_large = length is None or length > LARGE_BYTES
        refusal = await _refusal(scope) if is_large else None
        if refusal is None:
            body = _InTime(scope, receive, send, self._whole_within_s, None if is_large else self._unknown_within_s)
            await self._app(scope, body.receive, body.send)
            refusal = body.refusal
        if refusal is not None:
            await refusal(scope, receive, send)


class _InTime:
    """Lets a route read a body until its time is over; then the route is told that its client has hung up.

    `unknown_within_s`: how long the caller need not be known; None: the caller is known.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, within_s: float, unknown_within_s: float | None
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._within_s = within_s
        now = asyncio.get_running_loop().time()
        self._ends_at = now + within_s
        self._known_by = None if unknown_within_s is None else now + unknown_within_s
        self._reading = True
        self._answered = False
        self.refusal: Response | None = None
        """The answer to give, where the route could not read all and has answered nothing before."""

    async def receive(self) -> Message:
        if not self._reading:
            return await self._receive()
        message = await self._in_time()
        if message is None:
            self._reading = False
            return {"type": "http.disconnect"}
        self._reading = message.get("more_body", False)
        return message

    async def _in_time(self) -> Message | None:
        """Return the next part. None: it did not come in time, and `refusal` says why it is not waited for."""
        refusal = None
        while refusal is None:
            try:
                async with asyncio.timeout_at(self._ends_at if self._known_by is None else self._known_by):
                    return await self._receive()
            except TimeoutError:
                refusal = late(self._within_s) if self._known_by is None else await _refusal(self._scope)
                self._known_by = None
        self.refusal = None if self._answered else refusal
        return None

    async def send(self, message: Message) -> None:
        self._answered = True
        if self.refusal is None:
            await self._send(message)


async def _refusal(scope: Scope) -> Response | None:
    """Return what is to be answered to a caller whose token is none; None: the caller is known."""
    try:
        await provided(scope, Authentication).identify(HTTPConnection(scope))
    except ApiProblem as refusal:
        return problem(refusal.status, refusal.code, refusal.detail, refusal.headers)
    return None


def late(within_s: float) -> Response:
    """Return the answer to a request whose body was not whole after that time."""
    return problem(408, "request_timeout", f"the body of the request was not whole after {within_s:g} s: send it again")


def announced(scope: Scope) -> int | None:
    """Return how many bytes of body a request has by its headers; None where they do not say, as of one in chunks."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0
