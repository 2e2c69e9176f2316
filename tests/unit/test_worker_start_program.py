"""Start commands on a worker: each run that the manager orders begins once, with a log that stays small."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from orion_worker.records import RentalRecord
from orion_worker.rental.cli import order_from
from orion_worker.start import launcher, program
from orion_worker.start.launcher import Launcher
from test_worker_rental import CREATE

RECORD = RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=2)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the programs that root starts, each with its state at its start. Each ends with 0."""
    (tmp_path / "home/r-one").mkdir(parents=True)
    found: list[dict[str, Any]] = []
    begin = launcher.begin_child

    def begun(work: Callable[[], object]) -> int:
        state = mmap.mmap(-1, 1 << 16)  # shared with the child, which closes all of its descriptors
        with monkeypatch.context() as patched:
            patched.setattr(os, "execve", partial(_tell, state))
            for become in () if os.geteuid() == 0 else ("setgroups", "setresgid", "setresuid"):
                patched.setattr(os, become, lambda *_: None)
            child = begin(work)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        found.append(json.loads(state.readline()))
        return child

    monkeypatch.setattr(launcher, "begin_child", begun)
    return found


def _tell(state: mmap.mmap, program: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    """Record the state of the child, in place of the program."""
    seen = {
        "program": program, "arguments": arguments, "env": environment, "cwd": os.getcwd(),  # noqa: PTH109
        "uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups(), "leads": os.getsid(0) == os.getpid(),
        "standard": [Path(f"/proc/self/fd/{each}").resolve().name for each in (0, 1, 2)],
        "inherits": [each for each in range(3, 300) if Path(f"/proc/self/fd/{each}").is_symlink()],
    }  # fmt: skip
    state.write(json.dumps(seen).encode() + b"\n")
    os._exit(0)


def test_the_start_command_is_one_argument_of_a_shell_with_the_renter_s_uid(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    evil = "x'; $(reboot) `id` {{ 7 }} \\ --help"
    assert Launcher(tmp_path).launch(RECORD, evil, "1@boot")["started"] is True
    (call,) = calls
    assert call["program"] == call["arguments"][0] == "/usr/bin/python3"
    assert call["arguments"][1:] == ["-I", "-S", program.__file__, "2 1@boot", evil]
    if os.geteuid() == 0:
        assert (call["uids"], call["gids"], call["groups"]) == ([100_001] * 3, [100_001] * 3, [])
    assert call["leads"]
    assert call["standard"] == ["null"] * 3
    assert call["inherits"] == []
    assert call["cwd"] == str(tmp_path / "home/r-one")
    assert set(call["env"]) == {"HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "ORION_RENTAL_ID"}


def test_a_start_command_knows_the_name_and_the_id_of_its_rental(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    Launcher(tmp_path).launch(replace(RECORD, rental_name="lab"), "serve", "1@boot")
    (call,) = calls
    assert (call["env"]["ORION_RENTAL"], call["env"]["ORION_RENTAL_ID"]) == ("lab", "one")


def test_the_report_says_why_the_start_program_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home/r-one").mkdir(parents=True)

    def refuse(*_: object) -> None:
        raise OSError(errno.EAGAIN, "too many processes")

    monkeypatch.setattr(os, "setgroups", refuse)
    problem = Launcher(tmp_path).launch(RECORD, "serve", "1@boot")["start_problem"]
    assert problem == f"its start command cannot be run: {os.strerror(errno.EAGAIN)}"


def test_each_run_begins_once_in_a_boot_of_the_container_and_at_an_epoch(
    tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    launcher = Launcher(tmp_path)
    launcher.set_boot_id("boot-1")
    reports = [launcher.launch(RECORD, "serve", mark) for mark in ("1@boot-1", "1@boot-1", "2@boot-1", "2@boot-0")]
    assert [bool(report) for report in reports] == [True, False, True, False]
    assert launcher.launch(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3), "serve", "2@boot-1")
    launcher.set_boot_id("boot-2")
    assert launcher.launch(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3), "serve", "2@boot-2")
    launcher.forget("one")
    assert launcher.launch(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3), "serve", "2@boot-2")
    assert len(calls) == 5


def test_the_program_that_root_starts_is_a_file_of_the_package() -> None:
    assert Path(program.__file__) == launcher.PROGRAM


def test_a_command_that_cannot_be_run_is_reported_and_not_tried_again(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)  # where there is no home
    assert "No such file" in str(launcher.launch(RECORD, "serve", "1@boot")["start_problem"])
    assert launcher.launch(RECORD, "serve", "1@boot") == {}


@pytest.mark.parametrize("wrong", [{"start": "a\nb"}, {"start": "a\0b"}, {"start": " "}, {"start": "x" * 1001}])
def test_a_worker_takes_no_other_command_than_the_manager_does(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="start must be"):
        order_from("run", CREATE | {"start_mark": "1@b"} | wrong)
    with pytest.raises(ValueError, match="start_mark"):
        order_from("run", CREATE | {"start": "true", "start_mark": "../1"})


def run_in(home: Path, command: str, run: str = "2 1@boot") -> None:
    """Run a command as the renter until it ends."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    code = f"from orion_worker.start import program; program.run({run!r}, {command!r})"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env=environment | {"PYTHONPATH": str(Path(program.__file__).parents[2])},
        timeout=60,
        check=True,
    )


def test_the_output_is_kept_with_how_the_command_ended(tmp_path: Path) -> None:
    run_in(tmp_path, "echo out; echo err >&2; tty; exit 3")
    first, *output, last = (tmp_path / ".orion/start.log").read_text().splitlines()
    assert first.endswith("runs: echo out; echo err >&2; tty; exit 3")
    assert output == ["out", "err", "not a tty"]
    assert last.endswith("it ended with status 3")
    assert (tmp_path / ".orion/start.log").stat().st_mode & 0o777 == 0o600


def test_the_log_stays_small_and_has_the_last_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "LARGEST_BYTES", 1000)
    log = program.StartLog()
    for number in range(500):
        log.write(f"line {number}\n".encode())
    files = sorted((tmp_path / ".orion").iterdir())
    assert [file.name for file in files] == ["start.log", "start.log.1"]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert files[0].read_text().endswith("line 499\n")


@pytest.mark.parametrize("trick", ["a link", "a FIFO", "a folder", "a file for the folder"])
def test_a_command_whose_log_cannot_be_written_runs(tmp_path: Path, trick: str) -> None:
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


def test_the_program_detaches_itself_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    os.mkfifo(tmp_path / "gate")
    command = [sys.executable, "-I", "-S", program.__file__, "2 1@boot", "read line < gate; echo $line > done"]
    subprocess.run(command, cwd=tmp_path, timeout=60, check=True)
    assert not (tmp_path / "done").exists()
    (tmp_path / "gate").write_text("through\n")
    while not ((tmp_path / "done").exists() and (tmp_path / "done").read_text()):
        assert time.monotonic() < began + 60, "the command did not go on by itself"
        time.sleep(0.01)
    assert (tmp_path / "done").read_text() == "through\n"


def was_launched(root: Path, run: str = "2 1@boot") -> tuple[Launcher, RentalRecord, Path]:
    """Return a launcher, the record of a rental whose home belongs to this test's user, and that home."""
    marks, home = root / "run/orion/started", root / "home/r-one"
    marks.mkdir(parents=True)
    (marks / "one").write_text(run)
    home.mkdir(parents=True)
    return Launcher(root), RentalRecord(rental_id="one", username="r-one", uid=os.getuid(), epoch=2), home


@pytest.mark.parametrize(
    ("command", "how"), [("exit 3", "status 3"), ("true", "status 0"), ("kill -KILL $$", "signal 9")]
)
def test_how_a_start_command_ended_is_reported_with_its_run(tmp_path: Path, command: str, how: str) -> None:
    launcher, record, home = was_launched(tmp_path)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert launcher.ended(record, now) is None, "the command has not begun yet"
    run_in(home, command)
    end = launcher.ended(record, now + 100.0)
    assert end is not None
    assert (end["rental_id"], end["epoch"], end["run"], end["how"]) == ("one", 2, "1@boot", how)
    assert 0.0 <= end["ago_s"] <= 100.0


def test_a_running_start_command_has_no_end_and_one_whose_supervisor_was_killed_has(tmp_path: Path) -> None:
    launcher, record, home = was_launched(tmp_path)
    command = f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/ran; sleep 600"
    code = f"from orion_worker.start import program; program.run('2 1@boot', {command!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(program.__file__).parents[2])}
    keeper = subprocess.Popen([sys.executable, "-c", code], cwd=home, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ran").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert launcher.ended(record, 0.0) is None
    keeper.kill()
    keeper.wait()
    os.killpg(int((tmp_path / "ran").read_text()), signal.SIGKILL)
    end = launcher.ended(record, 0.0)
    assert end is not None
    assert (end["how"], end["ago_s"]) == ("unseen", 0.0)


def test_an_end_with_the_container_is_not_reported(tmp_path: Path) -> None:
    """The manager orders such a command anew, so a heartbeat must not report its end each time."""
    launcher, record, home = was_launched(tmp_path)
    run_in(home, "exit 3", "2 1@boot")
    assert launcher.ended(record, 0.0) is not None
    launcher.set_boot_id("another")
    assert launcher.ended(record, 0.0) is None


@pytest.mark.parametrize("run", ["1 1@boot", "2 2@boot", "2 1@another"])
def test_the_end_of_another_run_or_at_another_placement_is_not_reported(tmp_path: Path, run: str) -> None:
    """The note came with the files of the home, or the command was ordered anew."""
    launcher, record, home = was_launched(tmp_path)
    run_in(home, "exit 3", run)
    assert launcher.ended(record, 0.0) is None


@pytest.mark.parametrize(
    "written",
    [b"", b"2 1@boot", b"\xff\n", b"2 1@boot\nstatus 1000 5.0\n", b"2 1@boot\nstatus 3 nan\n", b"2 1@boot\nrm -rf /\n"],
)
def test_a_forged_note_of_an_end_is_ignored(tmp_path: Path, written: bytes) -> None:
    launcher, record, home = was_launched(tmp_path)
    (home / ".orion").mkdir()
    (home / ".orion/start.run").write_bytes(written)
    assert launcher.ended(record, 0.0) is None


@pytest.mark.parametrize("trick", ["a link", "a link for the folder", "a FIFO", "a folder", "another's"])
def test_a_renter_cannot_make_the_agent_read_or_wait_for_another_file(tmp_path: Path, trick: str) -> None:
    launcher, record, home = was_launched(tmp_path)
    note, elsewhere = home / ".orion/start.run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "start.run").write_text("2 1@boot\nstatus 3 5.0\n")
    if trick == "a link for the folder":
        note.parent.symlink_to(elsewhere)
    else:
        note.parent.mkdir()
    if trick == "a link":
        note.symlink_to(elsewhere / "start.run")
    elif trick == "a FIFO":
        os.mkfifo(note)
    elif trick == "a folder":
        note.mkdir()
    elif trick == "another's":
        note.write_text("2 1@boot\nstatus 3 5.0\n")
        record = RentalRecord(rental_id="one", username="r-one", uid=os.getuid() + 1, epoch=2)
    assert launcher.ended(record, 0.0) is None
