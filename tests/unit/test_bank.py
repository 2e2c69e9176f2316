"""The bank program of the tests tells a state that existed from one that never did."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from support import bank

NO_REST = 0.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bank.work(tmp_path / "bank", 3, NO_REST)
    return tmp_path / "bank"


def _program(*arguments: str) -> list[str]:
    return [sys.executable, str(bank.__file__), *arguments]


def test_a_bank_left_between_two_steps_is_valid_and_continues(folder: Path) -> None:
    assert bank.faults(folder) == []
    bank.work(folder, 2, NO_REST)
    assert (folder / "A").read_text() == "000000000005\n"
    assert bank.faults(folder) == []


def test_a_bank_is_valid_after_a_kill_at_any_time(tmp_path: Path) -> None:
    place = tmp_path / "bank"
    for _ in range(3):
        with subprocess.Popen(_program("run", str(place))) as running:
            deadline = time.monotonic() + 60
            before = (place / "zz_B").read_text() if place.exists() else ""
            while not place.exists() or (place / "zz_B").read_text() == before:
                assert time.monotonic() < deadline
            running.send_signal(signal.SIGKILL)
        assert bank.faults(place) == []


def test_checking_a_bank_changes_nothing(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    bank.faults(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_database_of_one_moment_with_the_log_of_another_is_detected(tmp_path: Path) -> None:
    """A snapshot that reads one file after the other while the program writes has such files."""
    place, torn = tmp_path / "bank", tmp_path / "torn"
    bank.create(place)
    with closing(bank._open(place)) as database:
        chance = bank.random.Random(7)
        for step in range(1, 40):
            bank._transfer(database, chance, step)
            bank._count(place, step)
            if step == 9:
                torn.mkdir()
                shutil.copy(place / bank.DATABASE, torn)
        for name in (bank.LOG, *bank.COUNTERS):
            shutil.copy(place / name, torn)
    assert any("units in" in fault or "integrity_check" in fault for fault in bank.faults(torn))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("A", b"000000000001\n", "m is at step 3, ahead of A at 1, which is written first"),
        ("A", b"000000000004\n", "A is at step 4, ahead of the database at 3, which is written first"),
        ("zz_B", b"000000000004\n", "zz_B is at step 4, ahead of m at 3, which is written first"),
        ("zz_B", b"000000000001\n", "zz_B is 2 steps behind the database, which waits for it"),
        ("A", b"", "A holds b'', which was never written"),
        ("m", b"00000000", "m holds b'00000000', which was never written"),
        ("zz_B", None, "zz_B is not there"),
    ],
)
def test_a_counter_that_the_program_cannot_have_left_is_detected(
    folder: Path, name: str, content: bytes | None, fault: str
) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert fault in bank.faults(folder)


def test_a_counter_may_be_one_step_behind_the_file_that_is_written_before_it(folder: Path) -> None:
    (folder / "zz_B").write_bytes(b"000000000002\n")
    assert bank.faults(folder) == []
    (folder / "m").write_bytes(b"000000000002\n")
    assert bank.faults(folder) == []


def test_a_changed_sum_is_detected(folder: Path) -> None:
    with closing(sqlite3.connect(folder / bank.DATABASE)) as database, database:
        database.execute("UPDATE accounts SET balance = balance + 6 WHERE number = 1")
    assert bank.faults(folder) == ["20000 accounts hold 20000006 of 20000000 units in 20000"]


def test_a_damaged_or_missing_database_is_detected(folder: Path) -> None:
    content = bytearray((folder / bank.DATABASE).read_bytes())
    content[4096 * 20 : 4096 * 24] = b"\xff" * 4096 * 4
    (folder / bank.DATABASE).write_bytes(content)
    assert bank.faults(folder)
    (folder / bank.DATABASE).unlink()
    assert any("cannot be read" in fault for fault in bank.faults(folder))
    shutil.rmtree(folder)
    assert bank.faults(folder) == ["there is no bank"]


def test_a_start_of_the_bank_records_what_it_found_and_a_second_one_does_nothing(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.touch()
    (folder / "A").write_bytes(b"")
    command = _program("start", str(folder), str(journal), "lab 1")
    try:
        for _ in range(2):
            subprocess.run(command, check=True, timeout=30)
        (line,) = (json.loads(line) for line in journal.read_text().splitlines())
        assert (line["words"], line["faults"]) == ("lab 1", ["A holds b'', which was never written"])
        deadline = time.monotonic() + 60
        while (folder / "zz_B").read_text() <= "000000000003\n":
            assert time.monotonic() < deadline
    finally:
        os.kill(int(folder.with_name("bank.lock").read_text()), signal.SIGKILL)
