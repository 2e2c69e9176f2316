"""The connections that the engine keeps open, with a shell script in place of ssh."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_contract import KEY

from orion.manager.ansible import connections
from orion.manager.ansible.connections import Connections, State, WorkerConnection
from orion.manager.messages import HostMessage

READY = """echo '{"ready": true}'"""
ECHO = (
    READY
    + """
while read -r line; do echo '{"id": 1, "status": 0, "report": {"changed": true}}'; done"""
)


class ConnectionsBench:
    """Connections, and the selector that drives them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.selector = selectors.DefaultSelector()
        self.connections = Connections(self.selector, folder)

    def to(self, script: str, name: str = "abcdefgh") -> WorkerConnection:
        # It is renamed into place, because a shell may be reading the former one at this moment.
        program = self.folder / "new"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        program.replace(self.folder / "ssh")
        return self.connections.to(host(name))

    def until(self, reached: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline, "the condition was not reached within 60 s"
            for key, ready in self.selector.select(0.01):
                key.data(ready)
            self.connections.step()

    def end(self) -> None:
        self.connections.close_all()
        for pid in list(self.connections.pids):
            self.connections.reaped(*os.waitpid(pid, 0))


def host(name: str) -> HostMessage:
    return HostMessage.model_validate({"worker_id": f"w-{name}", "address": "192.0.2.7", "host_keys": (KEY,)})


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectionsBench]:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    made = ConnectionsBench(tmp_path)
    yield made
    made.end()


def test_a_connection_is_open_when_the_program_says_so_and_is_kept_for_the_next_order(bench: ConnectionsBench) -> None:
    made = bench.to(ECHO)
    assert made.state is State.OPENING
    bench.until(lambda: made.state is State.OPEN)
    answers: list[dict[str, Any]] = []
    made.ask("run", {}, answers.append)
    bench.until(lambda: answers)
    assert answers == [{"status": 0, "report": {"changed": True}}]
    assert bench.connections.to(host("abcdefgh")) is made
    assert bench.connections.by_number(made.number) is made


@pytest.mark.parametrize(
    "output", ["nonsense", "[]", "null", '{"id": 7, "status": 0, "report": {}}', '{"id": 1, "status": 0, "report": 5}']
)
def test_an_invalid_answer_ends_the_connection_and_all_its_requests(bench: ConnectionsBench, output: str) -> None:
    made = bench.to(f"{READY}\nread -r line\necho '{output}'\nread -r line")
    bench.until(lambda: made.state is State.OPEN)
    answers: list[dict[str, Any]] = []
    made.ask("run", {}, answers.append)
    bench.until(lambda: answers)
    assert answers == [{"broken": "the worker sent an invalid answer"}]
    assert made.closed
    assert bench.connections.by_number(made.number) is None


def test_an_answer_beyond_the_limit_is_not_kept(bench: ConnectionsBench) -> None:
    made = bench.to(f"{READY}\nexec cat /dev/zero")
    bench.until(lambda: made.closed)
    assert made.complaint == "the worker sent more than an answer may hold"


@pytest.mark.parametrize(
    ("complaint", "reason"),
    [
        ("Host key verification failed.", "it has another host key than the pinned one"),
        ("ssh: connect to host 192.0.2.7 port 22: No route to host", "No route to host"),
        ("", "the connection was closed"),
    ],
)
def test_the_reason_of_a_failed_connection_is_the_output_of_ssh(
    bench: ConnectionsBench, complaint: str, reason: str
) -> None:
    made = bench.to(f"echo '{complaint}' >&2\nexit 255")
    bench.until(lambda: made.closed)
    assert made.complaint.endswith(reason)
    assert not made.was_open


def test_a_connection_that_never_opens_is_given_up(bench: ConnectionsBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "OPEN_WITHIN_S", 0.05)
    made = bench.to("exec sleep 100")
    assert bench.connections.patience() is not None
    bench.until(lambda: made.closed)
    assert made.complaint == "nothing answered in time"


def test_the_end_of_the_program_fails_its_requests_and_the_next_request_starts_a_new_one(
    bench: ConnectionsBench,
) -> None:
    made = bench.to(f"{READY}\nread -r line")
    bench.until(lambda: made.state is State.OPEN)
    answers: list[dict[str, Any]] = []
    made.ask("run", {}, answers.append)
    bench.until(lambda: answers)
    assert answers == [{"broken": "the connection was closed"}]
    again = bench.to(ECHO)
    assert again is not made
    made.reaped(0)
    bench.until(lambda: again.state is State.OPEN)


def test_the_connection_that_was_unused_the_longest_is_closed_for_a_new_one(
    bench: ConnectionsBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    made = [bench.to(ECHO, name) for name in ("a", "b")]
    bench.until(lambda: all(one.state is State.OPEN for one in made))
    bench.connections.to(host("a"))
    third = bench.to(ECHO, "c")
    assert [one.closed for one in (*made, third)] == [False, True, False]


def test_a_few_unused_connections_are_kept(bench: ConnectionsBench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [bench.to(ECHO, name) for name in ("a", "b")]
    bench.until(lambda: all(one.state is State.OPEN for one in made))
    bench.connections.to(host("a"))
    monkeypatch.setattr(connections, "MAX_IDLE", 1)
    bench.connections.step()
    assert not any(one.closed for one in made), "it was used not long ago"
    monkeypatch.setattr(connections, "IDLE_S", 0.0)
    bench.connections.step()
    assert [one.closed for one in made] == [False, True]
