"""Tests of the engine's real process with jobs that need no worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_contract import KEY

RUNNERS = 2
PATIENCE_S = 5.0
"""Seconds that a run over several workers may take: it takes milliseconds, and a busy machine may stop it for more."""
SSH = """#!/bin/sh
echo '{"ready": true}'
exec cat
"""
"""A replacement of ssh: a program on a worker that is ready and gets no request."""


class Engine:
    """The process, and a connection to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "engine.sock"
        programs = directory / "programs"
        programs.mkdir()
        (programs / "ssh").write_text(SSH)
        (programs / "ssh").chmod(0o755)
        command = [
            sys.executable,
            str(Path(__file__).with_name("ansible_stub.py")),
            str(self.path),
            str(RUNNERS),
            str(PATIENCE_S),
            str(programs),
        ]
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{programs}:/usr/bin:/bin"}
        self.process = subprocess.Popen(command, env=environment)
        wait_until(self.path.exists)
        self.connection = self.connect()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        self.heard = b""
        wait_until(lambda: connection.connect_ex(str(self.path)) == 0)
        return connection

    def send(self, line: bytes) -> None:
        self.connection.sendall(line + b"\n")

    def submit(self, what: str, identifier: str = "1", **changes: Any) -> None:
        self.send(json.dumps(request(what, identifier) | changes).encode())

    def submit_together(self, *jobs: tuple[str, str]) -> None:
        """Send jobs at the same time; each is a behaviour and a worker."""
        lines = [request(what, what) | {"host": host(worker_id)} for what, worker_id in jobs]
        self.send(b"\n".join(json.dumps(line).encode() for line in lines))

    def open_connections(self, *worker_ids: str) -> None:
        """Have the engine connected to these workers, so that their next jobs start in the order of their arrival."""
        for worker_id in worker_ids:
            self.submit("quick", worker_id, host=host(worker_id))
            assert self.answer()["ok"]

    def occupy(self) -> list[Path]:
        """Occupy all runners until the test writes to the returned gates."""
        gates = []
        for name in [f"wait{number}" for number in range(RUNNERS)]:
            gates.append(self.gate(name))
            # On workers that no test had fail: those may not have all runners.
            self.submit(name, name, host=host(f"w-{name}"))
            wait_until((self.directory / f"{name}-begun").exists)
        return gates

    def answer(self) -> dict[str, Any]:
        while b"\n" not in self.heard:
            part = self.connection.recv(1 << 16)
            assert part, "the engine closed the connection"
            self.heard += part
        line, _, self.heard = self.heard.partition(b"\n")
        return json.loads(line)

    def gate(self, name: str) -> Path:
        os.mkfifo(self.directory / name)
        return self.directory / name

    def catch_up(self) -> None:
        """Return when the engine has processed all earlier requests."""
        for _ in range(2):
            self.send(b"?")
            assert not self.answer()["ok"]

    def runners(self) -> list[int]:
        """Return the processes that play batches: the engine's children but for its connections to workers."""
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        children = [int(pid) for pid in listing.split()]
        return [pid for pid in children if b"ansible_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def forget(self) -> None:
        """Remove the connection of a test with its jobs, and its files."""
        self.connection.close()
        for left in self.directory.iterdir():
            if left != self.path and not left.is_dir():
                left.unlink()

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()  # not killed: it takes its children with it
        self.process.wait(60)


def request(what: str, identifier: str = "1") -> dict[str, Any]:
    return {
        "id": identifier,
        "action": "create_user",
        "host": host("w-abcdefgh"),
        "order": {"rental_id": what, "username": "r-abcdefghij", "uid": 100_000, "epoch": 7, "public_keys": []},
        "deadline_s": 30,
    }


def host(worker_id: str) -> dict[str, Any]:
    return {"worker_id": worker_id, "address": "192.0.2.7", "port": 22, "host_keys": [KEY]}


def open_gate(gate: Path, text: str) -> None:
    """Once a job waits there."""

    def opened() -> int | None:
        try:
            return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None

    writing = wait_until(opened)
    os.write(writing, text.encode())
    os.close(writing)


def wait_until(reached: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := reached()):
        assert time.monotonic() < deadline, "it did not come to pass within 60 s"
        os.sched_yield()
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def family(engine: Engine) -> list[int]:
    """Return the three processes of a job 'family', once each has written its number."""
    found = engine.directory / "family"
    wait_until(lambda: found.exists() and found.read_text().count("\n") == 3)
    return [int(pid) for pid in found.read_text().split()]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    running = Engine(tmp_path_factory.mktemp("engine"))
    try:
        yield running
    finally:
        running.end()


@pytest.fixture
def engine(process: Engine) -> Iterator[Engine]:
    """Yield a connection for each test to one process for all tests, which has to survive each of them."""
    assert process.process.poll() is None
    process.connection = process.connect()
    try:
        yield process
    finally:
        process.forget()


def test_a_job_is_answered_under_its_own_id(engine: Engine) -> None:
    engine.submit("quick", "job-9")
    answer = engine.answer()
    assert (answer["id"], answer["ok"], answer["report"]["epoch"]) == ("job-9", True, 7)


def test_a_job_carries_the_deadline_after_which_the_worker_refuses_it(engine: Engine) -> None:
    before = time.time()
    engine.submit("quick", deadline_s=50)
    assert before + 49 <= engine.answer()["report"]["refused_after"] <= time.time() + 50


def test_only_owner_and_group_can_open_the_socket_of_the_engine(engine: Engine) -> None:
    assert engine.path.stat().st_mode & 0o777 == 0o660


def test_the_number_of_runs_is_limited_and_waiting_jobs_share_the_next_run(engine: Engine) -> None:
    engine.open_connections("w-a", "w-b")
    gates = engine.occupy()
    engine.submit_together(("quick1", "w-a"), ("quick2", "w-b"), ("quick3", "w-a"))
    engine.catch_up()
    assert len(engine.runners()) == RUNNERS
    open_gate(gates[1], "open")
    assert engine.answer()["report"]["gate"] == "open"
    answers = [engine.answer() for _ in range(3)]
    assert {answer["id"] for answer in answers} == {"quick1", "quick2", "quick3"}
    assert {answer["report"]["together"] for answer in answers} == {3}
    open_gate(gates[0], "open")
    engine.answer()


def test_a_run_has_jobs_of_one_action_only(engine: Engine) -> None:
    engine.open_connections("w-abcdefgh")
    gates = engine.occupy()
    for number, action in enumerate(("create_user", "delete_user", "create_user")):
        engine.submit("quick", f"job-{number}", action=action)
    engine.catch_up()
    for gate in gates:
        open_gate(gate, "open")
    together = {answer["id"]: answer["report"]["together"] for answer in (engine.answer() for _ in range(5))}
    assert (together["job-0"], together["job-1"], together["job-2"]) == (2, 1, 2)


@pytest.mark.parametrize("what", ["raise", "killed", "huge"])
def test_a_broken_run_fails_only_the_job_that_broke_it_and_does_the_others(engine: Engine, what: str) -> None:
    engine.open_connections("w-a", "w-b", "w-c")
    gates = engine.occupy()
    engine.submit_together(("quick1", "w-a"), (what, "w-b"), ("quick2", "w-c"))
    engine.catch_up()
    for gate in gates:
        open_gate(gate, "open")
    answers = {answer["id"]: answer for answer in (engine.answer() for _ in range(5))}
    assert not answers[what]["ok"]
    assert answers["quick1"]["report"]["together"] == 3, "it was done before the break"
    assert answers["quick2"]["report"]["together"] == 1, "it was tried again, alone"


def test_the_job_of_a_hanging_worker_is_repeated_alone_and_the_other_jobs_do_not_wait(engine: Engine) -> None:
    engine.open_connections("w-a", "w-b", "w-slow")
    gates, slow = engine.occupy(), engine.gate("wait9")
    engine.submit_together(("quick1", "w-a"), ("quick2", "w-b"), ("wait9", "w-slow"))
    engine.catch_up()
    for gate in gates:
        open_gate(gate, "open")
    answers = {answer["id"]: answer for answer in (engine.answer() for _ in range(4))}
    assert answers["quick1"]["report"]["together"] == answers["quick2"]["report"]["together"] == 3
    begun = engine.directory / "wait9-begun"
    wait_until(lambda: begun.exists() and begun.read_text().count("\n") == 2)
    open_gate(slow, "at last")
    late = engine.answer()
    assert (late["id"], late["report"]["gate"], late["report"]["together"]) == ("wait9", "at last", 1)


def test_a_job_for_an_unreachable_worker_is_repeated_once_and_alone(engine: Engine) -> None:
    engine.submit_together(("unreachable", "w-gone"), ("quick", "w-gone"))
    answers = {answer["id"]: answer for answer in (engine.answer() for _ in range(2))}
    assert answers["unreachable"]["message"] == "not there, with 1"


def test_recently_failed_workers_never_occupy_all_runners(engine: Engine) -> None:
    engine.submit("unreachable", "x", host=host("w-bad1"))
    engine.submit("unreachable", "y", host=host("w-bad2"))
    for _ in range(2):
        engine.answer()
    gates = [engine.gate("wait1"), engine.gate("wait2")]
    engine.submit("wait1", "bad1", host=host("w-bad1"))
    engine.submit("wait2", "bad2", host=host("w-bad2"))
    engine.submit("quick", "good")
    assert engine.answer()["id"] == "good"
    for number, gate in enumerate(gates, 1):
        open_gate(gate, "open")
        assert engine.answer()["id"] == f"bad{number}"


def test_an_owner_with_hanging_workers_occupies_half_of_the_runners(engine: Engine) -> None:
    engine.open_connections("w-greedy1", "w-greedy2", "w-other")
    gates = [engine.gate("wait1"), engine.gate("wait2")]
    engine.submit("wait1", "greedy1", host=host("w-greedy1"), owner="greedy")
    wait_until((engine.directory / "wait1-begun").exists)
    engine.submit("wait2", "greedy2", host=host("w-greedy2"), owner="greedy")
    engine.submit("quick", "other", host=host("w-other"), owner="other", action="freeze")
    assert engine.answer()["id"] == "other"
    assert not (engine.directory / "wait2-begun").exists()
    for number, gate in enumerate(gates, 1):
        open_gate(gate, "open")
        assert engine.answer()["id"] == f"greedy{number}"


def test_a_late_job_is_killed_with_all_its_descendants(engine: Engine) -> None:
    engine.submit("family", deadline_s=10)
    pids = family(engine)
    assert not any(gone(pid) for pid in pids)
    answer = engine.answer()
    assert (answer["ok"], answer["message"]) == (False, "timed out after 10 s")
    wait_until(lambda: all(gone(pid) for pid in pids))


def test_a_job_that_never_starts_is_answered_at_its_deadline(engine: Engine) -> None:
    engine.occupy()
    engine.submit("quick", "late", host=host("w-wait0"), deadline_s=0.05)
    answer = engine.answer()
    assert (answer["id"], answer["message"]) == ("late", "timed out after 0.05 s, waiting for its turn")


@pytest.mark.parametrize("what", ["raise", "killed", "huge"])
def test_the_job_of_a_failed_runner_fails_and_the_engine_continues(engine: Engine, what: str) -> None:
    engine.submit(what)
    answer = engine.answer()
    assert (answer["ok"], answer["message"]) == (False, "the engine's process for this job ended without a result")
    engine.submit("quick")
    assert engine.answer()["ok"]


def test_nothing_outlives_the_runner_that_started_it(engine: Engine) -> None:
    engine.submit("orphans")
    pids = family(engine)
    assert not engine.answer()["ok"]
    wait_until(lambda: all(gone(pid) for pid in pids))


def test_a_report_larger_than_the_pipe_arrives_whole(engine: Engine) -> None:
    engine.submit("large")
    assert len(engine.answer()["report"]["filling"]) == 1 << 19


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"null", b"\xff", b'{"id": 5}', b"[" * 100_000])
def test_an_invalid_request_is_answered_with_an_error_and_the_engine_continues(engine: Engine, line: bytes) -> None:
    engine.send(line)
    assert not engine.answer()["ok"]
    engine.submit("quick")
    assert engine.answer()["ok"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("action",), "../../etc/evil"),
        (("action",), "site"),
        (("deadline_s",), -1),
        (("deadline_s",), 1e9),
        (("host", "address"), "-oProxyCommand=id"),
        (("host", "address"), "localhost"),
        (("host", "worker_id"), "w-a b"),
        (("host", "worker_id"), "w-a/../b"),
        (("host", "port"), 0),
        (("host", "host_keys"), []),
        (("host", "host_keys"), ["ssh-ed25519 {{ lookup('pipe','id') }}"]),
        (("order", "ansible_ssh_common_args"), "-o StrictHostKeyChecking=no"),
        (("order", "target"), "all"),
        (("order", "username"), "root"),
        (("order", "uid"), 0),
        (("order", "kill"), True),
        (("order", "deadline"), 4e9),
        (("order", "rental_id"), "{{ 1 }}"),
        (("order", "public_keys"), ['command="id" ' + KEY]),
    ],
)
def test_a_request_with_forbidden_values_is_refused(engine: Engine, place: tuple[str, ...], value: Any) -> None:
    wrong = request("quick", "job-9")
    where = wrong
    for name in place[:-1]:
        where = where[name]
    where[place[-1]] = value
    engine.send(json.dumps(wrong).encode())
    answer = engine.answer()
    assert (answer["id"], answer["ok"]) == ("job-9", False)
    assert answer["message"].startswith("the engine refused the request: " + ".".join(place))


def test_the_id_of_an_unfinished_job_cannot_be_used_again(engine: Engine) -> None:
    engine.gate("wait1")
    engine.submit("wait1", "same")
    engine.submit("quick", "same")
    assert engine.answer()["message"] == "a job with this id is already in work"


def test_the_end_of_a_connection_cancels_its_jobs(engine: Engine) -> None:
    engine.submit("family")
    pids = family(engine)
    engine.connection.close()
    wait_until(lambda: all(gone(pid) for pid in pids))
    engine.connection = engine.connect()
    engine.submit("quick")
    assert engine.answer()["ok"]


def test_a_connection_gets_only_answers_to_its_own_jobs(engine: Engine) -> None:
    gate = engine.gate("wait1")
    engine.submit("wait1", "1")
    # Together in one run, the second would wait for the first: the stub plays the jobs of a run in turn.
    wait_until((engine.directory / "wait1-begun").exists)
    other = engine.connect()
    other.sendall(json.dumps(request("quick", "1") | {"host": host("w-other")}).encode() + b"\n")
    assert json.loads(other.recv(1 << 16))["report"]["epoch"] == 7
    other.close()
    open_gate(gate, "mine")
    assert engine.answer()["report"]["gate"] == "mine"


def test_an_endless_request_ends_only_its_own_connection(engine: Engine) -> None:
    flood = engine.connect()
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        flood.sendall(b"x" * (64 << 20))
    engine.submit("quick")
    assert engine.answer()["ok"]


def test_sigterm_kills_running_jobs_and_the_engine_exits_with_status_0(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.submit("family")
    pids = family(engine)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(60) == 0
    wait_until(lambda: all(gone(pid) for pid in pids))
    assert not engine.path.exists()
