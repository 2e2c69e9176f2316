"""Snapshots in the whole manager, on virtual time: taken, restored, and never lost silently."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.house import Agent, House

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
async def pool(house: House) -> list[Agent]:
    return [await house.join(slots=4) for _ in range(2)]


def files(house: House, rental: dict[str, Any]) -> dict[str, str]:
    return house.agent_of(rental).node.homes[rental["id"]]


async def snapshot_round(house: House) -> None:
    """Take all snapshots that are due, and those that are started afterwards."""
    copies = house.manager.snapshots
    await copies.round()
    while running := [*copies._running.values(), *([copies._sweeping] if copies._sweeping else [])]:
        await asyncio.gather(*running)
        await copies.round()


async def copied(house: House, rental: dict[str, Any]) -> dict[str, Any]:
    """Return the rental after the next snapshots are due and taken."""
    await snapshot_round(house)
    await house.pass_time(31)
    await snapshot_round(house)
    return await house.rental(rental["id"])


async def lose(house: House, rental: dict[str, Any]) -> dict[str, Any]:
    """Let the rental's worker die, and the manager notice."""
    house.end_the_brake_of_the_start()
    dead = house.agent_of(rental)
    dead.die()
    await house.silence(dead, 91)
    return await house.rental(rental["id"])


async def test_a_takeover_restores_the_files_and_its_event_names_the_snapshot(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    assert (rental["last_safe_copy_at"], rental["last_safe_copy_bytes"]) == (None, None)
    files(house, rental)["precious"] = "content"
    shown = await copied(house, rental)
    assert shown["last_safe_copy_at"]
    assert shown["last_safe_copy_bytes"] == 2 * BLOCK_BYTES, "the home itself and a file"
    files(house, rental)["too late"] = "x"
    moved = await lose(house, rental)
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert files(house, moved) == {"precious": "content"}
    (event,) = await house.events("rental.files_restored")
    assert (event["epoch"], event["details"]["generation"], event["details"]["bytes"]) == (2, "1-1", 2 * BLOCK_BYTES)
    assert event["details"]["age_s"] > 90
    assert "incomplete in it" not in event["reason"]
    assert moved["explanation"] == f"running on worker {moved['worker_id']}"


async def test_a_takeover_names_the_files_that_its_snapshot_lacks(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    files(house, rental).update({"kept": "content", "sealed": "x", "shut": "y"})
    house.snapshot_service.unreadable = {"sealed", "shut"}
    await copied(house, rental)
    moved = await lose(house, rental)
    assert (moved["state"], files(house, moved)) == ("active", {"kept": "content"})
    (event,) = await house.events("rental.files_restored")
    assert event["reason"].endswith("2 files, 8192 bytes; incomplete in it: sealed, shut")
    assert event["details"]["skipped"] == ["sealed", "shut"]
    running = f"running on worker {moved['worker_id']}"
    assert moved["explanation"] == f"{running}; its files are from snapshot 1-1, incomplete in it: sealed, shut"


async def test_a_rental_is_not_activated_before_its_files_are_restored(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "x"
    await copied(house, rental)
    house.snapshot_service.failure = AWAY
    waiting = await lose(house, rental)
    assert waiting["state"] == "migrating"
    assert "its files cannot be restored now" in waiting["explanation"]
    assert "--empty" in waiting["explanation"]
    assert house.live_copies(rental["id"]) == []
    await house.pass_time(200)
    assert (await house.rental(rental["id"]))["epoch"] == 2, "another worker could not restore it either"
    house.snapshot_service.failure = None
    await house.pass_time(20)
    back = await house.rental(rental["id"])
    assert (back["state"], files(house, back)) == ("active", {"file": "x"})


async def test_a_rental_goes_to_another_worker_if_its_files_cannot_be_restored(house: House, store: Store) -> None:
    first, second, third = [await house.join() for _ in range(3)]
    rental = await house.rent()
    files(house, rental)["file"] = "x"
    await copied(house, rental)
    others = [agent for agent in (first, second, third) if agent.worker_id != rental["worker_id"]]
    restore, refused = house.snapshot_service.restore, []

    async def once(home: Home, *more: Any) -> Any:
        if not refused or refused == [home.host.worker_id]:
            refused[:] = [home.host.worker_id]
            raise SnapshotError("failed", "there is no room for it on the worker")
        return await restore(home, *more)

    house.snapshot_service.restore = once  # type: ignore[method-assign]
    await lose(house, rental)
    await house.pass_time(60)
    moved = await house.rental(rental["id"])
    assert (moved["state"], files(house, moved)) == ("active", {"file": "x"})
    assert {moved["worker_id"], *refused} == {agent.worker_id for agent in others}


async def test_a_rental_without_a_snapshot_begins_empty_and_the_event_says_so(house: House, pool: list[Agent]) -> None:
    moved = await lose(house, await house.rent())
    assert (moved["state"], files(house, moved)) == ("active", {})
    assert [event["reason"] for event in await house.events("rental.started_empty")] == [restore.NO_SNAPSHOT]


async def test_snapshots_missing_on_the_disk_are_not_taken_for_none(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    await copied(house, rental)
    house.snapshot_service.stored.clear()
    waiting = await lose(house, rental)
    assert waiting["state"] == "migrating"
    assert "they are not there any more" in waiting["explanation"]
    reply = await house.as_admin.post(f"/api/rentals/{rental['id']}/restore", json={"empty": True})
    assert reply.status_code == 202, reply.text
    await house.settle()
    assert (await house.rental(rental["id"]))["state"] == "active"
    assert [event["reason"] for event in await house.events("rental.started_empty")] == [
        "without its files, as asked for"
    ]


async def test_a_snapshot_that_only_the_snapshot_service_knows_is_restored(house: House, pool: list[Agent]) -> None:
    """The manager was killed between a snapshot and its commit, or its database was restored from a backup."""
    rental = await house.rent()
    files(house, rental)["file"] = "x"
    agent = house.agent_of(rental)
    host = Host(agent.worker_id, agent.node.host.address, agent.node.host.host_keys)
    account = agent.node.accounts[rental["id"]]
    await house.snapshot_service.take(Home(rental["id"], account.uid, 1, host), SnapshotLimits())
    moved = await lose(house, rental)
    assert files(house, moved) == {"file": "x"}


async def test_a_manager_that_restarts_after_a_restore_activates_without_repeating_it(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "x"
    await copied(house, rental)
    finish, house.manager.state_store.finish = house.manager.state_store.finish, _lose_it  # type: ignore[method-assign]
    moved = await lose(house, rental)
    assert moved["state"] == "migrating"
    target = next(agent for agent in house.agents if agent.node.alive)
    target.node.homes[rental["id"]]["newer"] = "than any copy"
    house.manager.state_store.finish = finish  # type: ignore[method-assign]
    await house.restart()
    await house.pass_time(40)
    back = await house.rental(rental["id"])
    assert (back["state"], back["epoch"]) == ("active", 2)
    assert files(house, back) == {"file": "x", "newer": "than any copy"}
    assert len(house.snapshot_service.restored) == 1


async def _lose_it(*_: Any) -> None:
    raise OSError("the manager is killed before it writes this down")


async def test_a_snapshot_that_arrives_after_the_end_of_its_placement_does_not_count(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "x"
    copy = house.snapshot_service.take

    async def late(*given: Any, **named: Any) -> Any:
        done = await copy(*given, **named)
        await lose(house, rental)
        return done

    house.snapshot_service.take = late  # type: ignore[method-assign]
    copies = house.manager.snapshots
    await copies.round()
    await house.pass_time(4)
    await copies.round()
    await asyncio.gather(*copies._running.values())
    moved = await house.rental(rental["id"])
    assert (moved["epoch"], moved["last_safe_copy_at"]) == (2, None)
    assert (await house.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")).json()["items"] == []


# When snapshots are taken


async def test_each_rental_has_one_snapshot_in_an_interval_a_few_at_a_time(house: House) -> None:
    await house.join(slots=10)
    rentals = [await house.rent() for _ in range(10)]
    at_once, made, most = 0, [], 0
    copy = house.snapshot_service.take

    async def counted(home: Home, *given: Any, **named: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        made.append(home.rental_id)
        await asyncio.sleep(0)
        done = await copy(home, *given, **named)
        at_once -= 1
        return done

    house.snapshot_service.take = counted  # type: ignore[method-assign]
    for _ in range(45):
        await snapshot_round(house)
        house.clock.now += 1.5
        await house.agents[0].beat()
    assert most == 4
    assert {r["id"] for r in rentals} == set(made)
    assert all(2 <= made.count(r["id"]) <= 3 for r in rentals), "in 67 s there are two, every 27 to 30 s"


async def test_programs_are_paused_for_half_a_percent_at_most_and_owners_of_rarer_snapshots_notified(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()

    async def snapshots_within(seconds: int) -> int:
        made = 0
        for number in range(seconds // 10):
            files(house, rental)["file"] = f"{house.snapshot_service.pause_s} {number}"
            before = (await house.rental(rental["id"]))["last_safe_copy_at"]
            await house.pass_time(10)
            await snapshot_round(house)
            made += (await house.rental(rental["id"]))["last_safe_copy_at"] != before
        return made

    async def warning() -> str:
        return str((await house.rental(rental["id"]))["home_warning"])

    assert await snapshots_within(120) in range(3, 6), "every half minute"
    assert await warning() == ""
    house.snapshot_service.pause_s = 0.6
    await snapshots_within(60)
    assert await snapshots_within(480) in range(3, 6), "every two minutes"
    (event,) = await house.events("rental.copy_interval_changed")
    assert event["reason"] == (
        "its programs would have to stand still for 0.6 s. The snapshot is tried again at growing intervals, until "
        "less changes at once"
    )
    assert "it is copied every 120 s only" in await warning()
    house.snapshot_service.pause_s = 0.01
    await snapshots_within(120)
    assert await snapshots_within(120) in range(3, 6)
    _, back = await house.events("rental.copy_interval_changed")
    assert "were paused for 0.01 s by a snapshot, so snapshots are taken every 30 s" in back["reason"]
    assert await warning() == ""


async def test_a_delay_of_snapshots_after_a_long_pause_is_shown_at_once(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    house.snapshot_service.pause_s = 9.0
    for number in range(2):
        files(house, rental)["file"] = str(number)
        shown = await copied(house, rental)
        await house.pass_time(31)
    assert len(await house.events("rental.copy_interval_changed")) == 1
    assert "it is copied every 1800 s only" in shown["home_warning"]
    assert shown["copy_problem"] == ""


async def test_a_too_large_home_has_one_event_and_another_when_a_snapshot_succeeds(store: Store) -> None:
    async with House(store, Settings(database_url=store.url, home_max_bytes=1 << 20)) as house:
        await house.join()
        rental = await house.rent()
        files(house, rental)["large"] = "x" * (2 << 20)
        for _ in range(3):
            shown = await copied(house, rental)
        assert "more than a copy may" in shown["copy_problem"]
        del files(house, rental)["large"]
        shown = await copied(house, rental)
        assert (shown["copy_problem"], shown["last_safe_copy_bytes"]) == ("", BLOCK_BYTES)
        kinds = [
            event["kind"] for event in await house.events() if event["kind"] in {"rental.over_limit", "rental.copied"}
        ]
        assert kinds == ["rental.over_limit", "rental.copied"]


async def test_only_the_second_failed_snapshot_of_an_unreachable_worker_is_a_problem(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    await copied(house, rental)
    house.snapshot_service.failure = SnapshotError("unreachable", "the worker cannot be asked")
    await house.pass_time(31)
    await snapshot_round(house)
    assert (await house.rental(rental["id"]))["copy_problem"] == ""
    await house.pass_time(31)
    await snapshot_round(house)
    assert (await house.rental(rental["id"]))["copy_problem"] == "the worker cannot be asked"


async def test_no_snapshot_is_taken_onto_a_nearly_full_disk_and_the_status_says_so(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    house.disk_share = 0.81
    assert (await copied(house, rental))["last_safe_copy_at"] is None
    status = (await house.as_admin.get("/api/status")).json()
    assert "80% full" in status["copies_paused"]
    house.disk_share = 0.79
    assert (await copied(house, rental))["last_safe_copy_at"]
    assert (await house.as_admin.get("/api/status")).json()["copies_paused"] is None


async def test_snapshots_are_removed_at_a_release_and_a_day_after_an_expiry(house: House, pool: list[Agent]) -> None:
    released, expired = await house.rent(), await house.rent(ttl_s=600)
    await copied(house, released)
    assert set(house.snapshot_service.stored) == {released["id"], expired["id"]}
    await house.as_admin.delete(f"/api/rentals/{released['id']}")
    await house.settle()
    await house.pass_time(61)
    await snapshot_round(house)
    assert set(house.snapshot_service.stored) == {expired["id"]}
    for after_s, kept in ((600.0, {expired["id"]}), (EXPIRED_KEPT_S + 1, set())):
        house.clock.now += after_s
        for agent in pool:
            await agent.beat()
        await house.manager.expiry.round()
        await house.settle()
        await snapshot_round(house)
        assert set(house.snapshot_service.stored) == kept


# A restore of an older snapshot


async def snapshots(house: House, rental: dict[str, Any]) -> list[str]:
    reply = await house.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")
    return [item["generation"] for item in reply.json()["items"]]


async def test_an_older_snapshot_is_restored_on_request_after_a_snapshot_of_the_present_home(
    house: House, pool: list[Agent]
) -> None:
    rental = await house.rent()
    for content in ("good", "better", "best", "spoilt"):
        files(house, rental)["file"] = content
        await copied(house, rental)
    assert await snapshots(house, rental) == ["1-2", "1-3", "1-4"]
    files(house, rental)["file"] = "just now"
    reply = await house.as_admin.post(f"/api/rentals/{rental['id']}/restore", json={"generation": "1-2"})
    assert (reply.status_code, reply.json()["state"]) == (202, "migrating")
    assert house.live_copies(rental["id"]) == [1], "the old placement has not ended yet"
    await house.settle()
    again = await house.rental(rental["id"])
    assert (again["state"], again["epoch"], files(house, again)) == ("active", 2, {"file": "better"})
    assert house.live_copies(rental["id"]) == [2]
    assert [p["state"] for p in await house.placements()] == ["purged", "running"]
    assert house.snapshot_service.stored[rental["id"]][max(house.snapshot_service.stored[rental["id"]])][1] == {
        "file": "just now"
    }
    after = await lose(house, again)
    assert files(house, after) == {"file": "better"}, (
        "there is no later snapshot: a takeover restores the same one again"
    )


async def test_a_rental_is_never_on_two_workers_during_a_restore(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    await copied(house, rental)
    old = house.agent_of(rental)
    old.node.hang()
    await house.as_admin.post(f"/api/rentals/{rental['id']}/restore", json={"generation": "1-1", "discard": True})
    await house.manager.reconciler.round()
    assert [p["state"] for p in await house.placements()] == ["stopping"]
    old.node.resume()
    await house.settle()
    assert (await house.rental(rental["id"]))["state"] == "active"


async def test_an_impossible_restore_is_refused_with_its_reason(house: House, pool: list[Agent]) -> None:
    queued = await house.rent()
    alice = await house.new_client("alice")
    rental_path = f"/api/rentals/{queued['id']}/restore"
    assert (await alice.post(rental_path, json={"empty": True})).status_code == 404
    for wrong in ({}, {"empty": True, "generation": "1-1"}, {"generation": "../1"}, {"generation": "1-1\n"}):
        assert (await house.as_admin.post(rental_path, json=wrong)).status_code == 422
    assert (await house.as_admin.post(rental_path, json={"generation": "1-7"})).status_code == 404
    house.snapshot_service.failure = AWAY
    refused = await house.as_admin.post(rental_path, json={"empty": True})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_copied")
    assert "does not answer" in refused.json()["detail"]
    await house.as_admin.delete(f"/api/rentals/{queued['id']}")
    await house.settle()
    ended = await house.as_admin.post(rental_path, json={"empty": True})
    assert (ended.status_code, ended.json()["code"]) == (409, "ended")


async def test_a_rental_that_was_never_active_has_nothing_to_restore(house: House) -> None:
    waiting = await house.rent()
    refused = await house.as_admin.post(f"/api/rentals/{waiting['id']}/restore", json={"empty": True})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_active_yet")


async def test_a_failed_first_snapshot_is_repeated_soon_and_reported_when_it_keeps_failing(
    house: House, pool: list[Agent]
) -> None:
    house.snapshot_service.failure = SnapshotError("unreachable", "the worker cannot be asked")
    rental = await house.rent()
    tries = []
    for _ in range(8):
        await snapshot_round(house)
        tries.append(house.manager.snapshots._failures[rental["id"]])
        problem = (await house.rental(rental["id"]))["copy_problem"]
        assert ("cannot be asked" in problem) is (tries[-1] > FIRST_TRIES)
        await house.pass_time(3)
    assert tries[:2] == [1, 2]
    assert tries[-1] == 4, "the tries become rarer"
    house.snapshot_service.failure = None
    await house.pass_time(31)
    await snapshot_round(house)
    shown = await house.rental(rental["id"])
    assert (bool(shown["last_safe_copy_at"]), shown["copy_problem"]) == (True, "")


async def test_a_snapshot_that_a_suspect_worker_missed_is_taken_soon_after_it_is_ready(
    house: House, pool: list[Agent]
) -> None:
    """This includes its first snapshot, which is due at once when it becomes active."""
    rental = await house.rent()
    silent = house.agent_of(rental)
    await house.silence(silent, 46)
    assert "not run on a worker that can be reached" in await house.manager.snapshots.take_now(rental["id"], None)
    silent.beating = True
    for _ in range(3):  # at most a tenth of the interval after it is found
        await house.pass_time(2)
        await snapshot_round(house)
    assert (await house.rental(rental["id"]))["last_safe_copy_at"]


async def test_an_old_snapshot_always_has_an_explanation(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    await copied(house, rental)

    async def explained() -> str:
        found = [await house.rental(rental["id"]), *(await house.as_admin.get("/api/rentals")).json()["items"]]
        (problem,) = {shown["copy_problem"] for shown in found}
        return str(problem)

    await house.pass_time(60)
    assert await explained() == ""
    await house.pass_time(31)
    assert await explained() == "snapshots of other rentals come first"
    house.snapshot_service.failure = SnapshotError("unreachable", "the worker cannot be asked")
    await snapshot_round(house)
    assert await explained() == "the last snapshot has failed, and is tried again"
    house.snapshot_service.failure = None
    house.disk_share = 0.81
    await snapshot_round(house)
    assert "no snapshots are taken at present: " in await explained()
    house.disk_share = 0.79
    house.end_the_brake_of_the_start()
    house.agent_of(rental).die()
    await house.silence(house.agent_of(rental), 60)
    await snapshot_round(house)
    assert "its worker sends no heartbeats" in await explained()
