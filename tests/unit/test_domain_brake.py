"""The brake: what turns it on, how long it is on, and what ends it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orion.manager.domain.brake import Brake, Observation, advance
from orion.manager.domain.clocks import Clocks

CLOCKS = Clocks()
START = 1000.0
OFF = Brake(disturbed_at=0.0, since=None, reason="")
FINE = Observation(proxy_answers=True, late_s=0.0, heard_at=None, silent_since=(), pool=3)
SHUT = replace(FINE, proxy_answers=False)


def quiet(brake: Brake, seconds: float, seen: Observation = FINE, start: float = START) -> Brake:
    """Return the brake after so many seconds of the same observation, with heartbeats all the time."""
    for second in range(int(seconds) + 1):
        now = start + second
        brake = advance(brake, replace(seen, heard_at=now), now, CLOCKS)
    return brake


def test_the_brake_is_on_when_the_manager_starts() -> None:
    brake = Brake.at_start(START)
    assert brake.on
    assert brake.reason == "the manager has just started"
    assert brake.disturbed_at == START


def test_the_brake_ends_after_takeover_after_when_there_was_a_heartbeat() -> None:
    assert quiet(Brake.at_start(START), 89).on
    ended = quiet(Brake.at_start(START), 90)
    assert not ended.on
    assert ended.reason == ""


def test_the_brake_does_not_end_before_a_heartbeat_since_the_disturbance() -> None:
    brake = advance(Brake.at_start(START), replace(FINE, heard_at=START - 1), START + 200, CLOCKS)
    assert brake.on
    assert not advance(brake, replace(FINE, heard_at=START + 199), START + 201, CLOCKS).on


def test_without_any_heartbeat_the_brake_ends_at_brake_max() -> None:
    assert advance(Brake.at_start(START), FINE, START + 299.9, CLOCKS).on
    assert not advance(Brake.at_start(START), FINE, START + 300, CLOCKS).on


def test_an_unreachable_proxy_turns_the_brake_on_and_keeps_it_on() -> None:
    brake = quiet(OFF, 200, SHUT)
    assert brake.on
    assert brake.since == START
    assert brake.disturbed_at == START + 200
    assert "through the proxy" in brake.reason


def test_the_proxy_must_have_been_reachable_for_the_whole_of_takeover_after() -> None:
    brake = quiet(OFF, 10, SHUT)
    brake = quiet(brake, 60, start=START + 11)
    brake = quiet(brake, 0, SHUT, start=START + 72)
    assert quiet(brake, 88, start=START + 73).on
    assert not quiet(brake, 89, start=START + 73).on


def test_a_late_round_turns_the_brake_on_and_a_punctual_one_does_not() -> None:
    assert not advance(OFF, replace(FINE, late_s=CLOCKS.door_answer_s), START, CLOCKS).on
    late = advance(OFF, replace(FINE, late_s=CLOCKS.door_answer_s + 0.1), START, CLOCKS)
    assert late.on
    assert "late" in late.reason


def test_a_cause_that_outlasted_brake_max_does_not_brake_again() -> None:
    brake = quiet(OFF, 299, SHUT)
    assert brake.on
    assert not quiet(OFF, 300, SHUT).on
    assert not quiet(OFF, 5000, SHUT).on


def test_a_cause_that_cleared_may_brake_again() -> None:
    spent = quiet(OFF, 400, SHUT)
    cleared = advance(spent, FINE, START + 401, CLOCKS)
    assert not cleared.exhausted
    assert advance(cleared, SHUT, START + 402, CLOCKS).on


def test_a_manager_that_is_late_by_another_amount_each_round_does_not_brake_for_ever() -> None:
    brake = OFF
    on_at: list[float] = []
    for second in range(0, 1000, 10):
        seen = replace(FINE, late_s=9.0 + second / 1000, heard_at=START + second)
        brake = advance(brake, seen, START + second, CLOCKS)
        on_at += [second] if brake.on else []
    assert max(on_at) < CLOCKS.brake_max_s


@pytest.mark.parametrize(
    ("silent_since", "pool", "brakes"),
    [
        ((START - 10,), 3, False),
        ((START - 10,), 2, False),
        ((START - 10,), 1, False),
        ((START - 10, START - 20), 2, True),
        ((START - 10, START - 20), 3, True),
        ((START - 10, START - 20), 4, True),
        ((START - 10, START - 20), 5, False),
        ((START - 10, START - 101), 3, False),
        ((START - 10, START - 20, START - 400), 5, False),
        ((START - 10, START - 20, START - 30, START - 400), 6, True),
    ],
    ids=[
        "one of three",
        "one of two",
        "the only one",
        "two of two",
        "two of three",
        "two of four",
        "two of five",
        "two, but not within one lease",
        "two of five and one of old",
        "three of six and one of old",
    ],
)
def test_the_brake_turns_on_when_half_of_the_pool_and_at_least_two_fall_silent_within_a_lease(
    silent_since: tuple[float, ...], pool: int, brakes: bool
) -> None:
    seen = replace(FINE, silent_since=silent_since, pool=pool)
    assert advance(OFF, seen, START, CLOCKS).on is brakes


def test_only_one_more_silent_worker_starts_the_grace_again() -> None:
    seen = replace(FINE, silent_since=(START - 20, START - 10), pool=4)
    first = advance(OFF, seen, START, CLOCKS)
    assert first.disturbed_at == START - 10
    assert advance(first, seen, START + 50, CLOCKS).disturbed_at == START - 10
    third = replace(seen, silent_since=(START - 20, START - 10, START + 40))
    assert advance(first, third, START + 50, CLOCKS).disturbed_at == START + 40


def test_a_silent_half_of_the_pool_keeps_the_brake_on_for_one_grace_while_others_call() -> None:
    seen = replace(FINE, silent_since=(START - 1, START - 1), pool=4)
    assert quiet(OFF, 88, seen).on
    assert not quiet(OFF, 89, seen).on
    assert not quiet(OFF, 1000, seen).on


def test_while_the_brake_is_on_an_unreachable_proxy_counts_again() -> None:
    spent = quiet(OFF, 400, SHUT)
    late = advance(spent, replace(FINE, late_s=9.0), START + 401, CLOCKS)
    assert not late.on, "another cause does not extend the brake beyond brake_max"
    cleared = advance(late, FINE, START + 402, CLOCKS)
    on = advance(advance(cleared, replace(FINE, late_s=9.0), START + 403, CLOCKS), SHUT, START + 480, CLOCKS)
    assert advance(on, replace(FINE, heard_at=START + 495), START + 495, CLOCKS).on
