"""The manager is killed at each crash point in turn, really restarted, and everything that was promised is kept."""

from __future__ import annotations

import asyncio
import time
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


async def perform(folder: Path, act: Act, dies_at: Point | None = None) -> Stage:
    """One run of an act, until all is at rest. Raises AssertionError with what is wrong."""
    stage = Stage(folder, dies_at)
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


async def kill_at(folder: Path, act: Act, point: Point, limit: asyncio.Semaphore) -> str | None:
    """None when every promise was kept; what went wrong else."""
    async with limit:
        for attempt in range(3):  # what depends on a timer may not come again in every run
            try:
                stage = await perform(folder / str(attempt), act, point)
            except AssertionError as error:
                return f"killed {point.name} (time {point.time}): {error}"
            if stage.killed:
                return None
    return f"{point.name} (time {point.time}) was not reached again"


@pytest.mark.parametrize("name", ACTS)
async def test_killed_at_any_point_nothing_is_lost_and_nothing_doubled(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    act, began = ACTS[name], time.monotonic()
    points = points_of(await perform(tmp_path / "record", act))
    limit = asyncio.Semaphore(AT_ONCE)
    runs = [kill_at(tmp_path / f"{number:03d}", act, point, limit) for number, point in enumerate(points)]
    wrong = [result for result in await asyncio.gather(*runs) if result]
    took_s = round(time.monotonic() - began)
    record_property(CRASH_POINTS, [name, *(sum(point.kills == who for point in points) for who in VICTIMS), took_s])
    assert points
    assert not wrong, "\n".join([f"{len(wrong)} of {len(points)}:", *wrong])
