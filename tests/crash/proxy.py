"""The proxy between the manager and everybody else, which may be killed at each request that changes something."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import httpx

AWAY_S = 0.2
"""Until it is there again."""
ANY_INSTANT_S = 0.01
"""After a request went on: somewhere in the middle of what it brings about."""

_ONE = re.compile(r"(?<=/rentals/|/workers/)[^/]+|(?<=/tokens/)[^/]+")


class PointedDoor(httpx.AsyncBaseTransport):
    """A request is three points: nothing of it went on; it went on and both sides were hung up on; its answer is lost.

    When it dies, whatever else is on its way through it is broken off as well.
    """

    def __init__(self, is_last: Callable[[str], bool]) -> None:
        self._is_last = is_last
        self._inner = httpx.AsyncHTTPTransport()
        self._in_flight: set[asyncio.Task[httpx.Response]] = set()
        self._back_at = 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if time.monotonic() < self._back_at:
            raise httpx.ConnectError("the proxy is away")
        name = described(request)
        if name and self._is_last(f"the proxy before {name}"):
            self._die()
            raise httpx.ConnectError("the proxy is away")
        sending = asyncio.create_task(self._send(request))
        self._in_flight.add(sending)
        try:
            if name and self._is_last(f"the proxy during {name}"):
                await asyncio.wait((sending,), timeout=ANY_INSTANT_S)
                self._die()
            await asyncio.wait((sending,))
        finally:
            sending.cancel()
            self._in_flight.discard(sending)
        if sending.cancelled():
            raise httpx.ReadError("the proxy hung up")
        if name and self._is_last(f"the proxy after {name}"):
            self._die()
            raise httpx.ReadError("the proxy hung up")
        return sending.result()

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        await response.aread()
        return response

    def _die(self) -> None:
        self._back_at = time.monotonic() + AWAY_S
        for sending in self._in_flight:
            sending.cancel()


def described(request: httpx.Request) -> str:
    """A request by its method and its route; empty for one that only reads."""
    if request.method == "GET":
        return ""
    return f"{request.method} {_ONE.sub('one', request.url.path)}"
