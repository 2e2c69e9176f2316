"""Removing directory trees as root where a renter may change them meanwhile.

No step follows a link or a path that a renter may change: each goes from an open directory to an entry in it (openat
with O_NOFOLLOW).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orion_worker.system.files import closing

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_entry(folder: int, name: str, expected: os.stat_result | None = None) -> int:
    """Remove one entry of an open directory with all that is in it; return the number of entries removed.

    Where `expected` is given, a directory is removed only if it still is the one that was looked at.
    """
    if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
        return _remove_tree(folder, name, expected)
    os.unlink(name, dir_fd=folder)
    return 1


def remove_tree(place: Path) -> None:
    """Remove a directory of root's with all that is in it, if it is there."""
    with suppress(FileNotFoundError), closing(os.open(place.parent, OPEN_FOLDER)) as folder:
        remove_entry(folder, place.name)


def _remove_tree(parent: int, name: str, expected: os.stat_result | None) -> int:
    """Remove a directory of any depth and size. Inner ones are moved to the top, so that two are open at a time."""
    removed = 0
    with _shut(parent, name) as top:
        if expected and not os.path.samestat(os.fstat(top), expected):
            return 0  # another renter has put something else in its place
        prefix = os.urandom(8).hex()  # `secrets` would cost each call of this program 4 ms
        while True:
            files, waiting = _clear(top, top, prefix)
            removed += files
            if not waiting:
                break
            while waiting:
                each = waiting.pop()
                with _shut(top, each) as folder:
                    files, inner = _clear(folder, top, prefix)
                os.rmdir(each, dir_fd=top)
                removed += files + 1
                waiting += inner
    os.rmdir(name, dir_fd=parent)
    return removed + 1


def _clear(folder: int, top: int, prefix: str) -> tuple[int, list[str]]:
    """Unlink all files of an open directory and move its directories to the top; return how many, and the new names.

    `prefix` begins the new names, and no other name in the tree: a renter cannot guess it.
    """
    files, moved = 0, []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=folder)
                files += 1
            elif not entry.name.startswith(prefix):
                moved.append(f"{prefix}{os.urandom(8).hex()}")
                os.rename(entry.name, moved[-1], src_dir_fd=folder, dst_dir_fd=top)
    return files, moved


@contextmanager
def _shut(parent: int, name: str) -> Iterator[int]:
    """Give a directory opened by root and shut to all others, whatever its mode or access list was."""
    with closing(os.open(name, OPEN_FOLDER, dir_fd=parent)) as folder:
        os.fchmod(folder, 0o700)
        yield folder
