"""The limit of terminals of one renter, by a /dev/pts in a directory and by the kernel's own."""

from __future__ import annotations

import os
import select
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from orion_worker.limits.terminals import (
    MOST_HELD,
    MOST_HIDDEN,
    MOST_SHOWN,
    TerminalGuard,
    free_numbers,
    highest_of,
    shown_by,
    watch_directory,
)
from orion_worker.system import processes

ONE, ANOTHER = 100_001, 100_002
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="a file of another's needs root; CI is root")


@dataclass
class TerminalFiles:
    """A worker whose terminals are files of a test. `hidden`: numbers that are held without being shown."""

    root: Path
    hidden: set[int] = field(default_factory=set)
    ended: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    hidden_ends: bool = True

    def __post_init__(self) -> None:
        (self.root / "ptmx").write_text("")
        (self.root / "ptmx").chmod(0o666)
        self.terminals = TerminalGuard(end=self._end, say=self.said.append, place=self.root, free=self._free)

    def opens(self, uid: int, count: int) -> int:
        """Return the highest number that was given."""
        given = []
        for _ in range(count):
            number = next(n for n in range(5000) if not self._is_held(n))
            (self.root / str(number)).write_text("")
            os.chown(self.root / str(number), uid, 5)
            given.append(number)
        return max(given)

    def hides(self, count: int) -> int:
        for _ in range(count):
            self.hidden.add(next(n for n in range(5000) if not self._is_held(n)))
        return max(self.hidden)

    @property
    def is_open(self) -> bool:
        return stat.S_IMODE((self.root / "ptmx").stat().st_mode) == 0o666

    def _is_held(self, number: int) -> bool:
        return number in self.hidden or (self.root / str(number)).exists()

    def _free(self, highest: int, enough: int) -> int:
        assert not self.is_open, "the count does not race with new terminals"
        return min(enough, sum(not self._is_held(number) for number in range(highest + 1)))

    def _end(self, uids: list[int]) -> None:
        self.ended += uids
        for file in self.root.glob("[0-9]*"):
            if file.stat().st_uid in uids:
                file.unlink()
        if ONE in uids and self.hidden_ends:
            self.hidden.clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TerminalFiles:
    monkeypatch.setattr(processes, "uids_from", lambda first: {ONE, ANOTHER})
    return TerminalFiles(tmp_path)


@AS_ROOT
def test_a_usual_number_of_terminals_changes_nothing(machine: TerminalFiles) -> None:
    machine.terminals.look(machine.opens(ONE, MOST_HELD))
    machine.terminals.look(-1)
    assert (machine.is_open, machine.ended, machine.said) == (True, [], [])


@AS_ROOT
def test_a_renter_with_too_many_terminals_is_killed_and_the_others_still_get_some(machine: TerminalFiles) -> None:
    machine.opens(ANOTHER, MOST_SHOWN)
    machine.opens(0, MOST_SHOWN + 1)
    machine.terminals.look(machine.opens(ONE, MOST_HELD))
    assert machine.ended == [ONE]
    assert machine.is_open
    assert shown_by(machine.root) == {ANOTHER: MOST_SHOWN}


@AS_ROOT
def test_while_hidden_terminals_are_held_no_new_ones_are_given_and_no_renter_is_killed(machine: TerminalFiles) -> None:
    machine.terminals.look(machine.hides(MOST_HELD + 40))
    machine.terminals.look(-1)
    assert (machine.is_open, machine.ended) == (False, [])
    machine.hidden -= set(range(40))
    machine.terminals.look(-1)
    assert not machine.is_open, "free numbers below do not hide terminals that are held"
    machine.hidden.remove(200)
    machine.terminals.look(-1)
    assert machine.is_open
    assert machine.ended == []
    assert len(machine.said) == 2


@AS_ROOT
def test_all_renters_are_killed_when_hidden_terminals_endanger_the_machine(machine: TerminalFiles) -> None:
    machine.terminals.look(machine.hides(MOST_HIDDEN - 1))
    assert machine.ended == []
    machine.hidden.add(MOST_HIDDEN)
    machine.terminals.look(MOST_HIDDEN)
    assert machine.ended == [ONE, ANOTHER]
    assert machine.is_open


@AS_ROOT
def test_while_no_terminals_are_given_each_check_kills_renters_with_many_visible_ones(machine: TerminalFiles) -> None:
    machine.hidden_ends = False
    machine.terminals.look(machine.hides(MOST_HELD + 1))
    machine.terminals.look(machine.opens(ONE, MOST_SHOWN + 1))
    assert machine.ended == [ONE]
    assert not machine.is_open


def test_each_new_terminal_is_reported_with_its_number(tmp_path: Path) -> None:
    watch = watch_directory(tmp_path)
    try:
        for name in ("7", "1203", "ptmx", "9a", "40"):
            (tmp_path / name).write_text("")
        (tmp_path / "1203").unlink()
        assert select.select([watch], [], [], 5)[0]
        assert highest_of(os.read(watch, 1 << 16)) == 1203
        (tmp_path / "x").write_text("")
        assert highest_of(os.read(watch, 1 << 16)) == -1
    finally:
        os.close(watch)
    assert highest_of(bytes.fromhex("ffffffff 00400000 00000000 00000000")) == MOST_HELD, (
        "not all terminals could be named"
    )


def test_a_missing_directory_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        watch_directory(tmp_path / "none")


def test_the_kernel_reports_a_real_terminal_by_its_number_and_reuses_the_lowest() -> None:
    watch = watch_directory(Path("/dev/pts"))
    try:
        opened = [os.openpty() for _ in range(3)]
        highest = max(int(Path(os.ttyname(slave)).name) for _, slave in opened)
        assert highest_of(os.read(watch, 1 << 16)) >= highest
        assert free_numbers(-1, 4) == 0
        for pair in opened:
            for each in pair:
                os.close(each)
        assert 1 <= free_numbers(highest, 2) <= 2
        assert 1 <= free_numbers(highest, 5000) <= highest + 1
    finally:
        os.close(watch)
