"""Processes that a renter stops: no program of root waits for them without end. The processes here are real."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from orion_worker.limits.stopped_log_ins import LOOKS, StoppedLogIns
from orion_worker.records import RentalRecord, RequestRefused
from orion_worker.rental.commands import Rentals
from orion_worker.rental.paths import WorkerPaths
from orion_worker.snapshots import requests, scan, transfer
from orion_worker.start import launcher
from orion_worker.start.launcher import Launcher
from orion_worker.system import processes
from orion_worker.system.repeat import look_for_ever
from support.descendants import ended_with_their_test

pytestmark = pytest.mark.timeout(180)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="acting under a renter's uid needs root; CI is root")
SHORT_S = 0.05
ENDS_S = 2.0
"""Seconds until a process is killed that has other work first."""


@pytest.fixture(autouse=True)
def whatever_is_left_ends() -> Iterator[None]:
    with ended_with_their_test():
        yield


@pytest.fixture
def uid() -> Iterator[int]:
    """Give a uid that nothing else on this machine has; end its processes after the test."""
    renter = 1_000_000_000 + secrets.randbelow(10**9)
    yield renter
    left = processes.pids_of([renter])
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def wait_until(reached: Callable[[], Any], what: str) -> Any:
    last_moment = time.monotonic() + 60
    while not (found := reached()):
        assert time.monotonic() < last_moment, what
        time.sleep(0.001)
    return found


def state(pid: int) -> str:
    """Return the kernel's letter for a process's state, or nothing if it has ended, also if it is a zombie."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if found == "Z" else found


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_with_a_child(pipe: int) -> None:
    """Stop this process and a child, which first prints its own pid: this process may have been killed by then."""
    if os.fork() == 0:
        os.write(pipe, b"%d\n" % os.getpid())
    stop_itself()


def number_from(pipe: int) -> int:
    with os.fdopen(pipe) as reading:
        return int(reading.readline())


def test_a_stopped_child_and_its_descendants_are_killed_and_reaped() -> None:
    reading, writing = os.pipe()
    child = processes.begin_child(partial(stop_with_a_child, writing))
    os.close(writing)
    grandchild = number_from(reading)
    wait_until(lambda: state(child) == state(grandchild) == "T", "both stand stopped")
    assert not processes.has_ended(child, SHORT_S)
    assert processes.kill_group(child) == -signal.SIGKILL
    wait_until(lambda: not state(grandchild), "what it has started is ended as well")
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)


def test_the_wait_for_a_child_ends_with_the_child() -> None:
    child = processes.begin_child(lambda: os._exit(3))
    assert processes.has_ended(child, 60.0)
    assert processes.kill_group(child) == 3
    child = processes.begin_child(lambda: os.close(-1))
    assert processes.has_ended(child, 60.0)
    assert processes.kill_group(child) > processes.NOT_BEGUN


def test_a_stopped_child_ends_with_the_process_that_started_it() -> None:
    reading, writing = os.pipe()

    def begin_and_end() -> None:
        parent = os.getpid()
        child = processes.begin_child(lambda: (processes.die_with(parent), os.write(writing, b"."), stop_itself()))
        os.read(reading, 1)
        wait_until(lambda: state(child) == "T", "it stands stopped")
        os.write(writing, b"%d\n" % child)

    parent = processes.begin_child(begin_and_end)
    assert processes.has_ended(parent, 60.0)
    os.waitpid(parent, 0)
    os.close(writing)
    child = number_from(reading)
    wait_until(lambda: not state(child), "its parent has ended")


def test_a_process_with_a_deadline_is_killed_though_it_is_stopped_and_its_child_is_not() -> None:
    reading, writing = os.pipe()

    def work() -> None:
        assert processes.be_killed_after(ENDS_S)
        stop_with_a_child(writing)

    child = processes.begin_child(work)
    os.close(writing)
    grandchild = number_from(reading)
    try:
        assert processes.has_ended(child, 60.0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        wait_until(lambda: state(grandchild) == "T", "what it has started stands stopped")
    finally:
        os.kill(grandchild, signal.SIGKILL)


@AS_ROOT
def test_a_transfer_ends_at_its_deadline_though_the_renter_stops_all_its_processes(
    uid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RSYNC", "/bin/sh")
    monkeypatch.setattr(transfer, "ARGUMENTS", {"receive": ("-c", "sh -c 'kill -STOP $$' & kill -STOP $$")})
    began = time.monotonic()
    assert transfer.run_rsync("receive", uid, time.time() + 0.15, gently=False) == -signal.SIGKILL & 0xFF
    assert time.monotonic() - began >= 0.14
    wait_until(lambda: not processes.pids_of([uid]), "no part of it is left")


@AS_ROOT
def test_an_rsync_ends_with_the_process_of_root_that_waits_for_it(uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RSYNC", "/bin/sh")
    monkeypatch.setattr(transfer, "ARGUMENTS", {"receive": ("-c", "kill -STOP $$")})
    parent = processes.begin_child(lambda: transfer.run_rsync("receive", uid, time.time() + 60, gently=False))
    (rsync,) = wait_until(lambda: [pid for pid in processes.pids_of([uid]) if state(pid) == "T"], "rsync is stopped")
    os.kill(parent, signal.SIGKILL)  # as the purge of the rental does
    os.waitpid(parent, 0)
    wait_until(lambda: not state(rsync), "rsync has ended too")


def test_a_transfer_is_killed_soon_after_its_deadline_whatever_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = requests.TransferRequest(rental_id="one", epoch=1, deadline=time.time() + SHORT_S)
    monkeypatch.setattr(transfer, "TIDIES_S", 0.0)
    monkeypatch.setattr(transfer, "_read_line", lambda: b"")
    monkeypatch.setattr(transfer, "parse_request", lambda *_: request)
    monkeypatch.setattr(transfer, "_receive", lambda *_: stop_itself())
    child = processes.begin_child(lambda: transfer.run_transfer("receive", Rentals, Path(), Path()))  # type: ignore[arg-type]
    assert processes.has_ended(child, 60.0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_the_scan_of_a_home_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "FIND", ("/bin/sh", "-c", "kill -STOP $$"))
    with pytest.raises(RequestRefused) as refused:
        scan.scan(10, time.monotonic() + SHORT_S, strict=False)
    assert refused.value.code == "timed_out"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@AS_ROOT
def test_a_start_command_that_its_renter_stops_before_it_begins_is_killed_and_logged(
    uid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/r-one").mkdir(parents=True)
    monkeypatch.setattr(launcher, "WITHIN_S", SHORT_S)
    monkeypatch.setattr(os, "execve", lambda *_: stop_itself())  # its child has the renter's uid by then
    report = Launcher(tmp_path).launch(
        RentalRecord(rental_id="one", username="r-one", uid=uid, epoch=2), "serve", "1@boot"
    )
    assert report["started"] is False
    assert "did not begin within" in str(report["start_problem"])
    assert processes.pids_of([uid]) == []


class LogIn:
    """The two processes that sshd has for a log-in: one of root, and one of the renter that stops itself."""

    def __init__(self, uid: int, script: str) -> None:
        become = f"setpriv --reuid={uid} --regid={uid} --clear-groups"
        self.root = subprocess.Popen(
            ["sshd-session: r-one [priv]", "-c", f"{become} sh -c '{script}'; exit"], executable="/bin/sh"
        )
        (self.child,) = wait_until(
            lambda: [pid for pid in processes.pids_of([uid]) if state(pid) == "T"], "it is stopped"
        )

    def is_there(self) -> bool:
        return bool(self.root.poll() is None and state(self.child))

    def end(self) -> None:
        self.root.kill()
        self.root.wait()
        if state(self.child):
            os.kill(self.child, signal.SIGKILL)
            wait_until(lambda: not state(self.child), "the renter's part has ended")


@pytest.fixture
def log_in(uid: int, request: pytest.FixtureRequest) -> Iterator[LogIn]:
    made = LogIn(uid, getattr(request, "param", "kill -STOP $$"))
    yield made
    made.end()


@pytest.fixture
def rentals(uid: int, tmp_path: Path) -> Rentals:
    made = Rentals(WorkerPaths(tmp_path))
    made.freezer.begin()
    made.freezer.set_lease(True)
    made.records.save(RentalRecord(rental_id="one", username="r-one", uid=uid, epoch=1, activated=True))
    return made


@AS_ROOT
def test_a_log_in_that_its_renter_stopped_is_killed_with_the_process_of_root_that_waits_for_it(
    rentals: Rentals, log_in: LogIn
) -> None:
    logged = list[str]()
    looking = StoppedLogIns(rentals, logged.append)
    for _ in range(LOOKS - 1):
        looking.look()
    assert log_in.is_there()
    looking.look()
    assert log_in.root.wait(60) == -signal.SIGKILL
    wait_until(lambda: not state(log_in.child), "the renter's part has ended")
    assert logged == ["r-one has stopped a log-in of its own: the log-in was ended"]


@AS_ROOT
@pytest.mark.parametrize("why", ["it is frozen", "there is no lease"])
def test_a_log_in_that_is_frozen_with_its_rental_goes_on_after_the_thaw(
    rentals: Rentals, log_in: LogIn, why: str
) -> None:
    looking = StoppedLogIns(rentals, pytest.fail)
    looking.look()
    (record,) = rentals.records.all()
    if why == "it is frozen":
        rentals.freezer.mark(record, frozenset())
    else:
        rentals.freezer.set_lease(False)
    for _ in range(2 * LOOKS):
        looking.look()
    rentals.freezer.forget("one")
    rentals.freezer.set_lease(True)
    for _ in range(LOOKS - 1):
        looking.look()
    assert log_in.is_there()


@AS_ROOT
@pytest.mark.parametrize("log_in", ["while :; do kill -STOP $$; done"], indirect=True)
def test_the_count_begins_anew_for_a_log_in_that_ran_between_two_checks(rentals: Rentals, log_in: LogIn) -> None:
    """One pause for a snapshot may follow another."""
    looking = StoppedLogIns(rentals, pytest.fail)
    for _ in range(2 * LOOKS):
        looking.look()
        turns = Path(f"/proc/{log_in.child}/status").read_text().partition("\nvoluntary_ctxt_switches")[2]
        os.kill(log_in.child, signal.SIGCONT)
        wait_until(
            lambda before=turns: (
                Path(f"/proc/{log_in.child}/status").read_text().partition("\nvoluntary_ctxt_switches")[2] != before
                and state(log_in.child) == "T"
            ),
            "it has run and is stopped again",
        )
    assert log_in.is_there()


@AS_ROOT
def test_programs_that_a_renter_stops_stay_stopped(uid: int, rentals: Rentals) -> None:
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    own = subprocess.Popen([*become, "sh", "-c", "kill -STOP $$"])
    try:
        wait_until(lambda: state(own.pid) == "T", "it is stopped")
        looking = StoppedLogIns(rentals, pytest.fail)
        for _ in range(2 * LOOKS):
            looking.look()
        assert state(own.pid) == "T"
    finally:
        own.kill()
        own.wait()


def test_a_look_that_fails_is_said_and_repeated_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    said, waits_s = list[str](), list[float]()

    def sleep(seconds: float) -> None:
        waits_s.append(seconds)
        if len(waits_s) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("orion_worker.system.repeat.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        look_for_ever(lambda: Path("/nowhere").read_text(), 5.0, said.append, "log-ins")
    assert waits_s == [5.0] * 3, "it looks again when it is due, and not before"
    assert len(said) == 3
    assert said[0].startswith("log-ins: ")
    assert said[0].endswith("looking again")
