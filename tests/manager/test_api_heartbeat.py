"""The heartbeat's two readers take the same bodies and give the same answers; a token counts by what is committed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.harness import Agent, Harness
from test_api_access import is_problem

from orion import wire
from orion.manager.api import heartbeat
from orion.manager.domain.states import Health
from orion.manager.domain.steps import move_worker
from orion.manager.store import state

ITEM = {"rental_id": "abcdef", "username": "r-abcdef", "uid": 100_001, "epoch": 1, "state": "running"}
LOAD = {"cpu": 0.5, "memory_used_bytes": 1, "memory_limit_bytes": 2, "processes": 3}
END = {"rental_id": "abcdef", "epoch": 1, "run": "1@boot-0001", "how": "status 3", "ago_s": 5.0}
WHOLE = {
    "session_id": "session-0001",
    "seq": 1,
    "load": LOAD,
    "inventory": [ITEM],
    "lease_s": 75.0,
    "start_ends": [END],
    "leaving": False,
}
NUMBERS: list[Any] = [0, 1, -1, 2, 1.0, 1.5, -0.5, 1e3, 4096, 4097, 86_401, 99_999, 2**31, 2**53, 2**63, 10**30]
TEXTS = ["", "1", "1.5", "true", "running", "abc", "abc\n", "r-abc", "r-abc\n", "session-0001\n", "x" * 64, "x" * 65]
TEXTS += [
    "1@boot",
    "1@boot\n",
    "1@",
    "@boot",
    "status 3",
    "status 3\n",
    "status 1000",
    "signal 9",
    "signal 99 ",
    "unseen",
]
ODD = [None, True, False, "Ünïcode-0", "\u0000", [], {}, [1], {"a": 1}]
PLACES = [
    *((field,) for field in (*WHOLE, "another")),
    *(("load", field) for field in (*LOAD, "another")),
    *(("inventory", 0, field) for field in (*ITEM, "another")),
    *(("start_ends", 0, field) for field in (*END, "another")),
]


def put(value: Any, *place: Any) -> bytes:
    """Return the body with one value replaced."""
    body: Any = json.loads(json.dumps(WHOLE))
    inner = body
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return json.dumps(body).encode()


def by_pydantic(raw: bytes) -> dict[str, Any] | None:
    """Read a heartbeat as FastAPI does."""
    try:
        return wire.HeartbeatRequest.model_validate(json.loads(raw)).model_dump()
    except (ValidationError, ValueError):
        return None


def by_msgspec(raw: bytes) -> dict[str, Any] | None:
    found = heartbeat._decoded(raw)
    return None if found is None else msgspec.to_builtins(found)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_both_readers_of_heartbeats_accept_the_same_values_everywhere(place: tuple[Any, ...]) -> None:
    for value in (*NUMBERS, *TEXTS, *ODD):
        raw = put(value, *place)
        assert by_msgspec(raw) == by_pydantic(raw), value


@pytest.mark.parametrize("field", WHOLE)
def test_both_readers_of_heartbeats_require_the_same_fields(field: str) -> None:
    raw = json.dumps({name: value for name, value in WHOLE.items() if name != field}).encode()
    assert by_msgspec(raw) == by_pydantic(raw)


@pytest.mark.parametrize("number", [0, 10_000, 10_001])
def test_both_readers_of_heartbeats_accept_inventories_of_the_same_length(number: int) -> None:
    raw = put([ITEM] * number, "inventory")
    assert (by_msgspec(raw) is None, by_pydantic(raw) is None) == (number > 10_000, number > 10_000)


@pytest.mark.parametrize("number", [0, 256, 257])
def test_both_readers_of_heartbeats_accept_the_same_number_of_start_ends(number: int) -> None:
    raw = put([END] * number, "start_ends")
    assert (by_msgspec(raw) is None, by_pydantic(raw) is None) == (number > 256, number > 256)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WHOLE, *ITEM, *LOAD]), inner),
    max_leaves=6,
)


@given(st.sampled_from(PLACES), ANY)
def test_both_readers_of_heartbeats_agree_on_any_body(place: tuple[Any, ...], value: Any) -> None:
    raw = put(value, *place)
    assert by_msgspec(raw) == by_pydantic(raw)


@pytest.fixture
async def agent(harness: Harness) -> Agent:
    agent = await harness.join()
    harness.end_the_brake_of_the_start()
    return agent


async def post(harness: Harness, agent: Agent, kind: str = "application/json", **request: Any) -> httpx.Response:
    headers = {"Content-Type": kind, "X-Real-IP": agent.node.host.address}
    return await harness.client(agent.token or "").post("/api/heartbeat", headers=headers, **request)


def body_of(agent: Agent, **change: Any) -> str:
    agent.seq += 1
    return json.dumps(
        {"session_id": agent.session, "seq": agent.seq, "inventory": agent.inventory(), "lease_s": 75.0} | change
    )


async def test_a_well_formed_heartbeat_reads_no_database(
    harness: Harness, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await harness.rent()

    async def nobody(*_: Any, **__: Any) -> None:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(harness.store, "read", nobody)
    monkeypatch.setattr(harness.store, "write", nobody)
    reply = await post(harness, agent, content=body_of(agent))
    assert reply.status_code == 200, reply.text
    parsed = wire.HeartbeatReply.model_validate(reply.json())
    assert [order.want for order in parsed.placements] == [wire.Want.RUN]


async def test_the_fastapi_route_of_heartbeats_gives_the_same_answer(harness: Harness, agent: Agent) -> None:
    await harness.rent()
    fast = (await post(harness, agent, content=body_of(agent))).json()
    slow = (await post(harness, agent, "application/json;charset=utf8", content=body_of(agent))).json()
    assert fast["placements"] == slow["placements"] != []
    assert (fast["lease_s"], fast.keys()) == (slow["lease_s"], slow.keys())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"session_id": "session-0001"}'])
async def test_an_invalid_heartbeat_is_refused_as_by_every_other_route(
    harness: Harness, agent: Agent, content: bytes
) -> None:
    is_problem(await post(harness, agent, content=content), 422, "invalid_request")


async def test_a_heartbeat_without_the_json_content_type_is_refused(harness: Harness, agent: Agent) -> None:
    reply = await post(harness, agent, "text/plain", content=body_of(agent))
    assert "Content-Type: application/json" in is_problem(reply, 422, "invalid_request")["detail"]


@pytest.mark.parametrize("token", ["", "rubbish", "orion_worker_w-nobody_" + "x" * 43])
async def test_an_unknown_worker_token_is_refused(harness: Harness, token: str) -> None:
    reply = await harness.client(token).post("/api/heartbeat", json=WHOLE)
    is_problem(reply, 401, "unauthorized")
    assert reply.headers["www-authenticate"].startswith("Bearer")


async def test_another_worker_s_secret_under_this_worker_s_name_is_refused(harness: Harness, agent: Agent) -> None:
    other = await harness.join()
    name, secret = (agent.token or "").rpartition("_")[0], (other.token or "").rpartition("_")[2]
    agent.token = f"{name}_{secret}"
    is_problem(await agent.beat(), 401, "unauthorized")


async def test_a_token_is_void_as_soon_as_another_was_given_and_the_new_one_outlives_a_restart(
    harness: Harness, agent: Agent
) -> None:
    old, agent.token = agent.token, None
    await agent.register()
    new = agent.token
    for _ in range(2):
        agent.token = new
        assert (await agent.beat()).status_code == 200
        agent.token = old
        is_problem(await agent.beat(), 401, "unauthorized")
        await harness.restart()


async def test_a_rolled_back_token_is_not_known(harness: Harness, agent: Agent) -> None:
    (worker,) = (await harness.manager.state_store.workers([agent.worker_id])).values()

    def half(connection: Any) -> None:
        assert state.apply(connection, [move_worker(worker, Health.SUSPECT, "a test")])
        raise RuntimeError("a full disk")

    with pytest.raises(RuntimeError):
        await harness.store.write(half)
    known = harness.manager.pool_index.worker(agent.worker_id)
    assert known is not None
    assert known.health is Health.READY
    await harness.compare_pool_index()


async def test_a_task_that_waited_for_a_commit_finds_it_in_memory(harness: Harness, agent: Agent) -> None:
    (worker,) = (await harness.manager.state_store.workers([agent.worker_id])).values()
    assert await harness.manager.state_store.apply([move_worker(worker, Health.SUSPECT, "a test")])
    known = harness.manager.pool_index.worker(agent.worker_id)
    assert known is not None
    assert known.health is Health.SUSPECT


async def test_heartbeats_are_written_once_a_second_at_any_rate_of_rounds(
    harness: Harness, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[str]] = []

    async def record_heartbeats(notes: Any) -> None:
        written.append([worker_id for worker_id, _, _ in notes])

    monkeypatch.setattr(harness.manager.state_store, "record_heartbeats", record_heartbeats)
    for _ in range(4):
        for _ in range(3):
            await agent.beat()
            await harness.manager.health.round()
        harness.clock.now += 0.5
    assert written == [[agent.worker_id]] * 2


async def test_a_worker_that_comes_back_with_another_address_registers_again(harness: Harness, agent: Agent) -> None:
    rental = await harness.rent()
    places, before = harness.world.workers, agent.node.host
    agent.node.host = replace(before, address="172.20.128.77")
    places["172.20.128.77", before.port] = places.pop((before.address, before.port))
    harness.clock.now += 5
    refused = await agent.beat()
    assert (refused.status_code, refused.json()["code"]) == (409, "stale_session")
    assert "172.20.128.77" in refused.json()["detail"]
    lease = harness.manager.leases.get(agent.worker_id)
    assert lease is not None
    assert lease.received_at == agent.last_beat < harness.clock.now, "nothing of a rolled back transaction counts"
    assert (await agent.register()).status_code == 201
    await harness.settle()
    shown = await harness.worker(agent)
    assert (shown["address"], shown["health"]) == ("172.20.128.77", "ready")
    after = await harness.rental(rental["id"])
    assert (after["state"], after["epoch"], after["worker_id"]) == ("active", 1, agent.worker_id)
    assert (await agent.beat()).status_code == 200
