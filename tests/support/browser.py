"""The page's end of a browser terminal in the house, with scripted shells in the place of workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from support.house import House
from support.way_in import Client, connecting

from orion.manager.fakes.shell import FakeShell


async def ticket(client: httpx.AsyncClient, rental_id: str) -> str:
    reply = await client.post(f"/api/rentals/{rental_id}/terminal")
    assert reply.status_code == 201, reply.text
    return str(reply.json()["ticket"])


class Page:
    def __init__(self, client: Client) -> None:
        self.client = client

    def types(self, data: bytes) -> None:
        self.client.said.put_nowait({"type": "websocket.receive", "bytes": data})

    def controls(self, text: str | None = None, **said: Any) -> None:
        self.client.said.put_nowait({"type": "websocket.receive", "text": json.dumps(said) if text is None else text})

    async def sees(self, state: str) -> str:
        """The next control is that state; its message."""
        told = await self.told()
        assert told["state"] == state, told
        return str(told["message"])

    async def told(self) -> dict[str, Any]:
        message = await self.client.hears()
        assert message["type"] == "websocket.send", message
        told: dict[str, Any] = json.loads(message["text"])
        return told

    async def shown(self) -> bytes:
        message = await self.client.hears()
        assert "bytes" in message, message
        return bytes(message["bytes"])

    async def is_closed(self) -> tuple[int, str]:
        """With which code; and the last word before it."""
        words = await self.sees("ended")
        message = await self.client.hears()
        assert message["type"] == "websocket.close", message
        assert message["reason"] == words[:100]
        await self.client.ended()
        return message["code"], words


@asynccontextmanager
async def opening(house: House, rental_id: str, by: str, query: str = "", **headers: str) -> AsyncIterator[Page]:
    """Open a WebSocket by that ticket or resume key."""
    path = f"/api/rentals/{rental_id}/terminal"
    async with connecting(house, path, headers, ("orion.terminal", by), query) as client:
        yield Page(client)


async def is_connected(page: Page) -> dict[str, Any]:
    """Wait until the page has its shell; return what it is told then."""
    assert await page.client.is_in()
    await page.sees("connecting")
    told = await page.told()
    assert told["state"] == "connected", told
    return told


@asynccontextmanager
async def terminal(house: House, rental_id: str) -> AsyncIterator[tuple[Page, FakeShell]]:
    """Of the admin, with its first shell."""
    async with opening(house, rental_id, await ticket(house.as_admin, rental_id)) as page:
        accepted = await page.client.hears()
        assert (accepted["type"], accepted["subprotocol"]) == ("websocket.accept", "orion.terminal")
        await page.sees("connecting")
        await page.sees("connected")
        yield page, house.shells.opened[-1]


async def turns(until: Callable[[], Any], what: str) -> None:
    """Of the event loop: nothing here waits for anything else."""
    for _ in range(10_000):
        if until():
            return
        await asyncio.sleep(0)
    raise AssertionError(f"it does not come to it: {what}")
