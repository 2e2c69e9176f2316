"""How long a worker may run rentals without an answer of the manager: pure functions of answers and their times."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from orion_worker.agent.decisions import (
    LIVENESS_GRACE_S,
    LIVENESS_SETTLES_S,
    LeaseState,
    actions_for,
    ask_within_s,
    may_run,
    proxy_answer_from,
)

LEASED = LeaseState(lease_s=75.0, proxy_answer_s=5.0, acknowledged_at=1000.0)


def test_a_worker_without_any_acknowledged_call_may_run_nothing() -> None:
    assert not may_run(LeaseState(), None, 0.0)
    assert not may_run(LeaseState(lease_s=75.0), None, 10.0)


def test_a_lease_runs_from_the_sending_of_the_last_acknowledged_call_and_ends_on_the_dot() -> None:
    assert may_run(LEASED, None, 1074.999)
    assert not may_run(LEASED, None, 1075.0)
    assert not may_run(LEASED, None, 9999.0), "however long the machine slept"


def test_beyond_the_lease_only_a_fresh_answer_of_the_proxy_counts() -> None:
    excused = replace(LEASED, unreached_at=1080.0)
    assert may_run(excused, None, 1084.9)
    assert not may_run(excused, None, 1085.0)
    assert not may_run(replace(LEASED, unreached_at=None), None, 1080.1)


def test_when_the_liveness_connection_has_ended_earlier_answers_count_for_a_second() -> None:
    assert may_run(LEASED, 1010.0, 1010.0 + LIVENESS_GRACE_S - 0.01)
    assert not may_run(LEASED, 1010.0, 1010.0 + LIVENESS_GRACE_S)
    excused = replace(LEASED, unreached_at=1010.0)
    assert not may_run(excused, 1010.0, 1011.0)


@pytest.mark.parametrize("settled_by", ["acknowledged_at", "unreached_at"])
def test_only_a_call_sent_after_the_manager_saw_the_end_restores_the_lease(settled_by: str) -> None:
    settled = 1010.0 + LIVENESS_SETTLES_S
    assert may_run(replace(LEASED, **{settled_by: settled}), 1010.0, 1012.0)
    assert not may_run(replace(LEASED, **{settled_by: settled - 0.01}), 1010.0, 1012.0)


def test_a_worker_with_a_long_lease_waits_for_its_interval() -> None:
    assert ask_within_s(LeaseState(), None, 1000.0) == math.inf
    assert ask_within_s(LEASED, None, 1000.0) == 70.0
    assert ask_within_s(replace(LEASED, acknowledged_at=1011.0), 1010.0, 1012.0) == 69.0


def test_a_worker_that_is_losing_or_has_lost_its_lease_calls_every_two_seconds() -> None:
    assert ask_within_s(LEASED, None, 1070.0) == 2.0
    assert ask_within_s(LEASED, None, 5000.0) == 2.0
    assert ask_within_s(replace(LEASED, lease_s=7.5, proxy_answer_s=0.5), None, 1007.0) == pytest.approx(0.2)


def test_the_call_after_the_end_of_the_liveness_connection_leaves_time_for_its_answer() -> None:
    assert ask_within_s(LEASED, 1010.0, 1010.0) == LIVENESS_SETTLES_S
    assert ask_within_s(LEASED, 1010.0, 1010.9) == LIVENESS_SETTLES_S, "and again, while there is time"
    assert ask_within_s(LEASED, 1010.0, 1011.0) == 2.0


def test_a_reply_of_an_older_manager_implies_the_default_share_for_the_proxy_s_answer() -> None:
    assert proxy_answer_from({"lease_s": 75.0}) == 5.0
    assert proxy_answer_from({"lease_s": 75.0, "door_answer_s": 2.5}) == 2.5


def test_a_frozen_rental_is_thawed_by_run_and_left_frozen_by_everything_else() -> None:
    item = {"rental_id": "one", "username": "r-one", "uid": 100_001, "epoch": 2, "state": "frozen"}

    def actions(want: str, epoch: int) -> list[str]:
        return [order.action for order in actions_for([item], [{"rental_id": "one", "epoch": epoch, "want": want}])]

    assert actions("run", 2) == ["thaw"]
    assert [actions("run", 1), actions("run", 3), actions("hold", 2), actions("purge", 2)] == [[], [], [], []]
