"""The ballast is deleted when the disk is full, so that the manager can go on writing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from orion.manager.store import ballast
from orion.manager.store.ballast import Ballast
from orion.manager.store.database import Store

SIZE_BYTES = 1 << 20


def problem(code: int) -> OperationalError:
    cause = sqlite3.OperationalError("database or disk is full")
    cause.sqlite_errorcode = code
    return OperationalError("INSERT", {}, cause)


@pytest.fixture
def store(database: Path) -> Iterator[Store]:
    url = f"sqlite:///{database}"
    store = Store(url, Ballast.of(url, SIZE_BYTES))
    yield store
    store.close()


@pytest.fixture
def file(database: Path) -> Path:
    return database.with_name(f"{database.name}.ballast")


def size_of(file: Path) -> int:
    return file.stat().st_size


async def test_a_commit_on_a_full_disk_succeeds_in_the_room_of_the_ballast(store: Store, file: Path) -> None:
    tries = 0

    def write(_: Connection) -> str:
        nonlocal tries
        tries += 1
        if file.exists():
            raise problem(sqlite3.SQLITE_FULL)
        return "written"

    assert await store.write(write) == "written"
    assert tries == 2
    with pytest.raises(OperationalError):
        await store.write(lambda _: _raise(problem(sqlite3.SQLITE_FULL)))


def _raise(error: Exception) -> None:
    raise error


async def test_a_commit_does_not_need_the_ballast(tmp_path: Path) -> None:
    """A directory stands in for a disk without inodes: the ballast's file cannot be opened."""
    url = f"sqlite:///{tmp_path}/orion.db"
    (tmp_path / "orion.db.ballast.partial").mkdir()
    store = Store(url, Ballast.of(url, SIZE_BYTES))
    try:
        assert await store.write(lambda connection: connection.exec_driver_sql("SELECT 1").scalar_one()) == 1
    finally:
        store.close()
    assert not (tmp_path / "orion.db.ballast").exists()


async def test_another_error_than_a_full_disk_keeps_the_ballast(store: Store, file: Path) -> None:
    with pytest.raises(OperationalError):
        await store.write(lambda _: _raise(problem(sqlite3.SQLITE_BUSY)))
    assert size_of(file) == SIZE_BYTES


def test_the_ballast_occupies_its_room_and_is_made_again_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Ballast(tmp_path / "ballast", 1 << 20)
    there.allocate()
    assert (tmp_path / "ballast").stat().st_blocks * 512 >= 1 << 20
    assert there.release(problem(sqlite3.SQLITE_IOERR_WRITE))
    there.allocate()
    assert not (tmp_path / "ballast").exists(), (
        "not at once, because the commit that needed the room has not used it yet"
    )
    monkeypatch.setattr(ballast, "CHECK_EVERY_S", 0.0)
    there.allocate()
    assert (tmp_path / "ballast").exists()


def test_no_ballast_is_made_on_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    Ballast(tmp_path / "ballast", room.f_bavail * room.f_frsize).allocate()
    assert list(tmp_path.iterdir()) == []
