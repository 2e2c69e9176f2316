"""Time that is over, renewed time, and a wall clock that is believed only while it goes evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import active_rental, new_rental

from orion.manager.domain.expiry import SETTLE_S, WallClock, expire, release, renew
from orion.manager.domain.states import ENDED, RentalState

WALL = 1_800_000_000.0
BELIEVED = WallClock(WALL)
LIVING = set(RentalState) - ENDED - {RentalState.RELEASING}


def test_a_rental_ends_when_its_time_is_over_and_not_before() -> None:
    rental = active_rental(expires_at=WALL)
    assert expire([rental], WALL - 0.001, BELIEVED) == []
    (step,) = expire([rental], WALL, BELIEVED)
    (write,) = step.writes
    assert write.change["state"] is RentalState.RELEASING
    assert write.change["end"] == "expired"
    assert write.expect == {"state": RentalState.ACTIVE, "epoch": rental.epoch, "expires_at": WALL}
    assert [e.kind for e in step.events] == ["rental.release_started"]


def test_one_whose_time_has_not_begun_does_not_expire() -> None:
    assert expire([new_rental()], WALL * 2, BELIEVED) == []


@pytest.mark.parametrize("state", sorted(set(RentalState) - LIVING))
def test_what_is_ending_or_has_ended_does_not_expire_again(state: RentalState) -> None:
    assert expire([active_rental(state=state, expires_at=WALL)], WALL + 1, BELIEVED) == []


@pytest.mark.parametrize("state", sorted(LIVING))
def test_one_that_was_active_expires_wherever_it_is(state: RentalState) -> None:
    assert len(expire([active_rental(state=state, expires_at=WALL)], WALL + 1, BELIEVED)) == 1


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 2.1, -2.1])
def test_a_clock_that_jumped_expires_nobody_until_it_has_gone_evenly_for_a_while(jump_s: float) -> None:
    rental = active_rental(expires_at=WALL)
    clock, now = WallClock(WALL), 0.0
    while now < SETTLE_S:
        clock = clock.observe(WALL + jump_s + now, now)
        assert not clock.believed
        assert expire([rental], WALL + jump_s + now, clock) == []
        now += 10
    clock = clock.observe(WALL + jump_s + now, now)
    assert clock.believed


def test_a_second_jump_starts_the_wait_again() -> None:
    clock = WallClock(WALL).observe(WALL + 100, 0.0)
    clock = clock.observe(WALL + 250 + 300, 250.0)
    clock = clock.observe(WALL + 300 + 300, 300.0)
    assert not clock.believed
    assert clock.observe(WALL + 550 + 300, 550.0).believed


def test_a_clock_that_is_slewed_is_believed_all_the_way() -> None:
    """NTP corrects by at most 500 ppm; here a hundred times as fast, over half an hour."""
    clock, now = WallClock(WALL), 0.0
    for _ in range(1800):
        now += 1.0
        clock = clock.observe(WALL + now * 1.05, now)
        assert clock.believed
    assert expire([active_rental(expires_at=WALL)], WALL + 1, clock)


@given(st.lists(st.floats(-5000, 5000), min_size=1, max_size=30))
def test_nobody_expires_within_settling_time_of_a_jump(jumps: list[float]) -> None:
    clock, offset, now, jumped_at = WallClock(WALL), WALL, 0.0, None
    for jump in jumps:
        now += 30.0
        offset += jump
        clock = clock.observe(offset + now, now)
        jumped_at = now if abs(jump) > 2.001 else jumped_at
        if jumped_at is not None and now - jumped_at < SETTLE_S:
            assert expire([active_rental(expires_at=0.0)], offset + now, clock) == []


def test_a_renewal_counts_again_from_now() -> None:
    step = renew(active_rental(), 60, "alice", WALL)
    assert step.writes[0].change == {"ttl_s": 60, "expires_at": WALL + 60}
    assert [(e.kind, e.actor) for e in step.events] == [("rental.renewed", "alice")]


def test_a_renewal_of_one_that_was_never_active_does_not_begin_its_time() -> None:
    assert renew(new_rental(), 60, "alice", WALL).writes[0].change == {"ttl_s": 60}


@pytest.mark.parametrize("state", sorted(LIVING))
def test_each_living_rental_can_be_released(state: RentalState) -> None:
    step = release(active_rental(state=state), "released", "alice", "asked for")
    assert step.writes[0].change["state"] is RentalState.RELEASING
