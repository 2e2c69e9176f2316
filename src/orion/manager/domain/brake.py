"""The brake: the circuit breaker that declares no silent worker down while the manager may be unreachable.

A disturbance of the proxy or the manager starts the grace of every worker again. The brake ends when the proxy has
answered throughout `takeover_after_s` and a heartbeat came in, or after `brake_max_s`, so that it is no stuck state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orion.manager.domain.clocks import Clocks


@dataclass(frozen=True, kw_only=True)
class Brake:
    disturbed_at: float
    """Monotonic seconds of the last disturbance, from which grace is counted."""
    since: float | None
    """Monotonic seconds at which the brake went on; None while it is off."""
    reason: str
    exhausted: bool = False
    """Whether a disturbance outlasted `brake_max_s`: the brake stays off until an observation has no disturbance."""

    @staticmethod
    def at_start(now: float) -> Brake:
        return Brake(disturbed_at=now, since=now, reason="the manager has just started")

    @property
    def on(self) -> bool:
        return self.since is not None


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The inputs of the brake since the last round of the health controller; times are monotonic seconds."""

    proxy_answers: bool
    """Whether the last proxy probe reached the manager through the proxy."""
    late_s: float
    """Seconds by which this round began later than planned."""
    heard_at: float | None
    """The time of the last heartbeat of any worker."""
    silent_since: tuple[float, ...]
    """The time at which each silent worker that is not down became suspect."""
    pool: int
    """The number of workers that are not down."""


def advance(brake: Brake, seen: Observation, now: float, clocks: Clocks) -> Brake:
    """Return the brake after one observation."""
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
    """Return the time at which the last of a group fell silent; None if there is no such group.

    A group is two workers or more, at least half of the pool, that fell silent within one lease.
    """
    times = sorted(silent_since)
    end = 0
    for first, at in enumerate(times):
        while end < len(times) and times[end] - at <= lease_s:
            end += 1
        if end - first >= 2 and (end - first) * 2 >= pool:
            return times[end - 1]
    return None
