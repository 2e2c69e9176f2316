"""Planned migrations in the whole manager, on virtual time: no byte lost, no rental alive twice, no state stuck."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.harness import Agent, Harness

from orion import wire
from orion.manager.ansible.port import OTHER_BOOT, Action, Job, Outcome
from orion.manager.domain import migration
from orion.manager.domain.states import HELD_DEADLINE_S, Health
from orion.manager.domain.steps import move_worker
from orion.manager.operations.task_runner import MIGRATION_TASKS
from orion.manager.snapshots.port import OVER_LIMIT, SnapshotError, Taken

TOO_LARGE = SnapshotError(OVER_LIMIT, "its home holds too much")


@pytest.fixture
async def pool(harness: Harness) -> list[Agent]:
    return [await harness.join(slots=2) for _ in range(2)]


def files(harness: Harness, rental: dict[str, Any]) -> dict[str, str]:
    return harness.agent_of(rental).node.homes[rental["id"]]


async def migrate(harness: Harness, rental: dict[str, Any]) -> dict[str, Any]:
    """Request a migration and run everything that can run now; return the rental."""
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    assert reply.status_code == 202, reply.text
    await harness.settle()
    return await harness.rental(rental["id"])


async def drain(harness: Harness, agent: Agent) -> None:
    assert (await harness.as_admin.post(f"/api/workers/{agent.worker_id}/drain")).status_code == 200
    await harness.settle()


class Interference:
    """Interferes with a migration after the engine has done an action for the nth time."""

    def __init__(self, harness: Harness, action: Action, what: Any, time: int = 1) -> None:
        self._run = harness.manager.task_runner.migrator.engine.run
        self._action, self._what, self._left = action, what, time
        harness.manager.task_runner.migrator.engine = self  # type: ignore[assignment]

    async def run(self, job: Job) -> Outcome:
        outcome = await self._run(job)
        if job.action is self._action:
            self._left -= 1
            if not self._left:
                found = self._what(job)
                if asyncio.iscoroutine(found):
                    await found
        return outcome


class Restart:
    """Restarts a worker's container while its first order to freeze is in transit, and keeps the outcome."""

    def __init__(self, harness: Harness, agent: Agent) -> None:
        self._run = harness.manager.task_runner.migrator.engine.run
        self._agent = agent
        self.outcomes: list[Outcome] = []
        harness.manager.task_runner.migrator.engine = self  # type: ignore[assignment]

    async def run(self, job: Job) -> Outcome:
        if job.action is not Action.FREEZE or self.outcomes:
            return await self._run(job)
        self._agent.node.come_back()
        self._agent.node.boot_id = "boot-0002"
        self.outcomes.append(await self._run(job))
        assert self._agent.node.frozen.keys() == ({job.order.rental_id} if self.outcomes[0].ok else set())
        return self.outcomes[0]


@pytest.mark.parametrize(("version", "refused"), [("0.1.0+boot", True), ("0.2.0+more.boot", True), ("0.1.0", False)])
async def test_a_late_freeze_does_not_reach_the_next_boot_of_a_container_that_supports_boot_ids(
    harness: Harness, version: str, refused: bool
) -> None:
    """A worker of a former version gets orders without a boot id, because it would refuse that field."""
    pool = [harness.new_agent(slots=2) for _ in range(2)]
    for agent in pool:
        agent.agent_version = version
        await agent.register()
    await harness.settle()
    rental = await harness.rent()
    source = harness.agent_of(rental)
    restart = Restart(harness, source)
    await migrate(harness, rental)
    assert [outcome.report.get("code") == OTHER_BOOT for outcome in restart.outcomes] == [refused]
    await source.come_back()
    await harness.pass_time(60)
    back = await harness.rental(rental["id"])
    assert (back["state"], len(harness.live_copies(rental["id"]))) == ("active", 1)


async def test_a_rental_has_its_name_on_each_worker(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent(name="lab")
    assert harness.agent_of(rental).node.names == {rental["id"]: "lab"}
    await migrate(harness, rental)
    assert [agent.node.names for agent in pool] == [{rental["id"]: "lab"}] * 2


async def test_a_migrated_rental_has_all_that_it_wrote_before_it_was_quiesced(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent()
    files(harness, rental)["early"] = "1"
    home = files(harness, rental)
    Interference(harness, Action.PREPARE, lambda _: home.update(late="2"))
    moved = await migrate(harness, rental)
    assert (moved["state"], moved["epoch"], moved["moving_to"]) == ("active", 2, None)
    assert moved["worker_id"] != rental["worker_id"]
    assert files(harness, moved) == {"early": "1", "late": "2"}
    assert harness.live_copies(rental["id"]) == [2]
    assert rental["id"] not in harness.agent_of(rental).node.accounts, "nothing is left on the source"
    kinds = [event["kind"] for event in await harness.events() if event["rental_id"] == rental["id"]]
    order = ["rental.move_started", "rental.held", "rental.migration_started", "rental.activated"]
    assert [kind for kind in kinds if kind in order] == ["rental.activated", *order]


async def test_a_rental_runs_during_precopy_and_its_target_stays_locked(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    seen: list[list[int]] = []
    Interference(harness, Action.PREPARE, lambda _: seen.append(harness.live_copies(rental["id"])))
    Interference(harness, Action.FREEZE, lambda _: seen.append(harness.live_copies(rental["id"])))
    await migrate(harness, rental)
    assert seen == [[1], []]


async def test_no_reply_lets_a_quiesced_rental_run(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    source = harness.agent_of(rental)

    async def beats(_: Job) -> None:
        await source.beat()
        assert [order["want"] for order in source.last_reply["placements"]] == ["hold"]
        assert harness.live_copies(rental["id"]) == []

    Interference(harness, Action.FREEZE, beats)
    assert (await migrate(harness, rental))["epoch"] == 2


async def test_a_migration_without_a_free_slot_is_refused_and_the_rental_goes_on(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent()
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    assert (reply.status_code, reply.json()["code"]) == (409, "nowhere_to_go")
    assert "of 1 worker, 1 where it is" in reply.json()["detail"]
    await harness.settle()
    assert harness.live_copies(rental["id"]) == [1]


async def test_a_stranger_cannot_migrate_a_rental_and_its_owner_can(harness: Harness, pool: list[Agent]) -> None:
    owner, stranger = await harness.new_client("alice"), await harness.new_client("mallory")
    rental = (await owner.post("/api/rent", json={"wait_s": 0})).json()
    await harness.settle()
    assert (await stranger.post(f"/api/rentals/{rental['id']}/migrate")).status_code == 404
    assert (await owner.post(f"/api/rentals/{rental['id']}/migrate")).status_code == 202
    again = await owner.post(f"/api/rentals/{rental['id']}/migrate")
    assert again.status_code == 202, "two requests make one migration"
    assert again.json()["moving_to"]
    await harness.settle()
    assert (await harness.rental(rental["id"]))["epoch"] == 2


@pytest.mark.parametrize("asked", ["queued", "released"])
async def test_a_rental_that_does_not_run_is_not_migrated(harness: Harness, asked: str) -> None:
    rental = await harness.rent()
    if asked == "released":
        await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
        await harness.settle()
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    assert (reply.status_code, reply.json()["code"]) == (409, "not_active")


async def test_a_rental_whose_final_sync_fails_is_thawed_at_once(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    source = harness.agent_of(rental)

    def breaks(_: Job) -> None:
        harness.snapshot_service.failure = TOO_LARGE

    Interference(harness, Action.FREEZE, breaks)
    kept = await migrate(harness, rental)
    assert (kept["state"], kept["epoch"], kept["worker_id"]) == ("active", 1, rental["worker_id"])
    assert kept["explanation"] == f"{wire.NOT_MOVED}{TOO_LARGE}"
    assert (source.unlocked(), source.node.frozen) == ({rental["id"]: 1}, {})
    assert [p["state"] for p in await harness.placements()] == ["running", "purged"]
    harness.snapshot_service.failure = None
    moved = await migrate(harness, rental)
    assert moved["epoch"] == 3, "the epoch of the failed migration is never used again"


async def test_the_waiting_client_learns_that_the_migration_failed(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    harness.snapshot_service.failure = TOO_LARGE
    migrating = asyncio.create_task(harness.as_admin.post(f"/api/rentals/{rental['id']}/migrate?wait_s=30"))
    with harness.store.news.listen(rental["id"]) as begun:
        await begun.wait()
    await harness.pass_time(30)
    reply = await migrating
    assert (reply.status_code, reply.json()["code"]) == (409, "not_moved")
    assert str(TOO_LARGE) in reply.json()["detail"]


async def test_when_the_target_worker_dies_a_quiesced_rental_goes_on_at_its_source(
    harness: Harness, pool: list[Agent]
) -> None:
    harness.end_the_brake_of_the_start()
    rental = await harness.rent()
    target = next(agent for agent in pool if agent is not harness.agent_of(rental))
    Interference(harness, Action.FREEZE, lambda _: target.die())
    kept = await migrate(harness, rental)
    assert (kept["epoch"], harness.live_copies(rental["id"])) == (1, [1])
    await harness.silence(target, 91)
    assert (await harness.rental(rental["id"]))["moving_to"] is None


async def test_when_the_source_worker_dies_the_target_takes_over(harness: Harness, pool: list[Agent]) -> None:
    harness.end_the_brake_of_the_start()
    rental = await harness.rent()
    files(harness, rental)["file"] = "1"
    source, state_store = harness.agent_of(rental), harness.manager.state_store

    async def is_found_dead(_: Job) -> None:
        source.die()
        worker = (await state_store.workers([source.worker_id]))[source.worker_id]
        assert await state_store.apply([move_worker(worker, Health.DOWN, "found dead")])

    Interference(harness, Action.PREPARE, is_found_dead)
    moved = await migrate(harness, rental)
    assert (moved["state"], moved["epoch"], harness.live_copies(rental["id"])) == ("active", 2, [2])
    assert await harness.events("rental.taken_over")


async def test_a_release_ends_both_source_and_target(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()

    async def releases(_: Job) -> None:
        await harness.as_admin.delete(f"/api/rentals/{rental['id']}")

    Interference(harness, Action.FREEZE, releases)
    assert (await migrate(harness, rental))["state"] == "released"
    assert [agent.node.accounts for agent in pool] == [{}, {}]


@pytest.mark.parametrize("action", [Action.PREPARE, Action.FREEZE])
async def test_a_restarted_manager_continues_a_planned_migration(
    harness: Harness, pool: list[Agent], action: Action
) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "1"
    stopped = asyncio.Event()

    async def ends(_: Job) -> None:
        stopped.set()
        await asyncio.Event().wait()

    Interference(harness, action, ends)
    assert (await harness.as_admin.post(f"/api/rentals/{rental['id']}/migrate")).status_code == 202
    while not stopped.is_set():
        await harness.manager.reconciler.round()
        await asyncio.sleep(0)
    await harness.restart()
    for agent in pool:
        await agent.beat()
    await harness.settle()
    moved = await harness.rental(rental["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert files(harness, moved) == {"file": "1"}
    assert harness.live_copies(rental["id"]) == [2]


async def test_a_quiesced_rental_goes_on_after_a_deadline(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    Interference(harness, Action.FREEZE, lambda _: asyncio.Event().wait())
    await harness.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    for _ in range(20):
        await harness.manager.reconciler.round()
        await asyncio.sleep(0.001)
    assert harness.live_copies(rental["id"]) == []
    harness.clock.now += HELD_DEADLINE_S + 1
    await harness.settle()
    kept = await harness.rental(rental["id"])
    assert kept["explanation"].startswith(wire.NOT_MOVED)
    assert (kept["worker_id"], harness.live_copies(rental["id"])) == (rental["worker_id"], [1])


# -- drains ---------------------------------------------------------------------------------------------------------


async def test_a_drain_migrates_all_rentals_and_ends(harness: Harness) -> None:
    full = await harness.join(slots=9)
    rentals = [await harness.rent() for _ in range(9)]
    for number, rental in enumerate(rentals):
        files(harness, rental)["file"] = str(number)
    other = await harness.join(slots=9)
    at_once: list[int] = []
    Interference(harness, Action.PREPARE, lambda _: None)
    original = harness.manager.task_runner.migrator.precopy

    async def counted(*jobs: Job) -> Outcome:
        at_once.append(sum(task.kind in MIGRATION_TASKS for task in harness.manager.task_runner._tasks.values()))
        return await original(*jobs)

    harness.manager.task_runner.migrator.precopy = counted  # type: ignore[method-assign]
    await drain(harness, full)
    assert (await harness.worker(full))["intent"] == "drained"
    assert 1 < max(at_once) <= migration.MAX_UNDER_WAY, "several migrate at a time, and no more"
    assert full.node.accounts == {}
    moved = [await harness.rental(rental["id"]) for rental in rentals]
    assert {rental["worker_id"] for rental in moved} == {other.worker_id}
    assert [files(harness, rental)["file"] for rental in moved] == [str(number) for number in range(9)]


async def test_a_drain_without_free_slots_says_so_and_continues_when_there_are_some(harness: Harness) -> None:
    only = await harness.join()
    rental = await harness.rent()
    await drain(harness, only)
    shown = await harness.worker(only)
    assert (shown["intent"], harness.live_copies(rental["id"])) == ("draining", [1])
    assert shown["explanation"] == ("1 rental is to be migrated, and no worker can take one: of 1 worker, 1 draining")
    await harness.join()
    assert (await harness.worker(only))["intent"] == "drained"
    assert (await harness.rental(rental["id"]))["epoch"] == 2


async def test_a_rental_that_cannot_migrate_does_not_delay_the_others_of_a_drain_and_is_explained(
    harness: Harness,
) -> None:
    full = await harness.join(slots=2)
    tricky, honest = await harness.rent(), await harness.rent()
    await harness.join(slots=2)
    copy = harness.snapshot_service.take

    async def refuses(home: Any, *arguments: Any, **named: Any) -> Any:
        if home.rental_id == tricky["id"]:
            raise TOO_LARGE
        return await copy(home, *arguments, **named)

    harness.snapshot_service.take = refuses  # type: ignore[method-assign]
    await drain(harness, full)
    await harness.pass_time(60)
    assert (await harness.rental(honest["id"]))["epoch"] == 2
    stays = await harness.rental(tricky["id"])
    assert stays["explanation"] == f"{wire.NOT_MOVED}{TOO_LARGE}"
    assert harness.live_copies(tricky["id"]) == [1]
    assert (await harness.worker(full))["explanation"] == "1 rental is to be migrated"
    tries = len(await harness.events("rental.move_started"))
    await harness.pass_time(200)
    assert len(await harness.events("rental.move_started")) <= tries + 2, "the tries become rarer"


async def test_rentals_of_a_quarantined_worker_migrate_away(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    source = harness.agent_of(rental)
    await harness.as_admin.post(f"/api/workers/{source.worker_id}/drain")
    await harness.as_admin.post(f"/api/workers/{source.worker_id}/resume")
    for _ in range(3):
        harness.manager.leases.lost_ready(source.worker_id, harness.clock.now, 3600.0)
    await source.come_back()
    await harness.pass_time(60)
    assert await harness.health(source) == "quarantined"
    assert (await harness.rental(rental["id"]))["epoch"] == 2


# -- goodbyes -------------------------------------------------------------------------------------------------------


async def evacuate(harness: Harness, *agents: Agent) -> None:
    """Have workers evacuate: they stop when no rental is left on them."""
    for agent in agents:
        await agent.beat(vacating=True)
    for _ in range(20):
        await harness.pass_time(0.5)
        for agent in agents:
            await agent.beat(vacating=True)
        if not any(agent.node.accounts for agent in agents):
            return
    raise AssertionError("something is left")


async def test_an_evacuating_worker_loses_no_file(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "1"
    await evacuate(harness, harness.agent_of(rental))
    moved = await harness.rental(rental["id"])
    assert (moved["state"], moved["epoch"], files(harness, moved)) == ("active", 2, {"file": "1"})


async def test_when_all_workers_evacuate_all_rentals_are_parked_and_come_back(
    harness: Harness, pool: list[Agent]
) -> None:
    rentals = [await harness.rent() for _ in range(3)]
    for number, rental in enumerate(rentals):
        files(harness, rental)["file"] = str(number)
    await evacuate(harness, *pool)
    assert {(await harness.rental(rental["id"]))["state"] for rental in rentals} == {"queued"}
    assert not await harness.events("rental.move_started"), "no rental migrates to another worker that is about to end"
    for agent in pool:
        await agent.exit()
    await harness.restart()
    await harness.join(slots=3)
    back = [await harness.rental(rental["id"]) for rental in rentals]
    assert [rental["state"] for rental in back] == ["active"] * 3
    assert [files(harness, rental)["file"] for rental in back] == ["0", "1", "2"]


async def test_a_snapshot_begun_before_a_park_does_not_replace_the_last_one(
    harness: Harness,
) -> None:
    """The snapshot was taken before the last one and is committed after it, because the manager's disk is slow."""
    agent = await harness.join()
    rental = await harness.rent()
    files(harness, rental)["file"] = "copied"
    was_made, may_be_noted, copy = asyncio.Event(), asyncio.Event(), harness.snapshot_service.take

    async def taken_and_delayed(*arguments: Any, for_migration: bool = False, **named: Any) -> Taken:
        made = await copy(*arguments, **named)
        if for_migration:
            may_be_noted.set()
            await begun
        else:
            was_made.set()
            await may_be_noted.wait()
        return made

    harness.snapshot_service.take = taken_and_delayed  # type: ignore[method-assign]
    begun = asyncio.create_task(harness.manager.snapshots.take_now(rental["id"], None))
    await was_made.wait()
    files(harness, rental)["file"] = "written before it stood still"
    await evacuate(harness, agent)
    assert begun.result() == "it was stopped or migrated meanwhile"
    assert (await harness.rental(rental["id"]))["state"] == "queued"
    await agent.exit()
    await harness.join()
    back = await harness.rental(rental["id"])
    assert (back["state"], files(harness, back)) == ("active", {"file": "written before it stood still"})


async def test_a_rental_whose_target_worker_also_evacuates_is_parked(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent()
    files(harness, rental)["file"] = "1"
    target = next(agent for agent in pool if agent is not harness.agent_of(rental))
    Interference(harness, Action.PREPARE, lambda _: target.beat(vacating=True))
    await evacuate(harness, *pool)
    assert (await harness.rental(rental["id"]))["state"] == "queued"
    await harness.join()
    back = await harness.rental(rental["id"])
    assert (back["state"], files(harness, back)) == ("active", {"file": "1"})
