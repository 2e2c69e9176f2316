"""The end of rentals whose time is over, by a wall clock that is believed only if it agrees with a monotonic clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from orion.manager.domain.model import Rental
from orion.manager.domain.states import ENDED, RentalState
from orion.manager.domain.steps import Step, move_rental, rental_event, write

JUMP_S = 2.0
"""Seconds: a larger change of the offset between two looks is a jump. Slewing by NTP is far slower."""
SETTLE_S = 300.0
"""Seconds without a jump after which a clock that is near to its expected time is believed again."""
NEAR_S = 120.0
"""Seconds from its expected time within which a clock settles by itself; any other waits for an operator."""
FAR_S = 3600.0
"""Seconds by which a clock may be ahead of the last known time after a boot: the machine may have been off."""
DRIFT = 0.001
"""The share of the time that passed by which a clock may be slewed while the manager is away."""
LATE_S = 60.0
"""Seconds after its end from which a rental counts as ended now, so that its snapshots are kept from now on."""


@dataclass(frozen=True)
class Mark:
    """A moment at which the wall clock was believed."""

    wall: float
    """Unix seconds."""
    boot: float
    """Seconds since the machine booted, times of suspension included."""
    boot_id: int
    """The id of that boot; 0: unknown."""


@dataclass(frozen=True, kw_only=True)
class WallClock:
    """The wall clock, compared at each look with the boot clock, which cannot be set."""

    offset_s: float
    """Seconds from the boot clock to the wall clock at the last look."""
    believed_offset_s: float | None = None
    """The expected offset in seconds; None: the present offset is believed."""
    jumped_at: float | None = None
    """Seconds of the boot clock at the last jump; None: the wall clock is believed."""
    ahead_s: float = NEAR_S
    """Seconds by which the clock may be ahead of its expected time and still settle by itself."""

    @staticmethod
    def at_start(wall: float, now: float, boot_id: int, mark: Mark | None, last_event_at: float | None) -> WallClock:
        """Return the clock of a manager that starts; `last_event_at` counts only if there is no mark.

        If the machine has not booted since the mark, the expected time is known exactly. Otherwise the clock should
        show no less than the last known time, and not more than FAR_S beyond.
        """
        offset = wall - now
        if mark is not None and boot_id and mark.boot_id == boot_id and now >= mark.boot:
            clock = WallClock(offset_s=offset, believed_offset_s=mark.wall - mark.boot, jumped_at=now)
            slewed_s = JUMP_S + DRIFT * (now - mark.boot)
            return WallClock(offset_s=offset) if abs(clock.far_s) <= slewed_s else clock
        known = mark.wall if mark is not None else last_event_at
        if known is None:
            return WallClock(offset_s=offset)
        clock = WallClock(offset_s=offset, believed_offset_s=known - now, jumped_at=now, ahead_s=FAR_S)
        return WallClock(offset_s=offset) if clock.settles else clock

    def observe(self, wall: float, now: float) -> WallClock:
        offset = wall - now
        if abs(offset - self.offset_s) > JUMP_S:
            return replace(self, offset_s=offset, believed_offset_s=self._expected_offset_s, jumped_at=now)
        if self.jumped_at is None:
            return WallClock(offset_s=offset)
        looked = replace(self, offset_s=offset)
        return WallClock(offset_s=offset) if looked.settles and now - self.jumped_at >= SETTLE_S else looked

    def confirmed(self) -> WallClock:
        """Return the clock after an operator confirmed the time that it shows."""
        return WallClock(offset_s=self.offset_s)

    def as_believed(self, now: float) -> float:
        """Return the expected Unix seconds at `now` of the boot clock."""
        return now + self._expected_offset_s

    @property
    def believed(self) -> bool:
        return self.jumped_at is None

    @property
    def far_s(self) -> float:
        """The seconds by which the clock is ahead of its expected time; negative: behind."""
        return self.offset_s - self._expected_offset_s

    @property
    def _expected_offset_s(self) -> float:
        return self.offset_s if self.believed_offset_s is None else self.believed_offset_s

    @property
    def settles(self) -> bool:
        """Whether a clock that is not believed is near enough to settle by itself after SETTLE_S without a jump."""
        return -NEAR_S <= self.far_s <= self.ahead_s


def end_of(ttl_s: int, counts_from: float | None) -> float | None:
    """Return the Unix seconds at which a time that is counted from `counts_from` ends; None while it is not counted."""
    return None if counts_from is None else counts_from + ttl_s


def count(rentals: Iterable[Rental], wall: float, clock: WallClock) -> list[Step]:
    """Return the steps that count, from now on, the time of rentals that began or were renewed by a doubted clock.

    No time is counted by a doubted clock: once that is set right, the time would be over at once, or last for ever.
    """
    if not clock.believed:
        return []
    return [Step((write(rental, {"expires_at": wall + rental.ttl_s}, expires_at=None),)) for rental in rentals]


def expire(rentals: Iterable[Rental], wall: float, clock: WallClock) -> list[Step]:
    """Return a release of each rental whose time is over; none while the clock is not believed."""
    if not clock.believed:
        return []
    living = (rental for rental in rentals if rental.state not in ENDED | {RentalState.RELEASING})
    return [_end(rental, at, wall) for rental in living if (at := rental.expires_at) is not None and at <= wall]


def _end(rental: Rental, expires_at: float, wall: float) -> Step:
    late: dict[str, Any] = {"expires_at": wall} if wall - expires_at > LATE_S else {}
    step = move_rental(rental, RentalState.RELEASING, "expiry", "its time is over", end="expired", **late)
    (ends,) = step.writes
    # The guard is there so that a renewal that was answered meanwhile is not undone.
    return replace(step, writes=(replace(ends, expect={**ends.expect, "expires_at": expires_at}),))


def release(rental: Rental, end: str, actor: str, reason: str) -> Step:
    """Return the step that begins the end of a rental; `end` is its last state, released or expired."""
    return move_rental(rental, RentalState.RELEASING, actor, reason, end=end)


def renew(rental: Rental, ttl_s: int, actor: str, counts_from: float | None) -> Step:
    """Return the step that counts `ttl_s` again from `counts_from`, or from the activation of a rental that waits.

    `counts_from`: Unix seconds; None: the clock is not believed, see `count`.
    """
    ends = {} if rental.activated_at is None else {"expires_at": end_of(ttl_s, counts_from)}
    event = rental_event("rental.renewed", f"for {ttl_s} s", rental, actor=actor)
    return Step((write(rental, {"ttl_s": ttl_s, **ends}, state=rental.state),), (event,))
