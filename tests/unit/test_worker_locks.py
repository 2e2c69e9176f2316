"""The locks of a worker's programs: only root can open them, and no wait for them is endless."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from orion_worker.freezer.marks import Freezer
from orion_worker.records import RentalRecords, RequestRefused
from orion_worker.rental import accounts, host_certificate
from orion_worker.system.locks import got_lock, open_lock


def freeze(root: Path) -> None:
    with Freezer(root).locked(0) as mine:
        if not mine:
            raise RequestRefused("busy", "try again")


def begin_anew(root: Path) -> None:
    with host_certificate.RunningSshd(root).locked():
        pass


def command(root: Path) -> None:
    with RentalRecords(root / "rentals").locked("abcdefghij", 0):
        pass


LOCKS: dict[str, Callable[[Path], object]] = {
    "etc/.pwd.lock": lambda root: accounts.add(root / "etc", "r-abcdefghij", 20_001),
    "run/orion/freezing.lock": freeze,
    "run/orion/sshd.lock": begin_anew,
    "rentals/locks/abcdefghij": command,
}
"""Functions that take each lock of a worker, by the lock's file."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    for name in accounts.FILES:
        (tmp_path / "etc" / name).write_text("")
    return tmp_path


@contextmanager
def held_by_another(file: Path) -> Iterator[None]:
    """Have another process hold both kinds of lock on a file within the context."""
    ready, ended = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            descriptor = open_lock(file)
            os.write(ready[1], b"y" if got_lock(descriptor, 0) and got_lock(descriptor, 0, fcntl.lockf) else b"n")
            os.close(ended[1])
            os.read(ended[0], 1)
        finally:
            os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"y"
        yield
    finally:
        for descriptor in (*ready, *ended):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_only_root_can_open_a_lock_whatever_the_file_was_before(root: Path) -> None:
    before = os.umask(0)
    try:
        for name, take in LOCKS.items():
            take(root)
            assert (root / name).stat().st_mode & 0o777 == 0o600, name
            (root / name).chmod(0o644)
            take(root)
            assert (root / name).stat().st_mode & 0o777 == 0o600, name
        assert (root / "run/orion").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_a_link_in_the_place_of_a_lock_leads_nowhere(root: Path) -> None:
    (root / "elsewhere").write_text("")
    (root / "lock").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        open_lock(root / "lock")
    assert (root / "elsewhere").stat().st_mode & 0o777 != 0o600


@pytest.mark.parametrize("name", LOCKS)
def test_no_wait_for_a_lock_is_endless(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "LOCK_WAIT_S", 0.0)
    monkeypatch.setattr(host_certificate, "LOCK_WAIT_S", 0.0)
    take = LOCKS[name]
    take(root)
    with held_by_another(root / name), pytest.raises(RequestRefused, match="try again"):
        take(root)
    take(root)
