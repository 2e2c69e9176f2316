"""The choice of a worker: which are refused and why, and which of the others is chosen."""

from __future__ import annotations

from typing import Any

import pytest
from support.builders import new_worker

from orion.manager.domain.scheduler import Candidate, Chosen, NoWorker, choose
from orion.manager.domain.states import Health, Intent


def candidate(number: int = 1, used: set[int] | None = None, **change: Any) -> Candidate:
    flags = {name: change.pop(name, False) for name in ("failed_here", "exiting")}
    return Candidate(worker=new_worker(number, **change), used=frozenset(used or ()), **flags)


def test_an_empty_pool_is_said_to_be_empty() -> None:
    assert choose([]) == NoWorker("waiting: the pool has no worker. It starts by itself when one joins")


@pytest.mark.parametrize("health", sorted(set(Health) - {Health.READY}))
def test_a_worker_that_is_not_ready_is_refused_with_its_health(health: Health) -> None:
    refused = choose([candidate(health=health)])
    assert refused == NoWorker(f"waiting: of 1 worker, 1 {health}. It starts by itself when one can take it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"intent": Intent.DRAINING}, "draining"),
        ({"intent": Intent.DRAINED}, "draining"),
        ({"exiting": True}, "exiting"),
        ({"used": {0}}, "full"),
        ({"failed_here": True}, "failed to make it"),
    ],
)
def test_each_filter_gives_its_reason(change: dict[str, Any], reason: str) -> None:
    refused = choose([candidate(**change)])
    assert isinstance(refused, NoWorker)
    assert f"1 {reason}." in refused.explanation


def test_the_refusals_of_a_whole_pool_are_counted_by_reason() -> None:
    pool = [candidate(1, {0}), candidate(2, {0}), candidate(3, health=Health.DOWN), candidate(4, exiting=True)]
    assert choose(pool) == NoWorker(
        "waiting: of 4 workers, 1 down, 1 exiting, 2 full. It starts by itself when one can take it"
    )


def test_the_least_used_worker_is_chosen_by_its_share() -> None:
    assert choose([candidate(1, {0, 1}, slots=4), candidate(2, {0, 1, 2}, slots=8)]) == Chosen("w-0002", 3)


def test_a_tie_goes_to_the_lower_id_whatever_the_order() -> None:
    pool = [candidate(number) for number in (3, 1, 2)]
    assert choose(pool) == choose(pool[::-1]) == Chosen("w-0001", 0)


def test_the_lowest_free_slot_is_taken() -> None:
    assert choose([candidate(1, {0, 2}, slots=4)]) == Chosen("w-0001", 1)


def test_a_slot_beyond_those_that_a_worker_has_now_fills_no_place() -> None:
    """The worker registered with fewer slots than before, while its old ones are in use."""
    assert choose([candidate(1, {5}, slots=2)]) == Chosen("w-0001", 0)
    assert isinstance(choose([candidate(1, {5}, slots=1)]), NoWorker)
