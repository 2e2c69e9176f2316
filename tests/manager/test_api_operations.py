"""Tokens, events and the status of the platform, over the API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Message
from support.harness import PROXY_SECRET, Harness
from test_api_access import is_problem

from orion import wire
from orion.manager.domain.steps import Event
from orion.manager.store.database import record
from orion.manager.store.events import BATCH


async def say(harness: Harness, *kinds: str, owner: str | None = None, **ids: str) -> None:
    for kind in kinds:
        await harness.store.write(record, Event(kind=kind, actor="somebody", reason="because", owner=owner, **ids))


@asynccontextmanager
async def stream(harness: Harness, token: str, query: str = "", **headers: str) -> AsyncIterator[asyncio.Queue[str]]:
    """Give the lines of a live stream as they arrive, over ASGI: httpx's transport waits for the end of a reply."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    sent = {"accept": "text/event-stream", "authorization": f"Bearer {token}", "x-orion-proxy-secret": PROXY_SECRET}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/api/events",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
    }

    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        for line in message.get("body", b"").decode().splitlines():
            if line:
                await lines.put(line)

    serving = asyncio.create_task(harness.app(scope, receive, send))
    try:
        yield lines
    finally:
        gone.set()
        await asyncio.wait_for(serving, 20)


async def next_event(lines: asyncio.Queue[str]) -> tuple[int, str, wire.Event]:
    parts = [(await asyncio.wait_for(lines.get(), 20)).split(": ", 1) for _ in range(3)]
    assert [name for name, _ in parts] == ["id", "event", "data"]
    return int(parts[0][1]), parts[1][1], wire.Event.model_validate_json(parts[2][1])


async def test_a_token_is_shown_once_and_listed_without_its_secret(harness: Harness) -> None:
    reply = await harness.as_admin.post("/api/tokens", json={"name": "bob"})
    assert reply.status_code == 201
    made = wire.TokenReply.model_validate(reply.json())
    assert (made.name, made.role, made.expires_at, made.revoked_at) == ("bob", "client", None, None)
    assert (await harness.client(made.token).get("/api/status")).status_code == 200
    listed = await harness.as_admin.get("/api/tokens")
    assert made.id in {token["id"] for token in listed.json()["items"]}
    assert made.token[-43:] not in listed.text
    assert "hash" not in listed.text


async def test_a_token_may_expire_and_its_holder_learns_the_reason(harness: Harness) -> None:
    made = (await harness.as_admin.post("/api/tokens", json={"name": "bob", "ttl_s": 60})).json()
    assert made["expires_at"] is not None
    harness.clock.now += 60
    refused = is_problem(await harness.client(made["token"]).get("/api/status"), 401, "unauthorized")
    assert refused["detail"].startswith("the time of this token is over")


@pytest.mark.parametrize("end", ["wrong", "gone"])
async def test_a_part_of_a_token_reveals_nothing_about_it(harness: Harness, end: str) -> None:
    made = (await harness.as_admin.post("/api/tokens", json={"name": "bob"})).json()
    if end == "gone":
        await harness.as_admin.delete(f"/api/tokens/{made['id']}")
    guessed = made["token"][:-43] + "A" * 43
    refused = is_problem(await harness.client(guessed).get("/api/status"), 401, "unauthorized")
    assert refused["detail"].startswith("this token is not known here")


async def test_a_refusal_without_a_token_names_no_command_of_operators(harness: Harness) -> None:
    for sent in ("", "Bearer", "Basic eDp5", "Bearer two words"):
        reply = await harness.client("x").get("/api/status", headers={"Authorization": sent})
        refused = is_problem(reply, 401, "unauthorized")
        assert "Ask the operator of this platform" in refused["detail"]
        assert "make" not in refused["detail"]


async def test_a_revoked_token_is_refused_and_revoking_is_repeatable(harness: Harness) -> None:
    made = (await harness.as_admin.post("/api/tokens", json={"name": "bob"})).json()
    for _ in range(2):
        assert (await harness.as_admin.delete(f"/api/tokens/{made['id']}")).status_code == 204
    refused = is_problem(await harness.client(made["token"]).get("/api/status"), 401, "unauthorized")
    assert refused["detail"].startswith("this token was revoked. Ask the operator of this platform")
    is_problem(await harness.as_admin.delete("/api/tokens/never"), 404, "not_found")
    assert [e["kind"] for e in await harness.events("token.")] == ["token.created", "token.revoked"]


async def test_a_worker_can_register_with_a_new_join_token(harness: Harness) -> None:
    made = (await harness.as_admin.post("/api/tokens", json={"name": "rack-2", "role": "join"})).json()
    agent = harness.new_agent()
    agent.token = made["token"]
    assert (await agent.register()).status_code == 201
    assert agent.token != made["token"]


async def test_tokens_are_listed_in_pages(harness: Harness) -> None:
    made = {(await harness.as_admin.post("/api/tokens", json={"name": "bob"})).json()["id"] for _ in range(3)}
    seen: list[str] = []
    after = ""
    while after is not None:
        page = (
            await harness.as_admin.get("/api/tokens", params={"limit": 2} | ({"after": after} if after else {}))
        ).json()
        seen += [token["id"] for token in page["items"]]
        after = page["next"]
    assert seen == sorted(made | {"admin", "join"})


async def test_events_come_in_order_in_pages(harness: Harness) -> None:
    await say(harness, *(f"test.number_{number}" for number in range(5)))
    first = (await harness.as_admin.get("/api/events?limit=3")).json()
    second = (await harness.as_admin.get(f"/api/events?limit=3&after={first['next']}")).json()
    assert [e["kind"][-1] for e in first["items"] + second["items"]] == list("01234")
    assert second["next"] is None
    wire.Event.model_validate(first["items"][0])


async def test_events_come_in_pages_from_the_end(harness: Harness) -> None:
    await say(harness, *(f"test.number_{number}" for number in range(5)), owner="alice")
    await say(harness, "test.others")
    alice = await harness.new_client("alice")
    first = (await alice.get("/api/events?newest_first=true&limit=3")).json()
    second = (await alice.get(f"/api/events?newest_first=true&limit=3&after={first['next']}")).json()
    assert [e["kind"][-1] for e in first["items"] + second["items"]] == list("43210")
    assert second["next"] is None


async def remove(harness: Harness, number: int) -> None:
    """Have the oldest events removed until this many are left."""
    harness.manager.retention._kept = number
    await harness.manager.retention.round()


def write_many(connection: Any) -> None:
    record(
        connection,
        *(Event(kind=f"test.n{number}", actor="somebody", reason="because") for number in range(2 * BATCH + 50)),
    )


async def test_the_oldest_events_are_removed_in_batches_and_that_is_an_event(harness: Harness) -> None:
    await harness.store.write(write_many)
    await remove(harness, BATCH + 50)
    (removed,) = await harness.events("events.removed")
    assert (removed["actor"], removed["owner"]) == ("retention", None)
    assert removed["details"] == {"up_to": BATCH, "number": BATCH}
    left = await harness.events()
    assert left[0]["id"] == removed["details"]["up_to"] + 1
    assert len(left) == BATCH + 51
    await remove(harness, BATCH + 50)
    assert await harness.events() == left, "less than a batch too many stays, because a removal is an event itself"


async def test_a_long_list_of_old_events_is_removed_batch_by_batch(harness: Harness) -> None:
    await harness.store.write(write_many)
    await remove(harness, 10)
    assert len(await harness.events("events.removed")) == 2
    await remove(harness, 10_000)
    assert len(await harness.events("events.removed")) == 2


async def test_a_request_for_removed_events_names_them_and_continues_after_them(harness: Harness) -> None:
    await harness.store.write(write_many)
    await remove(harness, BATCH + 50)
    first = (await harness.events())[0]["id"]
    page = (await harness.as_admin.get("/api/events?after=5&limit=2")).json()
    missed, following = (wire.Event.model_validate(item) for item in page["items"])
    assert (missed.kind, missed.id, following.id) == ("events.missed", first - 1, first)
    assert f"the events from number 6 to {first - 1} were removed" in missed.reason
    going_on = (await harness.as_admin.get(f"/api/events?after={missed.id}&limit=1")).json()
    assert going_on["items"][0]["id"] == first
    assert (await harness.as_admin.get("/api/events?limit=1")).json()["items"][0]["id"] == first, (
        "a client that asks for all"
    )


async def test_a_stream_that_resumes_before_the_oldest_event_is_notified_and_misses_nothing_else(
    harness: Harness,
) -> None:
    await harness.store.write(write_many)
    await remove(harness, BATCH + 50)
    kept = [event["id"] for event in await harness.events()]
    assert len(kept) > wire.MAX_PAGE, "after a full page the next one is read"
    async with stream(harness, harness.secrets.admin_token, last_event_id="5") as lines:
        number, kind, _ = await next_event(lines)
        assert (number, kind) == (kept[0] - 1, "events.missed")
        assert [(await next_event(lines))[0] for _ in kept] == kept


async def test_a_stream_goes_on_while_events_that_it_has_sent_are_removed(harness: Harness) -> None:
    await harness.store.write(write_many)
    async with stream(harness, harness.secrets.admin_token, last_event_id=str(2 * BATCH + 40)) as lines:
        resumed = [await next_event(lines) for _ in range(10)]
        await remove(harness, 10)
        await say(harness, "test.afterwards")
        after = [await next_event(lines) for _ in range(3)]
    numbers = [number for number, _, _ in resumed + after]
    assert numbers == list(range(numbers[0], numbers[0] + 13))
    assert [kind for _, kind, _ in after] == ["events.removed", "events.removed", "test.afterwards"]


async def test_a_client_reads_the_events_of_its_own_rentals_alone(harness: Harness) -> None:
    alice = await harness.new_client("alice")
    await say(harness, "rental.queued", owner="alice", rental_id="hers")
    await say(harness, "rental.queued", owner="bob", rental_id="his")
    await say(harness, "worker.registered", worker_id="w-1")
    seen = (await alice.get("/api/events")).json()["items"]
    assert [e["rental_id"] for e in seen] == ["hers"]
    assert (await alice.get("/api/events?rental_id=his")).json()["items"] == []


@pytest.mark.parametrize(
    ("query", "found"), [("rental_id=r1", ["a"]), ("worker_id=w1", ["a", "b"]), ("", ["a", "b", "c"])]
)
async def test_events_are_filtered_by_rental_and_by_worker(harness: Harness, query: str, found: list[str]) -> None:
    await say(harness, "a", rental_id="r1", worker_id="w1")
    await say(harness, "b", rental_id="r2", worker_id="w1")
    await say(harness, "c")
    assert [e["kind"] for e in (await harness.as_admin.get(f"/api/events?{query}")).json()["items"]] == found


async def test_a_stream_sends_past_and_new_events(harness: Harness) -> None:
    await say(harness, "test.before")
    async with stream(harness, harness.secrets.admin_token) as lines:
        number, kind, event = await next_event(lines)
        assert (kind, event.kind, event.id) == ("test.before", "test.before", number)
        await say(harness, "test.after")
        assert (await next_event(lines))[:2] == (number + 1, "test.after")


async def test_a_stream_resumes_after_its_last_event(harness: Harness) -> None:
    await say(harness, "test.one", "test.two", "test.three")
    async with stream(harness, harness.secrets.admin_token, last_event_id="1") as lines:
        assert [(await next_event(lines))[1] for _ in range(2)] == ["test.two", "test.three"]
    async with stream(harness, harness.secrets.admin_token, "after=2") as lines:
        assert (await next_event(lines))[1] == "test.three"


@pytest.mark.parametrize("number", ["rubbish", "", "-1", "9" * 20])
async def test_a_stream_that_resumes_from_an_invalid_id_is_harmless(harness: Harness, number: str) -> None:
    await say(harness, "test.one")
    async with stream(harness, harness.secrets.admin_token, last_event_id=number) as lines:
        assert (await next_event(lines))[1] == "test.one"


async def test_a_client_s_stream_has_no_events_of_others(harness: Harness) -> None:
    made = (await harness.as_admin.post("/api/tokens", json={"name": "alice"})).json()
    await say(harness, "test.his", owner="bob")
    await say(harness, "test.hers", owner="alice")
    async with stream(harness, made["token"]) as lines:
        assert (await next_event(lines))[1] == "test.hers"


async def test_a_stream_that_lags_behind_misses_nothing(harness: Harness) -> None:
    def many(connection: Any) -> None:
        record(
            connection,
            *(
                Event(kind=f"test.n{number}", actor="somebody", reason="because")
                for number in range(wire.MAX_PAGE + 20)
            ),
        )

    await harness.store.write(many)
    async with stream(harness, harness.secrets.admin_token) as lines:
        seen = [(await next_event(lines))[0] for _ in range(wire.MAX_PAGE + 20)]
    assert seen == list(range(1, wire.MAX_PAGE + 21))


async def test_the_status_counts_workers_rentals_and_slots_and_shows_the_brake(harness: Harness) -> None:
    await harness.join(slots=2)
    await harness.rent()
    reply = await harness.as_admin.get("/api/status")
    status = wire.Status.model_validate(reply.json())
    assert (status.workers, status.rentals) == ({"ready": 1}, {"active": 1})
    assert (status.slots, status.slots_free) == (2, 1)
    assert status.brake == "the manager has just started"
    harness.end_the_brake_of_the_start()
    assert json.loads((await harness.as_admin.get("/api/status")).text)["brake"] is None
