"""What snapshots cost who writes: how long its processes stand still, what the processors do for it, how old a copy is.

A renter's program rewrites files at a steady rate, and another beside it notes the gaps in its own clock
(inside_rental.py). All is done twice on one platform: first without copies, for what the machine does to a program
anyway, then with one every few seconds. The second less the first is what copies cost.
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
"""Between copies, where none is wanted while it is measured."""
LOOK_EVERY_S = 0.2
MORE_S = 120.0
"""Seconds that a program may take beyond its time, to be started and to fill a home."""
WORKERS = 2

Gap = tuple[float, float]
"""When it began (Unix time), and how long it was, in seconds."""
Case = tuple[int, float]


@dataclass
class WriterMeasurement:
    """The gaps and the costs that were seen while a program wrote for `seconds`."""

    seconds: float
    gaps: list[Gap]
    manager_s: float
    """Processor seconds of the manager, as `worker_s`."""
    worker_s: float
    copied_at: list[float] = field(default_factory=list)
    """When each copy that was finished meanwhile had been begun (Unix time)."""
    ages: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> float:
        """The share of the time that were gaps."""
        return sum(length for _, length in self.gaps) / self.seconds


def measure(sizes: Sequence[int], seconds: float, interval_s: float) -> Result:
    """`seconds`: of each case, with copies and without. `interval_s`: between copies."""
    result = Result("snapshots", f"Snapshots of homes that are written to, every {interval_s:g} s")
    cases = [(size, rate) for size in sizes for rate in RATES_MB_S]
    with running(WORKERS, {"ORION_SNAPSHOT_INTERVAL_S": f"{NEVER_S:g}"}) as stack:
        scene = RentedPlatform(stack, WORKERS)
        without = _watch_all(scene, cases, seconds, copying=False)
        stack.change(ORION_SNAPSHOT_INTERVAL_S=f"{interval_s:g}")
        copied = _watch_all(scene, cases, seconds, copying=True)
    for case in cases:
        _tell(result, case, without[case], copied[case], interval_s)
    return result


def longest_each(gaps: Sequence[Gap], bounds: Sequence[float]) -> list[float]:
    """Return the longest gap that began between each two bounds that follow each other, in seconds; 0 for none."""
    return [
        max((length for at, length in gaps if begin <= at < end), default=0.0)
        for begin, end in pairwise(sorted(bounds))
    ]


def _watch_all(
    scene: RentedPlatform, cases: Sequence[Case], seconds: float, copying: bool
) -> dict[Case, WriterMeasurement]:
    found: dict[Case, WriterMeasurement] = {}
    for size in dict.fromkeys(size for size, _ in cases):
        rental = scene.rent()
        scene.renter.runs(rental, _program("fill", size, size), MORE_S)
        if copying:
            scene.await_copies([rental["id"]])
        for case in (one for one in cases if one[0] == size):
            scene.tell(f"snapshots: {case[0]} MB at {case[1]:g} MB/s, copies: {copying}", len(found))
            found[case] = _watch(scene, rental, case, seconds)
        scene.release(rental["id"])
    return found


def _watch(scene: RentedPlatform, rental: Json, case: Case, seconds: float) -> WriterMeasurement:
    manager, worker = scene.stack.container("manager_app"), scene.workers()[rental["worker_id"]]["hostname"]
    before = processor_s(manager), processor_s(worker)
    copied: set[float] = set()
    ages = []
    with ThreadPoolExecutor(1) as threads:
        at_work = threads.submit(scene.renter.runs, rental, _program("work", *case, seconds), seconds + MORE_S)
        while not at_work.done():
            if safe_at := scene.rental(rental["id"])["last_safe_copy_at"]:
                copied.add(unix(safe_at))
                ages.append(time.time() - unix(safe_at))
            time.sleep(LOOK_EVERY_S)
        gaps = [(at, length) for at, length in json.loads(at_work.result())]
    used = processor_s(manager) - before[0], processor_s(worker) - before[1]
    return WriterMeasurement(seconds, gaps, *used, sorted(copied), ages)


def _program(*arguments: object) -> str:
    return shlex.join(["python3", "-c", PROGRAM.read_text(), *map(str, arguments)])


def _tell(result: Result, case: Case, without: WriterMeasurement, copied: WriterMeasurement, interval_s: float) -> None:
    label = f"{case[0]:,} MB, {case[1]:g} MB/s"
    rounds = len(copied.copied_at) - 1
    if rounds < 1:
        result.times(f"{label}: the longest stop of a round", [], "no two copies were finished in that time")
        return
    stops = longest_each(copied.gaps, copied.copied_at)
    begun = min((at for at, _ in without.gaps), default=0.0)
    as_long = [begun + number * interval_s for number in range(int(without.seconds / interval_s) + 1)]
    result.times(f"{label}: the longest stop of a round", stops)
    result.times("  (without copies: the longest gap in as long)", longest_each(without.gaps, as_long))
    result.value("  stopped, of all time", "%", 100 * copied.stopped)
    result.value("  (without copies)", "%", 100 * without.stopped)
    result.value("  processor time of a round, on the worker", "s", (copied.worker_s - without.worker_s) / rounds)
    result.value("  processor time of a round, on the manager", "s", (copied.manager_s - without.manager_s) / rounds)
    ages = summary(copied.ages)
    result.rows.append(Row("  age of the copy", "s", ages.count, ages.p50, ages.p95, ages.p99))
    result.at_most(f"{label}: the longest stop of a round, p99", 1000 * summary(stops).p99, 100, " ms")
    result.at_most(f"{label}: stopped by copies, of all time", 100 * (copied.stopped - without.stopped), 0.5, " %")
