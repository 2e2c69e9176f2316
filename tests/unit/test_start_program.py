"""How a worker runs a start command: once for each run that is asked for, and with a log that stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import launching
import pytest
import start
from launching import Launcher
from ledger import Record
from rental import parse
from test_rental_program import CREATE

RECORD = Record("one", "r-one", 100_001, epoch=2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Of programs that root starts, which end well."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def run(arguments: list[str], **how: Any) -> subprocess.CompletedProcess[bytes]:
        found.append((arguments, how))
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(launching.subprocess, "run", run)
    return found


def test_the_command_is_one_argument_of_a_program_that_is_the_renter_s(tmp_path: Path, calls: list[Any]) -> None:
    evil = "x'; $(reboot) `id` {{ 7 }} \\ --help"
    assert Launcher(tmp_path).launch(RECORD, evil, "1@boot")["started"] is True
    ((arguments, how),) = calls
    assert arguments[-1] == evil
    assert (how["user"], how["group"], how["extra_groups"]) == (100_001, 100_001, [])
    assert how["start_new_session"]
    assert {how["stdin"], how["stdout"], how["stderr"]} == {subprocess.DEVNULL}
    assert how["cwd"] == tmp_path / "home/r-one"
    assert set(how["env"]) == {"HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "ORION_RENTAL_ID"}


def test_a_start_command_knows_the_name_and_the_id_of_its_rental(tmp_path: Path, calls: list[Any]) -> None:
    Launcher(tmp_path).launch(replace(RECORD, rental_name="lab"), "serve", "1@boot")
    ((_, how),) = calls
    assert (how["env"]["ORION_RENTAL"], how["env"]["ORION_RENTAL_ID"]) == ("lab", "one")


def test_each_run_is_had_once_in_a_life_of_the_container_and_at_an_epoch(tmp_path: Path, calls: list[Any]) -> None:
    launcher = Launcher(tmp_path)
    launcher.begin("boot-1")
    told = [launcher.launch(RECORD, "serve", mark) for mark in ("1@boot-1", "1@boot-1", "2@boot-1", "2@boot-0")]
    assert [bool(report) for report in told] == [True, False, True, False]
    assert launcher.launch(Record("one", "r-one", 100_001, epoch=3), "serve", "2@boot-1")
    launcher.begin("boot-2")
    assert launcher.launch(Record("one", "r-one", 100_001, epoch=3), "serve", "2@boot-2")
    launcher.forget("one")
    assert launcher.launch(Record("one", "r-one", 100_001, epoch=3), "serve", "2@boot-2")
    assert len(calls) == 5


def test_what_cannot_be_run_is_said_and_not_tried_for_ever(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)  # where there is no home
    assert "No such file" in str(launcher.launch(RECORD, "serve", "1@boot")["start_problem"])
    assert launcher.launch(RECORD, "serve", "1@boot") == {}


@pytest.mark.parametrize("wrong", [{"start": "a\nb"}, {"start": "a\0b"}, {"start": " "}, {"start": "x" * 1001}])
def test_a_worker_takes_no_other_command_than_the_manager_does(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="start must be"):
        parse("run", json.dumps(CREATE | {"start_mark": "1@b"} | wrong))
    with pytest.raises(ValueError, match="start_mark"):
        parse("run", json.dumps(CREATE | {"start": "true", "start_mark": "../1"}))


def run_in(home: Path, command: str) -> None:
    """As the renter: until the command has ended."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    program = f"import start; start.run({command!r})"
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=home,
        env=environment | {"PYTHONPATH": str(Path(start.__file__).parent)},
        timeout=30,
        check=True,
    )


def test_what_it_says_is_kept_with_how_it_ended(tmp_path: Path) -> None:
    run_in(tmp_path, "echo out; echo err >&2; tty; exit 3")
    first, *said, last = (tmp_path / ".orion/start.log").read_text().splitlines()
    assert first.endswith("runs: echo out; echo err >&2; tty; exit 3")
    assert said == ["out", "err", "not a tty"]
    assert last.endswith("it ended with status 3")
    assert (tmp_path / ".orion/start.log").stat().st_mode & 0o777 == 0o600


def test_the_log_stays_small_and_what_was_said_last_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "LARGEST_BYTES", 1000)
    log = start.Log()
    for number in range(500):
        log.write(f"line {number}\n".encode())
    files = sorted((tmp_path / ".orion").iterdir())
    assert [file.name for file in files] == ["start.log", "start.log.1"]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert files[0].read_text().endswith("line 499\n")


@pytest.mark.parametrize("trick", ["a link", "a FIFO", "a folder", "a file for the folder"])
def test_where_its_log_cannot_be_written_it_runs_all_the_same(tmp_path: Path, trick: str) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    log = tmp_path / ".orion/start.log"
    if trick == "a file for the folder":
        log.parent.write_text("")
    else:
        log.parent.mkdir()
    if trick == "a link":
        log.symlink_to(target)
    elif trick == "a FIFO":
        os.mkfifo(log)
    elif trick == "a folder":
        log.mkdir()
    run_in(tmp_path, "echo said; touch ran")
    assert (tmp_path / "ran").exists()
    assert target.read_text() == "untouched"


def test_who_starts_it_does_not_wait_for_it(tmp_path: Path) -> None:
    began = time.monotonic()
    os.mkfifo(tmp_path / "gate")
    command = [sys.executable, "-I", "-S", start.__file__, "read line < gate; echo $line > done"]
    subprocess.run(command, cwd=tmp_path, timeout=30, check=True)
    assert not (tmp_path / "done").exists()
    (tmp_path / "gate").write_text("through\n")
    while not ((tmp_path / "done").exists() and (tmp_path / "done").read_text()):
        assert time.monotonic() < began + 30, "it did not go on by itself"
        time.sleep(0.01)
    assert (tmp_path / "done").read_text() == "through\n"
