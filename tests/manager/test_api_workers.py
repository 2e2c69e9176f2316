"""Workers over the API: registration, heartbeats, identity, and what operators may do with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.builders import host_key
from support.harness import Agent, Harness
from test_api_access import is_problem

from orion import wire


@pytest.fixture
async def agent(harness: Harness) -> Agent:
    agent = await harness.join()
    harness.end_the_brake_of_the_start()
    return agent


def keys_become(agent: Agent, *keys: str) -> None:
    agent.node.host = replace(agent.node.host, host_keys=keys)


async def test_a_registration_answers_with_all_that_the_agent_needs(harness: Harness) -> None:
    agent = harness.new_agent()
    answer = wire.RegisterReply.model_validate((await agent.register()).json())
    assert (answer.heartbeat_interval_s, answer.lease_s) == (30, 75)
    assert answer.authorized_keys == [harness.secrets.ssh_public_key]
    assert answer.worker_token.startswith(f"orion_worker_{answer.worker_id}_")
    assert answer.placements == []


async def test_a_worker_s_address_is_the_one_that_the_proxy_saw(harness: Harness, agent: Agent) -> None:
    shown = wire.Worker.model_validate(await harness.worker(agent))
    assert (shown.address, shown.hostname) == (agent.node.host.address, agent.hostname)
    assert (shown.health, shown.intent, shown.slots, shown.slots_free) == ("ready", "active", 1, 1)


@pytest.mark.parametrize("address", ["172.20.0.2", "172.20.0.3", "172.20.0.1", "203.0.113.5", "", "rubbish"])
async def test_no_worker_registers_from_outside_the_subnet(harness: Harness, address: str) -> None:
    agent = harness.new_agent()
    agent.node.host = replace(agent.node.host, address=address)
    is_problem(await agent.register(), 403, "address_not_in_pool")
    assert (await harness.as_admin.get("/api/workers")).json()["items"] == []


async def test_a_worker_with_its_token_keeps_its_identity_at_another_address_too(
    harness: Harness, agent: Agent
) -> None:
    before = agent.worker_id, agent.token, agent.session
    agent.node.host = replace(agent.node.host, address="172.20.128.99")
    reply = await agent.register()
    assert reply.status_code == 201
    assert (agent.worker_id, agent.token) == before[:2]
    assert agent.session != before[2]
    assert (await harness.worker(agent))["address"] == "172.20.128.99"


async def test_a_duplicate_of_a_worker_s_volume_is_refused_while_the_worker_answers(
    harness: Harness, agent: Agent
) -> None:
    rental = await harness.rent()
    copy = harness.new_agent()
    copy.token, copy.node.boot_id = agent.token, "another-life"
    keys_become(copy, *agent.node.host.host_keys)
    problem = is_problem(await copy.register(), 409, "identity_in_use")
    assert f"still answers at {agent.node.host.address}" in problem["detail"]
    assert (await agent.beat()).status_code == 200
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "active"
    assert agent.unlocked() == {rental["id"]: 1}
    agent.die()
    assert (await copy.register()).status_code == 201, "the worker has moved, with its volume"
    assert copy.worker_id == agent.worker_id


async def test_a_worker_whose_reply_was_lost_is_the_same_worker_with_a_new_token(
    harness: Harness, agent: Agent
) -> None:
    before = agent.worker_id, agent.token
    agent.token = None
    assert (await agent.register()).status_code == 201
    assert agent.worker_id == before[0]
    assert agent.token != before[1]
    assert len((await harness.as_admin.get("/api/workers")).json()["items"]) == 1
    is_problem(
        await harness.client(before[1] or "").post("/api/heartbeat", json={"session_id": agent.session, "seq": 1}),
        401,
        "unauthorized",
    )


async def test_an_address_is_refused_while_the_worker_that_holds_it_answers_there(
    harness: Harness, agent: Agent
) -> None:
    intruder = harness.new_agent()
    intruder.node.host = replace(intruder.node.host, address=agent.node.host.address)
    problem = is_problem(await intruder.register(), 409, "address_in_use")
    assert agent.worker_id in problem["detail"]
    assert (await agent.beat()).status_code == 200


@pytest.mark.parametrize("what", ["dead", "impostor"])
async def test_an_address_is_free_when_its_worker_no_longer_answers_there(
    harness: Harness, agent: Agent, what: str
) -> None:
    newcomer = harness.new_agent()
    newcomer.node.host = replace(newcomer.node.host, address=agent.node.host.address)
    if what == "dead":
        agent.node.die()
    else:
        harness.world.workers[agent.node.host.address, 22] = newcomer.node
    assert (await newcomer.register()).status_code == 201
    assert newcomer.worker_id != agent.worker_id


async def test_many_registrations_from_one_address_leave_one_new_worker(harness: Harness, agent: Agent) -> None:
    """An attacker with the join token ends the sshd of their own worker first."""
    agent.node.die()
    for _ in range(30):
        newcomer = harness.new_agent()
        newcomer.node.host = replace(newcomer.node.host, address=agent.node.host.address)
        newcomer.node.die()
        assert (await newcomer.register()).status_code == 201
    known = [worker["id"] for worker in (await harness.as_admin.get("/api/workers")).json()["items"]]
    assert sorted(known) == sorted([agent.worker_id, newcomer.worker_id])
    assert [worker_id for worker_id in known if harness.manager.leases.get(worker_id)] == known


async def test_a_worker_with_a_token_but_other_host_keys_is_not_taken_for_itself(
    harness: Harness, agent: Agent
) -> None:
    keys_become(agent, host_key(777))
    is_problem(await agent.register(), 409, "host_key_changed")


async def test_a_worker_with_a_token_and_its_own_keys_is_itself_though_another_row_has_the_same_keys(
    harness: Harness, agent: Agent
) -> None:
    """Two containers of an image that contains host keys get each other's address."""
    twin = harness.new_agent()
    keys_become(twin, *agent.node.host.host_keys)
    await twin.register()
    assert twin.worker_id != agent.worker_id
    twin.node.host = replace(twin.node.host, address=agent.node.host.address)
    agent.node.die()
    before = twin.worker_id
    assert (await twin.register()).status_code == 201
    assert twin.worker_id == before
    assert (await twin.beat()).status_code == 200


async def test_a_removed_worker_s_token_is_worth_nothing(harness: Harness, agent: Agent) -> None:
    agent.die()
    await harness.silence(agent, 91)
    assert (await harness.as_admin.delete(f"/api/workers/{agent.worker_id}")).status_code == 204
    agent.node.come_back()
    is_problem(await agent.register(), 401, "unauthorized")
    agent.token = None
    assert (await agent.register()).status_code == 201


@pytest.mark.parametrize(
    "change",
    [
        {"ssh_host_keys": []},
        {"ssh_host_keys": ["rubbish"]},
        {"slots": 0},
        {"hostname": "-"},
        {"boot_id": "x"},
        {"address": "172.20.128.7"},
        {"inventory": [{"rental_id": "x", "username": "root", "uid": 100_000, "epoch": 1, "state": "locked"}]},
        {"inventory": [{"rental_id": "x", "username": "r-x", "uid": 0, "epoch": 1, "state": "locked"}]},
        {"inventory": [{"rental_id": "../x", "username": "r-x", "uid": 100_000, "epoch": 1, "state": "locked"}]},
    ],
    ids=lambda change: f"{next(iter(change))} {str(change)[-60:]}",
)
async def test_a_registration_out_of_the_contract_is_refused(harness: Harness, change: dict[str, Any]) -> None:
    body = {"hostname": "n", "ssh_host_keys": [host_key(5)], "boot_id": "boot-0001", "agent_version": "1"} | change
    client = harness.client(harness.secrets.join_token)
    reply = await client.post("/api/register", json=body, headers={"X-Real-IP": "172.20.128.50"})
    is_problem(reply, 422, "invalid_request")


async def test_a_heartbeat_renews_the_lease_and_its_reply_sets_the_next_interval_with_jitter(
    harness: Harness, agent: Agent
) -> None:
    replies = [wire.HeartbeatReply.model_validate((await agent.beat()).json()) for _ in range(20)]
    assert {reply.lease_s for reply in replies} == {75.0}
    assert all(27 <= reply.next_heartbeat_s <= 31.5 for reply in replies)
    assert len({reply.next_heartbeat_s for reply in replies}) > 1


async def test_a_worker_that_reports_a_longer_lease_gets_a_short_interval(harness: Harness, agent: Agent) -> None:
    reply = wire.HeartbeatReply.model_validate((await agent.beat(lease_s=80.0)).json())
    assert (reply.lease_s, reply.next_heartbeat_s) == (75.0, 0.5)


async def test_a_heartbeat_s_load_and_time_are_shown(harness: Harness, agent: Agent) -> None:
    load = {"cpu": 1.5, "memory_used_bytes": 10, "memory_limit_bytes": 20, "processes": 3}
    await agent.beat(load=load)
    await harness.settle()
    shown = wire.Worker.model_validate(await harness.worker(agent))
    assert shown.load.model_dump() == load
    assert shown.last_heartbeat_at is not None
    assert shown.last_heartbeat_at.timestamp() == pytest.approx(harness.clock.wall())


async def test_a_heartbeat_is_shown_before_it_is_written(harness: Harness, agent: Agent) -> None:
    harness.clock.now += 7.0
    await agent.beat(load={"processes": 3})
    (listed,) = (await harness.as_admin.get("/api/workers")).json()["items"]
    for shown in (listed, await harness.worker(agent)):
        worker = wire.Worker.model_validate(shown)
        assert worker.load.processes == 3
        assert worker.last_heartbeat_at is not None
        assert worker.last_heartbeat_at.timestamp() == pytest.approx(harness.clock.wall())


async def test_a_heartbeat_of_another_session_or_an_old_number_is_told_to_register(
    harness: Harness, agent: Agent
) -> None:
    agent.seq = 10
    assert (await agent.beat()).status_code == 200
    is_problem(await agent.beat(seq=3), 409, "stale_session")
    is_problem(await agent.beat(session_id="another-session"), 409, "stale_session")


async def test_a_heartbeat_after_the_verdict_is_told_to_register(harness: Harness, agent: Agent) -> None:
    await harness.silence(agent, 91)
    assert await harness.health(agent) == "down"
    is_problem(await agent.beat(), 409, "stale_session")
    assert (await agent.register()).status_code == 201
    await harness.settle()
    assert await harness.health(agent) == "ready"


async def test_a_heartbeat_s_reply_says_what_to_run_and_what_to_purge(harness: Harness, agent: Agent) -> None:
    rental = await harness.rent()
    stranger = {"rental_id": "stranger", "username": "r-stranger", "uid": 100_500, "epoch": 1, "state": "locked"}
    reply = await agent.beat(inventory=[*agent.inventory(), stranger])
    assert reply.json()["placements"] == [
        {"rental_id": rental["id"], "epoch": 1, "want": "run"},
        {"rental_id": "stranger", "epoch": 1, "want": "purge"},
    ]


async def test_workers_are_listed_in_pages(harness: Harness) -> None:
    made = {(await harness.join()).worker_id for _ in range(5)}
    first = (await harness.as_admin.get("/api/workers?limit=3")).json()
    second = (await harness.as_admin.get(f"/api/workers?limit=3&after={first['next']}")).json()
    assert [w["id"] for w in first["items"] + second["items"]] == sorted(made)
    assert second["next"] is None


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/drain"), ("POST", "/resume"), ("DELETE", "")])
async def test_calls_for_an_unknown_worker_answer_not_found(harness: Harness, method: str, path: str) -> None:
    is_problem(await harness.as_admin.request(method, f"/api/workers/w-never{path}"), 404, "not_found")


async def test_drain_and_resume_are_repeatable_and_leave_one_event_each(harness: Harness, agent: Agent) -> None:
    for _ in range(2):
        reply = await harness.as_admin.post(f"/api/workers/{agent.worker_id}/drain")
        assert (reply.status_code, reply.json()["intent"]) == (200, "draining")
    for _ in range(2):
        reply = await harness.as_admin.post(f"/api/workers/{agent.worker_id}/resume")
        assert (reply.status_code, reply.json()["intent"]) == (200, "active")
    assert len(await harness.events("worker.drain_started")) == len(await harness.events("worker.resumed")) == 1


async def test_no_rental_migrates_to_a_worker_that_is_drained_together_with_its_own(harness: Harness) -> None:
    """Drained one after the other, the rental of the first would migrate to the roomy one, and then away again."""
    first = await harness.join(slots=1)
    rental = await harness.rent()
    roomy, last = await harness.join(slots=4), await harness.join(slots=1)
    ids = [first.worker_id, roomy.worker_id]
    reply = await harness.as_admin.post("/api/workers/drain", json={"worker_ids": ids})
    assert [(one["id"], one["intent"]) for one in reply.json()["items"]] == [(each, "draining") for each in ids]
    await harness.settle()
    moves = await harness.events("rental.move_started")
    assert [event["worker_id"] for event in moves] == [last.worker_id]
    assert (await harness.rental(rental["id"]))["worker_id"] == last.worker_id


async def test_no_worker_is_drained_if_one_of_them_is_unknown(harness: Harness, agent: Agent) -> None:
    reply = await harness.as_admin.post("/api/workers/drain", json={"worker_ids": [agent.worker_id, "w-never"]})
    is_problem(reply, 404, "not_found")
    assert (await harness.worker(agent))["intent"] == "active"


async def test_a_drained_worker_that_is_drained_again_stays_drained(harness: Harness, agent: Agent) -> None:
    for _ in range(2):
        await harness.as_admin.post(f"/api/workers/{agent.worker_id}/drain")
        await harness.settle()
        assert (await harness.worker(agent))["intent"] == "drained"


async def test_a_worker_at_fault_can_be_resumed_before_it_is_quarantined(harness: Harness, agent: Agent) -> None:
    """A resume ends the fault, also before the health controller has quarantined the worker."""
    agent.die()
    rental = await harness.rent()
    agent.node.alive, agent.node.failure = True, "stuck"
    agent.beating = True
    assert rental["state"] != "active"
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.pass_time(140)
    assert await harness.health(agent) == "quarantined"
    agent.die()
    await harness.silence(agent, 91)
    assert await harness.health(agent) == "down"
    agent.node.failure = ""
    await harness.as_admin.post(f"/api/workers/{agent.worker_id}/resume")
    await agent.come_back()
    await harness.settle()
    assert await harness.health(agent) == "ready"


async def test_a_worker_in_use_is_not_removed_and_one_that_is_down_is(harness: Harness, agent: Agent) -> None:
    rental = await harness.rent()
    is_problem(await harness.as_admin.delete(f"/api/workers/{agent.worker_id}"), 409, "worker_in_use")
    agent.die()
    await harness.silence(agent, 91)
    assert (await harness.as_admin.delete(f"/api/workers/{agent.worker_id}")).status_code == 204
    await harness.settle()
    waiting = await harness.rental(rental["id"])
    assert (waiting["state"], waiting["worker_id"]) == ("queued", None)
    assert [p["state"] for p in await harness.placements()] == ["purged"]


async def test_an_idle_worker_is_removed_and_calls_home_as_a_new_one(harness: Harness, agent: Agent) -> None:
    before = agent.worker_id
    assert (await harness.as_admin.delete(f"/api/workers/{before}")).status_code == 204
    is_problem(await agent.beat(), 401, "unauthorized")
    agent.token = None
    await agent.register()
    await harness.settle()
    assert agent.worker_id != before
    assert await harness.health(agent) == "ready"
