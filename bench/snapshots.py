"""The cost of snapshots for a program that writes: how long it is stopped, processor time, and the snapshots' age.

A renter's program rewrites files at a steady rate, and a second process notes the gaps in its own clock
(inside_rental.py). Each case is measured twice on one platform: first without snapshots, for the gaps that the machine
causes anyway, then with a snapshot every few seconds. The difference is the cost of snapshots.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from bench.figures import summary
from bench.report import Result, Row
from bench.scene import Json, RentedPlatform, processor_s, unix
from bench.stack import running

PROGRAM = Path(__file__).with_name("inside_rental.py")
SIZES_MB = (10, 100, 1000)
RATES_MB_S = (1.0, 20.0)
NEVER_S = 86_400.0
"""Seconds between snapshots, so that none is taken during the measurement."""
LOOK_EVERY_S = 0.2
MORE_S = 120.0
"""Seconds that a program may take in addition, to start and to fill a home."""
WORKERS = 2

Gap = tuple[float, float]
"""The beginning (Unix time) and the length of a gap, in seconds."""
Case = tuple[int, float]
"""The megabytes of a home, and those that are rewritten each second."""


@dataclass
class WriterMeasurement:
    """The gaps and the costs that were measured while a program wrote for `seconds`."""

    seconds: float
    gaps: list[Gap]
    manager_s: float
    """Processor seconds of the manager's container; `worker_s`: of the worker's."""
    worker_s: float
    taken_at: list[float] = field(default_factory=list)
    """The beginning of each snapshot that was finished meanwhile (Unix time)."""
    ages: list[float] = field(default_factory=list)
    """The ages of the newest snapshot, in seconds, read every LOOK_EVERY_S."""

    @property
    def stopped_share(self) -> float:
        """Return the share of the time in which the program was stopped."""
        return sum(length for _, length in self.gaps) / self.seconds


def measure(sizes: Sequence[int], seconds: float, interval_s: float) -> Result:
    """Measure all cases. `seconds`: of each case, with snapshots and without; `interval_s`: between snapshots."""
    result = Result("snapshots", f"Snapshots of homes that are written to, every {interval_s:g} s")
    cases = [(size, rate) for size in sizes for rate in RATES_MB_S]
    with running(WORKERS, {"ORION_SNAPSHOT_INTERVAL_S": f"{NEVER_S:g}"}) as stack:
        scene = RentedPlatform(stack, WORKERS)
        without = _measure_all(scene, cases, seconds, with_snapshots=False)
        stack.change(ORION_SNAPSHOT_INTERVAL_S=f"{interval_s:g}")
        with_them = _measure_all(scene, cases, seconds, with_snapshots=True)
    for case in cases:
        _report(result, case, without[case], with_them[case], interval_s)
    return result


def longest_each(gaps: Sequence[Gap], bounds: Sequence[float]) -> list[float]:
    """Return the longest gap that began between each two bounds that follow each other, in seconds; 0 for none."""
    return [
        max((length for at, length in gaps if begin <= at < end), default=0.0)
        for begin, end in pairwise(sorted(bounds))
    ]


def _measure_all(
    scene: RentedPlatform, cases: Sequence[Case], seconds: float, with_snapshots: bool
) -> dict[Case, WriterMeasurement]:
    found: dict[Case, WriterMeasurement] = {}
    for size in dict.fromkeys(size for size, _ in cases):
        rental = scene.rent()
        scene.renter.runs(rental, _program("fill", size, size), MORE_S)
        if with_snapshots:
            scene.await_snapshots([rental["id"]])
        for case in (one for one in cases if one[0] == size):
            scene.show_progress(f"snapshots: {case[0]} MB at {case[1]:g} MB/s, snapshots: {with_snapshots}", len(found))
            found[case] = _measure_case(scene, rental, case, seconds)
        scene.release(rental["id"])
    return found


def _measure_case(scene: RentedPlatform, rental: Json, case: Case, seconds: float) -> WriterMeasurement:
    manager, worker = scene.stack.container("manager_app"), scene.workers()[rental["worker_id"]]["hostname"]
    before = processor_s(manager), processor_s(worker)
    taken: set[float] = set()
    ages = []
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(scene.renter.runs, rental, _program("work", *case, seconds), seconds + MORE_S)
        while not writing.done():
            if safe_at := scene.rental(rental["id"])["last_safe_copy_at"]:
                taken.add(unix(safe_at))
                ages.append(time.time() - unix(safe_at))
            time.sleep(LOOK_EVERY_S)
        gaps = [(at, length) for at, length in json.loads(writing.result())]
    used = processor_s(manager) - before[0], processor_s(worker) - before[1]
    return WriterMeasurement(seconds, gaps, *used, sorted(taken), ages)


def _program(*arguments: object) -> str:
    return shlex.join(["python3", "-c", PROGRAM.read_text(), *map(str, arguments)])


def _report(
    result: Result, case: Case, without: WriterMeasurement, with_them: WriterMeasurement, interval_s: float
) -> None:
    label = f"{case[0]:,} MB, {case[1]:g} MB/s"
    rounds = len(with_them.taken_at) - 1
    if rounds < 1:
        result.times(f"{label}: the longest stop of a round", [], "no two snapshots were finished in that time")
        return
    stops = longest_each(with_them.gaps, with_them.taken_at)
    begun = min((at for at, _ in without.gaps), default=0.0)
    as_long = [begun + number * interval_s for number in range(int(without.seconds / interval_s) + 1)]
    result.times(f"{label}: the longest stop of a round", stops)
    result.times("  (without snapshots: the longest gap in as long)", longest_each(without.gaps, as_long))
    result.value("  stopped, of all time", "%", 100 * with_them.stopped_share)
    result.value("  (without snapshots)", "%", 100 * without.stopped_share)
    result.value("  processor time of a round, on the worker", "s", (with_them.worker_s - without.worker_s) / rounds)
    result.value("  processor time of a round, on the manager", "s", (with_them.manager_s - without.manager_s) / rounds)
    ages = summary(with_them.ages)
    result.rows.append(Row("  age of the snapshot", "s", ages.count, ages.p50, ages.p95, ages.p99))
    result.at_most(f"{label}: the longest stop of a round, p99", 1000 * summary(stops).p99, 100, " ms")
    result.at_most(
        f"{label}: stopped by snapshots, of all time",
        100 * (with_them.stopped_share - without.stopped_share),
        0.5,
        " %",
    )
