"""Snapshots in the whole manager, on virtual time: taken, restored, and never lost silently."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.harness import Agent, Harness

from orion.manager.controllers.snapshots import FIRST_TRIES
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import BLOCK_BYTES, EXPIRED_KEPT_S
from orion.manager.operations import restore
from orion.manager.settings import Settings
from orion.manager.snapshots.port import Home, SnapshotError
from orion.manager.ssh.port import Host
from orion.manager.store.database import Store

AWAY = SnapshotError("vault_away", "the snapshot service does not answer")


@pytest.fixture
async def pool(harness: Harness) -> list[Agent]:
    return [await harness.join(slots=4) for _ in range(2)]


def files(harness: Harness, rental: dict[str, Any]) -> dict[str, str]:
    return harness.agent_of(rental).node.homes[rental["id"]]


async def snapshot_round(harness: Harness) -> None:
    """Take all snapshots that are due, and those that are started afterwards."""
    copies = harness.manager.snapshots
    await copies.round()
    while running := [*copies._running.values(), *([copies._sweeping] if copies._sweeping else [])]:
        await asyncio.gather(*running)
        await copies.round()


async def copied(harness: Harness, rental: dict[str, Any]) -> dict[str, Any]:
    """Return the rental after the next snapshots are due and taken."""
    await snapshot_round(harness)
    await harness.pass_time(31)
    await snapshot_round(harness)
    return await harness.rental(rental["id"])


async def lose(harness: Harness, rental: dict[str, Any]) -> dict[str, Any]:
    """Let the rental's worker die, and the manager notice."""
    harness.end_the_brake_of_the_start()
    dead = harness.agent_of(rental)
    dead.die()
    await harness.silence(dead, 91)
    return await harness.rental(rental["id"])


async def test_a_takeover_restores_the_files_and_its_event_names_the_snapshot(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    assert (rental["last_safe_copy_at"], rental["last_safe_copy_bytes"]) == (None, None)
    files(harness, rental)["precious"] = "content"
    shown = await copied(harness, rental)
    assert shown["last_safe_copy_at"]
    assert shown["last_safe_copy_bytes"] == 2 * BLOCK_BYTES, "the home itself and a file"
    files(harness, rental)["too late"] = "x"
    moved = await lose(harness, rental)
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert files(harness, moved) == {"precious": "content"}
    (event,) = await harness.events("rental.files_restored")
    assert (event["epoch"], event["details"]["generation"], event["details"]["bytes"]) == (2, "1-1", 2 * BLOCK_BYTES)
    assert event["details"]["age_s"] > 90
    assert "incomplete in it" not in event["reason"]
    assert moved["explanation"] == f"running on worker {moved['worker_id']}"


async def test_a_takeover_names_the_files_that_its_snapshot_lacks(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    files(harness, rental).update({"kept": "content", "sealed": "x", "shut": "y"})
    harness.snapshot_service.unreadable = {"sealed", "shut"}
    await copied(harness, rental)
    moved = await lose(harness, rental)
    assert (moved["state"], files(harness, moved)) == ("active", {"kept": "content"})
    (event,) = await harness.events("rental.files_restored")
    assert event["reason"].endswith("2 files, 8192 bytes; incomplete in it: sealed, shut")
    assert event["details"]["skipped"] == ["sealed", "shut"]
    running = f"running on worker {moved['worker_id']}"
    assert moved["explanation"] == f"{running}; its files are from snapshot 1-1, incomplete in it: sealed, shut"


async def test_a_rental_is_not_activated_before_its_files_are_restored(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "x"
    await copied(harness, rental)
    harness.snapshot_service.failure = AWAY
    waiting = await lose(harness, rental)
    assert waiting["state"] == "migrating"
    assert "its files cannot be restored now" in waiting["explanation"]
    assert "--empty" in waiting["explanation"]
    assert harness.live_copies(rental["id"]) == []
    await harness.pass_time(200)
    assert (await harness.rental(rental["id"]))["epoch"] == 2, "another worker could not restore it either"
    harness.snapshot_service.failure = None
    await harness.pass_time(20)
    back = await harness.rental(rental["id"])
    assert (back["state"], files(harness, back)) == ("active", {"file": "x"})


async def test_a_rental_goes_to_another_worker_if_its_files_cannot_be_restored(harness: Harness, store: Store) -> None:
    first, second, third = [await harness.join() for _ in range(3)]
    rental = await harness.rent()
    files(harness, rental)["file"] = "x"
    await copied(harness, rental)
    others = [agent for agent in (first, second, third) if agent.worker_id != rental["worker_id"]]
    restore, refused = harness.snapshot_service.restore, []

    async def once(home: Home, *more: Any) -> Any:
        if not refused or refused == [home.host.worker_id]:
            refused[:] = [home.host.worker_id]
            raise SnapshotError("failed", "there is no room for it on the worker")
        return await restore(home, *more)

    harness.snapshot_service.restore = once  # type: ignore[method-assign]
    await lose(harness, rental)
    await harness.pass_time(60)
    moved = await harness.rental(rental["id"])
    assert (moved["state"], files(harness, moved)) == ("active", {"file": "x"})
    assert {moved["worker_id"], *refused} == {agent.worker_id for agent in others}


async def test_a_rental_without_a_snapshot_begins_empty_and_the_event_says_so(
    harness: Harness, pool: list[Agent]
) -> None:
    moved = await lose(harness, await harness.rent())
    assert (moved["state"], files(harness, moved)) == ("active", {})
    assert [event["reason"] for event in await harness.events("rental.started_empty")] == [restore.NO_SNAPSHOT]


async def test_snapshots_missing_on_the_disk_are_not_taken_for_none(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    await copied(harness, rental)
    harness.snapshot_service.stored.clear()
    waiting = await lose(harness, rental)
    assert waiting["state"] == "migrating"
    assert "they are not there any more" in waiting["explanation"]
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/restore", json={"empty": True})
    assert reply.status_code == 202, reply.text
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "active"
    assert [event["reason"] for event in await harness.events("rental.started_empty")] == [
        "without its files, as asked for"
    ]


async def test_a_snapshot_that_only_the_snapshot_service_knows_is_restored(harness: Harness, pool: list[Agent]) -> None:
    """The manager was killed between a snapshot and its commit, or its database was restored from a backup."""
    rental = await harness.rent()
    files(harness, rental)["file"] = "x"
    agent = harness.agent_of(rental)
    host = Host(worker_id=agent.worker_id, address=agent.node.host.address, host_keys=agent.node.host.host_keys)
    account = agent.node.accounts[rental["id"]]
    await harness.snapshot_service.take(
        Home(rental_id=rental["id"], uid=account.uid, epoch=1, host=host), SnapshotLimits()
    )
    moved = await lose(harness, rental)
    assert files(harness, moved) == {"file": "x"}


async def test_a_manager_that_restarts_after_a_restore_activates_without_repeating_it(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "x"
    await copied(harness, rental)
    finish, harness.manager.state_store.finish = harness.manager.state_store.finish, _lose_it  # type: ignore[method-assign]
    moved = await lose(harness, rental)
    assert moved["state"] == "migrating"
    target = next(agent for agent in harness.agents if agent.node.alive)
    target.node.homes[rental["id"]]["newer"] = "than any copy"
    harness.manager.state_store.finish = finish  # type: ignore[method-assign]
    await harness.restart()
    await harness.pass_time(40)
    back = await harness.rental(rental["id"])
    assert (back["state"], back["epoch"]) == ("active", 2)
    assert files(harness, back) == {"file": "x", "newer": "than any copy"}
    assert len(harness.snapshot_service.restored) == 1


async def _lose_it(*_: Any) -> None:
    raise OSError("the manager is killed before it writes this down")


async def test_a_snapshot_that_arrives_after_the_end_of_its_placement_does_not_count(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "x"
    copy = harness.snapshot_service.take

    async def late(*given: Any, **named: Any) -> Any:
        done = await copy(*given, **named)
        await lose(harness, rental)
        return done

    harness.snapshot_service.take = late  # type: ignore[method-assign]
    copies = harness.manager.snapshots
    await copies.round()
    await harness.pass_time(4)
    await copies.round()
    await asyncio.gather(*copies._running.values())
    moved = await harness.rental(rental["id"])
    assert (moved["epoch"], moved["last_safe_copy_at"]) == (2, None)
    assert (await harness.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")).json()["items"] == []


# When snapshots are taken


async def test_each_rental_has_one_snapshot_in_an_interval_a_few_at_a_time(harness: Harness) -> None:
    await harness.join(slots=10)
    rentals = [await harness.rent() for _ in range(10)]
    at_once, made, most = 0, [], 0
    copy = harness.snapshot_service.take

    async def counted(home: Home, *given: Any, **named: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        made.append(home.rental_id)
        await asyncio.sleep(0)
        done = await copy(home, *given, **named)
        at_once -= 1
        return done

    harness.snapshot_service.take = counted  # type: ignore[method-assign]
    for _ in range(45):
        await snapshot_round(harness)
        harness.clock.now += 1.5
        await harness.agents[0].beat()
    assert most == 4
    assert {r["id"] for r in rentals} == set(made)
    assert all(2 <= made.count(r["id"]) <= 3 for r in rentals), "in 67 s there are two, every 27 to 30 s"


async def test_programs_are_paused_for_half_a_percent_at_most_and_owners_of_rarer_snapshots_notified(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()

    async def snapshots_within(seconds: int) -> int:
        made = 0
        for number in range(seconds // 10):
            files(harness, rental)["file"] = f"{harness.snapshot_service.pause_s} {number}"
            before = (await harness.rental(rental["id"]))["last_safe_copy_at"]
            await harness.pass_time(10)
            await snapshot_round(harness)
            made += (await harness.rental(rental["id"]))["last_safe_copy_at"] != before
        return made

    async def warning() -> str:
        return str((await harness.rental(rental["id"]))["home_warning"])

    assert await snapshots_within(120) in range(3, 6), "every half minute"
    assert await warning() == ""
    harness.snapshot_service.pause_s = 0.6
    await snapshots_within(60)
    assert await snapshots_within(480) in range(3, 6), "every two minutes"
    (event,) = await harness.events("rental.copy_interval_changed")
    assert event["reason"] == (
        "its programs would have to stand still for 0.6 s. The snapshot is tried again at growing intervals, until "
        "less changes at once"
    )
    assert "it is copied every 120 s only" in await warning()
    harness.snapshot_service.pause_s = 0.01
    await snapshots_within(120)
    assert await snapshots_within(120) in range(3, 6)
    _, back = await harness.events("rental.copy_interval_changed")
    assert "were paused for 0.01 s by a snapshot, so snapshots are taken every 30 s" in back["reason"]
    assert await warning() == ""


async def test_a_delay_of_snapshots_after_a_long_pause_is_shown_at_once(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    harness.snapshot_service.pause_s = 9.0
    for number in range(2):
        files(harness, rental)["file"] = str(number)
        shown = await copied(harness, rental)
        await harness.pass_time(31)
    assert len(await harness.events("rental.copy_interval_changed")) == 1
    assert "it is copied every 1800 s only" in shown["home_warning"]
    assert shown["copy_problem"] == ""


async def test_a_too_large_home_has_one_event_and_another_when_a_snapshot_succeeds(store: Store) -> None:
    async with Harness(store, Settings(database_url=store.url, home_max_bytes=1 << 20)) as harness:
        await harness.join()
        rental = await harness.rent()
        files(harness, rental)["large"] = "x" * (2 << 20)
        for _ in range(3):
            shown = await copied(harness, rental)
        assert "more than a copy may" in shown["copy_problem"]
        del files(harness, rental)["large"]
        shown = await copied(harness, rental)
        assert (shown["copy_problem"], shown["last_safe_copy_bytes"]) == ("", BLOCK_BYTES)
        kinds = [
            event["kind"] for event in await harness.events() if event["kind"] in {"rental.over_limit", "rental.copied"}
        ]
        assert kinds == ["rental.over_limit", "rental.copied"]


async def test_only_the_second_failed_snapshot_of_an_unreachable_worker_is_a_problem(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    await copied(harness, rental)
    harness.snapshot_service.failure = SnapshotError("unreachable", "the worker cannot be asked")
    await harness.pass_time(31)
    await snapshot_round(harness)
    assert (await harness.rental(rental["id"]))["copy_problem"] == ""
    await harness.pass_time(31)
    await snapshot_round(harness)
    assert (await harness.rental(rental["id"]))["copy_problem"] == "the worker cannot be asked"


async def test_no_snapshot_is_taken_onto_a_nearly_full_disk_and_the_status_says_so(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    harness.disk_share = 0.81
    assert (await copied(harness, rental))["last_safe_copy_at"] is None
    status = (await harness.as_admin.get("/api/status")).json()
    assert "80% full" in status["copies_paused"]
    harness.disk_share = 0.79
    assert (await copied(harness, rental))["last_safe_copy_at"]
    assert (await harness.as_admin.get("/api/status")).json()["copies_paused"] is None


async def test_snapshots_are_removed_at_a_release_and_a_day_after_an_expiry(
    harness: Harness, pool: list[Agent]
) -> None:
    released, expired = await harness.rent(), await harness.rent(ttl_s=600)
    await copied(harness, released)
    assert set(harness.snapshot_service.stored) == {released["id"], expired["id"]}
    await harness.as_admin.delete(f"/api/rentals/{released['id']}")
    await harness.settle()
    await harness.pass_time(61)
    await snapshot_round(harness)
    assert set(harness.snapshot_service.stored) == {expired["id"]}
    for after_s, kept in ((600.0, {expired["id"]}), (EXPIRED_KEPT_S + 1, set())):
        harness.clock.now += after_s
        for agent in pool:
            await agent.beat()
        await harness.manager.expiry.round()
        await harness.settle()
        await snapshot_round(harness)
        assert set(harness.snapshot_service.stored) == kept


# A restore of an older snapshot


async def snapshots(harness: Harness, rental: dict[str, Any]) -> list[str]:
    reply = await harness.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")
    return [item["generation"] for item in reply.json()["items"]]


async def test_an_older_snapshot_is_restored_on_request_after_a_snapshot_of_the_present_home(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    for content in ("good", "better", "best", "spoilt"):
        files(harness, rental)["file"] = content
        await copied(harness, rental)
    assert await snapshots(harness, rental) == ["1-2", "1-3", "1-4"]
    files(harness, rental)["file"] = "just now"
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/restore", json={"generation": "1-2"})
    assert (reply.status_code, reply.json()["state"]) == (202, "migrating")
    assert harness.live_copies(rental["id"]) == [1], "the old placement has not ended yet"
    await harness.settle()
    again = await harness.rental(rental["id"])
    assert (again["state"], again["epoch"], files(harness, again)) == ("active", 2, {"file": "better"})
    assert harness.live_copies(rental["id"]) == [2]
    assert [p["state"] for p in await harness.placements()] == ["purged", "running"]
    assert harness.snapshot_service.stored[rental["id"]][max(harness.snapshot_service.stored[rental["id"]])][1] == {
        "file": "just now"
    }
    after = await lose(harness, again)
    assert files(harness, after) == {"file": "better"}, (
        "there is no later snapshot: a takeover restores the same one again"
    )


async def test_a_rental_is_never_on_two_workers_during_a_restore(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    await copied(harness, rental)
    old = harness.agent_of(rental)
    old.node.hang()
    await harness.as_admin.post(f"/api/rentals/{rental['id']}/restore", json={"generation": "1-1", "discard": True})
    await harness.manager.reconciler.round()
    assert [p["state"] for p in await harness.placements()] == ["stopping"]
    old.node.resume()
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "active"


async def test_an_impossible_restore_is_refused_with_its_reason(harness: Harness, pool: list[Agent]) -> None:
    queued = await harness.rent()
    alice = await harness.new_client("alice")
    rental_path = f"/api/rentals/{queued['id']}/restore"
    assert (await alice.post(rental_path, json={"empty": True})).status_code == 404
    for wrong in ({}, {"empty": True, "generation": "1-1"}, {"generation": "../1"}, {"generation": "1-1\n"}):
        assert (await harness.as_admin.post(rental_path, json=wrong)).status_code == 422
    assert (await harness.as_admin.post(rental_path, json={"generation": "1-7"})).status_code == 404
    harness.snapshot_service.failure = AWAY
    refused = await harness.as_admin.post(rental_path, json={"empty": True})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_copied")
    assert "does not answer" in refused.json()["detail"]
    await harness.as_admin.delete(f"/api/rentals/{queued['id']}")
    await harness.settle()
    ended = await harness.as_admin.post(rental_path, json={"empty": True})
    assert (ended.status_code, ended.json()["code"]) == (409, "ended")


async def test_a_rental_that_was_never_active_has_nothing_to_restore(harness: Harness) -> None:
    waiting = await harness.rent()
    refused = await harness.as_admin.post(f"/api/rentals/{waiting['id']}/restore", json={"empty": True})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_active_yet")


async def test_a_failed_first_snapshot_is_repeated_soon_and_reported_when_it_keeps_failing(
    harness: Harness, pool: list[Agent]
) -> None:
    harness.snapshot_service.failure = SnapshotError("unreachable", "the worker cannot be asked")
    rental = await harness.rent()
    tries = []
    for _ in range(8):
        await snapshot_round(harness)
        tries.append(harness.manager.snapshots._failures[rental["id"]])
        problem = (await harness.rental(rental["id"]))["copy_problem"]
        assert ("cannot be asked" in problem) is (tries[-1] > FIRST_TRIES)
        await harness.pass_time(3)
    assert tries[:2] == [1, 2]
    assert tries[-1] == 4, "the tries become rarer"
    harness.snapshot_service.failure = None
    await harness.pass_time(31)
    await snapshot_round(harness)
    shown = await harness.rental(rental["id"])
    assert (bool(shown["last_safe_copy_at"]), shown["copy_problem"]) == (True, "")


async def test_a_snapshot_that_a_suspect_worker_missed_is_taken_soon_after_it_is_ready(
    harness: Harness, pool: list[Agent]
) -> None:
    """This includes its first snapshot, which is due at once when it becomes active."""
    rental = await harness.rent()
    silent = harness.agent_of(rental)
    await harness.silence(silent, 46)
    assert "not run on a worker that can be reached" in await harness.manager.snapshots.take_now(rental["id"], None)
    silent.beating = True
    for _ in range(3):  # at most a tenth of the interval after it is found
        await harness.pass_time(2)
        await snapshot_round(harness)
    assert (await harness.rental(rental["id"]))["last_safe_copy_at"]


async def test_an_old_snapshot_always_has_an_explanation(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    await copied(harness, rental)

    async def explained() -> str:
        found = [await harness.rental(rental["id"]), *(await harness.as_admin.get("/api/rentals")).json()["items"]]
        (problem,) = {shown["copy_problem"] for shown in found}
        return str(problem)

    await harness.pass_time(60)
    assert await explained() == ""
    await harness.pass_time(31)
    assert await explained() == "snapshots of other rentals come first"
    harness.snapshot_service.failure = SnapshotError("unreachable", "the worker cannot be asked")
    await snapshot_round(harness)
    assert await explained() == "the last snapshot has failed, and is tried again"
    harness.snapshot_service.failure = None
    harness.disk_share = 0.81
    await snapshot_round(harness)
    assert "no snapshots are taken at present: " in await explained()
    harness.disk_share = 0.79
    harness.end_the_brake_of_the_start()
    harness.agent_of(rental).die()
    await harness.silence(harness.agent_of(rental), 60)
    await snapshot_round(harness)
    assert "its worker sends no heartbeats" in await explained()
