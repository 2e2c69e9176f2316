"""All that a token opened ends with the token: at its revocation, and at the end of its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.types import Message
from support.harness import PROXY_SECRET, Harness
from support.short_tokens import SOON_S, Short
from support.way_in import Sshds, coming_in

from orion.manager.api.snapshots import SnapshotServices
from orion.manager.gateway.relay import TOKEN_OVER
from orion.manager.gateway.token_lifetime import TokenUse
from orion.manager.store import tokens

WITHIN_S = 20.0


def open_now(harness: Harness) -> list[TokenUse]:
    return [opening for its in harness.manager.token_uses._open.values() for opening in its]


class Reply:
    """A reply over ASGI, whose reader can stop reading."""

    def __init__(self, harness: Harness, path: str, token: str, query: str = "", reads: bool = True) -> None:
        self.status = 0
        self.body = b""
        self.reads = reads
        self.something = asyncio.Event()
        sent = {"accept": "text/event-stream", "authorization": f"Bearer {token}", "x-orion-proxy-secret": PROXY_SECRET}
        headers = [(name.encode(), value.encode()) for name, value in sent.items()]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": headers}
        self.serving = asyncio.create_task(harness.app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
        if message.get("body"):
            self.something.set()
            if not self.reads:
                await asyncio.Event().wait()

    async def is_over(self) -> bytes:
        async with asyncio.timeout(WITHIN_S):
            await self.serving
        return self.body


@pytest.mark.parametrize("reads", [True, False], ids=["a reader", "who takes nothing"])
async def test_a_stream_of_events_ends_and_shows_nothing_that_comes_later(
    harness: Harness, short: Short, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orion.manager.gateway.token_lifetime.LAST_CHUNK_TIMEOUT_S", 0.05)
    stream = Reply(harness, "/api/events", await short.begins(), reads=reads)
    async with asyncio.timeout(WITHIN_S):
        await stream.something.wait()
    await short.ends()
    before = await stream.is_over()
    await harness.new_client("later")
    assert b"for later" not in stream.body
    assert stream.body == before
    assert before.endswith(b": the token is over\n\n")


async def test_another_tokens_stream_goes_on(harness: Harness) -> None:
    other = Short(harness, ends_by_itself=False)
    stream = Reply(harness, "/api/events", await other.begins())
    await harness.new_client("alice")
    await harness.revoke("alice")
    await harness.new_client("later")
    while b"for later" not in stream.body:
        stream.something.clear()
        await asyncio.wait_for(stream.something.wait(), WITHIN_S)
    stream.serving.cancel()


CALLS: dict[str, Callable[[httpx.AsyncClient, str], Awaitable[httpx.Response]]] = {
    "rent": lambda client, _: client.post("/api/rent", json={"wait_s": 50}),
    "show": lambda client, rental: client.get(f"/api/rentals/{rental}", params={"state": "active", "wait_s": 50}),
    "release": lambda client, rental: client.delete(f"/api/rentals/{rental}", params={"wait_s": 50}),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_waits_is_answered_at_once_with_401(harness: Harness, short: Short, call: str) -> None:
    await harness.join()
    rental = await harness.rent()
    waits_for = await harness.rent() if call == "show" else rental
    waiting = asyncio.create_task(CALLS[call](harness.client(await short.begins()), waits_for["id"]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    await short.ends()
    reply = await asyncio.wait_for(waiting, WITHIN_S)
    assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")


async def test_a_session_ends_and_says_why(harness: Harness, sshds: Sshds, short: Short) -> None:
    await harness.join()
    rental = await harness.rent()
    async with coming_in(harness, rental["id"], await short.begins()) as client:
        assert await client.is_in()
        await short.ends()
        ending = await client.hears()
        assert (ending["code"], ending["reason"]) == (TOKEN_OVER, short.reason)
        await client.ended()


async def test_a_session_that_waits_is_refused_at_once(harness: Harness, sshds: Sshds, short: Short) -> None:
    waiting = await harness.rent()
    async with coming_in(harness, waiting["id"], await short.begins(), "wait_s=50") as client:
        await short.ends()
        assert (await client.refusal())["status"] == 401
    assert sshds.connected == []


async def test_a_download_of_a_backup_ends_with_its_token(harness: Harness, short: Short) -> None:
    """The reply has a length, so a part of it is not taken for the whole."""
    reply = Reply(harness, "/api/admin/backup", await short.begins(), reads=False)
    async with asyncio.timeout(WITHIN_S):
        await reply.something.wait()
    await short.ends()
    assert b"the token is over" not in await reply.is_over()


async def test_a_restore_is_refused_if_its_token_ends_during_the_first_snapshot(harness: Harness, short: Short) -> None:
    await harness.join()
    rental = await harness.rent()
    copying, copied = asyncio.Event(), asyncio.Event()

    async def copy_now(*_: object) -> str:
        copying.set()
        await copied.wait()
        return ""

    harness.change_services(SnapshotServices, snapshot_now=copy_now)
    client = harness.client(await short.begins())
    restoring = asyncio.create_task(client.post(f"/api/rentals/{rental['id']}/restore", json={"empty": True}))
    await asyncio.wait_for(copying.wait(), WITHIN_S)
    await short.ends()
    _, waiting = await asyncio.wait([opening.over for opening in open_now(harness)], timeout=WITHIN_S)
    assert not waiting
    assert (await client.get("/api/rentals")).status_code == 401
    copied.set()
    assert (await restoring).status_code == 401
    assert not await harness.events("rental.restore")


async def test_a_clock_that_was_corrected_meanwhile_decides_when_a_tokens_time_is_over(harness: Harness) -> None:
    """A timer runs by another clock than the token, so at its end the time is checked again."""
    wall = 1000.0
    harness.manager.token_uses._wall = lambda: wall
    principal = tokens.Principal(role="client", id="x", name="x", mark="", expires_at=1000.0 + SOON_S)
    opening: TokenUse = TokenUse()
    timer: list[asyncio.TimerHandle] = []
    harness.manager.token_uses._end_in_time(opening, principal.expires_at or 0.0, timer)
    wall = 900.0
    await asyncio.sleep(SOON_S * 2)
    assert not opening.over.done()
    timer[0].cancel()
