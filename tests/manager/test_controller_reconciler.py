"""The reconciler and its task runner: failed tasks, their pauses and other workers; purges; restarts."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import update
from support.harness import Agent, Harness

from orion.manager.controllers import reconciler
from orion.manager.domain import assignment
from orion.manager.domain.outcomes import MAX_ATTEMPTS
from orion.manager.domain.reconcile import MAX_FAILURES
from orion.manager.domain.states import CREATE_DEADLINE_S, DELETE_DEADLINE_S
from orion.manager.store.schema import rentals


@pytest.fixture
async def agent(harness: Harness) -> Agent:
    agent = await harness.join()
    harness.end_the_brake_of_the_start()
    return agent


async def test_a_rental_runs_with_the_renter_s_key_under_its_own_account(harness: Harness, agent: Agent) -> None:
    rental = await harness.rent()
    account = agent.node.accounts[rental["id"]]
    assert (account.username, account.epoch, account.unlocked) == (rental["username"], 1, True)
    assert len(account.keys) == 1
    assert rental["ssh_host_keys"] == list(agent.node.host.host_keys)


async def test_a_release_leaves_no_residue_and_its_event_says_that_this_was_checked(
    harness: Harness, agent: Agent
) -> None:
    rental = await harness.rent()
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "released"
    assert agent.node.accounts == {}
    (purged,) = await harness.events("placement.purged")
    assert purged["reason"] == "purged, then looked: nothing is left"
    assert purged["details"]["report"]["left"] == []


async def test_an_order_refused_by_a_restarted_container_is_repeated_after_its_registration(
    harness: Harness, agent: Agent
) -> None:
    agent.node.boot_id = "boot-0002"
    rental = await harness.rent()
    await harness.pass_time(20, step_s=0.5)
    waiting = await harness.rental(rental["id"])
    assert (waiting["state"], waiting["epoch"]) == ("provisioning", 1), "more than MAX_ATTEMPTS were refused"
    assert waiting["explanation"] == "trying again: it is for another life of this worker's container"
    await agent.register()
    await harness.pass_time(16)
    assert (await harness.rental(rental["id"]))["state"] == "active"


async def test_a_container_that_restarts_and_never_registers_does_not_get_orders_without_end(
    harness: Harness, agent: Agent
) -> None:
    agent.node.boot_id = "boot-0002"
    rental = await harness.rent()
    await harness.pass_time(CREATE_DEADLINE_S + 4)
    assert [event["reason"] for event in await harness.events("placement.failed")] == ["it was not made within 60 s"]
    assert agent.node.tombstones == {rental["id"]: 1}, "it is purged in whatever boot of the container"


async def test_a_task_that_fails_is_tried_again_after_a_pause_that_grows(harness: Harness, agent: Agent) -> None:
    agent.node.failure = "no space left"
    rental = await harness.rent()
    assert rental["state"] == "provisioning"
    assert rental["explanation"] == "trying again: no space left"
    for pause_s in (0.5, 1.0):
        agent.node.asked.clear()
        harness.clock.now += pause_s - 0.1
        await harness.settle()
        assert not agent.node.asked.is_set()
        harness.clock.now += 0.1
        await harness.settle()
        assert agent.node.asked.is_set()


async def test_a_task_that_fails_once_succeeds_later_on_the_same_worker(harness: Harness, agent: Agent) -> None:
    agent.node.failure = "a hiccup"
    rental = await harness.rent()
    agent.node.failure = ""
    await harness.pass_time(1)
    assert (await harness.rental(rental["id"]))["state"] == "active"


async def test_a_rental_that_cannot_be_made_on_one_worker_is_made_on_another(harness: Harness, agent: Agent) -> None:
    agent.node.failure = "no space left"
    rental = await harness.rent()
    other = await harness.join()
    for _ in range(MAX_ATTEMPTS):
        await harness.pass_time(1)
    moved = await harness.rental(rental["id"])
    assert (moved["state"], moved["epoch"], moved["worker_id"]) == ("active", 2, other.worker_id)
    agent.node.failure = ""
    await harness.pass_time(4)
    assert [(p["epoch"], p["state"]) for p in await harness.placements()] == [(1, "purged"), (2, "running")]


async def test_a_rental_that_was_not_made_before_its_deadline_is_made_on_another_worker(
    harness: Harness, agent: Agent
) -> None:
    agent.node.hang()
    reply = await harness.as_admin.post("/api/rent", json={"wait_s": 0})
    for _ in range(3):
        await harness.manager.reconciler.round()
    await asyncio.wait_for(agent.node.asked.wait(), 20)
    other = harness.new_agent()
    await other.register()
    harness.clock.now += CREATE_DEADLINE_S + 1
    await agent.beat()
    await other.beat()
    for _ in range(4):
        await harness.manager.health.round()
        await harness.manager.reconciler.round()
        running = [t for key, t in harness.manager.task_runner._running.items() if key[0] == other.worker_id]
        await asyncio.gather(*running)
    moved = await harness.rental(reply.json()["id"])
    assert (moved["state"], moved["worker_id"]) == ("active", other.worker_id)
    agent.node.resume()
    await harness.settle()
    assert agent.node.accounts == {}, "a rental that was made too late is purged"
    assert harness.live_copies(moved["id"]) == [2]


async def test_a_rental_that_was_never_active_and_cannot_be_made_anywhere_fails(harness: Harness, agent: Agent) -> None:
    agents = [agent, *[await harness.join() for _ in range(MAX_FAILURES - 1)]]
    for each in agents:
        each.node.failure = "no space left"
    rental = await harness.rent()
    await harness.pass_time(60)
    failed = await harness.rental(rental["id"])
    assert failed["state"] == "failed"
    assert failed["explanation"].startswith(f"it could not be made {MAX_FAILURES} times; last: worker ")


async def test_a_clean_up_that_cannot_be_done_quarantines_the_worker(harness: Harness, agent: Agent) -> None:
    rental = await harness.rent()
    agent.node.failure = "a process that cannot be killed"
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.pass_time(DELETE_DEADLINE_S - 10)
    assert await harness.health(agent) == "ready"
    assert (await harness.rental(rental["id"]))["explanation"] == "trying again: a process that cannot be killed"
    await harness.pass_time(20)
    worker = await harness.worker(agent)
    assert worker["health"] == "quarantined"
    assert f"rental {rental['id']} could not be cleaned up" in worker["explanation"]
    assert f"orion resume {agent.worker_id}" in worker["explanation"]


async def test_a_quarantined_worker_gets_nothing_and_is_ready_again_after_it_was_cleaned_and_resumed(
    harness: Harness, agent: Agent
) -> None:
    rental = await harness.rent()
    agent.node.failure = "a process that cannot be killed"
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.pass_time(DELETE_DEADLINE_S + 10)
    waiting = await harness.rent()
    assert waiting["explanation"].startswith("waiting: of 1 worker, 1 quarantined.")
    agent.node.failure = ""
    await harness.pass_time(20)
    assert (await harness.rental(rental["id"]))["state"] == "released"
    assert await harness.health(agent) == "quarantined"
    assert (await harness.as_admin.post(f"/api/workers/{agent.worker_id}/resume")).status_code == 200
    await harness.settle()
    assert await harness.health(agent) == "ready"
    assert (await harness.rental(waiting["id"]))["state"] == "active"


async def test_a_worker_that_restarts_three_times_an_hour_is_quarantined(harness: Harness, agent: Agent) -> None:
    for _ in range(3):
        assert await harness.health(agent) == "ready"
        await agent.come_back()
        await harness.settle()
    worker = await harness.worker(agent)
    assert worker["health"] == "quarantined"
    assert "it was lost 3 times within 3600 s" in worker["explanation"]
    await harness.as_admin.post(f"/api/workers/{agent.worker_id}/resume")
    await harness.settle()
    assert await harness.health(agent) == "ready"


async def test_restarts_that_are_far_apart_do_not_count_as_flapping(harness: Harness, agent: Agent) -> None:
    for _ in range(5):
        await agent.come_back()
        await harness.settle()
        harness.clock.now += 1801
        await agent.beat()
        harness.end_the_brake_of_the_start()
    assert await harness.health(agent) == "ready"


@pytest.fixture
async def stranger(harness: Harness) -> Agent:
    """Return a worker with a rental that the database never placed, as after the restore of an older backup."""
    agent = harness.new_agent()
    rental = {"rental_id": "stranger", "username": "r-stranger", "uid": 100_500, "epoch": 7, "state": "running"}
    agent.inventory = lambda: [rental] if "stranger" not in agent.node.tombstones else []  # type: ignore[method-assign]
    reply = await agent.register()
    assert reply.json()["placements"] == [{"rental_id": "stranger", "epoch": 7, "want": "purge"}]
    await harness.settle()
    return agent


async def test_an_unknown_rental_is_kept_until_an_operator_decides(harness: Harness, stranger: Agent) -> None:
    for _ in range(2):
        worker = await harness.worker(stranger)
        assert (worker["health"], worker["slots_free"]) == ("quarantined", 1)
        assert "(stranger)" in worker["explanation"]
        assert stranger.node.tombstones == {}
        await harness.as_admin.post(f"/api/workers/{stranger.worker_id}/resume")
        await harness.settle()


async def test_a_worker_that_no_longer_shows_an_unknown_rental_becomes_ready_by_itself(
    harness: Harness, stranger: Agent
) -> None:
    assert await harness.health(stranger) == "quarantined"
    stranger.inventory = list  # type: ignore[method-assign]  deleted by hand
    await stranger.beat()
    await harness.settle()
    assert await harness.health(stranger) == "ready"


async def test_a_resumed_worker_has_time_again_for_a_clean_up_that_failed(harness: Harness, agent: Agent) -> None:
    rental = await harness.rent()
    agent.node.failure = "a process that cannot be killed"
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.pass_time(DELETE_DEADLINE_S + 10)
    assert await harness.health(agent) == "quarantined"
    await harness.as_admin.post(f"/api/workers/{agent.worker_id}/resume")
    await harness.pass_time(DELETE_DEADLINE_S - 10)
    assert await harness.health(agent) != "quarantined"
    await harness.pass_time(20)
    assert await harness.health(agent) == "quarantined", "its deadline has passed again"


async def test_an_unknown_rental_that_an_operator_gives_up_is_purged_before_its_worker_is_ready(
    harness: Harness, stranger: Agent
) -> None:
    reply = await harness.as_admin.post(f"/api/workers/{stranger.worker_id}/resume?give_up=true")
    assert reply.status_code == 200, reply.text
    await harness.settle()
    assert stranger.node.tombstones == {"stranger": 7}
    assert await harness.health(stranger) == "ready"
    (given_up,) = await harness.events("rental.given_up")
    assert (given_up["rental_id"], given_up["epoch"]) == ("stranger", 7)


async def test_an_ended_rental_is_purged_before_its_returning_worker_is_ready(harness: Harness) -> None:
    """A worker that was removed while it was away comes back as a new one, with its rentals."""
    agent = await harness.join()
    rental = await harness.rent()
    agent.die()
    await harness.silence(agent, 400.0)
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.as_admin.delete(f"/api/workers/{agent.worker_id}")
    await harness.settle()
    agent.token = None
    await agent.come_back()
    await harness.settle()
    assert agent.node.tombstones == {rental["id"]: 1}
    assert await harness.health(agent) == "ready"
    assert len(await harness.events("worker.cleaned")) == 1


async def test_a_purged_rental_that_a_ready_worker_shows_again_is_purged_again(harness: Harness, agent: Agent) -> None:
    """An order that ran beyond its deadline was done after all."""
    rental = await harness.rent()
    account = agent.node.accounts[rental["id"]]
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    assert agent.node.accounts == {}
    agent.node.accounts[rental["id"]] = account
    reply = await agent.beat()
    assert [order["want"] for order in reply.json()["placements"]] == ["purge"]
    await harness.settle()
    assert agent.node.accounts == {}
    assert await harness.health(agent) == "ready"
    assert len(await harness.events("worker.cleaned")) == 1


async def test_a_worker_that_cannot_be_reached_by_ssh_is_not_ready_and_says_so(harness: Harness) -> None:
    agent = harness.new_agent()
    agent.node.alive = False
    await agent.register()
    await harness.settle()
    worker = await harness.worker(agent)
    assert (worker["health"], worker["explanation"]) == ("joining", "it cannot be reached by SSH")


async def test_another_host_at_a_worker_s_address_is_not_taken_for_it(harness: Harness) -> None:
    agent, other = harness.new_agent(), harness.new_agent()
    harness.world.workers[agent.node.host.address, 22] = other.node
    await agent.register()
    await harness.settle()
    worker = await harness.worker(agent)
    assert worker["health"] == "joining"
    assert "its host key is not the pinned one" in worker["explanation"]


async def test_a_draining_worker_gets_no_new_rental_and_is_drained_in_the_end(harness: Harness, agent: Agent) -> None:
    agent.slots = 2
    await agent.register()
    await harness.settle()
    rental = await harness.rent()
    await harness.as_admin.post(f"/api/workers/{agent.worker_id}/drain")
    waiting = await harness.rent()
    assert waiting["explanation"].startswith("waiting: of 1 worker, 1 draining.")
    assert (await harness.rental(rental["id"]))["state"] == "active"
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    assert (await harness.worker(agent))["intent"] == "drained"
    await harness.as_admin.post(f"/api/workers/{agent.worker_id}/resume")
    await harness.settle()
    assert (await harness.rental(waiting["id"]))["state"] == "active"


@pytest.mark.parametrize("rounds", range(5))
async def test_a_manager_continues_where_one_that_was_killed_after_any_round_stopped(
    harness: Harness, agent: Agent, rounds: int
) -> None:
    agent.node.hang()
    reply = await harness.as_admin.post("/api/rent", json={"wait_s": 0})
    for _ in range(rounds):
        await harness.manager.reconciler.round()
    await harness.restart()
    agent.node.resume()
    await agent.beat()
    await harness.settle()
    rental = await harness.rental(reply.json()["id"])
    assert (rental["state"], rental["epoch"]) == ("active", 1)
    assert harness.live_copies(rental["id"]) == [1]


async def test_a_new_key_is_put_in_place_of_the_old_one(harness: Harness, agent: Agent) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await harness.as_admin.post("/api/rent", json={"wait_s": 0}, headers=headers)
    await harness.settle()
    old = agent.node.accounts[first.json()["id"]].keys
    await harness.as_admin.post("/api/rent", json={"wait_s": 0}, headers=headers)
    await harness.settle()
    assert agent.node.accounts[first.json()["id"]].keys != old
    assert [e["kind"] for e in await harness.events("rental.key")] == ["rental.key_changed"]


async def test_migrations_are_served_before_new_rentals_and_a_head_that_does_not_fit_blocks_nobody(
    harness: Harness,
) -> None:
    first, second = await harness.join(), await harness.join()
    harness.end_the_brake_of_the_start()
    running = [await harness.rent(), await harness.rent()]
    waiting = await harness.rent()
    first.die()
    await harness.silence(first, 91)
    lost = next(r for r in running if r["worker_id"] == first.worker_id)
    third = await harness.join()
    assert (await harness.rental(lost["id"]))["worker_id"] == third.worker_id
    assert (await harness.rental(waiting["id"]))["state"] == "queued"
    await harness.join()
    assert (await harness.rental(waiting["id"]))["state"] == "active"
    assert second.beating


# A worker with more tasks than its share


def at_work(harness: Harness, agent: Agent) -> int:
    return sum(worker_id == agent.worker_id for worker_id, _ in harness.manager.task_runner._running)


async def test_a_worker_on_which_things_fail_gets_one_task_at_a_time(harness: Harness) -> None:
    """Each task that hangs takes a part of the engine, which all workers share, until its deadline."""
    worker = await harness.join(slots=8)
    harness.end_the_brake_of_the_start()
    worker.node.hang()
    for _ in range(8):
        await harness.as_admin.post("/api/rent", json={"wait_s": 0})
    await harness.manager.reconciler.round()
    await asyncio.sleep(0)
    assert at_work(harness, worker) == 8
    worker.node.failure = "broken"
    worker.node.resume()
    await harness.finish_tasks()
    worker.node.hang()
    for _ in range(3):
        harness.clock.now += 20.0
        await harness.manager.reconciler.round()
        assert at_work(harness, worker) == 1
    worker.node.failure = ""
    worker.node.resume()
    await harness.finish_tasks()
    await harness.manager.reconciler.round()
    assert at_work(harness, worker) == 7, "with the first success the worker has its full share again"
    await harness.finish_tasks()
    await harness.settle()
    assert len(worker.unlocked()) == 8


async def test_many_rentals_that_only_an_inventory_shows_are_purged_a_few_at_a_time(harness: Harness) -> None:
    worker = await harness.join(slots=6)
    harness.end_the_brake_of_the_start()
    rentals = [await harness.rent() for _ in range(6)]
    accounts = dict(worker.node.accounts)
    for rental in rentals:
        await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    worker.node.accounts, worker.node.tombstones = accounts, {}
    await worker.beat()
    worker.node.hang()
    await harness.manager.reconciler.round()
    await asyncio.sleep(0)
    assert at_work(harness, worker) == 2
    worker.node.resume()
    await harness.settle()
    assert worker.node.accounts == {}


async def test_an_event_keeps_no_more_of_a_report_than_a_person_reads(harness: Harness, agent: Agent) -> None:
    rental = await harness.rent()
    agent.node.purge = lambda _: {"left": [], "looked": ["x" * 1000] * 200}  # type: ignore[method-assign]
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    assert (await harness.rental(rental["id"]))["state"] == "released"
    (purged,) = await harness.events("placement.purged")
    assert purged["details"] == {"report": {"cut": True}}


def counted(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count transactions from now on, by the function that made them."""
    calls: Counter[str] = Counter()

    def counting(transaction: Any) -> Any:
        async def count(function: Any, *args: Any, **kwargs: Any) -> Any:
            calls[function.__name__] += 1
            return await transaction(function, *args, **kwargs)

        return count

    for kind in ("read", "write"):
        monkeypatch.setattr(harness.store, kind, counting(getattr(harness.store, kind)))
    return calls


async def test_many_rents_at_once_are_placed_and_written_down_together(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [await harness.join(slots=20) for _ in range(3)]
    harness.end_the_brake_of_the_start()
    calls = counted(harness, monkeypatch)
    replies = await asyncio.gather(*(harness.as_admin.post("/api/rent", json={"wait_s": 0}) for _ in range(60)))
    await harness.settle()
    assert {(await harness.rental(reply.json()["id"]))["state"] for reply in replies} == {"active"}
    assert [len(agent.node.accounts) for agent in agents] == [20, 20, 20], "the tasks are spread over the workers"
    assert calls["finish"] <= 5, "the 60 outcomes are committed together"
    assert calls["apply"] <= 5
    await asyncio.gather(*(harness.as_admin.delete(f"/api/rentals/{reply.json()['id']}") for reply in replies))
    await harness.settle()
    assert [len(agent.node.accounts) for agent in agents] == [0, 0, 0]
    assert calls["finish"] <= 10


async def test_more_rentals_than_one_decision_places_are_all_placed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "MAX_PLACED", 3)
    monkeypatch.setattr(reconciler, "MAX_PLACED", 3)
    await harness.join(slots=20)
    replies = [await harness.as_admin.post("/api/rent", json={"wait_s": 0}) for _ in range(10)]
    await harness.settle()
    assert {(await harness.rental(reply.json()["id"]))["state"] for reply in replies} == {"active"}


async def test_workers_beyond_the_limit_of_a_round_get_their_turn(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "LOOKED_AT_ONCE", 2)
    agents = [harness.new_agent() for _ in range(7)]
    for agent in agents:
        await agent.register()
    await harness.settle()
    assert {await harness.health(agent) for agent in agents} == {"ready"}


async def test_an_outcome_that_cannot_be_written_fails_no_other(
    harness: Harness, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await harness.join()
    finish = harness.manager.state_store.finish

    async def not_for_the_first(ended: Any, follow: Any) -> None:
        if any(one.task.worker_id == agent.worker_id for one in ended):
            raise RuntimeError("this row cannot be written")
        await finish(ended, follow)

    monkeypatch.setattr(harness.manager.state_store, "finish", not_for_the_first)
    rentals = [await harness.as_admin.post("/api/rent", json={"wait_s": 0}) for _ in range(2)]
    await harness.manager.reconciler.round()
    await harness.finish_tasks()
    monkeypatch.undo()
    states = {r["worker_id"]: r["state"] for r in [await harness.rental(reply.json()["id"]) for reply in rentals]}
    assert states == {agent.worker_id: "provisioning", other.worker_id: "active"}


async def test_a_round_without_dirty_workers_loads_nothing(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = [await harness.join() for _ in range(5)]
    harness.end_the_brake_of_the_start()
    await harness.rent()
    calls = counted(harness, monkeypatch)
    await harness.pass_time(120)
    assert {await harness.health(agent) for agent in agents} == {"ready"}
    assert calls["load_workers"] <= 2 * len(agents), "each worker at most once in a lease, and not in each of 30 rounds"
    assert calls["apply"] == calls["apply_each"] == calls["finish"] == 0
    looks = [await harness.manager.reconciler._load(harness.manager.reconciler._workers_of_round()) for _ in range(2)]
    assert all(not look.workers and not look.placements for look in looks)


async def test_the_sweep_finds_changes_without_a_notification(
    harness: Harness, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep finds a change that never reached the pool index, though no code makes such a change."""
    rental = await harness.rent()
    await harness.store.write(_behind_its_back, rental["id"])
    await harness.manager.reconciler.round()
    assert harness.manager.task_runner.running == 0
    harness.manager.reconciler.swept_at_once = 1
    for _ in range(3):
        await harness.manager.reconciler.round()
        await harness.finish_tasks()
    assert agent.node.accounts[rental["id"]].keys == ("ssh-ed25519 another",)


def _behind_its_back(connection: Any, rental_id: str) -> None:
    change = {"public_key": "ssh-ed25519 another"}
    connection.execute(update(rentals).where(rentals.c.id == rental_id).values(change))


async def test_an_inventory_that_arrives_during_a_round_is_handled_in_the_next(
    harness: Harness, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    rental = await harness.rent()
    account = agent.node.accounts[rental["id"]]
    await harness.as_admin.delete(f"/api/rentals/{rental['id']}")
    await harness.settle()
    harness.manager.reconciler.swept_at_once = 1
    harness.manager.reconciler._sweep = iter([agent.worker_id])  # so that this round looks at it
    snapshot, shown = harness.manager.reconciler._load, []

    async def it_shows_something_and_then(looked_at: Any) -> Any:
        if not shown:
            agent.node.accounts[rental["id"]] = account
            shown.append((await agent.beat()).status_code)
        return await snapshot(looked_at)

    monkeypatch.setattr(harness.manager.reconciler, "_load", it_shows_something_and_then)
    await harness.manager.reconciler.round()
    harness.manager.reconciler.swept_at_once = 0
    await harness.manager.reconciler.round()
    await harness.finish_tasks()
    assert shown == [200]
    assert agent.node.accounts == {}


async def test_a_removed_worker_does_not_stay_dirty(harness: Harness, agent: Agent) -> None:
    stranger = {"rental_id": "stranger", "username": "r-stranger", "uid": 100_500, "epoch": 7, "state": "running"}
    await agent.beat(inventory=[stranger])
    assert harness.manager.reconciler._workers_of_round() == {agent.worker_id}
    await harness.as_admin.delete(f"/api/workers/{agent.worker_id}")
    await harness.settle()
    assert harness.manager.reconciler._workers_of_round() == frozenset()
