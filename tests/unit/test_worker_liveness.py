"""The watch as the agent sees it, over a real socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from orion_worker.rpc.liveness import ORDERLY_END, LivenessListener


class Watch:
    """The manager's end of a watch, with the program in between."""

    def __init__(self, place: Path) -> None:
        self.ours, theirs = socket.socketpair()
        with theirs:
            self.program = socket.socket(socket.AF_UNIX)
            self.program.connect(str(place))
            socket.send_fds(self.program, [b"w"], [theirs.fileno(), theirs.fileno()])

    def close(self) -> None:
        self.ours.close()


class House:
    def __init__(self, folder: Path) -> None:
        self.place = folder / "watch"
        self.ends = 0
        self.let_go = 0
        self.watched = LivenessListener(self.place, "boot-1", self._count, self._count_let_go)

    def watch(self) -> Watch:
        made = Watch(self.place)
        for _ in range(2):
            self.watched.look(0.2)
        return made

    def _count(self) -> None:
        self.ends += 1

    def _count_let_go(self) -> None:
        self.let_go += 1


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr("orion_worker.rpc.liveness.ROOT", os.getuid())
    return House(tmp_path)


def test_whoever_watches_is_told_which_boot_this_is(house: House) -> None:
    assert house.watch().ours.recv(100) == b"boot-1\n"
    assert house.place.stat().st_mode & 0o777 == 0o600


def test_a_watch_that_ends_by_itself_is_told_of(house: House) -> None:
    watch = house.watch()
    house.watched.look(0.0)
    assert house.ends == 0
    watch.close()
    house.watched.look(1.0)
    assert house.ends == 1


def test_a_watch_that_was_let_go_with_the_last_word_is_not(house: House) -> None:
    watch = house.watch()
    watch.ours.sendall(ORDERLY_END[:2])
    house.watched.look(1.0)
    watch.ours.sendall(ORDERLY_END[2:])
    watch.close()
    for _ in range(3):
        house.watched.look(0.1)
    assert (house.ends, house.let_go) == (0, 1)


def test_the_last_word_must_be_the_last(house: House) -> None:
    watch = house.watch()
    watch.ours.sendall(ORDERLY_END + b"no, wait")
    watch.close()
    for _ in range(3):
        house.watched.look(0.1)
    assert (house.ends, house.let_go) == (1, 0)


def test_each_of_two_watches_has_its_own_end(house: House) -> None:
    old, new = house.watch(), house.watch()
    old.close()
    house.watched.look(1.0)
    assert house.ends == 1
    new.close()
    house.watched.look(1.0)
    assert house.ends == 2


def test_the_program_in_between_lasts_as_long_as_the_watch_and_its_death_is_no_end_of_its_own(house: House) -> None:
    watch = house.watch()
    watch.program.setblocking(False)
    with pytest.raises(BlockingIOError):
        watch.program.recv(1)
    watch.close()
    house.watched.look(1.0)
    assert watch.program.recv(1) == b""


def test_who_hands_over_nothing_does_not_watch(house: House) -> None:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect(str(house.place))
    house.watched.look(1.0)
    stranger.send(b"w")
    house.watched.look(1.0)
    assert stranger.recv(1) == b""
    assert house.ends == 0


def test_who_cannot_look_tells_of_an_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    class Over(Exception): ...

    def out_of_descriptors(_: float | None) -> None:
        raise OSError(24, "Too many open files")

    def pause(_: float) -> None:
        raise Over

    monkeypatch.setattr(house.watched, "look", out_of_descriptors)
    monkeypatch.setattr("orion_worker.rpc.liveness.time.sleep", pause)
    with pytest.raises(Over):
        house.watched.run()
    assert house.ends == 1


def test_nobody_but_root_may_watch(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orion_worker.rpc.liveness.ROOT", 100_001)
    watch = house.watch()
    with pytest.raises(ConnectionResetError):
        watch.program.recv(100)
    assert house.ends == 0
