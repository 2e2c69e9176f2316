"""Workers whose container was removed: how that is noticed, when rentals are taken over, when workers are removed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.house import Agent, House
from support.way_in import Sshds, coming_in
from test_api_access import is_problem


@pytest.fixture
async def pool(house: House) -> list[Agent]:
    """Return three ready workers, after the brake of the start has ended."""
    agents = [await house.join() for _ in range(3)]
    house.end_the_brake_of_the_start()
    return agents


async def ids(house: House) -> set[str]:
    return {one["id"] for one in (await house.as_admin.get("/api/workers")).json()["items"]}


async def pruned(house: House) -> dict[str, Any]:
    reply: dict[str, Any] = (await house.as_admin.post("/api/workers/prune")).json()
    return reply


async def test_a_worker_declared_gone_is_down_at_once_also_after_a_restart_of_the_manager(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    lost = house.agent_of(rental)
    lost.die()
    await house.restart()
    for agent in pool:
        if agent is not lost:
            await agent.register()
    await house.settle()
    assert await house.health(lost) == "unknown"
    reply = await house.as_admin.post(f"/api/workers/{lost.worker_id}/gone")
    assert reply.status_code == 200
    await house.settle()
    assert await house.health(lost) == "down"
    moved = await house.rental(rental["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert (await house.events("worker.declared_gone"))[0]["worker_id"] == lost.worker_id
    again = await house.as_admin.post(f"/api/workers/{lost.worker_id}/gone")
    assert (again.status_code, again.json()["health"]) == (200, "down")


async def test_a_release_ends_when_its_worker_is_declared_gone(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    lost = house.agent_of(rental)
    lost.die()
    await house.as_admin.delete(f"/api/rentals/{rental['id']}")
    await house.settle()
    assert (await house.rental(rental["id"]))["state"] == "releasing"
    await house.as_admin.post(f"/api/workers/{lost.worker_id}/gone")
    await house.settle()
    assert (await house.rental(rental["id"]))["state"] == "released"


async def test_a_worker_that_answers_cannot_be_declared_gone(house: House, pool: list[Agent]) -> None:
    refused = await house.as_admin.post(f"/api/workers/{pool[0].worker_id}/gone")
    is_problem(refused, 409, "worker_answers")
    await house.settle()
    assert await house.health(pool[0]) == "ready"


async def test_a_worker_that_was_declared_gone_and_sends_a_heartbeat_becomes_ready(
    house: House, pool: list[Agent]
) -> None:
    pool[0].node.alive = False
    assert (await house.as_admin.post(f"/api/workers/{pool[0].worker_id}/gone")).status_code == 200
    pool[0].node.alive = True
    assert (await pool[0].beat()).status_code == 200
    await house.settle()
    assert await house.health(pool[0]) == "ready"


async def test_only_an_admin_can_declare_a_worker_gone_or_prune(house: House, pool: list[Agent]) -> None:
    client = await house.new_client("bob")
    is_problem(await client.post(f"/api/workers/{pool[0].worker_id}/gone"), 403, "forbidden")
    is_problem(await client.post("/api/workers/prune"), 403, "forbidden")
    is_problem(await house.as_admin.post("/api/workers/w-never/gone"), 404, "not_found")


async def test_another_worker_at_its_address_ends_the_doubled_grace_and_is_named_in_refusals(
    house: House, pool: list[Agent], sshds: Sshds
) -> None:
    """The worker may live on without a network, so its lease of before the restart must pass: 90 s, and not 180."""
    rental = await house.rent()
    lost = house.agent_of(rental)
    lost.die()
    await house.restart()
    others = [agent for agent in pool if agent is not lost]
    for agent in others:
        await agent.register()
    newcomer = house.new_agent()
    newcomer.node.host = replace(newcomer.node.host, address=lost.node.host.address)
    assert (await newcomer.register()).status_code == 201
    await house.settle()
    async with coming_in(house, rental["id"], house.secrets.admin_token) as client:
        refused = await client.refusal()
    assert (refused["status"], refused["code"]) == (502, "worker_unreachable")
    assert f"{newcomer.worker_id} has its address now" in refused["detail"]
    assert sshds.connected == [], "no session is relayed to another worker at that address"
    shown = await house.worker(lost)
    assert shown["health"] == "unknown"
    assert f"worker {newcomer.worker_id} has its address now: its container is gone" in shown["explanation"]
    house.end_the_brake_of_the_start()
    house.manager.health.brake = replace(house.manager.health.brake, disturbed_at=house.clock.now)
    await house.pass_time(85)
    assert await house.health(lost) == "unknown"
    await house.pass_time(10)
    assert await house.health(lost) == "down"
    assert (await house.rental(rental["id"]))["state"] == "active"


async def test_a_worker_that_comes_back_at_another_address_is_not_displaced(house: House, pool: list[Agent]) -> None:
    lost, address = pool[0], pool[0].node.host.address
    lost.die()
    newcomer = house.new_agent()
    newcomer.node.host = replace(newcomer.node.host, address=address)
    assert (await newcomer.register()).status_code == 201
    assert "has its address now" in (await house.worker(lost))["explanation"]
    lost.node.host = replace(lost.node.host, address="172.20.128.99")
    assert (await lost.come_back()).status_code == 201
    await house.settle()
    assert "has its address now" not in (await house.worker(lost))["explanation"]


async def test_a_dead_worker_whose_files_are_not_needed_is_removed_after_an_hour(
    house: House, pool: list[Agent]
) -> None:
    pool[0].die()
    await house.silence(pool[0], 91)
    assert await house.health(pool[0]) == "down"
    await house.pass_time(3500, step_s=100)
    assert pool[0].worker_id in await ids(house)
    await house.pass_time(300, step_s=100)
    assert await ids(house) == {agent.worker_id for agent in pool[1:]}
    assert [event["actor"] for event in await house.events("worker.removed")] == ["health"]


async def test_prune_removes_dead_workers_except_those_that_may_have_the_newest_files(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent(name="desk")
    holder = house.agent_of(rental)
    idle = next(agent for agent in pool if agent is not holder)
    drained = next(agent for agent in pool if agent not in (holder, idle))
    await house.as_admin.post(f"/api/workers/{drained.worker_id}/drain")
    await house.settle()
    for agent in pool:
        agent.die()
    assert await pruned(house) == {"forgotten": [], "kept": []}, "no worker is down"
    for agent in pool:
        await house.as_admin.post(f"/api/workers/{agent.worker_id}/gone")
    await house.settle()
    done = await pruned(house)
    assert done["forgotten"] == [idle.worker_id]
    why = {one["id"]: one["why"] for one in done["kept"]}
    assert why.keys() == {holder.worker_id, drained.worker_id}
    assert "may still have what was written last in desk" in why[holder.worker_id]
    assert "an operator drained it" in why[drained.worker_id]
    await house.as_admin.delete(f"/api/rentals/{rental['id']}")
    await house.settle()
    assert (await pruned(house))["forgotten"] == [holder.worker_id], "files of a released rental are not needed"
    assert await ids(house) == {drained.worker_id}


async def test_a_removed_worker_that_returns_is_a_new_one_and_is_cleaned(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    holder = house.agent_of(rental)
    holder.die()
    await house.as_admin.delete(f"/api/rentals/{rental['id']}")
    await house.as_admin.post(f"/api/workers/{holder.worker_id}/gone")
    await house.settle()
    before = holder.worker_id
    assert (await pruned(house))["forgotten"] == [before]
    await house.settle()
    holder.token = None
    assert (await holder.come_back()).status_code == 201
    await house.settle()
    assert holder.worker_id != before
    assert await house.health(holder) == "ready"
    assert holder.node.accounts == {}, "residue of the released rental was purged"
