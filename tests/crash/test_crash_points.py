"""The manager is killed at each crash point in turn and restarted, and every guarantee holds."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.environment import CRASH_POINTS, PATIENCE_S, VICTIMS, CrashEnvironment, Point, eventually
from crash.guarantees import violations
from crash.scenarios import SCENARIOS, Scenario

AT_ONCE = 6
"""Number of simultaneous runs, which mostly wait for clocks."""
SAME_POINT = 2
"""Number of times that the same commit or call is tried in a scenario; commits without events are tried once."""

ATTEMPTS = 3
"""Number of runs for a crash point, because a point that depends on a timer is not reached in every run."""
RECORDINGS = 2
"""Number of recordings of a scenario. The shorter one counts, because a worker that is lost by chance adds points."""
MISSED = 0.1
"""The share of a scenario's crash points that may be missed, because they were not reached again."""


async def perform(folder: Path, scenario: Scenario, dies_at: Point | None = None) -> CrashEnvironment:
    """Run a scenario until the platform has settled. Raise AssertionError with the violations."""
    environment = CrashEnvironment(folder, dies_at, scenario.snapshot_interval_s, scenario.ignored_points)
    async with environment.running():
        try:
            async with asyncio.timeout(PATIENCE_S):
                if scenario.workers is not None:
                    for agent in [environment.new_agent() for _ in range(scenario.workers)]:
                        await environment.until_health(agent, "ready")
                await scenario.play(environment)
                environment.disarm()
                await eventually(lambda: not violations(environment, scenario.expected))
        except TimeoutError:
            wrong = violations(environment, scenario.expected) or ["the scenario did not end"]
            raise AssertionError("; ".join(wrong)) from None
    return environment


def points_of(environment: CrashEnvironment) -> list[Point]:
    """Return the crash points to try, in the order in which they were reached."""
    return [p for p in environment.points if p.time == 1 or (p.time <= SAME_POINT and not _is_without_events(p))]


def _is_without_events(point: Point) -> bool:
    return "commit" in point.name and "(" not in point.name


async def kill_at(folder: Path, scenario: Scenario, point: Point, limit: asyncio.Semaphore) -> tuple[bool, str]:
    """Return whether a process was killed at the point, and the violations that this caused."""
    async with limit:
        for attempt in range(ATTEMPTS):
            try:
                environment = await perform(folder / str(attempt), scenario, point)
            except AssertionError as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                return True, f"killed {point.name} (time {point.time}): {error} [{where.name}: {where.line}]"
            if environment.killed:
                return True, ""
    return False, ""


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_kill_of_the_manager_at_any_point_loses_and_doubles_no_rental(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    scenario, began = SCENARIOS[name], time.monotonic()
    recorded = await asyncio.gather(*(perform(tmp_path / f"record-{number}", scenario) for number in range(RECORDINGS)))
    points = min(map(points_of, recorded), key=len)
    limit = asyncio.Semaphore(AT_ONCE)
    runs = [kill_at(tmp_path / f"{number:03d}", scenario, point, limit) for number, point in enumerate(points)]
    results = await asyncio.gather(*runs)
    tried = [point for point, (killed, _) in zip(points, results, strict=True) if killed]
    wrong = [broke for _, broke in results if broke]
    took_s = round(time.monotonic() - began)
    record_property(
        CRASH_POINTS, [name, *(sum(point.kills == victim for point in tried) for victim in VICTIMS), took_s]
    )
    assert points
    assert not wrong, "\n".join([f"{len(wrong)} of {len(points)}:", *wrong])
    missed = [f"{point.name} (time {point.time})" for point in points if point not in tried]
    assert len(missed) <= MISSED * len(points), "\n".join(["not reached again:", *missed])
