"""Takeovers, from silence to a rental that runs elsewhere and back: the whole manager on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.harness import STEP_S, Agent, Harness

from orion.manager.domain.states import JOIN_DEADLINE_S
from orion.manager.ssh.port import Host
from orion.manager.store import state
from orion.manager.store.database import Store


@pytest.fixture
async def pool(harness: Harness) -> list[Agent]:
    """Return three ready workers, after the brake of the start has ended."""
    agents = [await harness.join() for _ in range(3)]
    harness.end_the_brake_of_the_start()
    return agents


@contextmanager
def interrupted(
    harness: Harness, kind: str, function: Any, interruption: Callable[[], Awaitable[Any]]
) -> Iterator[list[Any]]:
    """Have `interruption` run once: after the first read, or before the first write, of this function of the store.

    `kind` is "read" or "write". The list gets the result.
    """
    begun, results = False, list[Any]()
    original = getattr(harness.store, kind)

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
        patched.setattr(harness.store, kind, read_or_write)
        yield results
    assert begun


async def test_the_brake_of_the_start_ends_after_a_grace_with_a_reachable_proxy(harness: Harness) -> None:
    agent = await harness.join()
    await harness.pass_time(89)
    assert (await harness.as_admin.get("/api/status")).json()["brake"] == "the manager has just started"
    await harness.pass_time(4)
    assert (await harness.as_admin.get("/api/status")).json()["brake"] is None
    assert await harness.health(agent) == "ready"


async def kinds(harness: Harness, rental: dict[str, Any]) -> list[str]:
    return [e["kind"] for e in await harness.events() if e["rental_id"] == rental["id"]]


async def test_a_silent_worker_is_suspect_then_down_and_its_rental_is_taken_over(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    dead = harness.agent_of(rental)
    dead.die()
    await harness.silence(dead, 40)
    assert await harness.health(dead) == "ready"
    await harness.silence(dead, 41)
    assert await harness.health(dead) == "suspect"
    await harness.silence(dead, 90)
    assert await harness.health(dead) == "suspect", "nobody is down before takeover_after"
    assert (await harness.rental(rental["id"]))["worker_id"] == dead.worker_id
    await harness.silence(dead, 91)
    moved = await harness.rental(rental["id"])
    assert await harness.health(dead) == "down"
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert moved["worker_id"] not in {None, dead.worker_id}
    assert [(p["epoch"], p["state"]) for p in await harness.placements()] == [(1, "lost"), (2, "running")]
    assert harness.agent_of(moved).unlocked() == {rental["id"]: 2}
    same = ("name", "username", "owner", "expires_at", "labels", "created_at")
    assert {key: moved[key] for key in same} == {key: rental[key] for key in same}
    assert (await kinds(harness, rental))[-7:] == [
        "placement.lost",
        "rental.migration_started",
        "placement.reserved",
        "placement.preparing",
        "placement.running",
        "rental.started_empty",
        "rental.activated",
    ]


async def test_a_release_ends_a_hanging_restore(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    begun = asyncio.Event()

    async def hang(*_: Any, **__: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    harness.snapshot_service.restore = hang  # type: ignore[method-assign, assignment]
    dead = harness.agent_of(rental)
    dead.die()
    taken_over = asyncio.create_task(harness.silence(dead, 91))
    await begun.wait()
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.manager.reconciler.round()
    async with asyncio.timeout(20):
        await taken_over
    assert (await harness.rental(rental["id"]))["state"] == "released"


async def test_a_worker_that_missed_one_heartbeat_loses_nothing(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    late = harness.agent_of(rental)
    await harness.silence(late, 60)
    assert await harness.health(late) == "suspect"
    await late.beat()
    await harness.settle()
    assert await harness.health(late) == "ready"
    assert (await harness.rental(rental["id"]))["epoch"] == 1


async def test_without_a_free_slot_a_rental_waits_until_a_worker_joins(harness: Harness) -> None:
    first, _other = await harness.join(), await harness.join()
    harness.end_the_brake_of_the_start()
    rentals = [await harness.rent(), await harness.rent()]
    first.die()
    await harness.pass_time(92 + 30)
    lost = next(r for r in rentals if r["worker_id"] == first.worker_id)
    waiting = await harness.rental(lost["id"])
    assert waiting["state"] == "queued"
    assert waiting["explanation"].startswith("waiting: of 2 workers, 1 down, 1 full.")
    await harness.join()
    again = await harness.rental(lost["id"])
    assert (again["state"], again["epoch"]) == ("active", 2)


async def test_a_heartbeat_between_the_read_and_the_verdict_saves_the_worker(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    late = harness.agent_of(rental)
    await harness.silence(late, 88)
    assert await harness.health(late) == "suspect"
    harness.clock.now += 4
    with interrupted(harness, "read", state.load_workers, late.beat) as replies:
        await harness.manager.health.round()
    await harness.settle()
    assert [reply.status_code for reply in replies] == [200]
    assert await harness.health(late) == "ready"
    assert (await harness.rental(rental["id"]))["epoch"] == 1


async def test_from_the_verdict_on_no_heartbeat_renews_the_lease(harness: Harness, pool: list[Agent]) -> None:
    """The session is revoked before `down` is committed: the answer to a heartbeat in between is to register."""
    late = pool[0]
    await harness.silence(late, 88)
    harness.clock.now += 4
    with interrupted(harness, "write", state.apply_each, late.beat) as replies:
        await harness.manager.health.round()
    assert [reply.status_code for reply in replies] == [409]
    assert await harness.health(late) == "down"


async def test_a_registration_between_the_read_and_the_verdict_saves_the_worker(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    late = harness.agent_of(rental)
    await harness.silence(late, 88)
    harness.clock.now += 4
    with interrupted(harness, "write", state.apply_each, late.register) as replies:
        await harness.manager.health.round()
    late.beating = True
    await harness.settle()
    assert [reply.status_code for reply in replies] == [201]
    assert await harness.health(late) == "ready"
    assert (await harness.rental(rental["id"]))["epoch"] == 1
    assert harness.live_copies(rental["id"]) == [1]


async def test_a_worker_that_comes_back_is_cleaned_of_stale_epochs_before_it_is_ready(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    dead = harness.agent_of(rental)
    dead.die()
    await harness.pass_time(94)
    assert rental["id"] in dead.node.accounts
    reply = await dead.come_back()
    assert [(o["epoch"], o["want"]) for o in reply.json()["placements"]] == [(1, "purge")]
    await harness.settle()
    assert await harness.health(dead) == "ready"
    assert dead.node.accounts == {}
    seen = [e["kind"] for e in await harness.events() if e["worker_id"] == dead.worker_id]
    assert seen[-5:-3] == ["worker.became_joining", "rental.salvaged"]
    assert seen[-3:] == ["placement.purged", "worker.verified", "worker.became_ready"]
    assert (await harness.rental(rental["id"]))["epoch"] == 2


async def test_a_worker_that_cannot_be_cleaned_does_not_become_ready(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    dead = harness.agent_of(rental)
    dead.die()
    await harness.pass_time(94)
    dead.node.failure = "the home is on fire"
    await dead.come_back()
    await harness.pass_time(60)
    assert await harness.health(dead) == "joining"
    await harness.pass_time(JOIN_DEADLINE_S)
    assert await harness.health(dead) == "quarantined"
    dead.node.failure = ""
    await harness.pass_time(20)
    assert dead.node.accounts == {}
    await harness.as_admin.post(f"/api/workers/{dead.worker_id}/resume")
    await harness.settle()
    assert await harness.health(dead) == "ready"


async def test_a_partitioned_worker_that_registers_after_the_verdict_gets_no_order_to_run(
    harness: Harness, pool: list[Agent]
) -> None:
    """The worker is down in the database, and its rental is not yet taken over: no order may be to run it."""
    rental = await harness.rent()
    cut_off = harness.agent_of(rental)
    await harness.silence(cut_off, 90)
    harness.clock.now += STEP_S
    await harness.manager.health.round()
    assert await harness.health(cut_off) == "down"
    reply = await cut_off.register()
    assert [o["want"] for o in reply.json()["placements"]] == ["hold"]
    await harness.manager.reconciler.round()
    cut_off.beating = True
    await harness.settle()
    assert len(harness.live_copies(rental["id"])) == 1
    after = await harness.rental(rental["id"])
    assert (after["state"], after["epoch"]) == ("active", 2)


async def test_a_worker_that_registers_again_before_the_takeover_keeps_its_rental(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    cut_off = harness.agent_of(rental)
    await harness.silence(cut_off, 90)
    harness.clock.now += STEP_S
    await harness.manager.health.round()

    async def come_back() -> None:
        await cut_off.register()
        await harness.manager.health.round()

    with interrupted(harness, "write", state.apply, come_back):
        await harness.manager.reconciler.round()
    cut_off.beating = True
    await harness.settle()
    await cut_off.beat()
    assert (await harness.rental(rental["id"]))["epoch"] == 1
    assert harness.live_copies(rental["id"]) == [1]


@pytest.mark.parametrize("away_s", [4, 60, 400])
async def test_a_restart_of_the_manager_causes_no_takeover(harness: Harness, pool: list[Agent], away_s: float) -> None:
    rentals = [await harness.rent() for _ in range(3)]
    harness.clock.now += away_s
    await harness.restart()
    await harness.settle()
    assert {await harness.health(agent) for agent in pool} == {"unknown"}
    await harness.pass_time(30)
    assert {await harness.health(agent) for agent in pool} == {"ready"}
    await harness.pass_time(200)
    assert [(await harness.rental(r["id"]))["epoch"] for r in rentals] == [1, 1, 1]
    assert not await harness.events("worker.became_down")


async def test_a_worker_that_died_while_the_manager_was_away_is_down_after_a_doubled_grace(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    dead = harness.agent_of(rental)
    dead.die()
    await harness.restart()
    await harness.pass_time(180)
    assert await harness.health(dead) == "unknown"
    assert (await harness.rental(rental["id"]))["epoch"] == 1
    await harness.pass_time(1)
    assert await harness.health(dead) == "down"
    assert (await harness.rental(rental["id"]))["epoch"] == 2


async def test_a_rent_after_a_restart_goes_to_the_first_worker_with_a_heartbeat(
    harness: Harness, pool: list[Agent]
) -> None:
    await harness.restart()
    await harness.settle()
    rental = await harness.rent()
    assert (rental["state"], "unknown" in rental["explanation"]) == ("queued", True)
    await pool[0].beat()
    await harness.settle()
    made = await harness.rental(rental["id"])
    assert (made["state"], made["worker_id"]) == ("active", pool[0].worker_id)


@pytest.mark.parametrize("away_s", [100, 290])
async def test_while_the_proxy_is_away_no_worker_is_down_and_no_takeover_follows(
    harness: Harness, pool: list[Agent], away_s: float
) -> None:
    rentals = [await harness.rent() for _ in range(3)]
    harness.proxy_probe.answers = False
    for agent in pool:
        agent.beating = False
    await harness.pass_time(away_s)
    assert (await harness.as_admin.get("/api/status")).json()["brake"] == (
        "the manager cannot reach itself through the proxy"
    )
    harness.proxy_probe.answers = True
    for agent in pool:
        agent.beating = True
    await harness.pass_time(200)
    assert not await harness.events("worker.became_down")
    assert [(await harness.rental(r["id"]))["epoch"] for r in rentals] == [1, 1, 1]


async def test_two_of_three_workers_that_fall_silent_together_get_another_grace(
    harness: Harness, pool: list[Agent]
) -> None:
    for agent in pool[:2]:
        agent.die()
    await harness.pass_time(124)
    assert [await harness.health(a) for a in pool] == ["suspect", "suspect", "ready"]
    await harness.pass_time(20)
    assert [await harness.health(a) for a in pool] == ["down", "down", "ready"]


async def test_after_a_goodbye_the_rental_is_taken_over_soon_where_there_is_a_free_slot(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    leaving = harness.agent_of(rental)
    await leaving.exit()
    await harness.settle()
    assert (await harness.rental(rental["id"]))["epoch"] == 1, "a restart moves nothing"
    await harness.pass_time(6)
    moved = await harness.rental(rental["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert await harness.health(leaving) == "down"


async def test_a_worker_that_says_goodbye_and_returns_at_once_keeps_its_rentals(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    restarted = harness.agent_of(rental)
    await restarted.exit()
    await harness.pass_time(4)
    reply = await restarted.come_back()
    assert [o["want"] for o in reply.json()["placements"]] == ["run"]
    await harness.pass_time(60)
    after = await harness.rental(rental["id"])
    assert (after["epoch"], after["worker_id"]) == (1, restarted.worker_id)
    assert harness.live_copies(rental["id"]) == [1]


async def test_when_all_workers_say_goodbye_there_is_no_takeover_and_all_keep_their_rentals(
    harness: Harness, pool: list[Agent]
) -> None:
    rentals = [await harness.rent() for _ in range(3)]
    for agent in pool:
        await agent.exit()
    await harness.pass_time(30)
    assert not await harness.events("worker.became_down")
    await harness.restart()
    for agent in pool:
        await agent.come_back()
    await harness.pass_time(60)
    assert {await harness.health(agent) for agent in pool} == {"ready"}
    after = [await harness.rental(r["id"]) for r in rentals]
    assert [(r["state"], r["epoch"], r["worker_id"]) for r in after] == [("active", 1, r["worker_id"]) for r in rentals]
    assert all(harness.live_copies(r["id"]) == [1] for r in rentals)


async def test_a_new_container_at_a_dead_worker_s_address_is_another_worker(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    dead = harness.agent_of(rental)
    dead.die()
    newcomer = harness.new_agent()
    newcomer.node.host = Host(worker_id="", address=dead.node.host.address, host_keys=newcomer.node.host.host_keys)
    harness.world.workers[dead.node.host.address, 22] = newcomer.node
    assert (await newcomer.register()).status_code == 201
    await harness.pass_time(92)
    assert newcomer.worker_id != dead.worker_id
    assert await harness.health(newcomer) == "ready"
    assert (await harness.rental(rental["id"]))["epoch"] == 2


async def test_a_release_does_not_wait_for_a_worker_that_is_down(
    harness: Harness, pool: list[Agent], store: Store
) -> None:
    rental = await harness.rent()
    dead = harness.agent_of(rental)
    dead.node.failure = "the disk is gone"
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "releasing"
    dead.die()
    await harness.pass_time(94)
    ended = await harness.rental(rental["id"])
    assert ended["state"] == "released"
    assert f"its residue on {dead.worker_id} is purged when that returns" in ended["explanation"]
    dead.node.failure = ""
    await dead.come_back()
    await harness.settle()
    assert dead.node.accounts == {}
    assert await harness.health(dead) == "ready"


async def test_when_all_workers_are_silent_the_brake_ends_at_brake_max(harness: Harness, pool: list[Agent]) -> None:
    for agent in pool:
        agent.beating = False
    await harness.pass_time(40 + 300 - 10)
    assert [await harness.health(a) for a in pool] == ["suspect"] * 3
    await harness.pass_time(30)
    assert [await harness.health(a) for a in pool] == ["down"] * 3
