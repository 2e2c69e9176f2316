"""Recovered snapshots of the homes on a lost worker: taken before the purge, without keeping it from being ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from support.builders import active_rental, new_placement, new_worker, new_world
from support.harness import Agent, Harness
from test_controller_snapshots import copied, files, lose

from orion.manager.ansible.port import Action, Job
from orion.manager.domain import outcomes
from orion.manager.domain.model import Item
from orion.manager.domain.observations import Observations
from orion.manager.domain.reconcile import RECOVERY_DEADLINE_S, decide
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import BLOCK_BYTES, SnapshotId
from orion.manager.domain.states import JOIN_DEADLINE_S, Health, PlacementState, RentalState
from orion.manager.domain.tasks import TaskKind
from orion.manager.fakes.workers import RefusedOrder
from orion.manager.operations.recover import LONGEST_TRY_S
from orion.manager.operations.task_runner import JOB_DEADLINE_S, MAX_RECOVERIES_PER_WORKER
from orion.manager.settings import Settings
from orion.manager.snapshots.port import Home, SnapshotError, Taken
from orion.manager.store.database import Store


@pytest.fixture
async def pool(harness: Harness) -> list[Agent]:
    return [await harness.join(slots=4) for _ in range(2)]


async def written_and_lost(harness: Harness) -> tuple[dict[str, Any], Agent]:
    """Return a rental that was taken over without its last writes, and the lost worker that has them."""
    rental = await harness.rent(name="lab")
    files(harness, rental)["file"] = "copied"
    await copied(harness, rental)
    files(harness, rental)["file"] = "written after that"
    dead = harness.agent_of(rental)
    return await lose(harness, rental), dead


async def snapshots(harness: Harness, rental: dict[str, Any]) -> list[tuple[str, bool]]:
    found = (await harness.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")).json()["items"]
    return [(one["generation"], one["salvage"]) for one in found]


def lets_in_and_dies(agent: Agent, written: str) -> None:
    """Let the next renter on this worker write something, of which no report comes before the worker dies."""
    create = agent.node.create

    def create_and_die(job: Job) -> dict[str, Any]:
        report = create(job)
        if job.action is Action.PREPARE:
            return report
        agent.node.homes[job.order.rental_id]["file"] = written
        agent.node.create = create  # type: ignore[method-assign]
        agent.die()
        raise RefusedOrder("the connection broke")

    agent.node.create = create_and_die  # type: ignore[method-assign]


@pytest.fixture
async def connected_harness(harness: Harness) -> Harness:
    """Prove deaths before a second try to make a rental there has failed."""
    await harness.hold_liveness_connections()
    harness.end_the_brake_of_the_start()
    return harness


async def intend(harness: Harness, agent: Agent, what: str) -> None:
    assert (await harness.as_admin.post(f"/api/workers/{agent.worker_id}/{what}")).status_code == 200
    await harness.settle()


async def test_files_written_after_the_last_snapshot_are_recovered_and_restored_on_request(
    harness: Harness, pool: list[Agent]
) -> None:
    moved, dead = await written_and_lost(harness)
    assert files(harness, moved) == {"file": "copied"}
    await dead.come_back()
    await harness.settle()
    assert (await harness.health(dead), dead.node.homes) == ("ready", {})
    assert await snapshots(harness, moved) == [("1-1", False), ("1-2", True)]
    (event,) = await harness.events("rental.salvaged")
    assert "orion restore lab --from 1-2" in event["reason"]
    await copied(harness, moved)
    again = await lose(harness, moved)
    assert files(harness, again) == {"file": "copied"}, "there is a snapshot of a later epoch"
    body = {"generation": "1-2", "discard": True}
    assert (await harness.as_admin.post(f"/api/rentals/{moved['id']}/restore", json=body)).status_code == 202
    await harness.pass_time(8)
    back = await harness.rental(moved["id"])
    assert (back["state"], files(harness, back)) == ("active", {"file": "written after that"})


async def test_a_recovered_snapshot_is_restored_by_itself_if_there_was_no_activation_since(harness: Harness) -> None:
    await harness.join()
    waiting, dead = await written_and_lost(harness)
    assert waiting["state"] == "queued"
    shown_before = waiting["last_safe_copy_at"]
    await dead.come_back()
    await harness.pass_time(8)
    back = await harness.rental(waiting["id"])
    assert (back["state"], files(harness, back)) == ("active", {"file": "written after that"})
    assert back["last_safe_copy_at"] > shown_before
    assert [e["details"]["generation"] for e in await harness.events("rental.files_restored")] == ["1-2"]


async def test_a_home_equal_to_its_last_snapshot_has_lost_nothing(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "same"
    await copied(harness, rental)
    dead = harness.agent_of(rental)
    await lose(harness, rental)
    await dead.come_back()
    await harness.settle()
    assert await snapshots(harness, rental) == [("1-1", False)]
    assert [e["reason"].partition(": ")[2] for e in await harness.events("rental.salvaged")] == [
        "they are as in snapshot 1-1"
    ]


async def test_a_released_rental_is_not_recovered(harness: Harness, pool: list[Agent]) -> None:
    moved, dead = await written_and_lost(harness)
    await harness.as_admin.delete(f"/api/rentals/{moved['id']}")
    await harness.settle()
    assert (await harness.rental(moved["id"]))["state"] == "released"
    await dead.come_back()
    await harness.settle()
    assert await harness.health(dead) == "ready"
    assert await harness.events("rental.salvage") == []


@pytest.mark.parametrize("code", ["unreachable", "over_limit", "unreadable_home", "failed", "purged"])
async def test_a_home_that_cannot_be_recovered_is_purged_and_the_loss_reported(
    harness: Harness, pool: list[Agent], code: str
) -> None:
    moved, dead = await written_and_lost(harness)
    tries = []

    async def refuse(home: Home, limits: SnapshotLimits, protected: SnapshotId | None = None) -> Taken:
        tries.append(home)
        raise SnapshotError(code, "there is no way")

    harness.snapshot_service.recover = refuse  # type: ignore[method-assign, assignment]
    await dead.come_back()
    await harness.pass_time(12)
    assert (await harness.health(dead), dead.node.homes) == ("ready", {})
    assert len(tries) == (2 if code in {"unreachable", "failed"} else 1)
    assert {(home.rental_id, home.epoch, home.host.worker_id) for home in tries} == {(moved["id"], 1, dead.worker_id)}
    (event,) = await harness.events("rental.salvage_failed")
    assert "there is no way" in event["reason"]
    assert "is lost" in event["reason"]


def test_a_worker_becomes_ready_in_time_though_a_recovery_never_ends() -> None:
    """A recovery that hangs is given up when its worker has been joining for too long."""
    joining = new_worker(1, health=Health.JOINING, verified_session=None)
    rental = active_rental(1, epoch=2, state=RentalState.QUEUED)
    lost = new_placement(replace(rental, epoch=1), joining, PlacementState.LOST)
    world = new_world(joining, rental, lost)
    shown = {joining.id: (Item(rental_id=rental.id, username=rental.username, uid=rental.uid, epoch=1),)}
    for age_s, kind in ((RECOVERY_DEADLINE_S, TaskKind.RECOVER), (RECOVERY_DEADLINE_S + 1, TaskKind.DELETE)):
        decision = decide(
            world, Observations(inventories=shown, exiting=frozenset(), ages={joining.id: age_s}, new_ids=iter("p"))
        )
        assert [task.kind for task in decision.tasks] == [kind]
    (event,) = [event for step in decision.steps for event in step.events if event.kind.startswith("rental.salvage")]
    assert (event.kind, "is lost" in event.reason) == ("rental.salvage_failed", True)
    assert RECOVERY_DEADLINE_S + LONGEST_TRY_S + JOB_DEADLINE_S < JOIN_DEADLINE_S, "there is time to purge it"


async def test_a_recovery_that_a_dying_manager_did_not_commit_is_repeated_and_kept_once(
    harness: Harness, pool: list[Agent]
) -> None:
    moved, dead = await written_and_lost(harness)
    salvage = harness.snapshot_service.recover

    async def and_die(home: Home, limits: SnapshotLimits, protected: SnapshotId | None = None) -> Taken:
        await salvage(home, limits, protected=protected)
        raise SnapshotError("no_answer", "the snapshot service ended before it answered")

    harness.snapshot_service.recover = and_die  # type: ignore[method-assign, assignment]
    await dead.come_back()
    await harness.manager.reconciler.round()
    await harness.finish_tasks()
    harness.snapshot_service.recover = salvage  # type: ignore[method-assign]
    await harness.restart()
    await dead.register()
    await harness.pass_time(12)
    assert await harness.health(dead) == "ready"
    assert await snapshots(harness, moved) == [("1-1", False), ("1-2", True)]


async def test_a_worker_that_shows_a_rental_that_was_never_placed_there_gains_nothing(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "mine"
    await copied(harness, rental)
    evil = next(agent for agent in pool if agent.worker_id != rental["worker_id"])
    account = harness.agent_of(rental).node.accounts[rental["id"]]
    evil.node.accounts[rental["id"]] = replace(account, epoch=99, unlocked=False)
    evil.node.homes[rental["id"]] = {"file": "evil"}
    evil.node.activated[rental["id"]] = 99
    await evil.beat()
    await harness.settle()
    resumed = await harness.as_admin.post(f"/api/workers/{evil.worker_id}/resume?give_up=true")
    assert resumed.status_code == 200
    await harness.pass_time(40)
    assert harness.snapshot_service.stored[rental["id"]].keys() == {SnapshotId(1, 1)}
    assert await snapshots(harness, rental) == [("1-1", False)]


# An activation that was never reported


@pytest.mark.parametrize("first_back", ["the latest", "the one before"])
async def test_the_home_of_an_unreported_activation_is_the_newest_in_any_order_of_return(
    connected_harness: Harness, first_back: str
) -> None:
    """The second worker activates the rental and dies; the manager knows only of the first until both are back."""
    first = await connected_harness.join()
    rental = await connected_harness.rent(name="lab")
    files(connected_harness, rental)["file"] = "copied"
    await copied(connected_harness, rental)
    files(connected_harness, rental)["file"] = "written at epoch 1"
    second = await connected_harness.join()
    lets_in_and_dies(second, "written at epoch 2")
    first.die()
    await connected_harness.pass_time(12)
    assert (await connected_harness.rental(rental["id"]))["state"] == "queued"
    for agent in (first, second):
        await intend(connected_harness, agent, "drain")  # no rental is made before both are back
    for agent in (second, first) if first_back == "the latest" else (first, second):
        await agent.come_back()
        await connected_harness.pass_time(8)
        assert agent.node.homes == {}
    shown = await connected_harness.rental(rental["id"])
    found = (await connected_harness.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")).json()["items"]
    newest = next(one for one in found if one["generation"] == "2-1")
    assert (shown["state"], shown["last_safe_copy_at"]) == ("queued", newest["at"]), (
        "the age of the snapshot that the rental begins with"
    )
    reasons = {
        event["details"]["generation"]: event["reason"] for event in await connected_harness.events("rental.salvaged")
    }
    assert "from which it is restored" in reasons["2-1"]
    assert ("orion restore lab --from 1-2" in reasons["1-2"]) == (first_back == "the latest")
    await intend(connected_harness, first, "resume")
    await connected_harness.pass_time(8)
    back = await connected_harness.rental(rental["id"])
    assert (back["state"], files(connected_harness, back)) == ("active", {"file": "written at epoch 2"})


async def test_a_rental_that_was_never_active_keeps_files_of_an_unreported_activation(
    connected_harness: Harness,
) -> None:
    only = await connected_harness.join()
    lets_in_and_dies(only, "written before anybody knew")
    rental = await connected_harness.rent()
    await connected_harness.pass_time(8)
    waiting = await connected_harness.rental(rental["id"])
    assert (waiting["state"], waiting["last_safe_copy_at"]) == ("queued", None)
    await only.come_back()
    await connected_harness.pass_time(8)
    back = await connected_harness.rental(rental["id"])
    assert (back["state"], files(connected_harness, back)) == ("active", {"file": "written before anybody knew"})
    assert back["last_safe_copy_at"]


async def test_files_of_an_unreported_activation_are_recovered_if_the_rental_was_made_elsewhere(
    connected_harness: Harness,
) -> None:
    dead = await connected_harness.join()
    lets_in_and_dies(dead, "written before anybody knew")
    rental = await connected_harness.rent(name="lab")
    await connected_harness.pass_time(8)
    await connected_harness.join()
    made = await connected_harness.rental(rental["id"])
    assert (made["state"], files(connected_harness, made)) == ("active", {})
    await dead.come_back()
    await connected_harness.pass_time(8)
    assert (await connected_harness.health(dead), dead.node.homes) == ("ready", {})
    assert await snapshots(connected_harness, made) == [("1-1", True)]
    (event,) = await connected_harness.events("rental.salvaged")
    assert "orion restore lab --from 1-1" in event["reason"]


async def test_a_worker_without_any_activation_has_nothing_to_recover_and_no_event_is_written(
    connected_harness: Harness,
) -> None:
    only = await connected_harness.join()
    create = only.node.create

    def make_and_die(job: Job) -> dict[str, Any]:
        create(replace(job, action=Action.PREPARE))
        only.die()
        raise RefusedOrder("the connection broke")

    only.node.create = make_and_die  # type: ignore[method-assign]
    rental = await connected_harness.rent()
    await connected_harness.pass_time(8)
    only.node.create = create  # type: ignore[method-assign]
    await only.come_back()
    await connected_harness.pass_time(8)
    assert (await connected_harness.rental(rental["id"]))["state"] == "active"
    assert await snapshots(connected_harness, rental) == []
    assert await connected_harness.events("rental.salvage") == []


async def lost_three_times(harness: Harness) -> tuple[dict[str, Any], list[Agent]]:
    """Return a rental that is active at epoch 4, with a snapshot of epoch 1 alone, and its former workers in order.

    The home was written at each epoch, and began with snapshot 1-1 at each but the first.
    """
    for _ in range(5):
        await harness.join(slots=4)
    rental = await harness.rent(name="lab")
    files(harness, rental)["file"] = "copied"
    await copied(harness, rental)
    gone: list[Agent] = []
    for epoch in range(1, 4):
        files(harness, rental)[f"of epoch {epoch}"] = "x"
        gone.append(harness.agent_of(rental))
        rental = await lose(harness, rental)
        assert (rental["state"], files(harness, rental)) == ("active", {"file": "copied"})
    return rental, gone


async def test_the_recovered_home_of_the_last_snapshot_precedes_homes_that_were_filled_from_it(
    harness: Harness,
) -> None:
    rental, gone = await lost_three_times(harness)
    for agent in gone:
        await agent.come_back()
        await harness.pass_time(8)
    assert {("1-2", True), ("2-1", True), ("3-1", True)} <= set(await snapshots(harness, rental))
    again = await lose(harness, rental)
    assert (again["state"], files(harness, again)) == ("active", {"file": "copied", "of epoch 1": "x"})
    assert (await harness.rental(rental["id"]))["salvage"]["generation"] == "3-1", (
        "the other recovered snapshots wait for the owner"
    )


async def test_a_home_that_was_restored_and_changed_since_is_preferred_to_its_snapshot(harness: Harness) -> None:
    """There are two kills without a snapshot in between, and only the second worker is back at the third."""
    rental, gone = await lost_three_times(harness)
    await gone[1].come_back()
    await harness.pass_time(8)
    (event,) = await harness.events("rental.salvaged")
    assert "from which it is restored if it loses its worker before the first snapshot" in event["reason"]
    again = await lose(harness, rental)
    assert (again["state"], files(harness, again)) == ("active", {"file": "copied", "of epoch 2": "x"})


async def test_of_two_kills_within_a_minute_the_second_restores_what_was_recovered_after_the_first(
    harness: Harness, pool: list[Agent]
) -> None:
    moved, dead = await written_and_lost(harness)
    assert files(harness, moved) == {"file": "copied"}
    await dead.come_back()
    await harness.pass_time(8)
    again = await lose(harness, await harness.rental(moved["id"]))
    assert (again["state"], files(harness, again)) == ("active", {"file": "written after that"})
    assert again["salvage"] is None, "the rental has the recovered snapshot"


async def test_after_a_restore_of_an_older_snapshot_later_files_of_that_home_do_not_come_back(
    harness: Harness, pool: list[Agent]
) -> None:
    await harness.join(slots=4)
    rental = await harness.rent()
    files(harness, rental)["file"] = "older"
    await copied(harness, rental)
    files(harness, rental)["file"] = "rejected"
    await copied(harness, rental)
    body = {"generation": "1-1", "discard": True}
    assert (await harness.as_admin.post(f"/api/rentals/{rental['id']}/restore", json=body)).status_code == 202
    await harness.pass_time(8)
    for _ in range(2):
        rental = await lose(harness, await harness.rental(rental["id"]))
        assert (rental["state"], files(harness, rental)) == ("active", {"file": "older"})


async def test_a_recovered_snapshot_is_shown_until_its_rental_has_it(harness: Harness, pool: list[Agent]) -> None:
    moved, dead = await written_and_lost(harness)
    files(harness, moved)["of epoch 2"] = "x"
    await copied(harness, moved)
    assert (await harness.rental(moved["id"]))["salvage"] is None
    await dead.come_back()
    await harness.pass_time(8)
    listed = (await harness.as_admin.get("/api/rentals")).json()["items"]
    for shown in (await harness.rental(moved["id"]), *listed):
        assert (shown["salvage"]["generation"], shown["salvage"]["bytes"]) == ("1-2", 2 * BLOCK_BYTES)
    body = {"generation": "1-2"}
    assert (await harness.as_admin.post(f"/api/rentals/{moved['id']}/restore", json=body)).status_code == 202
    await harness.pass_time(8)
    back = await harness.rental(moved["id"])
    assert (back["state"], files(harness, back), back["salvage"]) == ("active", {"file": "written after that"}, None)


# Rentals without a snapshot


@pytest.fixture
async def patient(store: Store) -> AsyncIterator[Harness]:
    """Return a harness with two workers, whose rentals wait ten minutes for files that no snapshot has."""
    async with Harness(store, Settings(database_url=store.url, uncopied_wait_s=600)) as harness:
        for _ in range(2):
            await harness.join(slots=4)
        yield harness


async def lost_before_its_first_copy(harness: Harness) -> tuple[dict[str, Any], Agent]:
    rental = await harness.rent(name="lab")
    files(harness, rental)["file"] = "typed briskly"
    dead = harness.agent_of(rental)
    return await lose(harness, rental), dead


async def test_a_rental_lost_before_its_first_snapshot_waits_and_names_both_remedies(
    patient: Harness,
) -> None:
    waiting, dead = await lost_before_its_first_copy(patient)
    assert waiting["state"] == "queued"
    for words in (dead.worker_id, "started", "10 min", "orion restore lab --empty"):
        assert words in waiting["explanation"]
    (event,) = await patient.events("rental.files_awaited")
    assert (event["rental_id"], event["worker_id"], event["epoch"]) == (waiting["id"], dead.worker_id, 1)
    await patient.pass_time(400)
    assert (await patient.rental(waiting["id"]))["state"] == "queued"
    (late,) = (await patient.as_admin.get("/api/status")).json()["overdue"]
    assert "orion restore lab --empty" in late["what_to_do"]
    await dead.come_back()
    await patient.pass_time(12)
    back = await patient.rental(waiting["id"])
    assert (back["state"], files(patient, back)) == ("active", {"file": "typed briskly"})
    assert await patient.events("rental.started_empty") == []
    assert len(await patient.events("rental.files_awaited")) == 1


async def test_a_waiting_rental_waits_until_its_returned_worker_is_recovered(patient: Harness) -> None:
    waiting, dead = await lost_before_its_first_copy(patient)
    await patient.pass_time(560)
    patient.snapshot_service.failure = SnapshotError("vault_away", "the snapshot service does not answer")
    await dead.come_back()
    await patient.manager.health.round()
    patient.manager.reconciler.awaits_files_s = 1.0  # its wait ends while the worker joins
    await patient.manager.reconciler.round()
    assert (await patient.rental(waiting["id"]))["state"] == "queued"
    patient.snapshot_service.failure = None
    await patient.pass_time(12)
    back = await patient.rental(waiting["id"])
    assert (back["state"], files(patient, back)) == ("active", {"file": "typed briskly"})


async def test_a_waiting_rental_begins_empty_after_its_wait_and_later_recovered_files_wait(
    patient: Harness,
) -> None:
    waiting, dead = await lost_before_its_first_copy(patient)
    await patient.pass_time(590)
    assert (await patient.rental(waiting["id"]))["state"] == "queued"
    await patient.pass_time(20)
    back = await patient.rental(waiting["id"])
    assert (back["state"], files(patient, back)) == ("active", {})
    (event,) = await patient.events("rental.started_empty")
    assert "kept when it comes back" in event["reason"]
    await dead.come_back()
    await patient.pass_time(12)
    assert (await patient.rental(back["id"]))["salvage"]["generation"] == "1-1"


async def test_the_owner_of_a_waiting_rental_may_let_it_begin_empty_at_once(patient: Harness) -> None:
    waiting, _dead = await lost_before_its_first_copy(patient)
    body = {"empty": True}
    assert (await patient.as_admin.post(f"/api/rentals/{waiting['id']}/restore", json=body)).status_code == 202
    await patient.pass_time(8)
    back = await patient.rental(waiting["id"])
    assert (back["state"], files(patient, back)) == ("active", {})


async def test_no_rental_waits_for_a_removed_worker(patient: Harness) -> None:
    waiting, dead = await lost_before_its_first_copy(patient)
    assert (await patient.as_admin.delete(f"/api/workers/{dead.worker_id}")).is_success
    await patient.pass_time(8)
    assert (await patient.rental(waiting["id"]))["state"] == "active"


async def test_a_target_without_files_does_not_take_over_a_rental_without_a_snapshot(
    patient: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MAX_ATTEMPTS", 1000)  # precopy fails until the source dies
    rental = await patient.rent(name="lab")
    files(patient, rental)["file"] = "typed briskly"
    patient.end_the_brake_of_the_start()
    dead = patient.agent_of(rental)
    patient.snapshot_service.failure = SnapshotError("unreachable", "the worker cannot be asked")
    assert (await patient.as_admin.post(f"/api/rentals/{rental['id']}/migrate")).status_code == 202
    await patient.pass_time(4)
    assert (await patient.rental(rental["id"]))["moving_to"]
    dead.die()
    await patient.silence(dead, 91)
    waiting = await patient.rental(rental["id"])
    assert (waiting["state"], "orion restore lab --empty" in waiting["explanation"]) == ("queued", True)
    patient.snapshot_service.failure = None
    await dead.come_back()
    await patient.pass_time(12)
    back = await patient.rental(rental["id"])
    assert (back["state"], files(patient, back)) == ("active", {"file": "typed briskly"})


async def test_recoveries_of_one_owner_leave_places_for_others_on_that_worker(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = await harness.join(slots=8)
    for client in [harness.as_admin] * 4 + [await harness.new_client("other")]:
        assert (await client.post("/api/rent", json={"wait_s": 0})).status_code in {201, 202}
    await harness.settle()
    under_way = list[str]()

    async def recover(home: Home, *_: object, **__: object) -> Taken:
        under_way.append(home.owner)
        return await asyncio.Future()

    monkeypatch.setattr(harness.snapshot_service, "recover", recover)
    harness.end_the_brake_of_the_start()
    dead.die()
    await harness.silence(dead, 91)
    await dead.come_back()
    for _ in range(3):
        await harness.manager.health.round()
        await harness.manager.reconciler.round()
        while len(under_way) < harness.manager.task_runner.running:  # noqa: ASYNC110 - each looks into the database first
            await asyncio.sleep(0.001)
    assert sorted(under_way) == ["admin"] * (MAX_RECOVERIES_PER_WORKER // 2) + ["other"]
