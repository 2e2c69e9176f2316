"""The ballast: a file beside the database that is deleted when the disk is full, so that takeovers can be committed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

CHECK_EVERY_S = 30.0
_FULL, _IO_ERROR = 13, 10
"""SQLITE_FULL and SQLITE_IOERR (sqlite.org/rescode.html); the low byte of an extended code is its primary one."""


def database_file(url: str) -> Path | None:
    """Return the file of a database; None if the database is not a file."""
    parsed = make_url(url)
    in_file = parsed.get_backend_name() == "sqlite" and parsed.database not in {None, "", ":memory:"}
    return Path(str(parsed.database)) if in_file else None


class Ballast:
    """The ballast file. Only the store's writer thread may use it."""

    def __init__(self, file: Path, size_bytes: int) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._checked_at = float("-inf")

    @staticmethod
    def of(url: str, size_bytes: int) -> Ballast | None:
        """Return the ballast of a database; None if the database is not a file, or the size is 0."""
        file = database_file(url)
        return Ballast(Path(f"{file}.ballast"), size_bytes) if file and size_bytes else None

    def release(self, error: OperationalError) -> bool:
        """Delete the file if the error says that the disk is full; return whether there is room now."""
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code not in {_FULL, _IO_ERROR} or not self._file.exists():
            return False
        self._file.unlink()
        self._checked_at = time.monotonic()
        return True

    def allocate(self) -> None:
        """Make the file if it is missing and as much room again stays free. Check at most once in CHECK_EVERY_S."""
        if time.monotonic() < self._checked_at + CHECK_EVERY_S:
            return
        self._checked_at = time.monotonic()
        room = os.statvfs(self._file.parent)
        if self._file.exists() or room.f_bavail * room.f_frsize < 2 * self._size_bytes:
            return
        partial = self._file.with_name(f"{self._file.name}.partial")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError:  # no inode is left, for example: the commit that follows does not need the ballast
            return
        try:
            os.posix_fallocate(descriptor, 0, self._size_bytes)
        except OSError:
            partial.unlink()  # the room was used up meanwhile
        else:
            partial.replace(self._file)
        finally:
            os.close(descriptor)
