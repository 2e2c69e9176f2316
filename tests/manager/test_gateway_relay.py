"""Sessions of the SSH relay: which reach a worker, for how long, and their events."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import Connection, insert, update
from support.browser import is_connected, opening, ticket
from support.harness import Harness
from support.way_in import Sshds, coming_in

from orion.manager.domain.steps import Event
from orion.manager.gateway.relay import LEFT_WORKER, TOKEN_OVER
from orion.manager.gateway.sessions import SessionLimits
from orion.manager.store import tokens
from orion.manager.store.database import record
from orion.manager.store.schema import copies, placements, rentals


async def token_of(harness: Harness, name: str, role: str = "client") -> str:
    _, token = await harness.store.write(tokens.create, "admin", name, role, None)
    return token


async def test_a_session_reaches_the_current_worker_of_the_rental(harness: Harness, sshds: Sshds) -> None:
    """Two workers had the rental, and the former one has a certificate that is valid for an hour: no session is relayed
    to that one."""
    first, second = await harness.join(), await harness.join()
    rental = await harness.rent()
    there = harness.agent_of(rental)
    other = second if there is first else first
    there.die()
    await harness.silence(there, 100)
    await harness.pass_time(10)
    there.node.alive = True
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        assert await client.is_in()
        [(host, sshd)] = sshds.connected
        assert (host.worker_id, host.host_keys) == (other.worker_id, other.node.host.host_keys)
        client.said.put_nowait({"type": "websocket.receive", "bytes": b"SSH-2.0-x"})
        assert await asyncio.get_running_loop().sock_recv(sshd, 100) == b"SSH-2.0-x"
        await client.leave()


async def test_another_clients_token_opens_nothing_and_reaches_no_worker(harness: Harness, sshds: Sshds) -> None:
    await harness.join()
    rental = await harness.rent()
    for role, status in (("client", 404), ("join", 403)):
        async with coming_in(harness, rental["id"], await token_of(harness, "mallory", role)) as client:
            assert (await client.refusal())["status"] == status
    async with coming_in(harness, rental["id"], "orion_client_nobody_x") as client:
        assert (await client.refusal())["status"] == 401
    assert sshds.connected == []


async def test_a_session_to_a_queued_or_ended_rental_is_refused_with_its_reason(harness: Harness, sshds: Sshds) -> None:
    rental = await harness.rent()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        refused = await client.refusal()
    assert (refused["status"], refused["code"]) == (409, "not_active")
    assert "queued" in refused["detail"]
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token, "wait_s=55") as client:
        assert "released" in (await client.refusal())["detail"]
    assert sshds.connected == []


async def test_a_refusal_says_whether_waiting_can_help(harness: Harness, sshds: Sshds) -> None:
    """A refusal that can pass has Retry-After, so that the client tries again and shows the reason meanwhile."""
    rental = await harness.rent()
    for again in ("5", ""):
        async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
            start = await client.hears()
            assert dict(start["headers"]).get(b"retry-after", b"").decode() == again
        await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
        await harness.settle()
    assert sshds.connected == []


async def test_no_session_is_relayed_to_a_quiesced_rental(harness: Harness, sshds: Sshds) -> None:
    """The sshd of its worker would answer that permission is denied."""
    await harness.join()
    rental = await harness.rent()

    async def hold(move: int) -> None:
        def put(connection: Connection) -> None:
            connection.execute(update(placements).values(quiesced_for=move))
            record(
                connection,
                Event(kind="rental.held", actor="reconciler", reason="it moves", rental_id=rental["id"], epoch=1),
            )

        await harness.store.write(put)

    await hold(1)
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        refused = await client.refusal()
        assert (refused["status"], refused["code"]) == (409, "not_active")
        assert "stopped for a moment" in refused["detail"]
    async with coming_in(harness, rental["id"], harness.secrets.admin_token, "wait_s=50") as client:
        await hold(0)
        assert await client.is_in()
        await client.leave()
    assert len(sshds.connected) == 1


async def test_a_log_in_shows_why_the_rental_may_be_frozen(harness: Harness, sshds: Sshds) -> None:
    await harness.join()
    rental = await harness.rent()
    problem = "its home holds too much: 3 GB\r\nX: y\u00e9; it is frozen: `orion thaw` lets it go on"
    await harness.store.write(lambda connection: connection.execute(update(rentals).values(snapshot_problem=problem)))
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        accepted = await client.hears()
        [(name, banner)] = accepted["headers"]
        assert name == b"X-Orion-Notice"
        assert banner.decode() == f"{rental['name']} is not copied: {problem}".replace("\r", "?").replace(
            "\n", "?"
        ).replace("\u00e9", "?")
        await client.leave()
    assert len(sshds.connected) == 1


async def nearly_full_with_a_recovered_snapshot(harness: Harness) -> dict[str, Any]:
    rental = await harness.rent()
    row = {"rental_id": rental["id"], "epoch": 1, "number": 4, "at": harness.clock.wall(), "bytes": 12_000, "files": 3}
    warned = update(rentals).values(home_warning="its home holds 9.0 MB of 10.0 MB", activated_epoch=2)
    await harness.store.write(lambda connection: connection.execute(warned))
    salvage = insert(copies).values(row | {"skipped": [], "recovered": True})
    await harness.store.write(lambda connection: connection.execute(salvage))
    return rental


async def test_a_log_in_shows_a_nearly_full_home_and_a_recovered_snapshot(harness: Harness, sshds: Sshds) -> None:
    await harness.join()
    rental = await nearly_full_with_a_recovered_snapshot(harness)
    refused = (
        f"{rental['name']}: its home holds 9.0 MB of 10.0 MB; a lost worker had newer files, which are "
        f"kept as a recovered snapshot: orion restore {rental['name']} --from 1-4"
    )
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        assert (await client.hears())["headers"] == [(b"X-Orion-Remark", refused.encode())]
        await client.leave()
    async with opening(harness, rental["id"], await ticket(harness.as_admin, rental["id"])) as page:
        assert (await is_connected(page))["notice"] == refused


async def test_a_recovered_snapshot_is_shown_for_a_week_of_the_trusted_clock(harness: Harness) -> None:
    await harness.join()
    rental = await nearly_full_with_a_recovered_snapshot(harness)
    harness.clock.wall_offset += 8 * 86_400
    assert (await harness.rental(rental["id"]))["salvage"]["generation"] == "1-4"
    assert (await harness.as_admin.get("/api/rentals")).json()["items"][0]["salvage"]
    await harness.as_admin.post("/api/admin/clock")
    assert (await harness.rental(rental["id"]))["salvage"] is None


async def test_a_log_in_shows_no_message_where_there_is_none(harness: Harness, sshds: Sshds) -> None:
    await harness.join()
    rental = await harness.rent()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        assert (await client.hears())["headers"] == []
        await client.leave()
    async with opening(harness, rental["id"], await ticket(harness.as_admin, rental["id"])) as page:
        assert "notice" not in await is_connected(page)


async def test_a_waiting_session_opens_when_the_rental_is_active(harness: Harness, sshds: Sshds) -> None:
    rental = await harness.rent()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token, "wait_s=55") as client:
        await harness.join()
        await harness.settle()
        assert await client.is_in()
        await client.leave()
    assert len(sshds.connected) == 1


@pytest.mark.parametrize("wait_s", ["-1", "nan", "1000", "x"])
async def test_no_session_waits_for_longer_than_the_api_says(harness: Harness, wait_s: str) -> None:
    rental = await harness.rent()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token, f"wait_s={wait_s}") as client:
        assert (await client.refusal())["status"] == 422


async def test_a_session_ends_at_once_when_its_worker_is_lost_and_says_so(harness: Harness, sshds: Sshds) -> None:
    worker = await harness.join()
    rental = await harness.rent()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        assert await client.is_in()
        harness.end_the_brake_of_the_start()
        worker.die()
        await harness.silence(worker, 100)
        await harness.pass_time(10)
        refused = await client.hears()
        assert (refused["type"], refused["code"], refused["reason"]) == (
            "websocket.close",
            LEFT_WORKER,
            "its worker is down",
        )
        await client.ended()
    assert sshds.connected[0][1].recv(1) == b"", "and its connection to the worker is closed"


async def test_a_release_ends_the_sessions_of_that_rental_alone(harness: Harness, sshds: Sshds) -> None:
    await harness.join(slots=2)
    one, other = await harness.rent(), await harness.rent()
    async with (
        coming_in(harness, one["id"], harness.secrets.admin_token) as ending,
        coming_in(harness, other["id"], harness.secrets.admin_token) as staying,
    ):
        assert await ending.is_in()
        assert await staying.is_in()
        await harness.as_admin.delete(f"/api/rentals/{one['id']}")
        await harness.settle()
        assert (await ending.hears())["code"] == LEFT_WORKER
        assert staying.heard.empty()
        await staying.leave()
    assert len(sshds.connected) == 2


async def test_a_revoked_token_ends_its_own_sessions_at_once_and_no_others(harness: Harness, sshds: Sshds) -> None:
    await harness.join()
    one = await harness.rent()
    alice = await token_of(harness, "alice", "admin")
    async with (
        coming_in(harness, one["id"], alice) as ending,
        coming_in(harness, one["id"], harness.secrets.admin_token) as staying,
    ):
        assert await ending.is_in()
        assert await staying.is_in()
        await harness.revoke("alice")
        refused = await ending.hears()
        assert (refused["code"], refused["reason"]) == (TOKEN_OVER, "the token by which it was opened has been revoked")
        assert staying.heard.empty()
        await staying.leave()


async def test_a_token_that_is_revoked_while_it_waits_for_its_rental_opens_nothing(
    harness: Harness, sshds: Sshds
) -> None:
    waiting = await harness.rent()
    async with coming_in(harness, waiting["id"], await token_of(harness, "alice", "admin"), "wait_s=50") as client:
        await harness.pass_time(1)
        await harness.revoke("alice")
        await harness.join()
        await harness.settle()
        assert (await client.refusal())["status"] == 401
    assert sshds.connected == []


async def test_the_end_of_another_epoch_ends_no_session(harness: Harness, sshds: Sshds) -> None:
    await harness.join()
    rental = await harness.rent()
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        assert await client.is_in()
        for epoch in (rental["epoch"] - 1, rental["epoch"] + 1):
            other = Event(
                kind="placement.failed",
                actor="reconciler",
                reason="it came to nothing",
                rental_id=rental["id"],
                epoch=epoch,
            )
            await harness.store.write(record, other)
        assert client.heard.empty()
        its_own = Event(
            kind="placement.lost", actor="reconciler", reason="its worker is down", rental_id=rental["id"], epoch=1
        )
        await harness.store.write(record, its_own)
        assert (await client.hears())["code"] == LEFT_WORKER
    assert len(sshds.connected) == 1


async def test_each_session_has_two_events_without_its_content(harness: Harness, sshds: Sshds) -> None:
    await harness.join()
    token = await token_of(harness, "alice")
    rental = (await harness.client(token).post("/api/rent", json={"wait_s": 0})).json()
    await harness.settle()
    async with coming_in(harness, rental["id"], token) as client:
        assert await client.is_in()
        client.said.put_nowait({"type": "websocket.receive", "bytes": b"the secret"})
        assert await asyncio.get_running_loop().sock_recv(sshds.connected[0][1], 100) == b"the secret"
        harness.clock.now += 61.5
        await client.leave()
    assert await harness.events("rental.session") == [], (
        "not in the course of the session, but once a second and all together"
    )
    await harness.manager.sessions.flush()
    opened, closed = await harness.events("rental.session")
    assert (opened["kind"], closed["kind"]) == ("rental.session_opened", "rental.session_closed")
    for event in (opened, closed):
        assert (event["actor"], event["owner"], event["rental_id"], event["epoch"]) == (
            "alice",
            "alice",
            rental["id"],
            1,
        )
        assert event["details"]["from"] == "198.51.100.7"
        assert event["details"]["session"] == opened["details"]["session"]
        assert "secret" not in str(event)
    assert closed["details"] | {"session": "", "from": ""} == {
        "session": "", "from": "", "seconds": 61.5, "bytes_to_worker": 10, "bytes_to_client": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (SessionLimits(of_a_rental=2), "the rental has 2 open sessions"),
        (SessionLimits(of_all=4), "the rentals of admin have 2 open sessions"),
        (SessionLimits(young_of_a_rental=2), "began on this worker at once"),
        (SessionLimits(young_of_a_worker=4), "began on this worker at once"),
    ],
)
async def test_a_limit_answers_with_its_reason(
    harness: Harness, sshds: Sshds, limits: SessionLimits, reason: str
) -> None:
    await harness.join()
    rental = await harness.rent()
    harness.manager.sessions.limits = limits
    async with AsyncExitStack() as inside:
        for _ in range(2):
            client = await inside.enter_async_context(coming_in(harness, rental["id"], harness.secrets.admin_token))
            assert await client.is_in()
        async with coming_in(harness, rental["id"], harness.secrets.admin_token) as one_more:
            refused = await one_more.refusal()
        assert (refused["status"], refused["code"]) == (429, "too_many_sessions")
        assert reason in refused["detail"]
        assert len(sshds.connected) == 2
        if limits.young_of_a_rental == 2:
            harness.clock.now += limits.young_s
            async with coming_in(harness, rental["id"], harness.secrets.admin_token) as later:
                assert await later.is_in(), "sessions that have logged in since do not count"
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as after:
        assert await after.is_in() or limits.young_of_a_rental == 2, "a session that ended takes no place"


async def test_sessions_of_one_rental_do_not_block_another(harness: Harness, sshds: Sshds) -> None:
    await harness.join(slots=2)
    one, other = await harness.rent(), await harness.rent()
    harness.manager.sessions.limits = SessionLimits(of_a_rental=1, young_of_a_rental=1)
    async with (
        coming_in(harness, one["id"], harness.secrets.admin_token) as first,
        coming_in(harness, other["id"], harness.secrets.admin_token) as second,
    ):
        assert await first.is_in()
        assert await second.is_in()
    assert len(sshds.connected) == 2


@pytest.mark.parametrize("limits", [SessionLimits(of_all=4), SessionLimits(young_of_a_worker=4)])
async def test_an_owner_of_many_rentals_leaves_others_half_of_the_sessions(
    harness: Harness, sshds: Sshds, limits: SessionLimits
) -> None:
    await harness.join(slots=4)
    other = (await harness.store.write(tokens.create, "admin", "other", "client", None))[1]
    rentals = [(await harness.rent())["id"] for _ in range(3)]
    theirs = (await harness.client(other).post("/api/rent", json={"wait_s": 0})).json()["id"]
    await harness.settle()
    harness.manager.sessions.limits = limits
    async with AsyncExitStack() as inside:
        for rental_id in rentals[:2]:
            client = await inside.enter_async_context(coming_in(harness, rental_id, harness.secrets.admin_token))
            assert await client.is_in()
        async with coming_in(harness, rentals[2], harness.secrets.admin_token) as one_more:
            assert (await one_more.refusal())["code"] == "too_many_sessions"
        for _ in range(2):
            client = await inside.enter_async_context(coming_in(harness, theirs, other))
            assert await client.is_in()
        async with coming_in(harness, theirs, other) as one_more:
            assert (await one_more.refusal())["code"] == "too_many_sessions"
    assert len(sshds.connected) == 4
    async with coming_in(harness, rentals[2], harness.secrets.admin_token) as after:
        assert await after.is_in() or limits.young_of_a_worker == 4, "a session that ended takes no place"


async def test_the_host_certificate_is_renewed_before_a_session_is_relayed(harness: Harness, sshds: Sshds) -> None:
    worker = await harness.join()
    rental = await harness.rent()
    before = worker.node.host_certificate
    harness.clock.now += 3600
    async with coming_in(harness, rental["id"], harness.secrets.admin_token) as client:
        assert await client.is_in()
    assert worker.node.host_certificate != before
    assert len(sshds.connected) == 1


def test_the_limits_leave_the_managers_own_connections_room() -> None:
    """A worker's sshd drops some connections as soon as 200 have not logged in (MaxStartups)."""
    assert SessionLimits().young_of_a_worker < 200
    assert 2 * SessionLimits().young_of_a_rental < SessionLimits().young_of_a_worker
