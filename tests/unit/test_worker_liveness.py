"""The manager's liveness connection as the agent sees it, over a real socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from orion_worker.rpc.liveness import ORDERLY_END, LivenessListener


class Connection:
    """The manager's end of a liveness connection, and the program on the worker that hands it over."""

    def __init__(self, place: Path) -> None:
        self.ours, theirs = socket.socketpair()
        with theirs:
            self.program = socket.socket(socket.AF_UNIX)
            self.program.connect(str(place))
            socket.send_fds(self.program, [b"w"], [theirs.fileno(), theirs.fileno()])

    def close(self) -> None:
        self.ours.close()


class LivenessBench:
    def __init__(self, folder: Path) -> None:
        self.place = folder / "watch"
        self.ends = 0
        self.orderly = 0
        self.listener = LivenessListener(
            place=self.place, boot_id="boot-1", on_end=self._count, on_orderly_end=self._count_orderly
        )

    def connection(self) -> Connection:
        made = Connection(self.place)
        for _ in range(2):
            self.listener.look(0.2)
        return made

    def _count(self) -> None:
        self.ends += 1

    def _count_orderly(self) -> None:
        self.orderly += 1


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LivenessBench:
    monkeypatch.setattr("orion_worker.rpc.liveness.ROOT", os.getuid())
    return LivenessBench(tmp_path)


def test_the_manager_receives_the_boot_id(bench: LivenessBench) -> None:
    assert bench.connection().ours.recv(100) == b"boot-1\n"
    assert bench.place.stat().st_mode & 0o777 == 0o600


def test_a_connection_that_breaks_is_reported(bench: LivenessBench) -> None:
    connection = bench.connection()
    bench.listener.look(0.0)
    assert bench.ends == 0
    connection.close()
    bench.listener.look(1.0)
    assert bench.ends == 1


def test_a_connection_that_ends_in_order_is_not_reported_as_broken(bench: LivenessBench) -> None:
    connection = bench.connection()
    connection.ours.sendall(ORDERLY_END[:2])
    bench.listener.look(1.0)
    connection.ours.sendall(ORDERLY_END[2:])
    connection.close()
    for _ in range(3):
        bench.listener.look(0.1)
    assert (bench.ends, bench.orderly) == (0, 1)


def test_the_last_word_must_be_the_last(bench: LivenessBench) -> None:
    connection = bench.connection()
    connection.ours.sendall(ORDERLY_END + b"no, wait")
    connection.close()
    for _ in range(3):
        bench.listener.look(0.1)
    assert (bench.ends, bench.orderly) == (1, 0)


def test_each_of_two_connections_has_its_own_end(bench: LivenessBench) -> None:
    old, new = bench.connection(), bench.connection()
    old.close()
    bench.listener.look(1.0)
    assert bench.ends == 1
    new.close()
    bench.listener.look(1.0)
    assert bench.ends == 2


def test_the_handing_program_lasts_as_long_as_the_connection_and_its_death_is_no_end(
    bench: LivenessBench,
) -> None:
    connection = bench.connection()
    connection.program.setblocking(False)
    with pytest.raises(BlockingIOError):
        connection.program.recv(1)
    connection.close()
    bench.listener.look(1.0)
    assert connection.program.recv(1) == b""


def test_a_program_that_hands_over_nothing_is_no_connection(bench: LivenessBench) -> None:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect(str(bench.place))
    bench.listener.look(1.0)
    stranger.send(b"w")
    bench.listener.look(1.0)
    assert stranger.recv(1) == b""
    assert bench.ends == 0


def test_a_failed_poll_counts_as_an_end_of_the_liveness_connection(
    bench: LivenessBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Over(Exception): ...

    def out_of_descriptors(_: float | None) -> None:
        raise OSError(24, "Too many open files")

    def pause(_: float) -> None:
        raise Over

    monkeypatch.setattr(bench.listener, "look", out_of_descriptors)
    monkeypatch.setattr("orion_worker.rpc.liveness.time.sleep", pause)
    with pytest.raises(Over):
        bench.listener.run()
    assert bench.ends == 1


def test_only_root_may_connect_to_the_liveness_socket(bench: LivenessBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orion_worker.rpc.liveness.ROOT", 100_001)
    connection = bench.connection()
    with pytest.raises(ConnectionResetError):
        connection.program.recv(100)
    assert bench.ends == 0
