"""Takeovers, from silence to a rental that runs elsewhere and back: the whole manager on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.house import STEP_S, Agent, House

from orion.manager.domain.states import JOIN_DEADLINE_S
from orion.manager.ssh.port import Host
from orion.manager.store import state
from orion.manager.store.database import Store


@pytest.fixture
async def pool(house: House) -> list[Agent]:
    """Return three ready workers, after the brake of the start has ended."""
    agents = [await house.join() for _ in range(3)]
    house.end_the_brake_of_the_start()
    return agents


@contextmanager
def interrupted(
    house: House, kind: str, function: Any, interruption: Callable[[], Awaitable[Any]]
) -> Iterator[list[Any]]:
    """Have `interruption` run once: after the first read, or before the first write, of this function of the store.

    `kind` is "read" or "write". The list gets the result.
    """
    begun, results = False, list[Any]()
    original = getattr(house.store, kind)

    async def interrupt(called: Any) -> None:
        nonlocal begun
        if called is function and not begun:
            begun = True
            results.append(await interruption())

    async def read_or_write(called: Any, *args: Any, **kwargs: Any) -> Any:
        if kind == "write":
            await interrupt(called)
        found = await original(called, *args, **kwargs)
        if kind == "read":
            await interrupt(called)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(house.store, kind, read_or_write)
        yield results
    assert begun


async def test_the_brake_of_the_start_ends_after_a_grace_with_a_reachable_proxy(house: House) -> None:
    agent = await house.join()
    await house.pass_time(89)
    assert (await house.as_admin.get("/api/status")).json()["brake"] == "the manager has just started"
    await house.pass_time(4)
    assert (await house.as_admin.get("/api/status")).json()["brake"] is None
    assert await house.health(agent) == "ready"


async def kinds(house: House, rental: dict[str, Any]) -> list[str]:
    return [e["kind"] for e in await house.events() if e["rental_id"] == rental["id"]]


async def test_a_silent_worker_is_suspect_then_down_and_its_rental_is_taken_over(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    dead = house.agent_of(rental)
    dead.die()
    await house.silence(dead, 40)
    assert await house.health(dead) == "ready"
    await house.silence(dead, 41)
    assert await house.health(dead) == "suspect"
    await house.silence(dead, 90)
    assert await house.health(dead) == "suspect", "nobody is down before takeover_after"
    assert (await house.rental(rental["id"]))["worker_id"] == dead.worker_id
    await house.silence(dead, 91)
    moved = await house.rental(rental["id"])
    assert await house.health(dead) == "down"
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert moved["worker_id"] not in {None, dead.worker_id}
    assert [(p["epoch"], p["state"]) for p in await house.placements()] == [(1, "lost"), (2, "running")]
    assert house.agent_of(moved).unlocked() == {rental["id"]: 2}
    same = ("name", "username", "owner", "expires_at", "labels", "created_at")
    assert {key: moved[key] for key in same} == {key: rental[key] for key in same}
    assert (await kinds(house, rental))[-7:] == [
        "placement.lost",
        "rental.migration_started",
        "placement.reserved",
        "placement.preparing",
        "placement.running",
        "rental.started_empty",
        "rental.activated",
    ]


async def test_a_release_ends_a_hanging_restore(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    begun = asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    house.snapshot_service.restore = hang  # type: ignore[method-assign, assignment]
    dead = house.agent_of(rental)
    dead.die()
    taken_over = asyncio.create_task(house.silence(dead, 91))
    await begun.wait()
    await house.as_admin.delete(f"/api/rentals/{rental['id']}")
    await house.manager.reconciler.round()
    async with asyncio.timeout(20):
        await taken_over
    assert (await house.rental(rental["id"]))["state"] == "released"


async def test_a_worker_that_missed_one_heartbeat_loses_nothing(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    late = house.agent_of(rental)
    await house.silence(late, 60)
    assert await house.health(late) == "suspect"
    await late.beat()
    await house.settle()
    assert await house.health(late) == "ready"
    assert (await house.rental(rental["id"]))["epoch"] == 1


async def test_without_a_free_slot_a_rental_waits_until_a_worker_joins(house: House) -> None:
    first, _other = await house.join(), await house.join()
    house.end_the_brake_of_the_start()
    rentals = [await house.rent(), await house.rent()]
    first.die()
    await house.pass_time(92 + 30)
    lost = next(r for r in rentals if r["worker_id"] == first.worker_id)
    waiting = await house.rental(lost["id"])
    assert waiting["state"] == "queued"
    assert waiting["explanation"].startswith("waiting: of 2 workers, 1 down, 1 full.")
    await house.join()
    again = await house.rental(lost["id"])
    assert (again["state"], again["epoch"]) == ("active", 2)


async def test_a_heartbeat_between_the_read_and_the_verdict_saves_the_worker(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    late = house.agent_of(rental)
    await house.silence(late, 88)
    assert await house.health(late) == "suspect"
    house.clock.now += 4
    with interrupted(house, "read", state.load_workers, late.beat) as replies:
        await house.manager.health.round()
    await house.settle()
    assert [reply.status_code for reply in replies] == [200]
    assert await house.health(late) == "ready"
    assert (await house.rental(rental["id"]))["epoch"] == 1


async def test_from_the_verdict_on_no_heartbeat_renews_the_lease(house: House, pool: list[Agent]) -> None:
    """The session is revoked before `down` is committed: the answer to a heartbeat in between is to register."""
    late = pool[0]
    await house.silence(late, 88)
    house.clock.now += 4
    with interrupted(house, "write", state.apply_each, late.beat) as replies:
        await house.manager.health.round()
    assert [reply.status_code for reply in replies] == [409]
    assert await house.health(late) == "down"


async def test_a_registration_between_the_read_and_the_verdict_saves_the_worker(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    late = house.agent_of(rental)
    await house.silence(late, 88)
    house.clock.now += 4
    with interrupted(house, "write", state.apply_each, late.register) as replies:
        await house.manager.health.round()
    late.beating = True
    await house.settle()
    assert [reply.status_code for reply in replies] == [201]
    assert await house.health(late) == "ready"
    assert (await house.rental(rental["id"]))["epoch"] == 1
    assert house.live_copies(rental["id"]) == [1]


async def test_a_worker_that_comes_back_is_cleaned_of_stale_epochs_before_it_is_ready(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    dead = house.agent_of(rental)
    dead.die()
    await house.pass_time(94)
    assert rental["id"] in dead.node.accounts
    reply = await dead.come_back()
    assert [(o["epoch"], o["want"]) for o in reply.json()["placements"]] == [(1, "purge")]
    await house.settle()
    assert await house.health(dead) == "ready"
    assert dead.node.accounts == {}
    seen = [e["kind"] for e in await house.events() if e["worker_id"] == dead.worker_id]
    assert seen[-5:-3] == ["worker.became_joining", "rental.salvaged"]
    assert seen[-3:] == ["placement.purged", "worker.verified", "worker.became_ready"]
    assert (await house.rental(rental["id"]))["epoch"] == 2


async def test_a_worker_that_cannot_be_cleaned_does_not_become_ready(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    dead = house.agent_of(rental)
    dead.die()
    await house.pass_time(94)
    dead.node.failure = "the home is on fire"
    await dead.come_back()
    await house.pass_time(60)
    assert await house.health(dead) == "joining"
    await house.pass_time(JOIN_DEADLINE_S)
    assert await house.health(dead) == "quarantined"
    dead.node.failure = ""
    await house.pass_time(20)
    assert dead.node.accounts == {}
    await house.as_admin.post(f"/api/workers/{dead.worker_id}/resume")
    await house.settle()
    assert await house.health(dead) == "ready"


async def test_a_partitioned_worker_that_registers_after_the_verdict_gets_no_order_to_run(
    house: House, pool: list[Agent]
) -> None:
    """The worker is down in the database, and its rental is not yet taken over: no order may be to run it."""
    rental = await house.rent()
    cut_off = house.agent_of(rental)
    await house.silence(cut_off, 90)
    house.clock.now += STEP_S
    await house.manager.health.round()
    assert await house.health(cut_off) == "down"
    reply = await cut_off.register()
    assert [o["want"] for o in reply.json()["placements"]] == ["hold"]
    await house.manager.reconciler.round()
    cut_off.beating = True
    await house.settle()
    assert len(house.live_copies(rental["id"])) == 1
    after = await house.rental(rental["id"])
    assert (after["state"], after["epoch"]) == ("active", 2)


async def test_a_worker_that_registers_again_before_the_takeover_keeps_its_rental(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    cut_off = house.agent_of(rental)
    await house.silence(cut_off, 90)
    house.clock.now += STEP_S
    await house.manager.health.round()

    async def come_back() -> None:
        await cut_off.register()
        await house.manager.health.round()

    with interrupted(house, "write", state.apply, come_back):
        await house.manager.reconciler.round()
    cut_off.beating = True
    await house.settle()
    await cut_off.beat()
    assert (await house.rental(rental["id"]))["epoch"] == 1
    assert house.live_copies(rental["id"]) == [1]


@pytest.mark.parametrize("away_s", [4, 60, 400])
async def test_a_restart_of_the_manager_causes_no_takeover(house: House, pool: list[Agent], away_s: float) -> None:
    rentals = [await house.rent() for _ in range(3)]
    house.clock.now += away_s
    await house.restart()
    await house.settle()
    assert {await house.health(agent) for agent in pool} == {"unknown"}
    await house.pass_time(30)
    assert {await house.health(agent) for agent in pool} == {"ready"}
    await house.pass_time(200)
    assert [(await house.rental(r["id"]))["epoch"] for r in rentals] == [1, 1, 1]
    assert not await house.events("worker.became_down")


async def test_a_worker_that_died_while_the_manager_was_away_is_down_after_a_doubled_grace(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    dead = house.agent_of(rental)
    dead.die()
    await house.restart()
    await house.pass_time(180)
    assert await house.health(dead) == "unknown"
    assert (await house.rental(rental["id"]))["epoch"] == 1
    await house.pass_time(1)
    assert await house.health(dead) == "down"
    assert (await house.rental(rental["id"]))["epoch"] == 2


async def test_a_rent_after_a_restart_goes_to_the_first_worker_with_a_heartbeat(
    house: House, pool: list[Agent]
) -> None:
    await house.restart()
    await house.settle()
    rental = await house.rent()
    assert (rental["state"], "unknown" in rental["explanation"]) == ("queued", True)
    await pool[0].beat()
    await house.settle()
    made = await house.rental(rental["id"])
    assert (made["state"], made["worker_id"]) == ("active", pool[0].worker_id)


@pytest.mark.parametrize("away_s", [100, 290])
async def test_while_the_proxy_is_away_no_worker_is_down_and_no_takeover_follows(
    house: House, pool: list[Agent], away_s: float
) -> None:
    rentals = [await house.rent() for _ in range(3)]
    house.proxy_probe.answers = False
    for agent in pool:
        agent.beating = False
    await house.pass_time(away_s)
    assert (await house.as_admin.get("/api/status")).json()["brake"] == (
        "the manager cannot reach itself through the proxy"
    )
    house.proxy_probe.answers = True
    for agent in pool:
        agent.beating = True
    await house.pass_time(200)
    assert not await house.events("worker.became_down")
    assert [(await house.rental(r["id"]))["epoch"] for r in rentals] == [1, 1, 1]


async def test_two_of_three_workers_that_fall_silent_together_get_another_grace(
    house: House, pool: list[Agent]
) -> None:
    for agent in pool[:2]:
        agent.die()
    await house.pass_time(124)
    assert [await house.health(a) for a in pool] == ["suspect", "suspect", "ready"]
    await house.pass_time(20)
    assert [await house.health(a) for a in pool] == ["down", "down", "ready"]


async def test_after_a_goodbye_the_rental_is_taken_over_soon_where_there_is_a_free_slot(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    leaving = house.agent_of(rental)
    await leaving.exit()
    await house.settle()
    assert (await house.rental(rental["id"]))["epoch"] == 1, "a restart moves nothing"
    await house.pass_time(6)
    moved = await house.rental(rental["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert await house.health(leaving) == "down"


async def test_a_worker_that_says_goodbye_and_returns_at_once_keeps_its_rentals(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    restarted = house.agent_of(rental)
    await restarted.exit()
    await house.pass_time(4)
    reply = await restarted.come_back()
    assert [o["want"] for o in reply.json()["placements"]] == ["run"]
    await house.pass_time(60)
    after = await house.rental(rental["id"])
    assert (after["epoch"], after["worker_id"]) == (1, restarted.worker_id)
    assert house.live_copies(rental["id"]) == [1]


async def test_when_all_workers_say_goodbye_there_is_no_takeover_and_all_keep_their_rentals(
    house: House, pool: list[Agent]
) -> None:
    rentals = [await house.rent() for _ in range(3)]
    for agent in pool:
        await agent.exit()
    await house.pass_time(30)
    assert not await house.events("worker.became_down")
    await house.restart()
    for agent in pool:
        await agent.come_back()
    await house.pass_time(60)
    assert {await house.health(agent) for agent in pool} == {"ready"}
    after = [await house.rental(r["id"]) for r in rentals]
    assert [(r["state"], r["epoch"], r["worker_id"]) for r in after] == [("active", 1, r["worker_id"]) for r in rentals]
    assert all(house.live_copies(r["id"]) == [1] for r in rentals)


async def test_a_new_container_at_a_dead_worker_s_address_is_another_worker(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    dead = house.agent_of(rental)
    dead.die()
    newcomer = house.new_agent()
    newcomer.node.host = Host("", dead.node.host.address, newcomer.node.host.host_keys)
    house.world.workers[dead.node.host.address, 22] = newcomer.node
    assert (await newcomer.register()).status_code == 201
    await house.pass_time(92)
    assert newcomer.worker_id != dead.worker_id
    assert await house.health(newcomer) == "ready"
    assert (await house.rental(rental["id"]))["epoch"] == 2


async def test_a_release_does_not_wait_for_a_worker_that_is_down(house: House, pool: list[Agent], store: Store) -> None:
    rental = await house.rent()
    dead = house.agent_of(rental)
    dead.node.failure = "the disk is gone"
    await house.as_admin.delete(f"/api/rentals/{rental['id']}")
    await house.settle()
    assert (await house.rental(rental["id"]))["state"] == "releasing"
    dead.die()
    await house.pass_time(94)
    ended = await house.rental(rental["id"])
    assert ended["state"] == "released"
    assert f"its residue on {dead.worker_id} is purged when that returns" in ended["explanation"]
    dead.node.failure = ""
    await dead.come_back()
    await house.settle()
    assert dead.node.accounts == {}
    assert await house.health(dead) == "ready"


async def test_when_all_workers_are_silent_the_brake_ends_at_brake_max(house: House, pool: list[Agent]) -> None:
    for agent in pool:
        agent.beating = False
    await house.pass_time(40 + 300 - 10)
    assert [await house.health(a) for a in pool] == ["suspect"] * 3
    await house.pass_time(30)
    assert [await house.health(a) for a in pool] == ["down"] * 3
