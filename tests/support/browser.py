"""The page of a browser terminal in the harness, with scripted shells in place of workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from support.harness import Harness
from support.way_in import Client, connecting

from orion.manager.fakes.shell import FakeShell


async def ticket(client: httpx.AsyncClient, rental_id: str) -> str:
    reply = await client.post(f"/api/rentals/{rental_id}/terminal")
    assert reply.status_code == 201, reply.text
    return str(reply.json()["ticket"])


class Page:
    """The page: its input, its controls and the answers that it gets."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def types(self, data: bytes) -> None:
        self.client.said.put_nowait({"type": "websocket.receive", "bytes": data})

    def controls(self, text: str | None = None, **fields: Any) -> None:
        self.client.said.put_nowait({"type": "websocket.receive", "text": json.dumps(fields) if text is None else text})

    async def sees(self, state: str) -> str:
        """Return the message of the next control, which must be of this state."""
        control = await self.control()
        assert control["state"] == state, control
        return str(control["message"])

    async def control(self) -> dict[str, Any]:
        message = await self.client.hears()
        assert message["type"] == "websocket.send", message
        control: dict[str, Any] = json.loads(message["text"])
        return control

    async def shown(self) -> bytes:
        message = await self.client.hears()
        assert "bytes" in message, message
        return bytes(message["bytes"])

    async def is_closed(self) -> tuple[int, str]:
        """Return the close code, and the message of the last control."""
        words = await self.sees("ended")
        message = await self.client.hears()
        assert message["type"] == "websocket.close", message
        assert message["reason"] == words[:100]
        await self.client.ended()
        return message["code"], words


@asynccontextmanager
async def opening(harness: Harness, rental_id: str, by: str, query: str = "", **headers: str) -> AsyncIterator[Page]:
    """Open a WebSocket by a ticket or a resume key."""
    path = f"/api/rentals/{rental_id}/terminal"
    async with connecting(harness, path, headers, ("orion.terminal", by), query) as client:
        yield Page(client)


async def is_connected(page: Page) -> dict[str, Any]:
    """Wait until the page has its shell; return the control that says so."""
    assert await page.client.is_in()
    await page.sees("connecting")
    control = await page.control()
    assert control["state"] == "connected", control
    return control


@asynccontextmanager
async def terminal(harness: Harness, rental_id: str) -> AsyncIterator[tuple[Page, FakeShell]]:
    """Open a terminal of the admin, and give it with its first shell."""
    async with opening(harness, rental_id, await ticket(harness.as_admin, rental_id)) as page:
        accepted = await page.client.hears()
        assert (accepted["type"], accepted["subprotocol"]) == ("websocket.accept", "orion.terminal")
        await page.sees("connecting")
        await page.sees("connected")
        yield page, harness.shells.opened[-1]


async def turns(until: Callable[[], Any], what: str) -> None:
    """Run the event loop until a condition holds."""
    for _ in range(10_000):
        if until():
            return
        await asyncio.sleep(0)
    raise AssertionError(f"it does not happen: {what}")
