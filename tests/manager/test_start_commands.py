"""A rental's start command: it runs on each worker of the rental, until the rental has lost too many workers."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Any

import pytest
from pydantic import ValidationError
from support.builders import active_rental, new_placement, new_worker, new_world
from support.harness import Agent, Harness

from orion import wire
from orion.manager.ansible.port import Job
from orion.manager.domain.observations import Observations
from orion.manager.domain.reconcile import decide
from orion.manager.domain.start_commands import TAKEOVERS_WITHIN_S
from orion.manager.domain.states import DELETE_DEADLINE_S, Health, PlacementState, RentalState
from orion.manager.fakes.workers import RefusedOrder

SERVE = "exec ./serve --name \"$HOSTNAME\" {{ 7*7 }} '; rm -rf / #' $(id) é"


@pytest.fixture
async def pool(harness: Harness) -> list[Agent]:
    agents = [await harness.join() for _ in range(2)]
    harness.end_the_brake_of_the_start()
    return agents


def runs(harness: Harness, rental: dict[str, Any]) -> list[str]:
    """Return the states of the runs of a rental's start command on its worker."""
    return harness.agent_of(rental).node.started.get(rental["id"], [])


async def restart(agent: Agent, number: int) -> None:
    """Restart the worker's container: it has another boot id, and none of its processes."""
    agent.node.boot_id = f"boot-{number:04d}"
    agent.node.started.clear()
    await agent.come_back()


async def lose(harness: Harness, rental: dict[str, Any]) -> dict[str, Any]:
    """Let the rental's worker die, the rental be taken over, and the worker come back; return the rental."""
    dead = harness.agent_of(rental)
    dead.die()
    await harness.silence(dead, 91)
    await dead.come_back()
    await harness.pass_time(4)
    return await harness.rental(rental["id"])


@pytest.mark.parametrize("given", [SERVE, "x" * wire.MAX_START, "true"])
def test_a_start_command_is_any_one_line_and_is_kept_as_it_is(given: str) -> None:
    assert wire.RentRequest(start=given).start == given


@pytest.mark.parametrize(
    "given",
    [
        "",
        "   ",
        "a\nb",
        "a\rb",
        "a\0b",
        "a\tb",
        "\x1b[2J",
        "a\u2028b",
        "\u202eb",
        "\ud800",
        "x" * (wire.MAX_START + 1),
        7,
    ],
)
def test_an_invalid_start_command_is_refused_with_the_rule(given: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        wire.RentRequest(start=given)
    (error,) = refused.value.errors()
    assert error["loc"] == ("start",)


async def test_a_start_command_runs_once_on_the_rental_s_worker_and_is_shown(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent(start=SERVE)
    assert (rental["start"], rental["start_problem"]) == (SERVE, "")
    assert runs(harness, rental) == ["1@boot-0001"]
    await harness.pass_time(120)
    assert runs(harness, rental) == ["1@boot-0001"]
    assert [e["kind"] for e in await harness.events("rental.start")] == ["rental.started"]
    without = await harness.rent()
    assert (without["start"], runs(harness, without)) == (None, [])


async def test_a_start_command_runs_again_after_a_takeover_and_after_a_restart_of_the_container(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent(start=SERVE)
    moved = await lose(harness, rental)
    assert (moved["epoch"], runs(harness, moved)) == (2, ["1@boot-0001"])
    await restart(harness.agent_of(moved), 2)
    await harness.pass_time(4)
    assert runs(harness, moved) == ["1@boot-0002"]
    assert (await harness.rental(rental["id"]))["start_problem"] == ""


async def test_a_start_command_that_keeps_losing_workers_runs_again_only_on_request(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent(start=SERVE, name="lab")
    for _ in range(2):
        rental = await lose(harness, rental)
        assert rental["start_problem"] == ""
    rental = await lose(harness, rental)
    assert rental["state"] == "active"
    assert "orion start lab" in rental["start_problem"]
    assert runs(harness, rental) == []
    assert len(await harness.events("rental.start_stopped")) == 1
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/start")
    assert (reply.status_code, reply.json()["start_problem"]) == (202, "")
    await harness.settle()
    assert runs(harness, rental) == ["2@boot-0001"]
    rental = await lose(harness, rental)
    assert (rental["start_problem"], runs(harness, rental)) == ("", ["2@boot-0001"]), "the count of losses begins anew"


async def test_restarts_of_the_container_count_as_losses_of_a_start_command(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent(start=SERVE)
    for number in (2, 3, 4):
        assert runs(harness, rental)
        await restart(harness.agent_of(rental), number)
        await harness.pass_time(8)
    assert runs(harness, rental) == []
    assert "orion start" in (await harness.rental(rental["id"]))["start_problem"]


async def test_losses_that_are_far_apart_do_not_stop_a_start_command(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent(start=SERVE)
    for _ in range(3):
        rental = await lose(harness, rental)
        harness.clock.now += TAKEOVERS_WITHIN_S / 2  # there was no work in between
        harness.end_the_brake_of_the_start()
        for agent in pool:
            await agent.beat()
        assert (rental["start_problem"], len(runs(harness, rental))) == ("", 1)


@pytest.mark.parametrize("state", [RentalState.PROVISIONING, RentalState.MIGRATING])
def test_a_worker_lost_while_the_rental_was_made_there_counts_too(state: RentalState) -> None:
    dead = new_worker(1, health=Health.DOWN)
    rental = active_rental(1, state=state, start=SERVE, takeovers=(1.0, 700.0, 800.0))
    placement = new_placement(rental, dead, PlacementState.PREPARING)
    observations = Observations(inventories={}, exiting=frozenset(), ages={}, new_ids=iter(()), wall=1000.0)
    world = new_world(dead, rental, placement)
    for step in decide(world, observations).steps:
        assert world.apply(step)
    assert world.rentals[rental.id].takeovers == (700.0, 800.0, 1000.0)
    assert "orion start" in world.rentals[rental.id].start_problem


@pytest.mark.parametrize(
    ("start", "state", "age_s", "goes_on"),
    [
        (SERVE, PlacementState.FAILED, 10.0, False),
        (SERVE, PlacementState.FAILED, DELETE_DEADLINE_S + 1.0, True),
        (SERVE, PlacementState.LOST, 10.0, True),
        ("", PlacementState.FAILED, 10.0, True),
    ],
)
def test_a_start_command_that_may_run_is_ended_before_it_runs_elsewhere(
    start: str, state: PlacementState, age_s: float, goes_on: bool
) -> None:
    """The rental was given up on a worker that lives: the end of its last try there may be unknown."""
    where = new_worker(1, health=Health.READY if state is PlacementState.FAILED else Health.JOINING)
    rental = active_rental(1, state=RentalState.QUEUED, start=start)
    given_up = new_placement(rental, where, state)
    world = new_world(where, new_worker(2), rental, given_up)
    observations = Observations(
        inventories={}, exiting=frozenset(), ages={given_up.id: age_s}, new_ids=iter(["p-new"]), wall=1000.0
    )
    for step in decide(world, observations).steps:
        assert world.apply(step)
    assert (world.live_placement(rental.id) is not None) is goes_on
    assert goes_on or "waiting until worker w-0001 has ended" in world.rentals[rental.id].explanation


async def test_a_given_up_placement_is_purged_before_the_start_command_runs_again(
    harness: Harness, pool: list[Agent]
) -> None:
    nodes = [agent.node for agent in pool]
    whole, purged = [(node.create, node.purge) for node in nodes], list[int]()

    def run_and_say_nothing(number: int, job: Job) -> dict[str, Any]:
        whole[number][0](job)
        raise RefusedOrder("the connection broke")

    def note_and_purge(number: int, job: Job) -> dict[str, Any]:
        for node, (create, _) in zip(nodes, whole, strict=True):
            node.create = create  # type: ignore[method-assign]
        purged.append(sum(len(node.started) for node in nodes))
        if len(purged) < 3:
            raise RefusedOrder("no space left")
        return whole[number][1](job)

    for number, node in enumerate(nodes):
        node.create = partial(run_and_say_nothing, number)  # type: ignore[method-assign]
        node.purge = partial(note_and_purge, number)  # type: ignore[method-assign]
    rental = await harness.rent(start=SERVE)
    await harness.pass_time(24)
    assert purged == [1, 1, 1], "the command ran there and nowhere else"
    assert (await harness.rental(rental["id"]))["state"] == "active"
    assert sum(len(node.started) for node in nodes) == 1


async def test_only_a_living_rental_with_a_start_command_can_be_started(harness: Harness, pool: list[Agent]) -> None:
    plain, serving = await harness.rent(), await harness.rent(start=SERVE)
    refused = await harness.as_admin.post(f"/api/rentals/{plain['id']}/start")
    assert (refused.status_code, refused.json()["code"]) == (409, "no_start")
    await harness.as_admin.delete(f"/api/rentals/{serving['id']}")
    await harness.settle()
    ended = await harness.as_admin.post(f"/api/rentals/{serving['id']}/start")
    assert (ended.status_code, ended.json()["code"]) == (409, "ended")
    other = await harness.new_client("bob")
    assert (await other.post(f"/api/rentals/{plain['id']}/start")).status_code == 404


async def test_a_start_command_that_could_not_run_shows_its_reason(harness: Harness, pool: list[Agent]) -> None:
    for agent in pool:
        agent.node.start_problem = "its start command cannot be run: it ended with 1"
    rental = await harness.rent(start=SERVE)
    assert rental["state"] == "active"
    (event,) = await harness.events("rental.start_failed")
    assert event["reason"] == "its start command cannot be run: it ended with 1"


async def test_a_repeated_request_without_a_start_command_is_the_same_and_with_one_is_another(
    harness: Harness, pool: list[Agent]
) -> None:
    headers = {"Idempotency-Key": "one"}
    for body, status in (({}, 201), ({}, 201), ({"start": "true"}, 409)):
        reply = await harness.as_admin.post("/api/rent", json={"wait_s": 0} | body, headers=headers)
        await harness.settle()
        assert reply.status_code in {status, 202}
        assert (reply.status_code == 409) == (status == 409)


def an_end(rental: dict[str, Any], run: str = "1@boot-0001", how: str = "status 3", **change: Any) -> dict[str, Any]:
    return {"rental_id": rental["id"], "epoch": rental["epoch"], "run": run, "how": how, "ago_s": 10.0} | change


async def tell(harness: Harness, agent: Agent, *ends: dict[str, Any]) -> None:
    """Send the ends in a heartbeat, and in all later ones."""
    agent.start_ends = list(ends)
    assert (await agent.beat()).status_code == 200
    await harness.settle()


async def shown_end(harness: Harness, rental: dict[str, Any]) -> str:
    end: str = (await harness.rental(rental["id"]))["start_end"]
    return end


async def test_the_end_of_a_start_command_is_shown_and_has_one_event(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent(start=SERVE)
    assert (rental["start_end"], rental["start_ended_at"]) == ("", None)
    at = harness.clock.wall() - 10.0
    await tell(harness, harness.agent_of(rental), an_end(rental))
    found = await harness.rental(rental["id"])
    assert found["start_end"] == "status 3"
    assert abs(datetime.fromisoformat(found["start_ended_at"]).timestamp() - at) < 5.0
    await harness.pass_time(120)
    (event,) = await harness.events("rental.start_ended")
    assert event["reason"] == "its start command ended with status 3: orion logs shows what it said"
    assert (event["owner"], event["details"]) == (rental["owner"], {"run": "1", "how": "status 3"})
    assert runs(harness, rental) == ["1@boot-0001"], "a command that ended is not run again"
    assert (await harness.rental(rental["id"]))["start_ended_at"] == found["start_ended_at"]


async def test_the_end_of_a_run_is_forgotten_with_the_next_one(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent(start=SERVE)
    await tell(harness, harness.agent_of(rental), an_end(rental))
    await harness.as_admin.post(f"/api/rentals/{rental['id']}/start")
    await harness.settle()
    assert runs(harness, rental) == ["1@boot-0001", "2@boot-0001"]
    assert await shown_end(harness, rental) == "", "the worker still reports the end of the former run"
    await tell(harness, harness.agent_of(rental), an_end(rental, "2@boot-0001", "signal 9"))
    assert await shown_end(harness, rental) == "signal 9"
    await restart(harness.agent_of(rental), 2)
    await harness.pass_time(8)
    assert (runs(harness, rental), await shown_end(harness, rental)) == (["2@boot-0002"], "")
    moved = await lose(harness, rental)
    assert moved["start_end"] == ""


async def test_a_worker_s_report_counts_once_for_each_run_and_only_for_its_own_rentals(
    harness: Harness, pool: list[Agent]
) -> None:
    rental = await harness.rent(start=SERVE)
    here = harness.agent_of(rental)
    there = next(agent for agent in pool if agent is not here)
    await tell(harness, there, an_end(rental))
    wrong = ({"epoch": 2}, {"run": "2@boot-0001"}, {"run": "1@boot-0002"}, {"rental_id": "another"})
    await tell(harness, here, *(an_end(rental, **change) for change in wrong))
    assert await shown_end(harness, rental) == ""
    for number in range(4):
        await tell(harness, here, an_end(rental, how=f"status {number}"))
    assert await shown_end(harness, rental) == "status 0"
    assert len(await harness.events("rental.start_ended")) == 1


async def test_a_restarted_manager_writes_no_second_event_of_the_same_end(harness: Harness, pool: list[Agent]) -> None:
    rental = await harness.rent(start=SERVE)
    await tell(harness, harness.agent_of(rental), an_end(rental))
    await harness.restart()
    await harness.pass_time(60)
    assert await shown_end(harness, rental) == "status 3"
    assert len(await harness.events("rental.start_ended")) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"how": "status 3\n"},
        {"how": "\x1b[2J"},
        {"how": "status 1000"},
        {"run": "x"},
        {"run": "1@" + "x" * 65},
        {"ago_s": -1.0},
        {"ago_s": 1e12},
        {"ago_s": "5"},
        {"more": 1},
    ],
)
async def test_an_invalid_end_of_a_start_command_is_refused(
    harness: Harness, pool: list[Agent], wrong: dict[str, Any]
) -> None:
    rental = await harness.rent(start=SERVE)
    reply = await harness.agent_of(rental).beat(start_ends=[an_end(rental) | wrong])
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_request")


async def test_replies_say_which_fields_the_next_heartbeat_may_have(harness: Harness, pool: list[Agent]) -> None:
    assert (await pool[0].beat()).json()["takes"] == ["start_ends"]
