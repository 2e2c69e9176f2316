"""Ending rentals whose time is over, by a wall clock that is believed only while it has not jumped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orion.manager.domain.model import Event, Rental, Step, Write, move_rental
from orion.manager.domain.states import ENDED, RentalState

JUMP_S = 2.0
"""A larger change between two rounds is a jump; slewing by NTP is far slower."""
SETTLE_S = 300.0
"""A clock that jumped is believed again when it has gone evenly for so long."""
_ENDING = ENDED | {RentalState.RELEASING}


@dataclass(frozen=True)
class WallClock:
    """The wall clock compared with the monotonic one, from round to round."""

    offset_s: float
    jumped_at: float | None = None
    """Monotonic seconds of the last jump."""

    def observe(self, wall: float, now: float) -> WallClock:
        offset = wall - now
        if abs(offset - self.offset_s) > JUMP_S:
            return WallClock(offset, now)
        settled = self.jumped_at is not None and now - self.jumped_at >= SETTLE_S
        return replace(self, offset_s=offset, jumped_at=None if settled else self.jumped_at)

    @property
    def believed(self) -> bool:
        return self.jumped_at is None


def expire(rentals: Iterable[Rental], wall: float, clock: WallClock) -> list[Step]:
    """A release for each rental whose time is over; nothing while the clock is not believed."""
    if not clock.believed:
        return []
    return [
        _end_unless_renewed(rental)
        for rental in rentals
        if rental.expires_at is not None
        and rental.expires_at <= wall
        and rental.state not in ENDED | {RentalState.RELEASING}
    ]


def _end_unless_renewed(rental: Rental) -> Step:
    # A renewal that was answered meanwhile must not be undone by what was seen before it.
    step = release(rental, "expired", "expiry", "its time is over")
    (write,) = step.writes
    return replace(step, writes=(replace(write, expect={**write.expect, "expires_at": rental.expires_at}),))


def release(rental: Rental, end: str, actor: str, reason: str) -> Step:
    """Begin the end of a living rental; `end` is how it will be called, released or expired."""
    return move_rental(rental, RentalState.RELEASING, actor, reason, end=end)


def renew(rental: Rental, ttl_s: int, actor: str, wall: float) -> Step:
    """Count `ttl_s` again from now; the time of one that was never active has not begun."""
    change: dict[str, float] = {"ttl_s": ttl_s}
    if rental.activated_at is not None:
        change["expires_at"] = wall + ttl_s
    event = Event("rental.renewed", actor, f"for {ttl_s} s", rental.owner, rental.id, epoch=rental.epoch)
    return Step((Write("rental", rental.id, {"state": rental.state}, change),), (event,))
