"""A renter's connection to a rental of the harness: the real route, with sockets in place of a worker's sshd."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from support.harness import PROXY_SECRET, Harness

from orion.manager.gateway.relay import SshStream
from orion.manager.ssh.port import Host


@dataclass
class Sshds:
    """The connections, in order: each worker's host, and sshd's end of the socket."""

    connected: list[tuple[Host, socket.socket]] = field(default_factory=list)

    async def connect(self, host: Host) -> SshStream:
        ours, its = socket.socketpair()
        its.setblocking(False)
        self.connected.append((host, its))
        reader, writer = await asyncio.open_connection(sock=ours)
        return SshStream(reader=reader, writer=writer)

    def close(self) -> None:
        for _, its in self.connected:
            its.close()


@dataclass
class Client:
    """The client of a WebSocket, as the server sees it."""

    said: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    heard: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    serving: asyncio.Task[None] | None = None

    async def hears(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.heard.get(), 20)

    async def is_in(self) -> bool:
        return (await self.hears())["type"] == "websocket.accept"

    async def refusal(self) -> dict[str, Any]:
        """Return the problem that the client got in place of a WebSocket."""
        start, body = await self.hears(), await self.hears()
        assert start["type"] == "websocket.http.response.start", start
        assert (b"content-type", b"application/problem+json") in start["headers"]
        problem: dict[str, Any] = json.loads(body["body"])
        assert problem["status"] == start["status"]
        return problem

    async def leave(self) -> None:
        self.said.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await self.ended()

    async def ended(self) -> None:
        assert self.serving
        await asyncio.wait_for(asyncio.shield(self.serving), 20)


def coming_in(harness: Harness, rental_id: str, token: str, query: str = "") -> AbstractAsyncContextManager[Client]:
    return connecting(harness, f"/api/rentals/{rental_id}/ssh", {"authorization": f"Bearer {token}"}, query=query)


@asynccontextmanager
async def connecting(
    harness: Harness, path: str, headers: dict[str, str], subprotocols: Sequence[str] = (), query: str = ""
) -> AsyncIterator[Client]:
    """Open a WebSocket of the harness as through the proxy."""
    client = Client()
    client.said.put_nowait({"type": "websocket.connect"})
    headers = {"x-orion-proxy-secret": PROXY_SECRET, "x-real-ip": "198.51.100.7"} | headers
    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "subprotocols": list(subprotocols),
        "extensions": {"websocket.http.response": {}},
    }

    async def send(message: dict[str, Any]) -> None:
        client.heard.put_nowait(message)

    client.serving = asyncio.create_task(harness.app(scope, client.said.get, send))  # type: ignore[arg-type]
    try:
        yield client
    finally:
        client.serving.cancel()
        await asyncio.gather(client.serving, return_exceptions=True)
