"""A proxy between the manager and its clients, which may be killed at each request that changes something."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import httpx

AWAY_S = 0.2
"""Seconds until the proxy runs again after it was killed."""
ANY_INSTANT_S = 0.01
"""Seconds from forwarding a request until the proxy is killed: during the effects of the request."""

_ONE = re.compile(r"(?<=/rentals/|/workers/)[^/]+|(?<=/tokens/)[^/]+")


class CrashingProxy(httpx.AsyncBaseTransport):
    """A transport with three crash points for each request: before it is forwarded, during it, and before its answer.

    When the proxy dies, all other requests in progress are broken off as well.
    """

    def __init__(self, is_last: Callable[[str], bool]) -> None:
        self._is_last = is_last
        self._inner = httpx.AsyncHTTPTransport()
        self._in_flight: set[asyncio.Task[httpx.Response]] = set()
        self._back_at = 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if time.monotonic() < self._back_at:
            raise httpx.ConnectError("the proxy does not run")
        name = described(request)
        if name and self._is_last(f"the proxy before {name}"):
            self._die()
            raise httpx.ConnectError("the proxy does not run")
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
            raise httpx.ReadError("the proxy closed the connection")
        if name and self._is_last(f"the proxy after {name}"):
            self._die()
            raise httpx.ReadError("the proxy closed the connection")
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
    """Return the method and the route of a request, or an empty string for one that only reads."""
    if request.method == "GET":
        return ""
    return f"{request.method} {_ONE.sub('one', request.url.path)}"
