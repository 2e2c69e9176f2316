"""The plan of `make up` for a platform that exists, and its description before the change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.rollout_plan import (
    PlatformContainer,
    PoolState,
    RolloutPlan,
    affected_rentals,
    count_without_place,
    describe,
    incompatible_workers,
    needs_confirmation,
    plan,
    wanted_number,
)

APP = PlatformContainer("a" * 64, "manager_app", 1, running=True, outdated=False)
PROXY = PlatformContainer("b" * 64, "manager_proxy", 1, running=True, outdated=False)


def worker(number: int, *, outdated: bool = False, running: bool = True) -> PlatformContainer:
    return PlatformContainer(f"{number:064x}"[::-1], "worker", number, running, outdated)


def pool(*on: tuple[PlatformContainer, list[str]], slots: int = 1) -> PoolState:
    """Return the view of a manager whose ready workers have these rentals."""
    return PoolState(
        {one.hostname: names for one, names in on}, {one.hostname: slots - len(names) for one, names in on}
    )


def test_an_unchanged_platform_needs_no_change_and_no_confirmation() -> None:
    containers = [APP, PROXY, worker(1), worker(2)]
    busy = pool((worker(1), ["a"]), (worker(2), ["b"]))
    planned = plan(containers, 2, busy)
    assert planned == RolloutPlan((), 0, (), ())
    assert not needs_confirmation(planned, busy)


def test_workers_with_other_settings_are_removed_after_as_many_new_ones_have_started() -> None:
    old = [worker(number, outdated=True) for number in (1, 2, 3)]
    busy = pool((old[0], ["a", "b"]), (old[1], ["c"]), (old[2], []), slots=4)
    planned = plan([APP, PROXY, *old], 3, busy)
    assert (planned.create, planned.outdated, planned.surplus) == (3, tuple(old), ())
    assert needs_confirmation(planned, busy)
    assert affected_rentals(planned, busy) == ["a", "b", "c"]
    assert count_without_place(planned, busy, [APP, PROXY, *old], slots=1) == 0
    assert "3 rentals on them will migrate, with all files: a, b, c" in describe(planned, busy, [*old], 1)


def test_only_incompatible_workers_with_rentals_are_named_with_a_solution() -> None:
    """The new manager cannot migrate their rentals."""
    old = [replace(worker(number, outdated=True), incompatible=number < 3) for number in (1, 2, 3)]
    empty = {old[1].id}
    says = incompatible_workers([APP, PROXY, *old], lambda one: one.id in empty, "WORKERS=3 make up")
    assert says.startswith("workers of another version have rentals")
    assert f": {old[0].hostname}. Run " in says
    assert says.endswith(
        "make down (which parks the rentals with all files), then WORKERS=3 make up (which starts them again)"
    )
    assert not any(one.hostname in says for one in old[1:])
    stopped = replace(APP, running=False)
    assert "With the former version run make up" in incompatible_workers(
        [stopped, PROXY, *old], lambda one: one.id in empty, "make up"
    )
    assert incompatible_workers([APP, PROXY, *old], lambda _: True, "make up") == ""


def test_fewer_slots_than_rentals_are_said_before() -> None:
    """A plain `make up` after ORION_SLOTS=4: seven rentals on two workers, three slots afterwards."""
    old = [worker(number, outdated=True) for number in (1, 2, 3)]
    busy = pool((old[0], ["a", "b", "c", "d"]), (old[1], ["e", "f", "g"]), (old[2], []), slots=4)
    planned = plan([APP, PROXY, *old], 3, busy)
    assert count_without_place(planned, busy, [APP, PROXY, *old], slots=1) == 4
    assert [line for line in describe(planned, busy, old, 1) if line.startswith("4 of them will WAIT without a worker")]


def test_surplus_workers_with_the_fewest_rentals_are_removed_first() -> None:
    workers = [worker(1), worker(2), worker(3)]
    busy = pool((workers[0], []), (workers[1], ["a"]), (workers[2], ["b"]))
    planned = plan([APP, PROXY, *workers], 1, busy)
    assert planned.surplus == (workers[0], workers[2])
    assert count_without_place(planned, busy, [APP, PROXY, *workers], slots=1) == 1
    assert describe(planned, busy, workers, 1)[0] == "2 workers fewer"


def test_a_platform_without_rentals_needs_no_confirmation() -> None:
    old = worker(1, outdated=True)
    assert not needs_confirmation(plan([APP, PROXY, old], 1, pool((old, []))), pool((old, [])))


def test_a_manager_that_does_not_answer_needs_a_confirmation() -> None:
    old, unknown = worker(1, outdated=True), PoolState({}, {}, known=False)
    planned = plan([APP, PROXY, old], 1, unknown)
    assert needs_confirmation(planned, unknown)
    assert "the rentals are not known" in describe(planned, unknown, [old], 1)[-1]


def test_a_restart_of_the_proxy_alone_is_announced() -> None:
    proxy = PlatformContainer("b" * 64, "manager_proxy", 1, running=True, outdated=True)
    busy = pool((worker(1), ["a"]))
    planned = plan([APP, proxy, worker(1)], 1, busy)
    assert needs_confirmation(planned, busy)
    assert describe(planned, busy, [worker(1)], 1) == [
        "the proxy restarts: open sessions break, and the API does not answer for some seconds"
    ]


@pytest.mark.parametrize(
    ("current", "outdated", "given", "kept", "number"),
    [
        (0, 0, "", "", 3),
        (0, 0, "", "5", 5),
        (4, 0, "", "5", 4),
        (4, 0, "2", "5", 2),
        (3, 3, "", "", 3),
        (3, 1, "", "", 3),
        (1, 3, "", "", 3),
    ],
)
def test_the_number_of_workers_stays_also_while_they_are_replaced(
    current: int, outdated: int, given: str, kept: str, number: int
) -> None:
    workers = [worker(n, outdated=n > current) for n in range(1, current + outdated + 1)]
    assert wanted_number([APP, PROXY, *workers], given, kept) == number


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), max_size=6), st.integers(0, 6))
def test_a_plan_leads_to_the_wanted_number_and_a_second_plan_changes_nothing(
    described: list[tuple[bool, bool, int]], number: int
) -> None:
    workers = [worker(n, outdated=out, running=up) for n, (out, up, _) in enumerate(described, 1)]
    on = [
        (one, [f"{one.number}-{n}" for n in range(number_of_rentals)])
        for one, (_, _, number_of_rentals) in zip(workers, described, strict=True)
    ]
    planned = plan(workers, number, pool(*on, slots=3))
    assert all(one in planned.retire for one in workers if one.outdated)
    left = [one for one in workers if one not in planned.retire]
    assert len(left) + planned.create == number
    again = plan([*left, *(worker(100 + n) for n in range(planned.create))], number, pool())
    assert again.changes_nothing
    assert not again.create
