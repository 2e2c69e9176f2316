"""The watch as the agent sees it, over a real socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from watched import LET_GO, Watched


class House:
    def __init__(self, folder: Path) -> None:
        self.place = folder / "watch"
        self.ends = 0
        self.watched = Watched(self.place, "boot-1", self._count)

    def watch(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(self.place))
        self.watched.look(1.0)
        return made

    def _count(self) -> None:
        self.ends += 1


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr("watched.ROOT", os.getuid())
    return House(tmp_path)


def test_whoever_watches_is_told_which_boot_this_is(house: House) -> None:
    assert house.watch().recv(100) == b"boot-1\n"
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
    watch.sendall(LET_GO[:2])
    house.watched.look(1.0)
    watch.sendall(LET_GO[2:])
    watch.close()
    for _ in range(3):
        house.watched.look(0.1)
    assert house.ends == 0


def test_the_last_word_must_be_the_last(house: House) -> None:
    watch = house.watch()
    watch.sendall(LET_GO + b"no, wait")
    watch.close()
    for _ in range(3):
        house.watched.look(0.1)
    assert house.ends == 1


def test_each_of_two_watches_has_its_own_end(house: House) -> None:
    old, new = house.watch(), house.watch()
    old.close()
    house.watched.look(1.0)
    assert house.ends == 1
    new.close()
    house.watched.look(1.0)
    assert house.ends == 2


def test_nobody_but_root_may_watch(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watched.ROOT", 100_001)
    watch = house.watch()
    assert watch.recv(100) == b""
    assert house.ends == 0
