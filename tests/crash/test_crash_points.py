"""The manager is killed at each crash point in turn, really restarted, and everything that was promised is kept."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from crash.acts import ACTS, Act
from crash.promises import broken
from crash.stage import CRASH_POINTS, PATIENCE_S, VICTIMS, Point, Stage, eventually

AT_ONCE = 6
"""Runs side by side: most of a run is waiting for clocks."""
SAME_POINT = 2
"""How often the same commit or call is tried within one act; once where nothing happens, as a heartbeat's note."""

ATTEMPTS = 3
"""What depends on a timer (who is heard first after a restart) does not come again in every run."""
RECORDINGS = 2
"""How often an act is recorded, of which the shorter counts: a worker that a busy machine lost adds some points."""
MISSED = 0.1
"""The share of the points of an act that may not have come again, and so were not tried in this run."""


async def perform(folder: Path, act: Act, dies_at: Point | None = None) -> Stage:
    """One run of an act, until all is at rest. Raises AssertionError with what is wrong."""
    stage = Stage(folder, dies_at, act.snapshot_interval_s, act.passes_over)
    async with stage.running():
        try:
            async with asyncio.timeout(PATIENCE_S):
                if act.workers is not None:
                    for agent in [stage.new_agent() for _ in range(act.workers)]:
                        await stage.until_health(agent, "ready")
                await act.play(stage)
                stage.disarm()
                await eventually(lambda: not broken(stage, act.expected))
        except TimeoutError:
            wrong = broken(stage, act.expected) or ["the act does not end"]
            raise AssertionError("; ".join(wrong)) from None
    return stage


def points_of(stage: Stage) -> list[Point]:
    """In the order in which they were reached."""
    return [p for p in stage.points if p.time == 1 or (p.time <= SAME_POINT and not _is_a_note(p))]


def _is_a_note(point: Point) -> bool:
    return "commit" in point.name and "(" not in point.name


async def kill_at(folder: Path, act: Act, point: Point, limit: asyncio.Semaphore) -> tuple[bool, str]:
    """Whether it was killed there, and what was broken by that."""
    async with limit:
        for attempt in range(ATTEMPTS):
            try:
                stage = await perform(folder / str(attempt), act, point)
            except AssertionError as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                return True, f"killed {point.name} (time {point.time}): {error} [{where.name}: {where.line}]"
            if stage.killed:
                return True, ""
    return False, ""


@pytest.mark.parametrize("name", ACTS)
async def test_killed_at_any_point_nothing_is_lost_and_nothing_doubled(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    act, began = ACTS[name], time.monotonic()
    recorded = await asyncio.gather(*(perform(tmp_path / f"record-{number}", act) for number in range(RECORDINGS)))
    points = min(map(points_of, recorded), key=len)
    limit = asyncio.Semaphore(AT_ONCE)
    runs = [kill_at(tmp_path / f"{number:03d}", act, point, limit) for number, point in enumerate(points)]
    results = await asyncio.gather(*runs)
    tried = [point for point, (killed, _) in zip(points, results, strict=True) if killed]
    wrong = [broke for _, broke in results if broke]
    took_s = round(time.monotonic() - began)
    record_property(CRASH_POINTS, [name, *(sum(point.kills == who for point in tried) for who in VICTIMS), took_s])
    assert points
    assert not wrong, "\n".join([f"{len(wrong)} of {len(points)}:", *wrong])
    missed = [f"{point.name} (time {point.time})" for point in points if point not in tried]
    assert len(missed) <= MISSED * len(points), "\n".join(["not reached again:", *missed])
