"""Which renter's processes get the lowest priority: by a /proc in a directory, and with real processes."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from orion_worker.limits.priority import CROWD, lower_crowds, tasks_waiting, uid_and_threads_of
from orion_worker.system import processes
from orion_worker.system.processes import FIRST_SENDER, LOWEST_PRIORITY

ONE, ANOTHER = 100_001, 100_002


@dataclass
class ProcessFiles:
    """A worker whose processes are files of a test."""

    root: Path
    last: list[int] = field(default_factory=list)

    def look(self) -> None:
        lower_crowds(self.last.append, self.root)

    def runs(self, pid: int, uid: int, states: str) -> None:
        """Add a process with a task of each of these states."""
        folder = self.root / str(pid)
        for number, state in enumerate(states):
            (folder / f"task/{pid + number}").mkdir(parents=True)
            (folder / f"task/{pid + number}/stat").write_text(f"{pid + number} (a) S ) R) {state} 1 1 1\n")
        status = f"Name:\ta\nState:\t{states[0]}\nUid:\t{uid}\t0\t0\t0\nThreads:\t{len(states)}\n"
        (folder / "status").write_text(status)


@pytest.fixture
def machine(tmp_path: Path) -> ProcessFiles:
    return ProcessFiles(tmp_path)


def test_only_a_renter_with_many_runnable_tasks_gets_the_lowest_priority(machine: ProcessFiles) -> None:
    for number in range(CROWD + 1):
        machine.runs(1000 + number, ONE, "R")
        machine.runs(2000 + number, ANOTHER, "R" if number else "S")
        machine.runs(3000 + number, 0, "R")
        machine.runs(4000 + number, FIRST_SENDER + ONE, "R")
    machine.look()
    assert machine.last == [ONE]


def test_threads_count_as_processes_do(machine: ProcessFiles) -> None:
    machine.runs(1000, ONE, "S" + "R" * (CROWD + 1))
    machine.runs(2000, ANOTHER, "R" * CROWD + "SDZT")
    machine.look()
    assert machine.last == [ONE]
    assert tasks_waiting(machine.root) == {ONE: CROWD + 1, ANOTHER: CROWD}


def test_processes_that_end_during_the_count_are_not_counted(machine: ProcessFiles) -> None:
    for number in range(CROWD + 2):
        machine.runs(1000 + number, ONE, "R")
    (machine.root / "1000/status").unlink()
    (machine.root / "1001/task/1001/stat").unlink()
    machine.look()
    assert machine.last == []
    assert uid_and_threads_of("") == (0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="acting under a renter's uid needs root; CI is root")
class TestForReal:
    @pytest.fixture
    def uid(self) -> int:
        """Give a uid that nothing else on this machine has."""
        return 1_000_000_000 + secrets.randbelow(10**9)

    @pytest.fixture
    def theirs(self, uid: int) -> Iterator[list[subprocess.Popen[bytes]]]:
        begun = [subprocess.Popen(["sleep", "60"], user=uid, group=uid, extra_groups=[]) for _ in range(3)]
        yield begun
        for each in begun:
            each.kill()
            each.wait()

    def test_all_processes_of_the_uid_get_the_lowest_priority_and_root_s_do_not(
        self, uid: int, theirs: list[subprocess.Popen[bytes]]
    ) -> None:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        assert processes.lower_priority(uid)
        assert {os.getpriority(os.PRIO_PROCESS, each.pid) for each in theirs} == {LOWEST_PRIORITY}
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
