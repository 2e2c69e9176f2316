"""The time of the next snapshot after a pause of programs, or after a pause that would have been too long."""

from __future__ import annotations

import pytest

from orion.manager.domain.pacing import LONGEST_PAUSE_S, SHORT_PAUSE_S, WARN_FROM, Pace

USUAL_S = 30.0
SHARE = 0.005


def play(pauses: list[float], until: float) -> tuple[list[tuple[float, float]], list[float]]:
    """Take snapshots of a home, the n-th with the n-th of these pauses; the last pause is repeated.

    Return the times and pauses of the snapshots, and the times at which the owner was told of another interval.
    """
    pace, now, made, notices = Pace(usual_s=USUAL_S, share=SHARE), 0.0, [], []
    waiting = list(pauses)
    while now < until:
        pause_s = waiting[0] if len(waiting) == 1 else waiting.pop(0)
        if pause_s <= pace.allowed_s(now):
            made.append((now, pause_s))
            changed = pace.copied(now, pause_s)
        else:
            changed = pace.too_long(now, 0.0)
        notices += [now] if changed else []
        now += pace.wait_s
    return made, notices


def test_short_pauses_change_nothing() -> None:
    made, notices = play([0.02], 300)
    assert [at for at, _ in made] == [30.0 * number for number in range(10)]
    assert notices == []


def test_one_long_pause_does_not_delay_snapshots_of_a_renter_that_writes_little_afterwards() -> None:
    """A tree was unpacked during the snapshot: after a wait of 1,000 s all later files would have none."""
    made, notices = play([5.0, 0.02], 300)
    assert [at for at, _ in made] == [30.0 * number for number in range(10)]
    assert notices == []


def test_files_written_in_a_burst_are_in_a_snapshot_soon_afterwards() -> None:
    made, notices = play([5.0, 2.0, 2.0, 0.02], 400)
    assert [at for at, _ in made][:4] == [0.0, 30 + 60 + 120, 240.0, 270.0]
    assert notices == [30.0, 210.0], "once that its snapshots are rarer, and once that they no longer are"


@pytest.mark.parametrize("pause_s", [0.16, 0.3, 0.6, 2.0, 9.0])
def test_a_renter_that_writes_much_is_paused_for_its_share_at_most_and_notified_once(pause_s: float) -> None:
    hours = 20 * 3600.0
    made, notices = play([pause_s], hours)
    assert sum(pause for _, pause in made) <= SHARE * hours + pause_s
    assert len(made) == pytest.approx(hours * SHARE / pause_s, abs=1), "snapshots are as frequent as that share allows"
    assert len(notices) == (pause_s / SHARE > WARN_FROM * USUAL_S)


def test_the_next_snapshot_waits_where_the_pause_is_paid_off_soon() -> None:
    made, notices = play([0.25], 160)
    assert [at for at, _ in made] == [0.0, 50.0, 100.0, 150.0], "no attempt in between fails"
    assert notices == [0.0]


def test_a_home_for_which_no_pause_is_enough_is_tried_in_each_interval_and_reported_once() -> None:
    made, notices = play([LONGEST_PAUSE_S + 1], 5000)
    assert (made, notices) == ([], [0.0])


def test_a_failed_pause_is_paid_off_and_a_predicted_one_costs_nothing() -> None:
    foreseen, in_vain = Pace(usual_s=USUAL_S, share=SHARE), Pace(usual_s=USUAL_S, share=SHARE)
    foreseen.too_long(0.0, 0.0)
    in_vain.too_long(0.0, LONGEST_PAUSE_S)
    assert [pace.allowed_s(60.0) for pace in (foreseen, in_vain)] == [LONGEST_PAUSE_S, SHORT_PAUSE_S]
    assert (foreseen.wait_s, in_vain.wait_s) == (60.0, 60.0)


def test_after_a_pause_beyond_the_limit_the_next_snapshot_waits_until_it_is_paid_off() -> None:
    """The worker did not predict the pause, and will not predict the next one."""
    pace, now = Pace(usual_s=USUAL_S, share=SHARE), 0.0
    stood = 0.0
    while now < 36_000:
        pace.copied(now, 2.0)
        stood += 2.0
        now += pace.wait_s
    assert stood <= SHARE * now + 4.0
    pace.copied(now, 0.02)
    assert pace.paid_at - now < LONGEST_PAUSE_S / SHARE + 1, "the debt of pauses is bounded"


def test_a_short_pause_is_allowed_during_a_debt() -> None:
    pace = Pace(usual_s=USUAL_S, share=SHARE)
    assert pace.allowed_s(0.0) == LONGEST_PAUSE_S
    pace.copied(0.0, 1.0)
    assert pace.allowed_s(199.0) == SHORT_PAUSE_S
    assert pace.allowed_s(200.0) == LONGEST_PAUSE_S
