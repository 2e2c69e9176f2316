"""The loop that runs rounds, the door's probe, and the expiry of rentals."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from support.house import House

from orion.manager.domain.expiry import SETTLE_S
from orion.manager.loops.door import DoorProbe
from orion.manager.loops.timer import Loop

NEVER_S = 3600.0


async def until(condition: asyncio.Event) -> None:
    await asyncio.wait_for(condition.wait(), 5)


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
async def test_the_door_is_open_when_the_manager_reaches_itself_through_it(reply: str, is_open: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{reply}\r\nContent-Length: 0\r\n\r\n".encode() if reply else b"")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        probe = DoorProbe(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/healthz", 5, 1)
        await probe.ask()
        assert probe.open is is_open
        await probe.close()


async def test_a_door_that_answers_too_late_is_shut_and_opens_again() -> None:
    slow = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if slow.is_set():
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            writer.close()
        else:
            await slow.wait()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        probe = DoorProbe(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/healthz", 0.05, 1)
        await probe.ask()
        assert not probe.open
        slow.set()
        probe._client.timeout = httpx.Timeout(5)
        await probe.ask()
        assert probe.open
        await probe.close()


async def test_a_rental_expires_when_its_time_is_over_and_its_worker_is_cleaned(house: House) -> None:
    agent = await house.join()
    rental = await house.rent(ttl_s=60)
    await house.pass_time(59)
    await house.manager.expiry.round()
    assert (await house.rental(rental["id"]))["state"] == "active"
    await house.pass_time(1)
    await house.manager.expiry.round()
    await house.settle()
    assert (await house.rental(rental["id"]))["state"] == "expired"
    assert agent.node.accounts == {}


async def test_a_queued_rental_does_not_use_up_its_time(house: House) -> None:
    rental = await house.rent(ttl_s=60)
    await house.pass_time(120)
    await house.manager.expiry.round()
    assert (await house.rental(rental["id"]))["state"] == "queued"


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
async def test_a_wall_clock_that_jumped_expires_nobody_until_it_is_believed_again(house: House, jump_s: float) -> None:
    await house.join()
    rental = await house.rent(ttl_s=3600)
    house.clock.wall_offset += jump_s
    await house.manager.expiry.round()
    house.clock.now += SETTLE_S - 1
    await house.manager.expiry.round()
    assert (await house.rental(rental["id"]))["state"] == "active"
    house.clock.now += 1
    await house.manager.expiry.round()
    expected = "releasing" if jump_s > 0 else "active"
    assert (await house.rental(rental["id"]))["state"] == expected
