"""Locks between the programs of a worker, on files that root alone can open.

flock(2) and fcntl(2) ask for no right but to have opened the file, so an account that can read a lock's file can hold
the lock for ever. Each file therefore gets the mode 0600, even if it is there already; and each wait has an end.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orion_worker.system.files import closing

Lock = Callable[[int, int], object]
"""fcntl.flock, or fcntl.lockf, which shadow's own tools take (lckpwdf(3))."""
LOOK_EVERY_S = 0.005


def open_lock(file: Path) -> int:
    """Return the descriptor of the lock's file, which root alone can open from now on. Raise OSError for a link."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


@contextmanager
def opened_lock(file: Path) -> Iterator[int]:
    """Give the descriptor of the lock's file, as `open_lock` does, and close it, which frees the lock, at the end."""
    with closing(open_lock(file)) as descriptor:
        yield descriptor


def got_lock(descriptor: int, wait_s: float, lock: Lock = fcntl.flock) -> bool:
    """Take the lock of an open file, with flock or lockf; return whether it was free within that time."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # fcntl(2): "EACCES or EAGAIN"
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_EVERY_S)
        else:
            return True
