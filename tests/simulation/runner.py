"""`make simulate`: plays many schedules, each made from its seed; shrinks the first that fails, and prints its history.

python -m simulation.runner [--schedules 10000] [--first 0] [--seed ONE]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

from simulation.schedule import Schedule, make_schedule
from simulation.shrinker import shrink
from simulation.world import Failure, Simulation


@dataclass(frozen=True)
class Finding:
    """A schedule that breaks an invariant."""

    schedule: Schedule
    failure: Failure
    history: str


def play(schedule: Schedule) -> Failure | None:
    return Simulation(schedule).run()


def history_of(schedule: Schedule) -> str:
    """Return the schedule and the history of its simulation, in seconds of virtual time."""
    sim = Simulation(schedule, record=True)
    failure = sim.run()
    lines = [f"schedule of seed {schedule.seed}, slots {schedule.slots}, {schedule.length_s:.1f} s:"]
    lines += [f"  {fault}" for fault in schedule.faults]
    lines += ["", "history:"]
    lines += [f"  {at:9.3f}  {actor:<10} {text}" for at, actor, text in sim.history or []]
    lines += [
        "",
        f"BROKEN at {failure}" if failure else f"all well; settled {sim.settled_after_s:.0f} s after the faults",
    ]
    return "\n".join(lines)


def search(seeds: range, raw: bool = False) -> Finding | None:
    """Return the first of these schedules that breaks an invariant, shrunk unless `raw`; None if there is none."""
    for seed in seeds:
        schedule = make_schedule(seed)
        failure = play(schedule)
        if failure is not None:
            small = schedule if raw else shrink(schedule, failure, play)
            return Finding(small, failure, "" if raw else history_of(small))
    return None


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--schedules", type=int, default=10_000)
    arguments.add_argument("--first", type=int, default=0, help="the first seed")
    arguments.add_argument("--seed", type=int, help="replay this one and print its history")
    arguments.add_argument("--raw", action="store_true", help="print only which seed breaks which invariant")
    wanted = arguments.parse_args()
    if wanted.seed is not None:
        print(history_of(make_schedule(wanted.seed)))
        return 0
    started = time.perf_counter()
    finding = search(range(wanted.first, wanted.first + wanted.schedules), wanted.raw)
    if finding is not None:
        print(finding.history)
        print(f"\nseed {finding.schedule.seed} breaks: {finding.failure}")
        print(f"its whole history: make simulate SEED={finding.schedule.seed}")
        return 1
    took_s = time.perf_counter() - started
    print(
        f"{wanted.schedules} schedules, nothing broken, {took_s:.1f} s, {1000 * took_s / wanted.schedules:.1f} ms each"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
