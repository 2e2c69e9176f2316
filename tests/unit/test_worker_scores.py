"""Which processes the kernel kills first when memory is used up, by a /proc and a control group in a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from orion_worker.limits.scores import ABOVE_ROOT, FIRST, OomScores, is_short, renter_memory_of, usual
from orion_worker.system.cgroup import CgroupUsage
from orion_worker.system.processes import FIRST_SENDER

ONE, ANOTHER = 100_001, 100_002
LIMIT_BYTES = 512 << 20
STATUS = """Name:\t{name}
State:\tS (sleeping)
Uid:\t{real}\t{effective}\t{effective}\t{effective}
VmRSS:\t 99999999 kB
RssAnon:\t{kilobytes:>9} kB
RssFile:\t 99999999 kB
RssShmem:\t       1 kB
VmSwap:\t       2 kB
"""


@dataclass
class MemoryFiles:
    """A worker whose processes and control group are files of a test."""

    root: Path
    used_mb: int = 400

    def __post_init__(self) -> None:
        self.scores = OomScores(usual(0), self._read, self.root)
        (self.root / "self").mkdir()

    def runs(self, pid: int, uid: int, mb: int, effective: int | None = None, score: int = 0) -> None:
        folder = self.root / str(pid)
        folder.mkdir()
        real_effective = {"real": uid, "effective": uid if effective is None else effective}
        (folder / "status").write_text(STATUS.format(name="Uid:\\t0", kilobytes=mb << 10, **real_effective))
        (folder / "oom_score_adj").write_text(f"{score}\n")

    def shown(self) -> dict[int, int]:
        files = self.root.glob("[0-9]*/oom_score_adj")
        return {int(file.parent.name): int(file.read_text()) for file in files}

    def _read(self, name: str) -> str | None:
        files = {
            "cgroup.controllers": "memory\n",
            "memory.current": str(self.used_mb << 20),
            "memory.max": str(LIMIT_BYTES),
        }
        return files.get(name)


@pytest.fixture
def machine(tmp_path: Path) -> MemoryFiles:
    return MemoryFiles(tmp_path)


def test_the_rental_with_the_most_memory_is_killed_first_however_small_its_processes_are(machine: MemoryFiles) -> None:
    machine.runs(11, ANOTHER, 100)
    for pid in range(20, 34):
        machine.runs(pid, ONE, 36)
    machine.scores.look()
    assert machine.shown() == {11: ABOVE_ROOT} | dict.fromkeys(range(20, 34), FIRST)


def test_the_difference_of_scores_outweighs_the_memory_of_any_smaller_rental() -> None:
    """Where a rental has more memory than another, the other has at most half of it all."""
    assert (FIRST - usual(0)) / 1000 * LIMIT_BYTES >= LIMIT_BYTES / 2


def test_the_rental_with_the_most_memory_is_determined_anew_each_time(machine: MemoryFiles) -> None:
    machine.runs(11, ONE, 10)
    machine.runs(12, ANOTHER, 20)
    machine.scores.look()
    assert machine.shown() == {11: ABOVE_ROOT, 12: FIRST}
    machine.runs(13, ONE, 30)
    machine.scores.look()
    assert machine.shown() == {11: FIRST, 12: ABOVE_ROOT, 13: FIRST}


def test_a_score_that_a_renter_lowered_is_raised_again(machine: MemoryFiles) -> None:
    machine.runs(11, ONE, 10, score=0)
    machine.runs(12, ANOTHER, 20, score=0)
    machine.scores.look()
    assert machine.shown() == {11: ABOVE_ROOT, 12: FIRST}


def test_scores_are_set_only_while_memory_is_short_and_reset_afterwards(machine: MemoryFiles) -> None:
    machine.used_mb = 256
    machine.runs(11, ONE, 10, score=7)
    machine.scores.look()
    assert machine.shown() == {11: 7}
    machine.used_mb = 257
    machine.scores.look()
    assert machine.shown() == {11: FIRST}
    machine.used_mb = 256
    machine.scores.look()
    assert machine.shown() == {11: ABOVE_ROOT}
    machine.runs(12, ONE, 10, score=7)
    machine.scores.look()
    assert machine.shown() == {11: ABOVE_ROOT, 12: 7}


def test_processes_of_root_and_senders_of_files_keep_their_scores(machine: MemoryFiles) -> None:
    machine.runs(1, 0, 300)
    machine.runs(2, 0, 300, effective=ONE)
    machine.runs(3, FIRST_SENDER + ONE, 300)
    machine.runs(4, ONE, 1)
    machine.scores.look()
    assert machine.shown() == {1: 0, 2: 0, 3: 0, 4: FIRST}


def test_a_process_that_ends_meanwhile_does_not_keep_the_others_from_their_scores(machine: MemoryFiles) -> None:
    machine.runs(11, ONE, 10)
    machine.runs(12, ONE, 10)
    machine.runs(13, ONE, 10)
    (machine.root / "12/oom_score_adj").unlink()
    (machine.root / "13/status").unlink()
    machine.scores.look()
    assert machine.shown() == {11: FIRST, 13: 0}


def test_memory_of_files_does_not_count_and_a_process_s_name_cannot_forge_a_line(machine: MemoryFiles) -> None:
    machine.runs(11, ONE, 10)
    assert renter_memory_of((machine.root / "11/status").read_text()) == (ONE, (10 << 20) + (3 << 10))
    assert renter_memory_of("") is None
    assert renter_memory_of(f"Uid:\t{ONE}\t{ONE}\t{ONE}\t{ONE}\n") == (ONE, 0), "the process has ended"


@pytest.mark.parametrize(("used", "limit", "short"), [(9, 10, True), (5, 10, False), (9, 0, False), (0, 0, False)])
def test_memory_is_short_when_more_than_half_of_it_is_used(used: int, limit: int, short: bool) -> None:
    assert (
        is_short(
            CgroupUsage(cpu_s=0.0, memory_used_bytes=used, memory_limit_bytes=limit, processes=0, processes_limit=0)
        )
        is short
    )


@pytest.mark.parametrize(("of_root", "of_renters"), [(0, 500), (200, 700), (800, 1000), (-500, 0)])
def test_scores_of_renters_are_above_those_of_root_wherever_docker_puts_root(of_root: int, of_renters: int) -> None:
    assert usual(of_root) == of_renters
