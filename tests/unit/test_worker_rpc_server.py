"""`orion-rental serve`: many orders over one connection, each answered once, and none delays another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orion_worker import shim
from orion_worker.rpc import server
from support.descendants import ended_with_their_test

COMMANDS = ("say", "wait", "break", "die", "flood", "stop")


HAND_OVER = "from orion_worker import shim; import sys; sys.exit(shim.hand_over(sys.argv[1], sys.argv[2]))"


def _echo(command: str) -> int:
    """Do a transfer that writes its name, then its input."""
    os.write(1, f"{command}: ".encode())
    while part := os.read(0, 100):
        os.write(1, part)
    return 3


class Served:
    """The program in a process of its own, as sshd starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        their_in, self.to = os.pipe()
        self.back, their_out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.to)
            os.close(self.back)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            ends = {"socket_path": folder / "transfers", "incoming": their_in, "outgoing": their_out}
            server.RpcServer(self._answer, COMMANDS, _echo, **ends).run()
            os._exit(0)
        os.close(their_in)
        os.close(their_out)
        self.answers = os.fdopen(self.back)
        assert json.loads(self.answers.readline()) == {"ready": True}

    def _answer(self, command: str, text: str) -> tuple[int, dict[str, Any]]:
        if command == "wait":
            return 0, {"gate": (self.folder / "gate").read_text()}
        if command == "break":
            raise RuntimeError("a fault")
        if command == "die":
            os._exit(9)
        if command == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if command == "flood":
            return 0, {"filling": "x" * (1 << 18)}
        return 0, {"heard": json.loads(text)}

    def ask(self, identifier: int, command: str, request: Any = None) -> None:
        line = json.dumps({"id": identifier, "command": command, "request": request})
        os.write(self.to, line.encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.answers.readline())
        return found

    def end(self) -> None:
        os.close(self.to)
        rest = self.answers.read()
        self.answers.close()
        assert os.waitpid(self.pid, 0)[1] == 0
        assert rest == ""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    running = Served(tmp_path)
    yield running
    running.end()


def test_each_order_is_answered_under_its_own_number(served: Served) -> None:
    for number in range(1, 6):
        served.ask(number, "say", {"rental_id": f"r{number}"})
    answers = {answer["id"]: answer for answer in (served.answer() for _ in range(5))}
    assert {number: answer["report"]["heard"]["rental_id"] for number, answer in answers.items()} == {
        number: f"r{number}" for number in range(1, 6)
    }


@pytest.mark.timeout(120)
def test_an_order_that_never_ends_is_killed_though_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LONGEST_S", 0.05)
    with ended_with_their_test():
        served = Served(tmp_path)
        served.ask(1, "stop")
        answer = served.answer()
        assert (answer["id"], answer["report"]["code"]) == (1, "broken")
        served.end()


def test_a_slow_order_delays_no_other(served: Served) -> None:
    os.mkfifo(served.folder / "gate")
    served.ask(1, "wait")
    served.ask(2, "say")
    assert served.answer()["id"] == 2
    (served.folder / "gate").write_text("open")
    assert served.answer() == {"id": 1, "status": 0, "report": {"gate": "open"}}


def test_an_order_that_raises_is_answered_and_so_is_the_next(served: Served) -> None:
    served.ask(1, "break")
    answer = served.answer()
    assert (answer["id"], answer["status"], answer["report"]["code"]) == (1, 1, "broken")
    assert "a fault" in answer["report"]["error"]
    served.ask(2, "say")
    assert served.answer()["id"] == 2


def test_an_order_whose_process_dies_is_answered_as_broken(served: Served) -> None:
    served.ask(1, "die")
    answer = served.answer()
    assert (answer["id"], answer["report"]["code"]) == (1, "broken")


@pytest.mark.parametrize("line", [b"", b"?", b"[]", b"{}", b'{"id": 1, "command": "rm", "request": {}}'])
def test_a_line_that_is_no_order_gets_an_answer_that_it_is_invalid(served: Served, line: bytes) -> None:
    os.write(served.to, line + b"\n")
    assert served.answer()["id"] is None
    served.ask(2, "say")
    assert served.answer()["id"] == 2


def test_large_answers_arrive_whole_side_by_side(served: Served) -> None:
    for number in range(4):
        served.ask(number, "flood")
    answers = [served.answer() for _ in range(4)]
    assert {answer["id"] for answer in answers} == {0, 1, 2, 3}
    assert all(len(answer["report"]["filling"]) == 1 << 18 for answer in answers)


def test_orders_beyond_the_limit_wait_and_are_all_answered(served: Served) -> None:
    number = 3 * server.MOST_AT_ONCE
    for identifier in range(number):
        served.ask(identifier, "say")
    assert {served.answer()["id"] for _ in range(number)} == set(range(number))


def _handed_over(place: Path) -> subprocess.Popen[bytes]:
    """Start the shim with a transfer, as sshd does."""
    command = [sys.executable, "-c", HAND_OVER, "send", str(place)]
    environment = os.environ | {"PYTHONPATH": str(Path(shim.__file__).parents[1])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def test_transfers_run_in_parallel_each_with_its_own_descriptors(served: Served) -> None:
    place = served.folder / "transfers"
    with _handed_over(place) as first, _handed_over(place) as second:
        assert second.communicate(b"two", timeout=60)[0] == b"send: two"
        assert first.poll() is None, "the shim stays as long as its transfer goes on"
        assert first.communicate(b"one", timeout=60)[0] == b"send: one"
    assert (first.returncode, second.returncode) == (3, 3)
    served.ask(1, "say", "still here")
    assert served.answer()["report"] == {"heard": "still here"}


def test_only_root_can_hand_over_a_transfer(served: Served) -> None:
    assert (served.folder / "transfers").stat().st_mode & 0o777 == 0o600


def test_a_transfer_without_a_server_is_not_handed_over(tmp_path: Path) -> None:
    assert shim.hand_over("send", str(tmp_path / "nobody")) is None
    place = tmp_path / "dies"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()

        def die() -> None:
            listening.accept()[0].close()

        dying = threading.Thread(target=die)
        dying.start()
        assert shim.hand_over("send", str(place)) is None
        dying.join()
