"""The batches of waiting jobs: which jobs share a run of Ansible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ansible_contract import KEY, OTHER_KEY

from orion.manager.ansible.batches import MAX_HOSTS, MAX_RENTALS, WaitingJob, choose
from orion.manager.ansible.port import Action
from orion.manager.domain.fair_share import Claim
from orion.manager.messages import HostMessage


def anybody(_: Claim) -> bool:
    return True


def host(name: str, key: str = KEY) -> HostMessage:
    return HostMessage.model_validate({"worker_id": f"w-{name}", "address": "192.0.2.7", "host_keys": (key,)})


def jobs(*workers: str) -> list[WaitingJob]:
    return [
        WaitingJob(number=number, action=Action.CREATE, host=host(name), alone=False, suspect=False)
        for number, name in enumerate(workers, 1)
    ]


def changed(waiting: list[WaitingJob], numbers: Iterable[int], **changes: object) -> list[WaitingJob]:
    return [replace(job, **changes) if job.number in numbers else job for job in waiting]  # type: ignore[arg-type]


def test_waiting_jobs_of_several_workers_and_rentals_share_a_run() -> None:
    assert choose(jobs("a", "b", "a"), anybody) == [1, 2, 3]
    assert choose([], anybody) == []


def test_a_run_is_of_the_action_that_waits_the_longest() -> None:
    waiting = changed(jobs("a", "b", "c", "d"), [2, 4], action=Action.DELETE)
    assert choose(waiting, anybody) == [1, 3]
    assert choose(waiting[1:], anybody) == [2, 4]


def test_a_suspect_worker_shares_a_run_with_no_other() -> None:
    waiting = changed(jobs("good", "bad", "good", "bad"), [2, 4], suspect=True)
    assert choose(waiting, anybody) == [1, 3]
    assert choose(waiting[1:], anybody) == [2, 4]


def test_suspects_are_passed_over_when_they_have_their_share_of_the_runners() -> None:
    waiting = changed(jobs("bad", "good"), [1], suspect=True)
    assert choose(waiting, lambda claim: not claim.fails) == [2]
    assert choose(waiting[:1], lambda claim: not claim.fails) == []


def test_a_repeated_job_runs_alone() -> None:
    waiting = changed(jobs("a", "a", "b"), [1], alone=True)
    assert choose(waiting, anybody) == [1]
    assert choose(waiting[1:] + waiting[:1], anybody) == [2, 3]


def test_a_run_is_bounded_in_workers_and_in_rentals_of_each() -> None:
    many = jobs(*(f"h{number}" for number in range(MAX_HOSTS + 5)))
    assert choose(many, anybody) == [job.number for job in many[:MAX_HOSTS]]
    crowd = jobs(*["a"] * (MAX_RENTALS + 5), "b")
    assert choose(crowd, anybody) == [*range(1, MAX_RENTALS + 1), MAX_RENTALS + 6]


def test_a_worker_with_two_pinned_host_keys_is_never_twice_in_a_run() -> None:
    waiting = changed(jobs("a", "a", "b"), [2], host=host("a", OTHER_KEY))
    assert choose(waiting, anybody) == [1, 3]


def test_a_run_over_a_single_worker_begins_within_the_share_of_its_owner() -> None:
    full = Claim("greedy")
    waiting = [replace(job, owner="greedy") for job in jobs("a", "a", "b")] + [replace(jobs("c")[0], number=4)]
    waiting = changed(waiting, [3], action=Action.DELETE)
    waiting = changed(waiting, [4], action=Action.FREEZE, owner="other")
    assert choose(waiting, full.__ne__) == [4], "each run is for one worker, and its owner has its share"
    assert choose(waiting[:3], full.__ne__) == []
    assert choose(changed(waiting, [1], alone=True), full.__ne__) == [4]
    assert choose(changed(waiting, [4], action=Action.CREATE), full.__ne__) == [1, 2, 4], (
        "a run for several workers is short"
    )


def test_a_job_without_an_owner_counts_for_its_worker() -> None:
    job, suspect = jobs("a")[0], changed(jobs("a"), [1], suspect=True)[0]
    assert (job.claim, suspect.claim) == (Claim("w-a"), Claim("w-a", fails=True))
    assert replace(suspect, owner="one").claim == Claim("one", fails=True)


def test_a_run_over_a_shared_worker_begins_by_the_share_of_any_of_its_owners() -> None:
    first, second = jobs("shared", "shared")
    waiting = [replace(first, owner="greedy"), replace(second, owner="other")]
    assert choose(waiting, Claim("greedy").__ne__) == [1, 2], "owners who share a worker share its run"
