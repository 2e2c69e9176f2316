"""Rentals over the API: rent, wait, list, show, renew, release, and who may see which rental."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncssh
import httpx
import pytest
from sqlalchemy import Connection
from support.builders import host_key
from support.harness import WALL_START, Agent, Harness
from test_api_access import is_problem

from orion import wire


@pytest.fixture
async def alice(harness: Harness) -> httpx.AsyncClient:
    return await harness.new_client("alice")


@pytest.fixture
async def agent(harness: Harness) -> Agent:
    return await harness.join(slots=4)


async def until_queued(harness: Harness, known: int = 0) -> None:
    """Wait until another rental is in the database, while the request that made it goes on waiting."""
    with harness.store.news.listen("*") as changed:
        while len(await harness.events("rental.queued")) <= known:
            await asyncio.wait_for(changed.wait(), 20)
            changed.clear()


async def rent_and_wait(harness: Harness, client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    known = len(await harness.events("rental.queued"))
    waiting = asyncio.create_task(client.post("/api/rent", json=body))
    await until_queued(harness, known)
    await harness.settle()
    return await asyncio.wait_for(waiting, 20)


async def test_a_rent_answers_201_with_the_rental_when_it_is_active(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    reply = await rent_and_wait(harness, alice, name="lab", ttl_s=3600, labels={"course": "iac"})
    assert reply.status_code == 201
    rental = wire.RentReply.model_validate(reply.json())
    assert reply.headers["location"] == f"/api/rentals/{rental.id}"
    assert (rental.name, rental.owner, rental.state, rental.epoch) == ("lab", "alice", "active", 1)
    assert (rental.worker_id, rental.username) == (agent.worker_id, f"r-{rental.id}")
    assert rental.ssh_host_keys == list(agent.node.host.host_keys)
    assert rental.labels == {"course": "iac"}
    assert rental.expires_at == datetime.fromtimestamp(WALL_START, UTC) + timedelta(hours=1)
    assert rental.last_safe_copy_at is None


async def test_a_made_key_opens_the_rental_and_is_returned_once(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    rental = (await rent_and_wait(harness, alice)).json()
    public = asyncssh.import_private_key(rental["ssh_private_key"]).export_public_key().decode().strip()
    assert agent.node.accounts[rental["id"]].keys == (public,)
    assert "ssh_private_key" not in (await alice.get(f"/api/rentals/{rental['id']}")).json()
    assert not any("PRIVATE" in str(event) for event in await harness.events())


async def test_the_renter_s_own_key_is_used_without_its_comment_and_none_is_made(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    rental = (await rent_and_wait(harness, alice, ssh_public_key=f"{host_key(7)} alice@home")).json()
    assert rental["ssh_private_key"] is None
    assert agent.node.accounts[rental["id"]].keys == (host_key(7),)


async def test_a_rent_that_does_not_wait_answers_202_at_once(harness: Harness, alice: httpx.AsyncClient) -> None:
    reply = await alice.post("/api/rent", json={"wait_s": 0})
    assert (reply.status_code, reply.json()["state"]) == (202, "queued")


async def test_a_rent_whose_wait_ends_says_what_it_waits_for(harness: Harness, alice: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(alice.post("/api/rent", json={"wait_s": 0.05}))
    await until_queued(harness)
    await harness.settle()
    harness.clock.now += 1
    reply = await asyncio.wait_for(waiting, 20)
    assert reply.status_code == 202
    assert reply.json()["explanation"] == "waiting: the pool has no worker. It starts by itself when one joins"


async def test_a_rent_is_not_active_for_its_renter_before_the_key_of_this_reply_is_in_place(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    headers = {"Idempotency-Key": "once"}
    await alice.post("/api/rent", json={"wait_s": 0}, headers=headers)
    await harness.settle()
    again = await alice.post("/api/rent", json={"wait_s": 0}, headers=headers)
    assert (again.status_code, again.json()["state"]) == (202, "active")


async def test_a_replay_answers_with_the_same_rental_and_a_key_that_opens_it(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    headers = {"Idempotency-Key": "once"}
    first = (await alice.post("/api/rent", json={"name": "lab", "wait_s": 0}, headers=headers)).json()
    await harness.settle()
    waiting = asyncio.create_task(alice.post("/api/rent", json={"name": "lab"}, headers=headers))
    while not waiting.done():
        await harness.settle()
    again = waiting.result()
    assert (again.status_code, again.json()["id"]) == (201, first["id"])
    public = asyncssh.import_private_key(again.json()["ssh_private_key"]).export_public_key().decode().strip()
    assert agent.node.accounts[first["id"]].keys == (public,)
    assert again.json()["ssh_private_key"] != first["ssh_private_key"]


async def test_a_replay_with_the_renter_s_own_key_changes_nothing(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    ask = {"ssh_public_key": host_key(7), "wait_s": 0}
    headers = {"Idempotency-Key": "once"}
    first = await alice.post("/api/rent", json=ask, headers=headers)
    await harness.settle()
    again = await alice.post("/api/rent", json=ask | {"wait_s": 10}, headers=headers)
    assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert len(await harness.events("rental.queued")) == 1


async def test_another_request_with_a_used_key_is_refused(harness: Harness, alice: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    await alice.post("/api/rent", json={"wait_s": 0}, headers=headers)
    reply = await alice.post("/api/rent", json={"wait_s": 0, "ttl_s": 60}, headers=headers)
    is_problem(reply, 409, "idempotency_conflict")


async def allow_pages(harness: Harness, more: int) -> None:
    """Let the database grow by this number of pages and no further: SQLite then fails as on a full disk."""

    def limit(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + more}")

    await harness.store.write(limit)


async def test_a_rent_on_a_full_database_writes_nothing_and_can_be_repeated(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    running = await harness.rent(name="before")
    await allow_pages(harness, 0)
    labels = {f"label-{number}": "x" * 63 for number in range(16)}
    for number in range(1000):
        ask = {"json": {"labels": labels, "wait_s": 0}, "headers": {"Idempotency-Key": f"rent-{number}"}}
        refused = await alice.post("/api/rent", **ask)
        if refused.status_code != 202:
            break
    is_problem(refused, 500, "internal_error")
    assert len(await harness.events("rental.queued")) == number + 1, "with the one from before"
    await harness.settle()
    assert (await harness.rental(running["id"]))["state"] == "active"
    await allow_pages(harness, 1000)
    repeated = await alice.post("/api/rent", **ask)
    assert repeated.status_code == 202
    assert len(await harness.events("rental.queued")) == number + 2


async def test_an_invalid_name_is_refused_with_the_rule_for_names(alice: httpx.AsyncClient) -> None:
    reply = await alice.post("/api/rent", json={"name": "My Lab\n", "wait_s": 0})
    is_problem(reply, 422, "invalid_request")
    assert reply.json()["detail"].startswith("name must be lowercase letters, digits and hyphens")


async def test_the_name_of_a_living_rental_is_taken_only_for_its_owner(
    harness: Harness, alice: httpx.AsyncClient
) -> None:
    bob = await harness.new_client("bob")
    assert (await alice.post("/api/rent", json={"name": "lab", "wait_s": 0})).status_code == 202
    is_problem(await alice.post("/api/rent", json={"name": "lab", "wait_s": 0}), 409, "name_taken")
    assert (await bob.post("/api/rent", json={"name": "lab", "wait_s": 0})).status_code == 202


async def test_an_admin_may_list_only_its_own_rentals(harness: Harness, alice: httpx.AsyncClient) -> None:
    for client in (alice, harness.as_admin):
        assert (await client.post("/api/rent", json={"name": "desk", "wait_s": 0})).status_code == 202
    for client, owner in ((harness.as_admin, "admin"), (alice, "alice")):
        (found,) = (await client.get("/api/rentals?name=desk&mine=true")).json()["items"]
        assert found["owner"] == owner


async def test_a_client_sees_its_own_rentals_and_an_admin_everybody_s(
    harness: Harness, alice: httpx.AsyncClient
) -> None:
    bob = await harness.new_client("bob")
    mine = (await alice.post("/api/rent", json={"wait_s": 0})).json()["id"]
    his = (await bob.post("/api/rent", json={"wait_s": 0})).json()["id"]

    async def ids(client: httpx.AsyncClient) -> set[str]:
        return {item["id"] for item in (await client.get("/api/rentals")).json()["items"]}

    assert await ids(alice) == {mine}
    assert await ids(bob) == {his}
    assert await ids(harness.as_admin) == {mine, his}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("GET", "", None), ("POST", "/renew", {"ttl_s": 60}), ("DELETE", "", None)],
    ids=["show", "renew", "release"],
)
async def test_another_client_s_rental_is_as_unknown_as_one_that_never_was(
    harness: Harness, alice: httpx.AsyncClient, method: str, path: str, body: Any
) -> None:
    bob = await harness.new_client("bob")
    hers = (await alice.post("/api/rent", json={"wait_s": 0})).json()["id"]
    theirs = await bob.request(method, f"/api/rentals/{hers}{path}", json=body)
    nobody_s = await bob.request(method, f"/api/rentals/never{path}", json=body)
    assert is_problem(theirs, 404, "not_found") == is_problem(nobody_s, 404, "not_found")
    assert (await alice.get(f"/api/rentals/{hers}")).json()["state"] == "queued"


async def test_an_admin_may_release_any_rental_and_the_event_names_that_admin(
    harness: Harness, alice: httpx.AsyncClient
) -> None:
    hers = (await alice.post("/api/rent", json={"wait_s": 0})).json()["id"]
    assert (await harness.as_admin.delete(f"/api/rentals/{hers}")).status_code == 202
    assert [(e["actor"], e["owner"]) for e in await harness.events("rental.release_started")] == [("admin", "alice")]


async def test_a_replaced_token_of_the_same_name_keeps_the_rentals(harness: Harness, alice: httpx.AsyncClient) -> None:
    hers = (await alice.post("/api/rent", json={"wait_s": 0})).json()["id"]
    tokens = (await harness.as_admin.get("/api/tokens")).json()["items"]
    (old,) = [token["id"] for token in tokens if token["name"] == "alice"]
    again = await harness.new_client("alice")
    assert (await harness.as_admin.delete(f"/api/tokens/{old}")).status_code == 204
    is_problem(await alice.get(f"/api/rentals/{hers}"), 401, "unauthorized")
    assert (await again.get(f"/api/rentals/{hers}")).json()["owner"] == "alice"


async def test_a_list_filters_by_exact_name_and_shows_what_ended_on_request(
    harness: Harness, alice: httpx.AsyncClient
) -> None:
    for name in ("lab", "lab-2"):
        await alice.post("/api/rent", json={"name": name, "wait_s": 0})
    (found,) = (await alice.get("/api/rentals?name=lab")).json()["items"]
    assert found["name"] == "lab"
    await alice.delete(f"/api/rentals/{found['id']}")
    await harness.settle()
    assert (await alice.get("/api/rentals?name=lab")).json()["items"] == []
    (ended,) = (await alice.get("/api/rentals?name=lab&ended=true")).json()["items"]
    assert (ended["id"], ended["state"]) == (found["id"], "released")


async def test_all_pages_of_a_list_hold_each_rental_once(harness: Harness, alice: httpx.AsyncClient) -> None:
    made = {(await alice.post("/api/rent", json={"wait_s": 0})).json()["id"] for _ in range(7)}
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = (await alice.get("/api/rentals", params={"limit": 3} | ({"after": after} if after else {}))).json()
        assert len(page["items"]) <= 3
        seen += [item["id"] for item in page["items"]]
        after = page["next"]
    assert seen == sorted(made)


async def test_a_page_that_is_just_full_is_the_last_one(harness: Harness, alice: httpx.AsyncClient) -> None:
    for _ in range(3):
        await alice.post("/api/rent", json={"wait_s": 0})
    assert (await alice.get("/api/rentals?limit=3")).json()["next"] is None


async def test_showing_waits_for_the_requested_state_and_is_woken_by_the_commit(
    harness: Harness, alice: httpx.AsyncClient
) -> None:
    rental_id = (await alice.post("/api/rent", json={"wait_s": 0})).json()["id"]
    waiting = asyncio.create_task(alice.get(f"/api/rentals/{rental_id}?state=active&wait_s=55"))
    await harness.settle()
    assert not waiting.done()
    await harness.join()
    reply = await asyncio.wait_for(waiting, 20)
    assert reply.json()["state"] == "active"


async def test_waiting_for_a_state_that_will_not_come_ends_with_the_rental(
    harness: Harness, alice: httpx.AsyncClient
) -> None:
    rental_id = (await alice.post("/api/rent", json={"wait_s": 0})).json()["id"]
    waiting = asyncio.create_task(alice.get(f"/api/rentals/{rental_id}?state=active&wait_s=55"))
    await alice.delete(f"/api/rentals/{rental_id}")
    await harness.settle()
    assert (await asyncio.wait_for(waiting, 20)).json()["state"] == "released"


async def test_a_renewal_counts_again_from_now(harness: Harness, alice: httpx.AsyncClient, agent: Agent) -> None:
    rental = (await rent_and_wait(harness, alice, ttl_s=60)).json()
    reply = await alice.post(f"/api/rentals/{rental['id']}/renew", json={"ttl_s": 7200})
    assert reply.status_code == 200
    renewed = wire.Rental.model_validate(reply.json())
    assert renewed.ttl_s == 7200
    assert renewed.expires_at is not None
    assert round(renewed.expires_at.timestamp() - harness.clock.wall()) == 7200


async def test_a_rental_that_is_ending_cannot_be_renewed(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    rental = (await rent_and_wait(harness, alice)).json()
    await alice.delete(f"/api/rentals/{rental['id']}")
    is_problem(await alice.post(f"/api/rentals/{rental['id']}/renew", json={}), 409, "ended")


async def test_a_release_answers_202_while_it_is_cleaned_and_200_when_it_has_ended(
    harness: Harness, alice: httpx.AsyncClient, agent: Agent
) -> None:
    rental = (await rent_and_wait(harness, alice)).json()
    first = await alice.delete(f"/api/rentals/{rental['id']}")
    assert (first.status_code, first.json()["state"]) == (202, "releasing")
    waiting = asyncio.create_task(alice.delete(f"/api/rentals/{rental['id']}?wait_s=55"))
    await harness.settle()
    ended = await asyncio.wait_for(waiting, 20)
    assert (ended.status_code, ended.json()["state"], ended.json()["worker_id"]) == (200, "released", None)
    again = await alice.delete(f"/api/rentals/{rental['id']}")
    assert (again.status_code, again.json()["state"]) == (200, "released")
