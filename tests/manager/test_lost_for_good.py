"""Workers whose container was removed: how that is noticed, when rentals are taken over, when workers are removed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.harness import Agent, Harness
from support.way_in import Sshds, coming_in
from test_api_access import is_problem


@pytest.fixture
async def pool(harness: Harness) -> list[Agent]:
    """Return three ready workers, after the brake of the start has ended."""
    agents = [await harness.join() for _ in range(3)]
    harness.end_the_brake_of_the_start()
    return agents


async def ids(harness: Harness) -> set[str]:
    return {one["id"] for one in (await harness.as_admin.get("/api/workers")).json()["items"]}


async def pruned(harness: Harness) -> dict[str, Any]:
    reply: dict[str, Any] = (await harness.as_admin.post("/api/workers/prune")).json()
    return reply


async def test_a_worker_declared_gone_is_down_at_once_also_after_a_restart_of_the_manager(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    lost = harness.agent_of(rental)
    lost.die()
    await harness.restart()
    for agent in pool:
        if agent is not lost:
            await agent.register()
    await harness.settle()
    assert await harness.health(lost) == "unknown"
    reply = await harness.as_admin.post(f"/api/workers/{lost.worker_id}/gone")
    assert reply.status_code == 200
    await harness.settle()
    assert await harness.health(lost) == "down"
    moved = await harness.rental(rental["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert (await harness.events("worker.declared_gone"))[0]["worker_id"] == lost.worker_id
    again = await harness.as_admin.post(f"/api/workers/{lost.worker_id}/gone")
    assert (again.status_code, again.json()["health"]) == (200, "down")


async def test_a_release_ends_when_its_worker_is_declared_gone(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    lost = harness.agent_of(rental)
    lost.die()
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "releasing"
    await harness.as_admin.post(f"/api/workers/{lost.worker_id}/gone")
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "released"


async def test_a_worker_that_answers_cannot_be_declared_gone(harness: Harness, pool: list[Agent]) -> None:
    refused = await harness.as_admin.post(f"/api/workers/{pool[0].worker_id}/gone")
    is_problem(refused, 409, "worker_answers")
    await harness.settle()
    assert await harness.health(pool[0]) == "ready"


async def test_a_worker_that_was_declared_gone_and_sends_a_heartbeat_becomes_ready(
    harness: Harness, pool: list[Agent]
) -> None:
    pool[0].node.alive = False
    assert (await harness.as_admin.post(f"/api/workers/{pool[0].worker_id}/gone")).status_code == 200
    pool[0].node.alive = True
    assert (await pool[0].beat()).status_code == 200
    await harness.settle()
    assert await harness.health(pool[0]) == "ready"


async def test_only_an_admin_can_declare_a_worker_gone_or_prune(harness: Harness, pool: list[Agent]) -> None:
    client = await harness.new_client("bob")
    is_problem(await client.post(f"/api/workers/{pool[0].worker_id}/gone"), 403, "forbidden")
    is_problem(await client.post("/api/workers/prune"), 403, "forbidden")
    is_problem(await harness.as_admin.post("/api/workers/w-never/gone"), 404, "not_found")


async def test_another_worker_at_its_address_ends_the_doubled_grace_and_is_named_in_refusals(
    harness: Harness, pool: list[Agent], sshds: Sshds
) -> None:
    """The worker may live on without a network, so its lease of before the restart must pass: 90 s, and not 180."""
    rental = await harness.rent()
    lost = harness.agent_of(rental)
    lost.die()
    await harness.restart()
    others = [agent for agent in pool if agent is not lost]
    for agent in others:
        await agent.register()
    newcomer = harness.new_agent()
    newcomer.node.host = replace(newcomer.node.host, address=lost.node.host.address)
    assert (await newcomer.register()).status_code == 201
    await harness.settle()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        refused = await client.refusal()
    assert (refused["status"], refused["code"]) == (502, "worker_unreachable")
    assert f"{newcomer.worker_id} has its address now" in refused["detail"]
    assert sshds.connected == [], "no session is relayed to another worker at that address"
    shown = await harness.worker(lost)
    assert shown["health"] == "unknown"
    assert f"worker {newcomer.worker_id} has its address now: its container is gone" in shown["explanation"]
    harness.end_the_brake_of_the_start()
    harness.manager.health.brake = replace(harness.manager.health.brake, disturbed_at=harness.clock.now)
    await harness.pass_time(85)
    assert await harness.health(lost) == "unknown"
    await harness.pass_time(10)
    assert await harness.health(lost) == "down"
    assert (await harness.rental(rental["id"]))["state"] == "active"


async def test_a_worker_that_comes_back_at_another_address_is_not_displaced(
    harness: Harness, pool: list[Agent]
) -> None:
    lost, address = pool[0], pool[0].node.host.address
    lost.die()
    newcomer = harness.new_agent()
    newcomer.node.host = replace(newcomer.node.host, address=address)
    assert (await newcomer.register()).status_code == 201
    assert "has its address now" in (await harness.worker(lost))["explanation"]
    lost.node.host = replace(lost.node.host, address="172.20.128.99")
    assert (await lost.come_back()).status_code == 201
    await harness.settle()
    assert "has its address now" not in (await harness.worker(lost))["explanation"]


async def test_a_dead_worker_whose_files_are_not_needed_is_removed_after_an_hour(
    harness: Harness, pool: list[Agent]
) -> None:
    pool[0].die()
    await harness.silence(pool[0], 91)
    assert await harness.health(pool[0]) == "down"
    await harness.pass_time(3500, step_s=100)
    assert pool[0].worker_id in await ids(harness)
    await harness.pass_time(300, step_s=100)
    assert await ids(harness) == {agent.worker_id for agent in pool[1:]}
    assert [event["actor"] for event in await harness.events("worker.removed")] == ["health"]


async def test_prune_removes_dead_workers_except_those_that_may_have_the_newest_files(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent(name="desk")
    holder = harness.agent_of(rental)
    idle = next(agent for agent in pool if agent is not holder)
    drained = next(agent for agent in pool if agent not in (holder, idle))
    await harness.as_admin.post(f"/api/workers/{drained.worker_id}/drain")
    await harness.settle()
    for agent in pool:
        agent.die()
    assert await pruned(harness) == {"forgotten": [], "kept": []}, "no worker is down"
    for agent in pool:
        await harness.as_admin.post(f"/api/workers/{agent.worker_id}/gone")
    await harness.settle()
    done = await pruned(harness)
    assert done["forgotten"] == [idle.worker_id]
    why = {one["id"]: one["why"] for one in done["kept"]}
    assert why.keys() == {holder.worker_id, drained.worker_id}
    assert "may still have what was written last in desk" in why[holder.worker_id]
    assert "an operator drained it" in why[drained.worker_id]
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    assert (await pruned(harness))["forgotten"] == [holder.worker_id], "files of a released rental are not needed"
    assert await ids(harness) == {drained.worker_id}


async def test_a_removed_worker_that_returns_is_a_new_one_and_is_cleaned(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    holder = harness.agent_of(rental)
    holder.die()
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.as_admin.post(f"/api/workers/{holder.worker_id}/gone")
    await harness.settle()
    before = holder.worker_id
    assert (await pruned(harness))["forgotten"] == [before]
    await harness.settle()
    holder.token = None
    assert (await holder.come_back()).status_code == 201
    await harness.settle()
    assert holder.worker_id != before
    assert await harness.health(holder) == "ready"
    assert holder.node.accounts == {}, "residue of the released rental was purged"
