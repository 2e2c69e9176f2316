"""What `make up` would change of a platform that stands, and what it says of it before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.rollout_plan import (
    Container,
    Plan,
    Pool,
    concerned,
    homeless,
    must_ask,
    number_wanted,
    plan,
    stranded,
    told,
)

APP = Container("a" * 64, "manager_app", 1, running=True, outdated=False)
PROXY = Container("b" * 64, "manager_proxy", 1, running=True, outdated=False)


def worker(number: int, *, outdated: bool = False, running: bool = True) -> Container:
    return Container(f"{number:064x}"[::-1], "worker", number, running, outdated)


def pool(*on: tuple[Container, list[str]], slots: int = 1) -> Pool:
    """Workers that are ready, with these rentals."""
    return Pool({one.hostname: names for one, names in on}, {one.hostname: slots - len(names) for one, names in on})


def test_what_is_as_it_should_be_is_left_alone_and_nobody_is_asked() -> None:
    containers = [APP, PROXY, worker(1), worker(2)]
    busy = pool((worker(1), ["a"]), (worker(2), ["b"]))
    planned = plan(containers, 2, busy)
    assert planned == Plan((), 0, (), ())
    assert not must_ask(planned, busy)


def test_workers_of_other_settings_go_after_as_many_new_ones_have_come() -> None:
    old = [worker(number, outdated=True) for number in (1, 2, 3)]
    busy = pool((old[0], ["a", "b"]), (old[1], ["c"]), (old[2], []), slots=4)
    planned = plan([APP, PROXY, *old], 3, busy)
    assert (planned.create, planned.outdated, planned.surplus) == (3, tuple(old), ())
    assert must_ask(planned, busy)
    assert concerned(planned, busy) == ["a", "b", "c"]
    assert homeless(planned, busy, [APP, PROXY, *old], slots=1) == 0
    assert "3 rentals there move, files and all: a, b, c" in told(planned, busy, [*old], 1)


def test_workers_of_another_version_that_hold_rentals_are_named_with_the_way_out_and_no_others() -> None:
    """The new manager cannot move what is on them."""
    old = [replace(worker(number, outdated=True), foreign=number < 3) for number in (1, 2, 3)]
    empty = {old[1].id}
    says = stranded([APP, PROXY, *old], lambda one: one.id in empty, "WORKERS=3 make up")
    assert says.startswith(f"{old[0].hostname} of another version")
    assert says.endswith(
        "make down (it parks them with all their files), then: WORKERS=3 make up (it brings them back)"
    )
    assert not {old[1].hostname, old[2].hostname} & set(says.split())
    stopped = replace(APP, running=False)
    assert "With the former version: make up" in stranded(
        [stopped, PROXY, *old], lambda one: one.id in empty, "make up"
    )
    assert stranded([APP, PROXY, *old], lambda _: True, "make up") == ""


def test_fewer_slots_than_rentals_are_said_before() -> None:
    """The plain `make up` after ORION_SLOTS=4: seven rentals on two workers, three places afterwards."""
    old = [worker(number, outdated=True) for number in (1, 2, 3)]
    busy = pool((old[0], ["a", "b", "c", "d"]), (old[1], ["e", "f", "g"]), (old[2], []), slots=4)
    planned = plan([APP, PROXY, *old], 3, busy)
    assert homeless(planned, busy, [APP, PROXY, *old], slots=1) == 4
    assert [line for line in told(planned, busy, old, 1) if line.startswith("4 of them would find no place")]


def test_of_too_many_workers_those_go_that_hold_the_least() -> None:
    workers = [worker(1), worker(2), worker(3)]
    busy = pool((workers[0], []), (workers[1], ["a"]), (workers[2], ["b"]))
    planned = plan([APP, PROXY, *workers], 1, busy)
    assert planned.surplus == (workers[0], workers[2])
    assert homeless(planned, busy, [APP, PROXY, *workers], slots=1) == 1
    assert told(planned, busy, workers, 1)[0] == "2 workers fewer"


def test_nobody_is_asked_where_nobody_rents() -> None:
    old = worker(1, outdated=True)
    assert not must_ask(plan([APP, PROXY, old], 1, pool((old, []))), pool((old, [])))


def test_who_rents_is_asked_for_where_the_manager_does_not_answer() -> None:
    old, nobody_knows = worker(1, outdated=True), Pool({}, {}, known=False)
    planned = plan([APP, PROXY, old], 1, nobody_knows)
    assert must_ask(planned, nobody_knows)
    assert "it is not known who rents" in told(planned, nobody_knows, [old], 1)[-1]


def test_a_proxy_alone_that_starts_anew_is_said() -> None:
    proxy = Container("b" * 64, "manager_proxy", 1, running=True, outdated=True)
    busy = pool((worker(1), ["a"]))
    planned = plan([APP, proxy, worker(1)], 1, busy)
    assert must_ask(planned, busy)
    assert told(planned, busy, [worker(1)], 1) == [
        "the proxy starts anew: open sessions break, and the API is away for some seconds"
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
    assert number_wanted([APP, PROXY, *workers], given, kept) == number


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), max_size=6), st.integers(0, 6))
def test_a_plan_ends_with_what_was_asked_for_and_done_twice_it_does_nothing(
    described: list[tuple[bool, bool, int]], number: int
) -> None:
    workers = [worker(n, outdated=out, running=up) for n, (out, up, _) in enumerate(described, 1)]
    on = [
        (one, [f"{one.number}-{n}" for n in range(held)]) for one, (_, _, held) in zip(workers, described, strict=True)
    ]
    planned = plan(workers, number, pool(*on, slots=3))
    assert all(one in planned.retire for one in workers if one.outdated)
    left = [one for one in workers if one not in planned.retire]
    assert len(left) + planned.create == number
    again = plan([*left, *(worker(100 + n) for n in range(planned.create))], number, pool())
    assert again.changes_nothing
    assert not again.create
