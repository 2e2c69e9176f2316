"""No schedule breaks an invariant; and the simulation itself replays, notices and shrinks failures."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from simulation.runner import history_of, play, search
from simulation.schedule import Fault, Schedule, make_schedule
from simulation.shrinker import shrink
from simulation.world import Failure, Simulation

SCHEDULES = int(os.environ.get("ORION_SCHEDULES", "100"))
SHARE = 50
"""Schedules of one test, so that tests can run in parallel."""
QUIET = Schedule(7, (1, 1), (Fault(1.0, "a client rents", 0, 0.0, 3600),), 60.0, only_outages=False)


@pytest.mark.parametrize("first", range(0, SCHEDULES, SHARE))
def test_no_schedule_breaks_an_invariant(first: int) -> None:
    finding = search(range(first, min(SCHEDULES, first + SHARE)))
    assert finding is None, finding and finding.history


@pytest.mark.parametrize("seed", [2133, 2400, 2746, 4475, 5549, 5597, 5633, 5793, 6225, 6794, 7383, 8452, 25437, 33704])
def test_schedules_that_once_broke_an_invariant_pass(seed: int) -> None:
    finding = search(range(seed, seed + 1))
    assert finding is None, finding and finding.history


@pytest.mark.parametrize("seed", [3, 27, 31])
def test_a_seed_replays_exactly(seed: int) -> None:
    schedule = make_schedule(seed)
    assert history_of(schedule) == history_of(schedule)


def test_seeds_give_different_schedules_and_all_kinds_of_faults() -> None:
    schedules = [make_schedule(seed) for seed in range(300)]
    assert len({fault.kind for schedule in schedules for fault in schedule.faults}) == 27
    assert 30 < sum(schedule.only_outages for schedule in schedules) < 100


def test_a_platform_without_faults_rents_and_settles_at_once() -> None:
    sim = Simulation(QUIET, record=True)
    assert sim.run() is None
    assert sim.settled_after_s <= 10.0
    assert any("rental-1 provisioning -> active" in text for _, _, text in sim.history or [])


def test_the_rental_of_a_killed_worker_continues_on_another_worker() -> None:
    dead = Fault(100.0, "a worker is killed", 0, 9e9)
    both = (replace(QUIET.faults[0], target=0), dead, replace(dead, target=1, at_s=101.0))
    sim = Simulation(replace(QUIET, slots=(1, 1, 1), faults=both, length_s=320.0), record=True)
    assert sim.run() is None
    assert any("active -> migrating" in text for _, _, text in sim.history or [])


def test_a_broken_invariant_is_detected_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = Simulation(QUIET, record=True)
    sim.loop.call_later(30.0, lambda: sim.containers[0].unlocked.clear() or sim.containers[1].unlocked.clear())
    sim.loop.call_later(31.0, lambda: [container.records.clear() for container in sim.containers])
    failure = sim.run()
    assert failure is not None
    assert failure.invariant == "a world that is left quiet converges"
    assert "on the workers []" in failure.story


def test_a_failing_schedule_is_shrunk_to_the_necessary_steps() -> None:
    needed = Fault(50.0, "the proxy is away", 0, 20.0)
    others = tuple(Fault(10.0 * n, "a client rents", n, 0.0, 60) for n in range(1, 9))
    schedule = Schedule(1, (1, 1, 2), (*others, needed), 200.0, only_outages=False)

    def breaks(tried: Schedule) -> Failure | None:
        return Failure("x", "y", 1.0) if any(f.kind == needed.kind for f in tried.faults) else None

    small = shrink(schedule, Failure("x", "y", 1.0), breaks)
    assert [fault.kind for fault in small.faults] == [needed.kind]
    assert (len(small.slots), small.length_s) == (1, 51.0)
    assert play(small) is None
