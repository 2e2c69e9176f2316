"""The ranking of workers, updated one change at a time, is the ranking of all of them computed anew."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from test_property_scheduler import POOLS

from orion.manager.domain.ranking import Rank, Ranking
from orion.manager.domain.scheduler import Candidate, Candidates, Chosen, NoWorker, choose

RANKS = st.none() | st.tuples(st.sampled_from([0.0, 0.5, 0.75]), st.integers(0, 3))
CHANGES = st.lists(st.tuples(st.sampled_from("abcdefgh"), RANKS), max_size=60)


@given(CHANGES, st.integers(0, 9), st.sets(st.sampled_from("abcdefgh"), max_size=3))
def test_the_best_workers_of_the_ranking_are_the_best_of_all_after_any_changes(
    changes: list[Any], number: int, without: set[str]
) -> None:
    room, ranks = Ranking(), dict[str, Rank | None]()
    for identity, rank in changes:
        ranks[identity] = (*rank, identity) if rank else None
        room.put(identity, ranks[identity])
        known = [(rank, one) for one, rank in ranks.items() if rank]
        for _ in range(2):  # reading changes nothing
            assert room.best(number, without) == [one for _, one in sorted(known) if one not in without][:number]
        assert len(room) == len(known)
        assert len(room._heap) <= 2 * len(known) + 64


@given(POOLS, st.integers(1, 8))
def test_repeated_choices_from_the_ranking_equal_choices_among_all_candidates(
    candidates: list[Candidate], number: int
) -> None:
    pool = Candidates([_unfailed(c) for c in candidates], {})
    now = {c.worker.id: c for c in candidates}
    failed = {c.worker.id for c in candidates if c.failed_here}
    for _ in range(number):
        choice = pool.choose(failed)
        assert choice == choose(list(now.values()))
        if not isinstance(choice, Chosen):
            break
        pool.take(choice)
        taken = now[choice.worker_id]
        now[choice.worker_id] = Candidate(
            worker=taken.worker, used=taken.used | {choice.slot}, failed_here=taken.failed_here, exiting=taken.exiting
        )


def test_workers_outside_the_part_count_in_the_explanation_and_a_suitable_one_is_waited_for() -> None:
    assert Candidates([], {"draining": 2, "full": 1}).choose(()) == NoWorker(
        "waiting: of 3 workers, 2 draining, 1 full. It starts by itself when one can take it"
    )
    assert Candidates([], {"full": 1, "": 1}).choose(()) is None


def _unfailed(candidate: Candidate) -> Candidate:
    return Candidate(worker=candidate.worker, used=candidate.used, failed_here=False, exiting=candidate.exiting)
