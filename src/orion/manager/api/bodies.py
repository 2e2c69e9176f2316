"""A middleware that limits how long a request's body may take, and what a caller without a token may send.

The proxy does not buffer bodies (manager_proxy/to_manager.conf), so a body that arrives slowly occupies the manager.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orion.manager.api.problems import problem, refused
from orion.manager.api.services import provided
from orion.manager.authentication import Authentication
from orion.manager.refusals import ApiProblem

WHOLE_WITHIN_S = 15.0
"""Seconds that a whole body may take."""
UNKNOWN_WITHIN_S = 1.0
"""Seconds until the token is checked, if the body is not whole by then. Most bodies are whole at once."""
LARGE_BYTES = 16 << 10
"""Bytes of body above which the token is checked before the body is read."""
UNLIMITED_PREFIX = "/api/admin/"
"""The paths without a limit: a restore uploads a large database, and its route authenticates before it reads."""


@dataclass(frozen=True)
class Bodies:
    app: ASGIApp
    whole_within_s: float = WHOLE_WITHIN_S
    unknown_within_s: float = UNKNOWN_WITHIN_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = 0 if scope["type"] != "http" or scope["path"].startswith(UNLIMITED_PREFIX) else declared_length(scope)
        if length == 0:
            await self.app(scope, receive, send)
            return
        is_large = length is None or length > LARGE_BYTES
        refusal = await _refusal(scope) if is_large else None
        if refusal is None:
            unknown_within_s = None if is_large else self.unknown_within_s
            body = _TimedBody(scope, receive, send, within_s=self.whole_within_s, unknown_within_s=unknown_within_s)
            await self.app(scope, body.receive, body.send)
            refusal = body.refusal
        if refusal is not None:
            await refusal(scope, receive, send)


class _TimedBody:
    """The `receive` and `send` of one request, with a time limit on its body.

    When the time is over, the route receives a disconnect. `unknown_within_s` is the time after which the token is
    checked; None means that it was checked.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, within_s: float, unknown_within_s: float | None
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._within_s = within_s
        now = asyncio.get_running_loop().time()
        self._ends_at = now + within_s
        self._check_at = None if unknown_within_s is None else now + unknown_within_s
        self._reading = True
        self._answered = False
        self.refusal: Response | None = None
        """The answer to send, if the body was cut off before the route had answered."""

    async def receive(self) -> Message:
        if not self._reading:
            return await self._receive()
        refusal = None
        while refusal is None:
            try:
                async with asyncio.timeout_at(self._ends_at if self._check_at is None else self._check_at):
                    message = await self._receive()
                self._reading = message.get("more_body", False)
                return message
            except TimeoutError:
                refusal = _too_slow(self._within_s) if self._check_at is None else await _refusal(self._scope)
                self._check_at = None
        self.refusal = None if self._answered else refusal
        self._reading = False
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self._answered = True
        if self.refusal is None:
            await self._send(message)


async def _refusal(scope: Scope) -> Response | None:
    """Return the answer to a caller without a valid token, or None if the token is valid."""
    try:
        await provided(scope, Authentication).identify(HTTPConnection(scope))
    except ApiProblem as refusal:
        return refused(refusal)
    return None


def _too_slow(within_s: float) -> Response:
    return problem(408, "request_timeout", f"the request's body was not complete after {within_s:g} s: send it again")


def declared_length(scope: Scope) -> int | None:
    """Return the length of a request's body in bytes by its headers, or None if they give none (chunked)."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0
