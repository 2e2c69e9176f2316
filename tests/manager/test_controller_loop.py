"""The loop that runs rounds, the proxy probe, and the expiry of rentals."""

from __future__ import annotations

import asyncio
from datetime import datetime

import httpx
import pytest
from support.harness import Harness

from orion.manager.controllers.expiry import COUNT_EVERY
from orion.manager.controllers.loop import Loop
from orion.manager.controllers.proxy_probe import ProxyProbe
from orion.manager.domain.expiry import NEAR_S, SETTLE_S

NEVER_S = 3600.0


async def until(condition: asyncio.Event) -> None:
    await asyncio.wait_for(condition.wait(), 60)


async def test_a_hint_brings_the_next_round_forward() -> None:
    rounds: list[int] = []
    ran = asyncio.Event()

    async def once() -> None:
        rounds.append(len(rounds))
        ran.set()

    loop = Loop("test", NEVER_S, once)
    running = asyncio.create_task(loop.run())
    for number in (1, 2, 3):
        await until(ran)
        assert len(rounds) == number
        ran.clear()
        loop.hint()
    running.cancel()


async def test_a_hint_during_a_round_is_not_lost() -> None:
    ran, twice = asyncio.Event(), asyncio.Event()

    async def once() -> None:
        if ran.is_set():
            twice.set()
        else:
            loop.hint()
            ran.set()

    loop = Loop("test", NEVER_S, once)
    running = asyncio.create_task(loop.run())
    await until(twice)
    running.cancel()


async def test_a_round_that_fails_is_counted_and_the_next_one_comes() -> None:
    went_well = asyncio.Event()
    failures: list[int] = []

    async def once() -> None:
        failures.append(loop.failures)
        if len(failures) < 3:
            loop.hint()
            raise RuntimeError("a bad moment")
        went_well.set()

    loop = Loop("test", NEVER_S, once)
    running = asyncio.create_task(loop.run())
    await until(went_well)
    await asyncio.sleep(0)
    assert failures == [0, 1, 2]
    assert loop.failures == 0
    running.cancel()


@pytest.mark.parametrize(
    ("reply", "is_open"), [("HTTP/1.1 200 OK", True), ("HTTP/1.1 502 Bad Gateway", False), ("", False)]
)
async def test_the_proxy_counts_as_reachable_when_the_manager_reaches_itself_through_it(
    reply: str, is_open: bool
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{reply}\r\nContent-Length: 0\r\n\r\n".encode() if reply else b"")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        probe = ProxyProbe(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/healthz", 60, 1)
        await probe.ask()
        assert probe.answers is is_open
        await probe.close()


async def test_a_proxy_that_answers_too_late_is_unreachable_until_it_answers_in_time() -> None:
    slow = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if slow.is_set():
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()
        else:
            await slow.wait()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        probe = ProxyProbe(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/healthz", 0.05, 1)
        await probe.ask()
        assert not probe.answers
        slow.set()
        probe._client.timeout = httpx.Timeout(60)
        await probe.ask()
        assert probe.answers
        await probe.close()


async def test_a_rental_expires_when_its_time_is_over_and_its_worker_is_cleaned(harness: Harness) -> None:
    agent = await harness.join()
    rental = await harness.rent(ttl_s=60)
    await harness.pass_time(59)
    await harness.manager.expiry.round()
    assert (await harness.rental(rental["id"]))["state"] == "active"
    await harness.pass_time(1)
    await harness.manager.expiry.round()
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "expired"
    assert agent.node.accounts == {}


async def test_a_queued_rental_does_not_use_up_its_time(harness: Harness) -> None:
    rental = await harness.rent(ttl_s=60)
    await harness.pass_time(120)
    await harness.manager.expiry.round()
    assert (await harness.rental(rental["id"]))["state"] == "queued"


async def test_after_a_small_jump_of_the_clock_no_rental_expires_until_it_has_run_evenly(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(ttl_s=60)
    harness.clock.wall_offset += NEAR_S - 1
    await harness.manager.expiry.round()
    harness.clock.now += SETTLE_S - 1
    await harness.manager.expiry.round()
    assert (await harness.rental(rental["id"]))["state"] == "active"
    harness.clock.now += 1
    await harness.manager.expiry.round()
    assert (await harness.rental(rental["id"]))["state"] == "releasing"


async def doubted(harness: Harness) -> str | None:
    found: str | None = (await harness.as_admin.get("/api/status")).json()["clock"]
    metric = (await harness.as_admin.get("/metrics")).text
    assert f"orion_clock_believed {float(found is None)}" in metric
    return found


@pytest.mark.parametrize("begins", [False, True], ids=["it jumps", "the manager begins with it"])
async def test_a_clock_that_is_far_ahead_ends_nothing_until_an_operator_confirms_it(
    harness: Harness, begins: bool
) -> None:
    """A jump of forty days: no rental expires, expired ones keep their snapshots, and events tell of the doubt."""
    await harness.join(slots=2)
    over, rental = await harness.rent(ttl_s=60), await harness.rent(ttl_s=3600)
    home = harness.snapshot_service
    await harness.manager.snapshots.take_now(over["id"], None)
    await harness.pass_time(60)
    await harness.manager.expiry.round()
    await harness.settle()
    assert (await harness.rental(over["id"]))["state"] == "expired"
    assert over["id"] in await home.rentals()
    harness.clock.wall_offset += 40 * 86_400
    if begins:
        await harness.restart()
    await harness.manager.expiry.round()
    await harness.manager.snapshots._sweep()
    await harness.settle()
    for _ in range(10):
        harness.clock.now += SETTLE_S
        await harness.manager.expiry.round()
        await harness.manager.snapshots._sweep()
    assert (await harness.rental(rental["id"]))["state"] != "releasing"
    assert over["id"] in await home.rentals()
    reasons = await doubted(harness)
    assert reasons is not None
    assert "40.0 days ahead" in reasons
    assert "orion admin confirm-clock" in reasons
    assert len(await harness.events("manager.clock_doubted")) == 1
    assert (await (await harness.new_client("alice")).post("/api/admin/clock")).status_code == 403

    for _ in range(2):
        assert (await harness.as_admin.post("/api/admin/clock")).json() == {"problem": None}
    assert await doubted(harness) is None
    assert [(e["actor"]) for e in await harness.events("manager.clock_confirmed")] == ["admin"]
    await harness.manager.expiry.round()
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] in {"releasing", "expired"}
    await harness.restart()
    assert await doubted(harness) is None, "the next manager knows of the confirmation"


async def opens(client: httpx.AsyncClient) -> bool:
    return (await client.get("/api/rentals")).status_code == 200


async def rents(client: httpx.AsyncClient, key: str) -> str:
    """Rent with this idempotency key; return the id of the rental that was made now or earlier."""
    reply = await client.post("/api/rent", json={"wait_s": 0}, headers={"Idempotency-Key": key})
    return str(reply.json()["id"])


@pytest.mark.parametrize("begins", [False, True], ids=["it jumps", "the manager begins with it"])
async def test_a_clock_that_is_far_ahead_expires_no_token_and_no_idempotency_key(
    harness: Harness, begins: bool
) -> None:
    """Tokens end by the last trusted time, carried on, until an operator confirms the new one."""
    alice, bob = await harness.new_client("alice", ttl_s=3600), await harness.new_client("bob", ttl_s=30 * 86_400)
    made = await rents(bob, "key-1")
    harness.clock.wall_offset += 40 * 86_400
    if begins:
        await harness.restart()
    await harness.manager.expiry.round()
    await harness.manager.retention.round()
    assert await opens(alice)
    assert await opens(bob)
    assert await rents(bob, "key-1") == made
    harness.clock.now += 3600
    assert not await opens(alice), "its time is over by the trusted clock"
    made_meanwhile = await rents(bob, "key-2")

    await harness.as_admin.post("/api/admin/clock")
    await harness.manager.retention.round()
    assert not await opens(bob)
    assert await rents(await harness.new_client("bob"), "key-1") != made
    assert await rents(await harness.new_client("bob"), "key-2") == made_meanwhile, "the key is an hour old at most"


async def test_an_expired_token_stays_expired_though_the_clock_goes_back(harness: Harness) -> None:
    alice = await harness.new_client("alice", ttl_s=60)
    harness.clock.now += 60
    assert not await opens(alice)
    await harness.manager.expiry.round()
    harness.clock.wall_offset -= 86_400
    assert not await opens(alice)
    await harness.restart()
    assert await doubted(harness)
    assert not await opens(alice)


async def test_a_token_made_under_a_doubted_clock_lasts_for_its_whole_time(harness: Harness) -> None:
    harness.clock.wall_offset -= 86_400
    made = (await harness.as_admin.post("/api/tokens", json={"name": "alice", "ttl_s": 3600})).json()
    alice = harness.client(made["token"])
    harness.clock.now += 1800
    harness.clock.wall_offset += 86_400
    assert await opens(alice)
    harness.clock.now += 1801
    assert not await opens(alice)


@pytest.mark.parametrize("wrong_s", [-2 * 86_400, 2 * 86_400], ids=["behind", "ahead"])
@pytest.mark.parametrize("is_right", [False, True], ids=["it is set right", "an operator confirms it"])
async def test_a_rental_s_time_that_begins_under_a_doubted_clock_has_its_whole_length(
    harness: Harness, wrong_s: float, is_right: bool
) -> None:
    """The time of a new rental and of a renewed one begins when the clock is trusted again."""
    await harness.join(slots=2)
    before = await harness.rent(ttl_s=3600)
    harness.clock.wall_offset += wrong_s
    await harness.manager.expiry.round()
    rental = await harness.rent(ttl_s=6 * 3600)
    renewed = (await harness.as_admin.post(f"/api/rentals/{before['id']}/renew", json={"ttl_s": 6 * 3600})).json()
    assert (rental["state"], rental["expires_at"], renewed["expires_at"]) == ("active", None, None)
    if is_right:
        await harness.as_admin.post("/api/admin/clock")
    else:
        harness.clock.wall_offset -= wrong_s
        await harness.manager.expiry.round()
        harness.clock.now += SETTLE_S
    await harness.manager.expiry.round()
    assert await doubted(harness) is None
    both = [await harness.rental(each["id"]) for each in (rental, before)]
    for each in both:
        left_s = datetime.fromisoformat(each["expires_at"]).timestamp() - harness.clock.wall()
        assert (each["state"], round(left_s)) == ("active", 6 * 3600)
    harness.clock.now += 6 * 3600 - 1
    await harness.manager.expiry.round()
    assert {(await harness.rental(each["id"]))["state"] for each in both} == {"active"}
    harness.clock.now += 1
    await harness.manager.expiry.round()
    assert {(await harness.rental(each["id"]))["state"] for each in both} == {"releasing"}


async def test_a_doubt_of_the_clock_between_two_rounds_leaves_no_rental_without_an_end(harness: Harness) -> None:
    await harness.join()
    harness.clock.wall_offset += 2 * 86_400
    rental = await harness.rent(ttl_s=3600)
    await harness.as_admin.post("/api/admin/clock")
    for _ in range(COUNT_EVERY):
        await harness.manager.expiry.round()
    assert (await harness.rental(rental["id"]))["expires_at"]


async def test_a_clock_that_returns_to_the_trusted_time_is_trusted_again_with_an_event(harness: Harness) -> None:
    await harness.join()
    harness.clock.wall_offset += 86_400
    await harness.restart()
    await harness.manager.expiry.round()
    assert await doubted(harness)
    harness.clock.wall_offset -= 86_400
    await harness.manager.expiry.round()
    harness.clock.now += SETTLE_S
    await harness.manager.expiry.round()
    assert await doubted(harness) is None
    kinds = [e["kind"] for e in await harness.events("manager.clock")]
    assert kinds == ["manager.clock_doubted", "manager.clock_believed"]
    await harness.restart()
    assert await doubted(harness) is None


async def test_snapshots_of_a_late_expiry_are_kept_for_a_day_from_then_on(harness: Harness) -> None:
    """Let the manager be away for three days."""
    await harness.join()
    rental = await harness.rent(ttl_s=3600)
    await harness.manager.snapshots.take_now(rental["id"], None)
    harness.clock.now += 3 * 86_400
    await harness.manager.expiry.round()
    await harness.settle()
    await harness.manager.snapshots._sweep()
    assert rental["id"] in await harness.snapshot_service.rentals()
