"""Shrinks a schedule that fails: fewer faults, fewer workers, less time, while it breaks the same invariant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from simulation.schedule import Schedule
from simulation.world import Failure

MOST_TRIES = 400


def shrink(schedule: Schedule, failure: Failure, play: Callable[[Schedule], Failure | None]) -> Schedule:
    """Return the smallest schedule found that breaks the same invariant; its seed stays the same."""
    tries = 0
    progress = True
    while progress and tries < MOST_TRIES:
        progress = False
        for smaller in _smaller(schedule):
            tries += 1
            found = play(smaller)
            if found is not None and found.invariant == failure.invariant:
                schedule, progress = smaller, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Yield smaller schedules, the smallest first."""
    faults = schedule.faults
    size = len(faults) // 2
    while size >= 1:
        for start in range(0, len(faults), size):
            yield replace(schedule, faults=faults[:start] + faults[start + size :])
        size //= 2
    for number in range(len(schedule.slots)):
        if len(schedule.slots) > 1:
            yield replace(schedule, slots=schedule.slots[:number] + schedule.slots[number + 1 :])
    last = max((fault.at_s for fault in faults), default=0.0) + 1.0
    if last < schedule.length_s * 0.95:
        yield replace(schedule, length_s=last)
    for number, fault in enumerate(faults):
        if 2.0 < fault.lasts_s < 1e6:
            shorter = replace(fault, lasts_s=fault.lasts_s / 2)
            yield replace(schedule, faults=(*faults[:number], shorter, *faults[number + 1 :]))
