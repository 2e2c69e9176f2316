"""The end of a rental's time, its renewal, and a wall clock that is believed only without jumps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import active_rental, new_rental

from orion.manager.domain.expiry import FAR_S, NEAR_S, SETTLE_S, Mark, WallClock, expire, release, renew
from orion.manager.domain.states import ENDED, RentalState

WALL = 1_800_000_000.0
BELIEVED = WallClock(offset_s=WALL)
LIVING = set(RentalState) - ENDED - {RentalState.RELEASING}


def test_a_rental_expires_when_its_time_is_over_and_not_before() -> None:
    rental = active_rental(expires_at=WALL)
    assert expire([rental], WALL - 0.001, BELIEVED) == []
    (step,) = expire([rental], WALL, BELIEVED)
    (write,) = step.writes
    assert write.change["state"] is RentalState.RELEASING
    assert write.change["end"] == "expired"
    assert write.expect == {"state": RentalState.ACTIVE, "epoch": rental.epoch, "expires_at": WALL}
    assert [e.kind for e in step.events] == ["rental.release_started"]


def test_a_rental_whose_time_has_not_begun_does_not_expire() -> None:
    assert expire([new_rental()], WALL * 2, BELIEVED) == []


@pytest.mark.parametrize("state", sorted(set(RentalState) - LIVING))
def test_a_rental_that_is_ending_or_has_ended_does_not_expire_again(state: RentalState) -> None:
    assert expire([active_rental(state=state, expires_at=WALL)], WALL + 1, BELIEVED) == []


@pytest.mark.parametrize("state", sorted(LIVING))
def test_a_rental_that_was_once_active_expires_in_any_living_state(state: RentalState) -> None:
    assert len(expire([active_rental(state=state, expires_at=WALL)], WALL + 1, BELIEVED)) == 1


@pytest.mark.parametrize("jump_s", [NEAR_S - 1, 1 - NEAR_S, 2.1, -2.1])
def test_after_a_jump_of_the_clock_no_rental_expires_until_the_clock_has_run_evenly(jump_s: float) -> None:
    rental = active_rental(expires_at=WALL)
    clock, now = WallClock(offset_s=WALL), 0.0
    while now < SETTLE_S:
        clock = clock.observe(WALL + jump_s + now, now)
        assert not clock.believed
        assert expire([rental], WALL + jump_s + now, clock) == []
        now += 10
    clock = clock.observe(WALL + jump_s + now, now)
    assert clock.believed


def test_a_second_jump_starts_the_wait_again() -> None:
    clock = WallClock(offset_s=WALL).observe(WALL + 10, 0.0)
    clock = clock.observe(WALL + 250 + 30, 250.0)
    clock = clock.observe(WALL + 300 + 30, 300.0)
    assert not clock.believed
    assert clock.observe(WALL + 550 + 30, 550.0).believed


@pytest.mark.parametrize("jump_s", [NEAR_S + 1, -NEAR_S - 1, 40 * 86_400.0, -3600.0])
def test_a_clock_that_is_far_off_is_never_trusted_without_an_operator(jump_s: float) -> None:
    rental = active_rental(expires_at=WALL)
    clock = WallClock(offset_s=WALL)
    for now in range(0, 100_000, 10):
        clock = clock.observe(WALL + jump_s + now, float(now))
        assert expire([rental], WALL + jump_s + now, clock) == []
    assert not clock.settles
    assert abs(clock.far_s - jump_s) < 1
    assert clock.confirmed().believed


def test_a_clock_that_returns_to_the_trusted_time_is_trusted_after_it_has_run_evenly() -> None:
    clock = WallClock(offset_s=WALL).observe(WALL + 86_400, 0.0)
    clock = clock.observe(WALL + 1000, 1000.0)
    assert not clock.believed
    assert clock.settles
    assert clock.observe(WALL + 1000 + SETTLE_S, 1000 + SETTLE_S).believed


@pytest.mark.parametrize("jump_s", [-3600.0, 5.0, 40 * 86_400.0])
def test_the_trusted_time_runs_on_after_a_jump_of_the_clock(jump_s: float) -> None:
    clock = (
        WallClock(offset_s=WALL)
        .observe(WALL + 10, 10.0)
        .observe(WALL + 20 + jump_s, 20.0)
        .observe(WALL + 50 + jump_s, 50.0)
    )
    assert clock.as_believed(60.0) == WALL + 60
    assert clock.confirmed().as_believed(60.0) == WALL + 60 + jump_s


def test_many_small_jumps_do_not_carry_a_clock_far() -> None:
    """After each jump the clock has to run evenly, and has to stay near the time that was believed before."""
    clock = WallClock(offset_s=WALL)
    for number in range(1, 100):
        clock = clock.observe(WALL + 100 * number, 0.0)
    assert not clock.settles
    assert clock.far_s == 9900


MARK = Mark(WALL, 1000.0, 7)


@pytest.mark.parametrize(
    ("wall", "now", "boot_id", "mark", "last_event_at", "believed"),
    [
        (WALL, 0.0, 7, None, None, True),
        # The machine ran on, so the right time is known exactly, however long the manager was away.
        (WALL + 86_400 * 9, 1000.0 + 86_400 * 9, 7, MARK, WALL - 5, True),
        (WALL + 86_400 * 9 + 500, 1000.0 + 86_400 * 9, 7, MARK, WALL - 5, True),  # slewed
        (WALL + 86_400 * 40, 1010.0, 7, MARK, WALL, False),
        (WALL + 100, 1010.0, 7, MARK, WALL, False),
        (WALL - 100, 1010.0, 7, MARK, WALL, False),
        # The machine was restarted: the time for which it was off is unknown.
        (WALL + FAR_S - 1, 20.0, 8, MARK, WALL, True),
        (WALL + FAR_S + 1, 20.0, 8, MARK, WALL, False),
        (WALL + 86_400 * 40, 20.0, 8, MARK, WALL, False),
        (WALL - NEAR_S - 1, 20.0, 8, MARK, WALL, False),
        (WALL + 50, 20.0, 0, Mark(WALL, 1000.0, 0), WALL, True),
        # Where the mark is known, the time of an event counts for nothing: the clock may have been ahead.
        (WALL + 10, 20.0, 8, MARK, WALL + 86_400, True),
        (WALL + 10, 20.0, 8, None, WALL, True),
        (WALL + 86_400 * 40, 20.0, 8, None, WALL, False),
    ],
)
def test_a_starting_manager_compares_its_clock_with_the_last_known_time(
    wall: float, now: float, boot_id: int, mark: Mark | None, last_event_at: float | None, believed: bool
) -> None:
    clock = WallClock.at_start(wall, now, boot_id, mark, last_event_at)
    assert clock.believed is believed
    if not believed:
        assert expire([active_rental(expires_at=0.0)], wall, clock.observe(wall, now)) == []


@pytest.mark.parametrize(
    ("now", "boot_id", "believed"),
    [(1000.0 + 86_400, 7, WALL + 86_400), (20.0, 8, WALL)],
    ids=["went on", "began anew"],
)
def test_a_manager_that_starts_with_a_wrong_clock_continues_from_the_last_known_time(
    now: float, boot_id: int, believed: float
) -> None:
    """The time for which the machine was off is unknown, so the last known time is the least that is certain."""
    clock = WallClock.at_start(WALL + 40 * 86_400, now, boot_id, MARK, WALL)
    assert not clock.believed
    assert clock.as_believed(now) == believed


def test_after_a_reboot_a_corrected_clock_is_trusted_again() -> None:
    """The clock is two hours ahead until NTP corrects it, because the machine keeps local time."""
    clock = WallClock.at_start(WALL + 7200, 20.0, 8, MARK, None)
    clock = clock.observe(WALL + 600, 40.0)
    assert clock.settles
    assert clock.observe(WALL + 600 + SETTLE_S, 40.0 + SETTLE_S).believed


def test_a_late_expiry_is_dated_now_so_that_its_snapshots_are_kept_from_now() -> None:
    for late_s, ends_at in ((10.0, None), (86_400.0 * 3, WALL + 86_400.0 * 3)):
        (step,) = expire([active_rental(expires_at=WALL)], WALL + late_s, BELIEVED)
        assert step.writes[0].change.get("expires_at") == ends_at


def test_a_slewed_clock_stays_trusted() -> None:
    """NTP corrects by at most 500 ppm; here a hundred times as fast, over half an hour."""
    clock, now = WallClock(offset_s=WALL), 0.0
    for _ in range(1800):
        now += 1.0
        clock = clock.observe(WALL + now * 1.05, now)
        assert clock.believed
    assert expire([active_rental(expires_at=WALL)], WALL + 1, clock)


@given(st.lists(st.floats(-5000, 5000), min_size=1, max_size=30))
def test_no_rental_expires_within_the_settling_time_after_a_jump(jumps: list[float]) -> None:
    clock, offset, now, jumped_at = WallClock(offset_s=WALL), WALL, 0.0, None
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


def test_a_renewal_under_a_doubted_clock_is_not_dated_by_that_clock() -> None:
    assert renew(active_rental(), 60, "alice", None).writes[0].change == {"ttl_s": 60, "expires_at": None}


def test_a_renewal_does_not_begin_the_time_of_a_rental_that_was_never_active() -> None:
    assert renew(new_rental(), 60, "alice", WALL).writes[0].change == {"ttl_s": 60}


@pytest.mark.parametrize("state", sorted(LIVING))
def test_each_living_rental_can_be_released(state: RentalState) -> None:
    step = release(active_rental(state=state), "released", "alice", "asked for")
    assert step.writes[0].change["state"] is RentalState.RELEASING
