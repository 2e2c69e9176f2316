"""Ending rentals whose time is over, by a wall clock that is believed only while nothing speaks against it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orion.manager.domain.model import Rental
from orion.manager.domain.states import ENDED, RentalState
from orion.manager.domain.steps import Event, Step, Write, move_rental

JUMP_S = 2.0
"""A larger change between two looks is a jump; slewing by NTP is far slower."""
SETTLE_S = 300.0
"""A clock that jumped is believed again when it has gone evenly for so long near to where it should be."""
NEAR_S = 120.0
"""A clock that is no further than this from where it should be settles by itself; any other waits for an operator."""
FAR_S = 3600.0
"""A machine that begins anew was off for a time that nobody knows: so far ahead of the last known time is believed."""
DRIFT = 0.001
"""How far, as a share of the time that passed, a clock may be slewed while the manager is away."""
LATE_S = 60.0
"""A rental that is ended later than this is said to end now, so that its copies are kept from now on."""


@dataclass(frozen=True)
class Mark:
    """A moment at which the wall clock was believed."""

    wall: float
    """Unix seconds."""
    boot: float
    """Seconds since the machine began; a suspended machine counts on."""
    boot_id: int
    """Which beginning of the machine; 0: unknown."""


@dataclass(frozen=True, kw_only=True)
class WallClock:
    """The wall clock compared with one that cannot be set, from look to look."""

    offset_s: float
    """Of the wall clock from the other one at the last look."""
    believed_offset_s: float | None = None
    """What the offset should be; None: what it is."""
    jumped_at: float | None = None
    """Seconds, by the other clock, of the last jump; None: nothing speaks against this clock."""
    ahead_s: float = NEAR_S
    """How far ahead of what it should be the clock may be and settle by itself."""

    @staticmethod
    def at_start(wall: float, now: float, boot_id: int, mark: Mark | None, last_event_at: float | None) -> WallClock:
        """Return the clock of a manager that begins; `last_event_at` counts only where there is no mark.

        Since the same start of the machine it is known exactly what the clock should show. Otherwise it should show no
        less than the last known time, and not much more.
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
        return WallClock(offset_s=offset) if clock._is_near else clock

    def observe(self, wall: float, now: float) -> WallClock:
        offset = wall - now
        if abs(offset - self.offset_s) > JUMP_S:
            return replace(self, offset_s=offset, believed_offset_s=self._should_be_s, jumped_at=now)
        if self.jumped_at is None:
            return WallClock(offset_s=offset)
        looked = replace(self, offset_s=offset)
        return WallClock(offset_s=offset) if looked._is_near and now - self.jumped_at >= SETTLE_S else looked

    def confirmed(self) -> WallClock:
        """Return the clock as an operator believes it, as it is."""
        return WallClock(offset_s=self.offset_s)

    def as_believed(self, now: float) -> float:
        """Return Unix seconds at `now`, of the other clock, by what this one should show."""
        return now + self._should_be_s

    @property
    def believed(self) -> bool:
        return self.jumped_at is None

    @property
    def far_s(self) -> float:
        """How far ahead of what it should show the clock is; negative: how far behind."""
        return self.offset_s - self._should_be_s

    @property
    def settles(self) -> bool:
        """Whether a clock that is not believed will be, by itself, when it has gone evenly for a while."""
        return self._is_near

    @property
    def _should_be_s(self) -> float:
        return self.offset_s if self.believed_offset_s is None else self.believed_offset_s

    @property
    def _is_near(self) -> bool:
        return -NEAR_S <= self.far_s <= self.ahead_s


def end_of(ttl_s: int, counts_from: float | None) -> float | None:
    """Return the Unix seconds at which a time that is counted from `counts_from` ends; None while it is not counted."""
    return None if counts_from is None else counts_from + ttl_s


def count(rentals: Iterable[Rental], wall: float, clock: WallClock) -> list[Step]:
    """Return the steps that count the time, from now on, of rentals that began or were renewed by a doubted clock.

    No time is counted by a clock that may be set right: it would be over in a moment, or last for ever.
    """
    if not clock.believed:
        return []
    return [
        Step(
            (
                Write(
                    kind="rental", id=rental.id, expect={"expires_at": None}, change={"expires_at": wall + rental.ttl_s}
                ),
            ),
            (),
        )
        for rental in rentals
    ]


def expire(rentals: Iterable[Rental], wall: float, clock: WallClock) -> list[Step]:
    """A release for each rental whose time is over; nothing while the clock is not believed."""
    if not clock.believed:
        return []
    return [
        _end_unless_renewed(rental, wall)
        for rental in rentals
        if rental.expires_at is not None
        and rental.expires_at <= wall
        and rental.state not in ENDED | {RentalState.RELEASING}
    ]


def _end_unless_renewed(rental: Rental, wall: float) -> Step:
    late = wall - (rental.expires_at or wall) > LATE_S
    # A renewal that was answered meanwhile must not be undone by what was seen before it.
    step = release(rental, "expired", "expiry", "its time is over")
    (write,) = step.writes
    expect = {**write.expect, "expires_at": rental.expires_at}
    change = {**write.change, "expires_at": wall} if late else write.change
    return replace(step, writes=(replace(write, expect=expect, change=change),))


def release(rental: Rental, end: str, actor: str, reason: str) -> Step:
    """Begin the end of a living rental; `end` is how it will be called, released or expired."""
    return move_rental(rental, RentalState.RELEASING, actor, reason, end=end)


def renew(rental: Rental, ttl_s: int, actor: str, counts_from: float | None) -> Step:
    """Count `ttl_s` again from `counts_from` (Unix seconds), or None while the clock is doubted: see `count`.

    The time of a rental that was never active has not begun.
    """
    change: dict[str, float | None] = {"ttl_s": ttl_s}
    if rental.activated_at is not None:
        change["expires_at"] = end_of(ttl_s, counts_from)
    event = Event(
        kind="rental.renewed",
        actor=actor,
        reason=f"for {ttl_s} s",
        owner=rental.owner,
        rental_id=rental.id,
        epoch=rental.epoch,
    )
    return Step((Write(kind="rental", id=rental.id, expect={"state": rental.state}, change=change),), (event,))
