"""Which waiting jobs share a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from engine_contract import KEY, OTHER_KEY

from orion.manager.engine.batches import MOST_HOSTS, MOST_RENTALS, Waiting, choose
from orion.manager.engine.port import Action
from orion.manager.engine.protocol import HostLine


def host(name: str, key: str = KEY) -> HostLine:
    return HostLine.model_validate({"worker_id": f"w-{name}", "address": "192.0.2.7", "host_keys": (key,)})


def jobs(*workers: str) -> list[Waiting]:
    return [Waiting(number, Action.CREATE, host(name), False, False) for number, name in enumerate(workers, 1)]


def changed(waiting: list[Waiting], numbers: Iterable[int], **changes: object) -> list[Waiting]:
    return [replace(job, **changes) if job.number in numbers else job for job in waiting]  # type: ignore[arg-type]


def test_what_waits_goes_together_over_workers_and_rentals() -> None:
    assert choose(jobs("a", "b", "a"), suspects_too=True) == [1, 2, 3]
    assert choose([], suspects_too=True) == []


def test_a_run_is_of_the_action_that_waits_the_longest() -> None:
    waiting = changed(jobs("a", "b", "c", "d"), [2, 4], action=Action.DELETE)
    assert choose(waiting, suspects_too=True) == [1, 3]
    assert choose(waiting[1:], suspects_too=True) == [2, 4]


def test_a_suspect_worker_shares_a_run_with_no_other() -> None:
    waiting = changed(jobs("good", "bad", "good", "bad"), [2, 4], suspect=True)
    assert choose(waiting, suspects_too=True) == [1, 3]
    assert choose(waiting[1:], suspects_too=True) == [2, 4]


def test_suspects_are_passed_over_when_they_have_their_share_of_the_runners() -> None:
    waiting = changed(jobs("bad", "good"), [1], suspect=True)
    assert choose(waiting, suspects_too=False) == [2]
    assert choose(waiting[:1], suspects_too=False) == []


def test_what_is_tried_again_is_alone() -> None:
    waiting = changed(jobs("a", "a", "b"), [1], alone=True)
    assert choose(waiting, suspects_too=True) == [1]
    assert choose(waiting[1:] + waiting[:1], suspects_too=True) == [2, 3]


def test_a_run_is_bounded_in_workers_and_in_rentals_of_each() -> None:
    many = jobs(*(f"h{number}" for number in range(MOST_HOSTS + 5)))
    assert choose(many, suspects_too=True) == [job.number for job in many[:MOST_HOSTS]]
    crowd = jobs(*["a"] * (MOST_RENTALS + 5), "b")
    assert choose(crowd, suspects_too=True) == [*range(1, MOST_RENTALS + 1), MOST_RENTALS + 6]


def test_a_worker_that_is_pinned_in_two_ways_is_never_twice_in_a_run() -> None:
    waiting = changed(jobs("a", "a", "b"), [2], host=host("a", OTHER_KEY))
    assert choose(waiting, suspects_too=True) == [1, 3]
