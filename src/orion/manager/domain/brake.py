"""The brake: while it holds, silence proves nothing, because it may be the manager that nobody can reach.

Anything that disturbs the door starts everybody's grace again. The brake ends when the door and at least one heartbeat
have worked throughout `takeover_after`, or after `brake_max`: a brake is not a stuck state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orion.manager.domain.clocks import Clocks


@dataclass(frozen=True, kw_only=True)
class Brake:
    """`since`: monotonic seconds when it went on, None while it is off. `disturbed_at`: grace counts from here."""

    disturbed_at: float
    since: float | None
    reason: str
    exhausted: bool = False
    """A disturbance outlasted `brake_max`: nothing brakes again before one observation without any."""

    @staticmethod
    def at_start(now: float) -> Brake:
        return Brake(disturbed_at=now, since=now, reason="the manager has just started")

    @property
    def on(self) -> bool:
        return self.since is not None


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the health loop saw since its last round."""

    proxy_answers: bool
    """The manager reached itself through the proxy the last time it asked."""
    late_s: float
    """How much later than planned this round began."""
    heard_at: float | None
    """When any worker was last heard."""
    silent_since: tuple[float, ...]
    """For each worker that has gone silent (but is not down): when it became suspect."""
    pool: int
    """How many workers are not down."""


def advance(brake: Brake, seen: Observation, now: float, clocks: Clocks) -> Brake:
    """The brake after one observation."""
    cause, at = _disturbance(seen, now, clocks)
    if cause is None:
        brake = replace(brake, exhausted=False)
    elif not brake.exhausted and at > brake.disturbed_at:
        since = brake.since if brake.since is not None else now
        brake = replace(brake, disturbed_at=at, since=since, reason=cause)
    if brake.since is None:
        return brake
    quiet = now - brake.disturbed_at >= clocks.takeover_after_s
    heard = seen.heard_at is not None and seen.heard_at > brake.disturbed_at
    if quiet and heard:
        return replace(brake, since=None, reason="")
    if now - brake.since >= clocks.brake_max_s:
        return replace(brake, since=None, reason="", exhausted=cause is not None)
    return brake


def _disturbance(seen: Observation, now: float, clocks: Clocks) -> tuple[str | None, float]:
    if not seen.proxy_answers:
        return "the manager cannot reach itself through the proxy", now
    if seen.late_s > clocks.door_answer_s:
        return f"the manager itself was late by more than {clocks.door_answer_s:g} s", now
    fell_silent = _fell_silent_together(seen.silent_since, seen.pool, clocks.takeover_after_s)
    if fell_silent is not None:
        return "at least half of the pool fell silent together", fell_silent
    return None, now


def _fell_silent_together(silent_since: Iterable[float], pool: int, lease_s: float) -> float | None:
    """When the last of them fell silent, if two or more and at least half of the pool did within one lease."""
    times = sorted(silent_since)
    end = 0
    for first, at in enumerate(times):
        while end < len(times) and times[end] - at <= lease_s:
            end += 1
        if end - first >= 2 and (end - first) * 2 >= pool:
            return times[end - 1]
    return None
