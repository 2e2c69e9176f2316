"""Planned migrations in the whole manager, on virtual time: no byte lost, no rental alive twice, no state stuck."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.house import Agent, House

from orion import wire
from orion.manager.ansible.port import OTHER_BOOT, Action, Job, Outcome
from orion.manager.domain import migration
from orion.manager.domain.states import HELD_DEADLINE_S, Health
from orion.manager.domain.steps import move_worker
from orion.manager.operations.task_runner import MIGRATION_TASKS
from orion.manager.snapshots.port import OVER_LIMIT, SnapshotError, Taken

TOO_LARGE = SnapshotError(OVER_LIMIT, "its home holds too much")


@pytest.fixture
async def pool(house: House) -> list[Agent]:
    return [await house.join(slots=2) for _ in range(2)]


def files(house: House, rental: dict[str, Any]) -> dict[str, str]:
    return house.agent_of(rental).node.homes[rental["id"]]


async def migrate(house: House, rental: dict[str, Any]) -> dict[str, Any]:
    """Request a migration and run everything that can run now; return the rental."""
    reply = await house.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    assert reply.status_code == 202, reply.text
    await house.settle()
    return await house.rental(rental["id"])


async def drain(house: House, agent: Agent) -> None:
    assert (await house.as_admin.post(f"/api/workers/{agent.worker_id}/drain")).status_code == 200
    await house.settle()


class Interference:
    """Interferes with a migration after the engine has done an action for the nth time."""

    def __init__(self, house: House, action: Action, what: Any, time: int = 1) -> None:
        self._run = house.manager.task_runner.migrator.engine.run
        self._action, self._what, self._left = action, what, time
        house.manager.task_runner.migrator.engine = self  # type: ignore[assignment]

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

    def __init__(self, house: House, agent: Agent) -> None:
        self._run = house.manager.task_runner.migrator.engine.run
        self._agent = agent
        self.outcomes: list[Outcome] = []
        house.manager.task_runner.migrator.engine = self  # type: ignore[assignment]

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
    house: House, version: str, refused: bool
) -> None:
    """A worker of a former version gets orders without a boot id, because it would refuse that field."""
    pool = [house.new_agent(slots=2) for _ in range(2)]
    for agent in pool:
        agent.agent_version = version
        await agent.register()
    await house.settle()
    rental = await house.rent()
    source = house.agent_of(rental)
    restart = Restart(house, source)
    await migrate(house, rental)
    assert [outcome.report.get("code") == OTHER_BOOT for outcome in restart.outcomes] == [refused]
    await source.come_back()
    await house.pass_time(60)
    back = await house.rental(rental["id"])
    assert (back["state"], len(house.live_copies(rental["id"]))) == ("active", 1)


async def test_a_rental_has_its_name_on_each_worker(house: House, pool: list[Agent]) -> None:
    rental = await house.rent(name="lab")
    assert house.agent_of(rental).node.names == {rental["id"]: "lab"}
    await migrate(house, rental)
    assert [agent.node.names for agent in pool] == [{rental["id"]: "lab"}] * 2


async def test_a_migrated_rental_has_all_that_it_wrote_before_it_was_quiesced(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    files(house, rental)["early"] = "1"
    home = files(house, rental)
    Interference(house, Action.PREPARE, lambda _: home.update(late="2"))
    moved = await migrate(house, rental)
    assert (moved["state"], moved["epoch"], moved["moving_to"]) == ("active", 2, None)
    assert moved["worker_id"] != rental["worker_id"]
    assert files(house, moved) == {"early": "1", "late": "2"}
    assert house.live_copies(rental["id"]) == [2]
    assert rental["id"] not in house.agent_of(rental).node.accounts, "nothing is left on the source"
    kinds = [event["kind"] for event in await house.events() if event["rental_id"] == rental["id"]]
    order = ["rental.move_started", "rental.held", "rental.migration_started", "rental.activated"]
    assert [kind for kind in kinds if kind in order] == ["rental.activated", *order]


async def test_a_rental_runs_during_precopy_and_its_target_stays_locked(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    seen: list[list[int]] = []
    Interference(house, Action.PREPARE, lambda _: seen.append(house.live_copies(rental["id"])))
    Interference(house, Action.FREEZE, lambda _: seen.append(house.live_copies(rental["id"])))
    await migrate(house, rental)
    assert seen == [[1], []]


async def test_no_reply_lets_a_quiesced_rental_run(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    source = house.agent_of(rental)

    async def beats(_: Job) -> None:
        await source.beat()
        assert [order["want"] for order in source.last_reply["placements"]] == ["hold"]
        assert house.live_copies(rental["id"]) == []

    Interference(house, Action.FREEZE, beats)
    assert (await migrate(house, rental))["epoch"] == 2


async def test_a_migration_without_a_free_slot_is_refused_and_the_rental_goes_on(house: House) -> None:
    await house.join()
    rental = await house.rent()
    reply = await house.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    assert (reply.status_code, reply.json()["code"]) == (409, "nowhere_to_go")
    assert "of 1 worker, 1 where it is" in reply.json()["detail"]
    await house.settle()
    assert house.live_copies(rental["id"]) == [1]


async def test_a_stranger_cannot_migrate_a_rental_and_its_owner_can(house: House, pool: list[Agent]) -> None:
    owner, stranger = await house.new_client("alice"), await house.new_client("mallory")
    rental = (await owner.post("/api/rent", json={"wait_s": 0})).json()
    await house.settle()
    assert (await stranger.post(f"/api/rentals/{rental['id']}/migrate")).status_code == 404
    assert (await owner.post(f"/api/rentals/{rental['id']}/migrate")).status_code == 202
    again = await owner.post(f"/api/rentals/{rental['id']}/migrate")
    assert again.status_code == 202, "two requests make one migration"
    assert again.json()["moving_to"]
    await house.settle()
    assert (await house.rental(rental["id"]))["epoch"] == 2


@pytest.mark.parametrize("asked", ["queued", "released"])
async def test_a_rental_that_does_not_run_is_not_migrated(house: House, asked: str) -> None:
    rental = await house.rent()
    if asked == "released":
        await house.as_admin.delete(f"/api/rentals/{rental['id']}")
        await house.settle()
    reply = await house.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    assert (reply.status_code, reply.json()["code"]) == (409, "not_active")


async def test_a_rental_whose_final_sync_fails_is_thawed_at_once(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    source = house.agent_of(rental)

    def breaks(_: Job) -> None:
        house.snapshot_service.failure = TOO_LARGE

    Interference(house, Action.FREEZE, breaks)
    kept = await migrate(house, rental)
    assert (kept["state"], kept["epoch"], kept["worker_id"]) == ("active", 1, rental["worker_id"])
    assert kept["explanation"] == f"{wire.NOT_MOVED}{TOO_LARGE}"
    assert (source.unlocked(), source.node.frozen) == ({rental["id"]: 1}, {})
    assert [p["state"] for p in await house.placements()] == ["running", "purged"]
    house.snapshot_service.failure = None
    moved = await migrate(house, rental)
    assert moved["epoch"] == 3, "the epoch of the failed migration is never used again"


async def test_the_waiting_client_learns_that_the_migration_failed(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    house.snapshot_service.failure = TOO_LARGE
    migrating = asyncio.create_task(house.as_admin.post(f"/api/rentals/{rental['id']}/migrate?wait_s=30"))
    with house.store.news.listen(rental["id"]) as begun:
        await begun.wait()
    await house.pass_time(30)
    reply = await migrating
    assert (reply.status_code, reply.json()["code"]) == (409, "not_moved")
    assert str(TOO_LARGE) in reply.json()["detail"]


async def test_when_the_target_worker_dies_a_quiesced_rental_goes_on_at_its_source(
    house: House, pool: list[Agent]
) -> None:
    house.end_the_brake_of_the_start()
    rental = await house.rent()
    target = next(agent for agent in pool if agent is not house.agent_of(rental))
    Interference(house, Action.FREEZE, lambda _: target.die())
    kept = await migrate(house, rental)
    assert (kept["epoch"], house.live_copies(rental["id"])) == (1, [1])
    await house.silence(target, 91)
    assert (await house.rental(rental["id"]))["moving_to"] is None


async def test_when_the_source_worker_dies_the_target_takes_over(house: House, pool: list[Agent]) -> None:
    house.end_the_brake_of_the_start()
    rental = await house.rent()
    files(house, rental)["file"] = "1"
    source, state_store = house.agent_of(rental), house.manager.state_store

    async def is_found_dead(_: Job) -> None:
        source.die()
        worker = (await state_store.workers([source.worker_id]))[source.worker_id]
        assert await state_store.apply([move_worker(worker, Health.DOWN, "found dead")])

    Interference(house, Action.PREPARE, is_found_dead)
    moved = await migrate(house, rental)
    assert (moved["state"], moved["epoch"], house.live_copies(rental["id"])) == ("active", 2, [2])
    assert await house.events("rental.taken_over")


async def test_a_release_ends_both_source_and_target(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()

    async def releases(_: Job) -> None:
        await house.as_admin.delete(f"/api/rentals/{rental['id']}")

    Interference(house, Action.FREEZE, releases)
    assert (await migrate(house, rental))["state"] == "released"
    assert [agent.node.accounts for agent in pool] == [{}, {}]


@pytest.mark.parametrize("action", [Action.PREPARE, Action.FREEZE])
async def test_a_restarted_manager_continues_a_planned_migration(
    house: House, pool: list[Agent], action: Action
) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "1"
    stopped = asyncio.Event()

    async def ends(_: Job) -> None:
        stopped.set()
        await asyncio.Event().wait()

    Interference(house, action, ends)
    assert (await house.as_admin.post(f"/api/rentals/{rental['id']}/migrate")).status_code == 202
    while not stopped.is_set():
        await house.manager.reconciler.round()
        await asyncio.sleep(0)
    await house.restart()
    for agent in pool:
        await agent.beat()
    await house.settle()
    moved = await house.rental(rental["id"])
    assert (moved["state"], moved["epoch"]) == ("active", 2)
    assert files(house, moved) == {"file": "1"}
    assert house.live_copies(rental["id"]) == [2]


async def test_a_quiesced_rental_goes_on_after_a_deadline(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    Interference(house, Action.FREEZE, lambda _: asyncio.Event().wait())
    await house.as_admin.post(f"/api/rentals/{rental['id']}/migrate")
    for _ in range(20):
        await house.manager.reconciler.round()
        await asyncio.sleep(0.001)
    assert house.live_copies(rental["id"]) == []
    house.clock.now += HELD_DEADLINE_S + 1
    await house.settle()
    kept = await house.rental(rental["id"])
    assert kept["explanation"].startswith(wire.NOT_MOVED)
    assert (kept["worker_id"], house.live_copies(rental["id"])) == (rental["worker_id"], [1])


# -- drains ---------------------------------------------------------------------------------------------------------


async def test_a_drain_migrates_all_rentals_and_ends(house: House) -> None:
    full = await house.join(slots=9)
    rentals = [await house.rent() for _ in range(9)]
    for number, rental in enumerate(rentals):
        files(house, rental)["file"] = str(number)
    other = await house.join(slots=9)
    at_once: list[int] = []
    Interference(house, Action.PREPARE, lambda _: None)
    original = house.manager.task_runner.migrator.precopy

    async def counted(*jobs: Job) -> Outcome:
        at_once.append(sum(task.kind in MIGRATION_TASKS for task in house.manager.task_runner._tasks.values()))
        return await original(*jobs)

    house.manager.task_runner.migrator.precopy = counted  # type: ignore[method-assign]
    await drain(house, full)
    assert (await house.worker(full))["intent"] == "drained"
    assert 1 < max(at_once) <= migration.MAX_UNDER_WAY, "several migrate at a time, and no more"
    assert full.node.accounts == {}
    moved = [await house.rental(rental["id"]) for rental in rentals]
    assert {rental["worker_id"] for rental in moved} == {other.worker_id}
    assert [files(house, rental)["file"] for rental in moved] == [str(number) for number in range(9)]


async def test_a_drain_without_free_slots_says_so_and_continues_when_there_are_some(house: House) -> None:
    only = await house.join()
    rental = await house.rent()
    await drain(house, only)
    shown = await house.worker(only)
    assert (shown["intent"], house.live_copies(rental["id"])) == ("draining", [1])
    assert shown["explanation"] == ("1 rental is to be migrated, and no worker can take one: of 1 worker, 1 draining")
    await house.join()
    assert (await house.worker(only))["intent"] == "drained"
    assert (await house.rental(rental["id"]))["epoch"] == 2


async def test_a_rental_that_cannot_migrate_does_not_delay_the_others_of_a_drain_and_is_explained(house: House) -> None:
    full = await house.join(slots=2)
    tricky, honest = await house.rent(), await house.rent()
    await house.join(slots=2)
    copy = house.snapshot_service.take

    async def refuses(home: Any, *arguments: Any, **named: Any) -> Any:
        if home.rental_id == tricky["id"]:
            raise TOO_LARGE
        return await copy(home, *arguments, **named)

    house.snapshot_service.take = refuses  # type: ignore[method-assign]
    await drain(house, full)
    await house.pass_time(60)
    assert (await house.rental(honest["id"]))["epoch"] == 2
    stays = await house.rental(tricky["id"])
    assert stays["explanation"] == f"{wire.NOT_MOVED}{TOO_LARGE}"
    assert house.live_copies(tricky["id"]) == [1]
    assert (await house.worker(full))["explanation"] == "1 rental is to be migrated"
    tries = len(await house.events("rental.move_started"))
    await house.pass_time(200)
    assert len(await house.events("rental.move_started")) <= tries + 2, "the tries become rarer"


async def test_rentals_of_a_quarantined_worker_migrate_away(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    source = house.agent_of(rental)
    await house.as_admin.post(f"/api/workers/{source.worker_id}/drain")
    await house.as_admin.post(f"/api/workers/{source.worker_id}/resume")
    for _ in range(3):
        house.manager.leases.lost_ready(source.worker_id, house.clock.now, 3600.0)
    await source.come_back()
    await house.pass_time(60)
    assert await house.health(source) == "quarantined"
    assert (await house.rental(rental["id"]))["epoch"] == 2


# -- goodbyes -------------------------------------------------------------------------------------------------------


async def evacuate(house: House, *agents: Agent) -> None:
    """Have workers evacuate: they stop when no rental is left on them."""
    for agent in agents:
        await agent.beat(vacating=True)
    for _ in range(20):
        await house.pass_time(0.5)
        for agent in agents:
            await agent.beat(vacating=True)
        if not any(agent.node.accounts for agent in agents):
            return
    raise AssertionError("something is left")


async def test_an_evacuating_worker_loses_no_file(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "1"
    await evacuate(house, house.agent_of(rental))
    moved = await house.rental(rental["id"])
    assert (moved["state"], moved["epoch"], files(house, moved)) == ("active", 2, {"file": "1"})


async def test_when_all_workers_evacuate_all_rentals_are_parked_and_come_back(house: House, pool: list[Agent]) -> None:
    rentals = [await house.rent() for _ in range(3)]
    for number, rental in enumerate(rentals):
        files(house, rental)["file"] = str(number)
    await evacuate(house, *pool)
    assert {(await house.rental(rental["id"]))["state"] for rental in rentals} == {"queued"}
    assert not await house.events("rental.move_started"), "no rental migrates to another worker that is about to end"
    for agent in pool:
        await agent.exit()
    await house.restart()
    await house.join(slots=3)
    back = [await house.rental(rental["id"]) for rental in rentals]
    assert [rental["state"] for rental in back] == ["active"] * 3
    assert [files(house, rental)["file"] for rental in back] == ["0", "1", "2"]


async def test_a_snapshot_begun_before_a_park_does_not_replace_the_last_one(
    house: House,
) -> None:
    """The snapshot was taken before the last one and is committed after it, because the manager's disk is slow."""
    agent = await house.join()
    rental = await house.rent()
    files(house, rental)["file"] = "copied"
    was_made, may_be_noted, copy = asyncio.Event(), asyncio.Event(), house.snapshot_service.take

    async def taken_and_delayed(*arguments: Any, for_migration: bool = False, **named: Any) -> Taken:
        made = await copy(*arguments, **named)
        if for_migration:
            may_be_noted.set()
            await begun
        else:
            was_made.set()
            await may_be_noted.wait()
        return made

    house.snapshot_service.take = taken_and_delayed  # type: ignore[method-assign]
    begun = asyncio.create_task(house.manager.snapshots.take_now(rental["id"], None))
    await was_made.wait()
    files(house, rental)["file"] = "written before it stood still"
    await evacuate(house, agent)
    assert begun.result() == "it was stopped or migrated meanwhile"
    assert (await house.rental(rental["id"]))["state"] == "queued"
    await agent.exit()
    await house.join()
    back = await house.rental(rental["id"])
    assert (back["state"], files(house, back)) == ("active", {"file": "written before it stood still"})


async def test_a_rental_whose_target_worker_also_evacuates_is_parked(house: House, pool: list[Agent]) -> None:
    rental = await house.rent()
    files(house, rental)["file"] = "1"
    target = next(agent for agent in pool if agent is not house.agent_of(rental))
    Interference(house, Action.PREPARE, lambda _: target.beat(vacating=True))
    await evacuate(house, *pool)
    assert (await house.rental(rental["id"]))["state"] == "queued"
    await house.join()
    back = await house.rental(rental["id"])
    assert (back["state"], files(house, back)) == ("active", {"file": "1"})
