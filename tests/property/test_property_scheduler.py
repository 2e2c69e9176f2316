"""The chosen worker of any pool passes every filter and is the least used one that does."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from support.builders import new_worker

from orion.manager.domain.scheduler import FILTERS, Candidate, Chosen, NoWorker, choose
from orion.manager.domain.states import Health, Intent


@st.composite
def candidates(draw: st.DrawFn, number: int) -> Candidate:
    slots = draw(st.integers(1, 4))
    worker = new_worker(
        number,
        slots=slots,
        health=draw(st.sampled_from([Health.READY, Health.READY, *Health])),
        intent=draw(st.sampled_from([Intent.ACTIVE, Intent.ACTIVE, *Intent])),
    )
    used = draw(st.frozensets(st.integers(0, slots), max_size=slots))
    return Candidate(worker=worker, used=used, failed_here=draw(st.booleans()), exiting=draw(st.booleans()))


POOLS = st.integers(0, 6).flatmap(lambda size: st.tuples(*(candidates(number) for number in range(size)))).map(list)


def fits(candidate: Candidate) -> bool:
    return not any(refuses(candidate.eligibility) for _, refuses in FILTERS)


def share(candidate: Candidate) -> float:
    return len(candidate.used) / candidate.worker.slots


@given(POOLS)
def test_a_worker_is_chosen_when_and_only_when_one_fits(pool: list[Candidate]) -> None:
    assert isinstance(choose(pool), Chosen) == any(fits(c) for c in pool)


@given(POOLS)
def test_the_choice_fits_is_the_least_used_and_its_slot_is_free(pool: list[Candidate]) -> None:
    choice = choose(pool)
    if isinstance(choice, NoWorker):
        return
    (chosen,) = [c for c in pool if c.worker.id == choice.worker_id]
    assert fits(chosen)
    assert chosen.worker.health is Health.READY
    assert chosen.worker.intent is Intent.ACTIVE
    assert not chosen.exiting
    assert not chosen.failed_here
    assert 0 <= choice.slot < chosen.worker.slots
    assert choice.slot not in chosen.used
    better = [c for c in pool if fits(c) and c.worker.health is Health.READY]
    alike = better if better else [c for c in pool if fits(c)]
    assert chosen in alike
    assert all(share(chosen) <= share(c) for c in alike)


@given(POOLS, st.randoms())
def test_the_order_of_the_pool_does_not_change_the_choice(pool: list[Candidate], random: object) -> None:
    shuffled = list(pool)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose(pool) == choose(shuffled)


@given(POOLS)
def test_the_counts_of_a_refusal_add_up_to_the_pool(pool: list[Candidate]) -> None:
    choice = choose(pool)
    if isinstance(choice, Chosen) or not pool:
        return
    counts = re.fullmatch(r"waiting: of (\d+) workers?, (.+)\. It starts by itself.*", choice.explanation)
    assert counts is not None
    assert int(counts[1]) == len(pool)
    assert sum(int(part.split(" ", 1)[0]) for part in counts[2].split(", ")) == len(pool)
