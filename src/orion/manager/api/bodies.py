"""The bodies of requests: each is whole in time, and a large one is taken from callers with a token alone.

The proxy passes a body on as it comes (manager_proxy/to_manager.conf), so what was sent of one waits here.
"""

from __future__ import annotations

import asyncio

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orion.manager.api.problems import ApiProblem, problem
from orion.manager.api.services import identify

WHOLE_WITHIN_S = 15.0
LARGE_BYTES = 16 << 10
"""A larger body is not begun to be read before its caller is known."""
AS_SLOW_AS_IT_IS = "/api/admin/"
"""Restores of databases are large; their routes know the caller before they read."""


class Bodies:
    """Stands before all routes."""

    def __init__(self, app: ASGIApp, whole_within_s: float = WHOLE_WITHIN_S) -> None:
        self._app = app
        self._whole_within_s = whole_within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = 0 if scope["type"] != "http" or scope["path"].startswith(AS_SLOW_AS_IT_IS) else announced(scope)
        if length == 0:
            await self._app(scope, receive, send)
            return
        if length is None or length > LARGE_BYTES:
            try:
                await identify(HTTPConnection(scope), scope["app"].state.services)
            except ApiProblem as refusal:
                told = problem(refusal.status, refusal.code, refusal.detail, refusal.headers)
                await told(scope, receive, send)
                return
        body = _InTime(receive, send, self._whole_within_s)
        await self._app(scope, body.receive, body.send)
        if body.is_late:
            detail = f"the body of the request was not whole after {self._whole_within_s:g} s: send it again"
            await problem(408, "request_timeout", detail)(scope, receive, send)


class _InTime:
    """Lets a route read a body until its time is over; then the route is told that its client has hung up."""

    def __init__(self, receive: Receive, send: Send, within_s: float) -> None:
        self._receive = receive
        self._send = send
        self._ends_at = asyncio.get_running_loop().time() + within_s
        self._reading = True
        self._answered = False
        self.is_late = False
        """Whether the route could not read all, and has answered nothing before."""

    async def receive(self) -> Message:
        if not self._reading:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._ends_at):
                message = await self._receive()
        except TimeoutError:
            self._reading = False
            self.is_late = not self._answered
            return {"type": "http.disconnect"}
        self._reading = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        self._answered = True
        if not self.is_late:
            await self._send(message)


def announced(scope: Scope) -> int | None:
    """Return how many bytes of body a request has by its headers; None where they do not say, as of one in chunks."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0
