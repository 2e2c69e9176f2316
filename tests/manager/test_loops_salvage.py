"""What a worker that comes back still has is copied aside before it is purged, and never keeps it from being ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from support.builders import active_rental, new_placement, new_worker, new_world
from support.house import Agent, House
from test_loops_copies import copied, files, holder, lose

from orion.manager.domain.copies import Generation
from orion.manager.domain.facts import Facts
from orion.manager.domain.model import Item
from orion.manager.domain.reconcile import SALVAGE_WITHIN_S, decide
from orion.manager.domain.states import JOIN_DEADLINE_S, Health, PlacementState, RentalState
from orion.manager.domain.tasks import TaskKind
from orion.manager.engine.fake import FakeWatch, Refused
from orion.manager.engine.port import Action, Job
from orion.manager.engine.vault.port import Copied, Home, Limits, VaultError
from orion.manager.loops.reconciler import JOB_DEADLINE_S
from orion.manager.loops.salvaging import LONGEST_TRY_S
from orion.manager.loops.watching import Watching


@pytest.fixture
async def pool(house: House) -> list[Agent]:
    return [await house.join(slots=4) for _ in range(2)]


async def written_and_lost(house: House) -> tuple[dict[str, Any], Agent]:
    """A rental that moved without what was written last, and the worker that has it."""
    rental = await house.rent(name="lab")
    files(house, rental)["file"] = "copied"
    await copied(house, rental)
    files(house, rental)["file"] = "written after that"
    dead = holder(house, rental)
    return await lose(house, rental), dead


async def snapshots(house: House, rental: dict[str, Any]) -> list[tuple[str, bool]]:
    found = (await house.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")).json()["items"]
    return [(one["generation"], one["salvage"]) for one in found]


def lets_in_and_dies(agent: Agent, written: str) -> None:
    """The next renter that it lets in writes something; nobody hears of that before its end."""
    create = agent.node.create

    def create_and_die(job: Job) -> dict[str, Any]:
        report = create(job)
        if job.action is Action.PREPARE:
            return report
        agent.node.homes[job.rental_id]["file"] = written
        agent.node.create = create  # type: ignore[method-assign]
        agent.die()
        raise Refused("the connection broke")

    agent.node.create = create_and_die  # type: ignore[method-assign]


@pytest.fixture
async def watched(house: House) -> AsyncIterator[House]:
    """Deaths are proved, before a second try to make anything there has failed."""
    watching = Watching(FakeWatch(house.world), house.clock.monotonic, house.manager.watch_changed)
    house.manager.health.watching = house.manager.watching = watching
    house.end_the_brake_of_the_start()
    yield house
    await watching.stop()


async def intend(house: House, agent: Agent, what: str) -> None:
    assert (await house.as_admin.post(f"/api/workers/{agent.worker_id}/{what}")).status_code == 200
    await house.settle()


async def test_what_was_written_after_the_last_copy_is_kept_aside_and_restored_on_request(
    house: House, pool: list[Agent]
) -> None:
    moved, dead = await written_and_lost(house)
    assert files(house, moved) == {"file": "copied"}
    await dead.come_back()
    await house.settle()
    assert (await house.health(dead), dead.node.homes) == ("ready", {})
    assert await snapshots(house, moved) == [("1-1", False), ("1-2", True)]
    (event,) = await house.events("rental.salvaged")
    assert "orion restore lab --from 1-2" in event["reason"]
    again = await lose(house, moved)
    assert files(house, again) == {"file": "copied"}, "its renter was let in at a later epoch"
    body = {"generation": "1-2", "discard": True}
    assert (await house.as_admin.post(f"/api/rentals/{moved['id']}/restore", json=body)).status_code == 202
    await house.pass_time(8)
    back = await house.rental(moved["id"])
    assert (back["state"], files(house, back)) == ("active", {"file": "written after that"})


async def test_what_nobody_has_worked_on_since_is_the_newest_and_comes_back_by_itself(house: House) -> None:
    await house.join()
    waiting, dead = await written_and_lost(house)
    assert waiting["state"] == "queued"
    shown_before = waiting["last_safe_copy_at"]
    await dead.come_back()
    await house.pass_time(8)
    back = await house.rental(waiting["id"])
    assert (back["state"], files(house, back)) == ("active", {"file": "written after that"})
    assert back["last_safe_copy_at"] > shown_before
    assert [e["details"]["generation"] for e in await house.events("rental.files_restored")] == ["1-2"]


async def test_a_home_that_was_copied_as_it_is_has_lost_nothing(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "same"
    await copied(house, rental)
    dead = holder(house, rental)
    await lose(house, rental)
    await dead.come_back()
    await house.settle()
    assert await snapshots(house, rental) == [("1-1", False)]
    assert [e["reason"].partition(": ")[2] for e in await house.events("rental.salvaged")] == [
        "they are as in copy 1-1"
    ]


async def test_what_was_released_is_not_salvaged(house: House, pool: list[Agent]) -> None:
    moved, dead = await written_and_lost(house)
    await house.as_admin.delete(f"/api/rentals/{moved['id']}")
    await house.settle()
    assert (await house.rental(moved["id"]))["state"] == "released"
    await dead.come_back()
    await house.settle()
    assert await house.health(dead) == "ready"
    assert await house.events("rental.salvage") == []


@pytest.mark.parametrize("code", ["unreachable", "over_limit", "unreadable_home", "failed", "purged"])
async def test_what_cannot_be_salvaged_is_purged_all_the_same_and_what_was_lost_is_said(
    house: House, pool: list[Agent], code: str
) -> None:
    moved, dead = await written_and_lost(house)
    tries = []

    async def refuse(home: Home, limits: Limits, spare: Generation | None = None) -> Copied:
        tries.append(home)
        raise VaultError(code, "there is no way")

    house.vault.salvage = refuse  # type: ignore[method-assign, assignment]
    await dead.come_back()
    await house.pass_time(12)
    assert (await house.health(dead), dead.node.homes) == ("ready", {})
    assert len(tries) == (2 if code in {"unreachable", "failed"} else 1)
    assert {(home.rental_id, home.epoch, home.host.worker_id) for home in tries} == {(moved["id"], 1, dead.worker_id)}
    (event,) = await house.events("rental.salvage_failed")
    assert "there is no way" in event["reason"]
    assert "is lost" in event["reason"]


def test_a_worker_becomes_ready_in_time_though_a_salvage_never_ends() -> None:
    """Whatever it hangs in: its worker has been joining for so long."""
    joining = new_worker(1, health=Health.JOINING, verified_session=None)
    rental = active_rental(1, epoch=2, state=RentalState.QUEUED)
    lost = new_placement(replace(rental, epoch=1), joining, PlacementState.LOST)
    world = new_world(joining, rental, lost)
    shown = {joining.id: (Item(rental.id, rental.username, rental.uid, 1),)}
    for age_s, kind in ((SALVAGE_WITHIN_S, TaskKind.SALVAGE), (SALVAGE_WITHIN_S + 1, TaskKind.DELETE)):
        decision = decide(world, Facts(shown, frozenset(), {joining.id: age_s}, iter("p")))
        assert [task.kind for task in decision.tasks] == [kind]
    (event,) = [event for step in decision.steps for event in step.events if event.kind.startswith("rental.salvage")]
    assert (event.kind, "is lost" in event.reason) == ("rental.salvage_failed", True)
    assert SALVAGE_WITHIN_S + LONGEST_TRY_S + JOB_DEADLINE_S < JOIN_DEADLINE_S, "there is time to purge it"


async def test_a_manager_that_ends_before_it_has_noted_a_salvage_makes_it_again_and_keeps_one(
    house: House, pool: list[Agent]
) -> None:
    moved, dead = await written_and_lost(house)
    salvage = house.vault.salvage

    async def and_die(home: Home, limits: Limits, spare: Generation | None = None) -> Copied:
        await salvage(home, limits, spare=spare)
        raise VaultError("no_answer", "the vault ended before it answered")

    house.vault.salvage = and_die  # type: ignore[method-assign, assignment]
    await dead.come_back()
    await house.manager.reconciler.round()
    await house.finish_tasks()
    house.vault.salvage = salvage  # type: ignore[method-assign]
    await house.restart()
    await dead.register()
    await house.pass_time(12)
    assert await house.health(dead) == "ready"
    assert await snapshots(house, moved) == [("1-1", False), ("1-2", True)]


async def test_a_worker_gains_nothing_by_showing_what_was_never_placed_there(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "mine"
    await copied(house, rental)
    evil = next(agent for agent in pool if agent.worker_id != rental["worker_id"])
    account = holder(house, rental).node.accounts[rental["id"]]
    evil.node.accounts[rental["id"]] = account.__class__(account.username, account.uid, 99, account.keys, False)
    evil.node.homes[rental["id"]] = {"file": "evil"}
    evil.node.let_in[rental["id"]] = 99
    await evil.beat()
    await house.settle()
    resumed = await house.as_admin.post(f"/api/workers/{evil.worker_id}/resume?give_up=true")
    assert resumed.status_code == 200
    await house.pass_time(40)
    assert house.vault.stored[rental["id"]].keys() == {Generation(1, 1)}
    assert await snapshots(house, rental) == [("1-1", False)]


# What nobody lived to tell


@pytest.mark.parametrize("first_back", ["the latest", "the one before"])
async def test_where_a_renter_was_let_in_unheard_is_the_newest_whoever_comes_back_first(
    watched: House, first_back: str
) -> None:
    """The second worker lets it in and dies, and the manager knows only of the first, until both have come back."""
    first = await watched.join()
    rental = await watched.rent(name="lab")
    files(watched, rental)["file"] = "copied"
    await copied(watched, rental)
    files(watched, rental)["file"] = "written at epoch 1"
    second = await watched.join()
    lets_in_and_dies(second, "written at epoch 2")
    first.die()
    await watched.pass_time(12)
    assert (await watched.rental(rental["id"]))["state"] == "queued"
    for agent in (first, second):
        await intend(watched, agent, "drain")  # nothing is made anew before both are back
    for agent in (second, first) if first_back == "the latest" else (first, second):
        await agent.come_back()
        await watched.pass_time(8)
        assert agent.node.homes == {}
    shown = await watched.rental(rental["id"])
    found = (await watched.as_admin.get(f"/api/rentals/{rental['id']}/snapshots")).json()["items"]
    newest = next(one for one in found if one["generation"] == "2-1")
    assert (shown["state"], shown["last_safe_copy_at"]) == ("queued", newest["at"]), "the age of what it begins with"
    told = {event["details"]["generation"]: event["reason"] for event in await watched.events("rental.salvaged")}
    assert "with which it begins again" in told["2-1"]
    assert ("orion restore lab --from 1-2" in told["1-2"]) == (first_back == "the latest")
    await intend(watched, first, "resume")
    await watched.pass_time(8)
    back = await watched.rental(rental["id"])
    assert (back["state"], files(watched, back)) == ("active", {"file": "written at epoch 2"})


async def test_what_was_never_active_keeps_what_was_written_where_it_was_let_in_unheard(watched: House) -> None:
    only = await watched.join()
    lets_in_and_dies(only, "written before anybody knew")
    rental = await watched.rent()
    await watched.pass_time(8)
    waiting = await watched.rental(rental["id"])
    assert (waiting["state"], waiting["last_safe_copy_at"]) == ("queued", None)
    await only.come_back()
    await watched.pass_time(8)
    back = await watched.rental(rental["id"])
    assert (back["state"], files(watched, back)) == ("active", {"file": "written before anybody knew"})
    assert back["last_safe_copy_at"]


async def test_what_was_never_active_and_is_made_elsewhere_meanwhile_has_it_kept_aside(watched: House) -> None:
    dead = await watched.join()
    lets_in_and_dies(dead, "written before anybody knew")
    rental = await watched.rent(name="lab")
    await watched.pass_time(8)
    await watched.join()
    made = await watched.rental(rental["id"])
    assert (made["state"], files(watched, made)) == ("active", {})
    await dead.come_back()
    await watched.pass_time(8)
    assert (await watched.health(dead), dead.node.homes) == ("ready", {})
    assert await snapshots(watched, made) == [("1-1", True)]
    (event,) = await watched.events("rental.salvaged")
    assert "orion restore lab --from 1-1" in event["reason"]


async def test_a_worker_that_never_let_anybody_in_has_nothing_to_salvage_and_nothing_is_said(watched: House) -> None:
    only = await watched.join()
    create = only.node.create

    def make_and_die(job: Job) -> dict[str, Any]:
        create(replace(job, action=Action.PREPARE))
        only.die()
        raise Refused("the connection broke")

    only.node.create = make_and_die  # type: ignore[method-assign]
    rental = await watched.rent()
    await watched.pass_time(8)
    only.node.create = create  # type: ignore[method-assign]
    await only.come_back()
    await watched.pass_time(8)
    assert (await watched.rental(rental["id"]))["state"] == "active"
    assert await snapshots(watched, rental) == []
    assert await watched.events("rental.salvage") == []


async def test_what_a_rental_began_with_is_kept_however_many_salvages_come(house: House) -> None:
    """Salvaged at epoch 1 and copied at no epoch since: three more workers come and go, and come back."""
    agents = [await house.join(slots=4) for _ in range(4)]
    rental = await house.rent()
    files(house, rental)["file"] = "copied"
    await copied(house, rental)
    files(house, rental)["file"] = "salvaged"
    for agent in agents:
        if agent.worker_id != rental["worker_id"]:
            await intend(house, agent, "drain")
    first = holder(house, rental)
    assert (await lose(house, rental))["state"] == "queued"
    await first.come_back()
    for agent in agents:
        if agent is not first:
            await intend(house, agent, "resume")
    await house.pass_time(8)
    gone: list[Agent] = []
    for _ in range(2):
        rental = await house.rental(rental["id"])
        assert (rental["state"], files(house, rental)) == ("active", {"file": "salvaged"})
        files(house, rental)[f"of epoch {rental['epoch']}"] = "x"
        gone.append(holder(house, rental))
        await lose(house, rental)
    for agent in gone:
        await agent.come_back()
        await house.pass_time(8)
    assert ("1-2", True) in await snapshots(house, rental)
    again = await lose(house, await house.rental(rental["id"]))
    assert (again["state"], files(house, again)) == ("active", {"file": "salvaged"})
