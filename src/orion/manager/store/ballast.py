"""A file beside the database that can be thrown away: a full disk must not stop a takeover, which is a few commits."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

LOOK_EVERY_S = 30.0
_FULL, _IO_ERROR = 13, 10
"""SQLITE_FULL and SQLITE_IOERR (sqlite.org/rescode.html); the low byte of an extended code is its primary one."""


class Ballast:
    """Not safe for several threads: the store's one writer has it."""

    def __init__(self, file: Path, size_bytes: int) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._looked_at = float("-inf")

    @staticmethod
    def of(url: str, size_bytes: int) -> Ballast | None:
        """None where the database is no file, or nothing is to be kept."""
        parsed = make_url(url)
        in_file = parsed.get_backend_name() == "sqlite" and parsed.database not in {None, "", ":memory:"}
        return Ballast(Path(f"{parsed.database}.ballast"), size_bytes) if in_file and size_bytes else None

    def drop(self, error: OperationalError) -> bool:
        """Make room, if that is what the error is about and there is something to drop."""
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code not in {_FULL, _IO_ERROR} or not self._file.exists():
            return False
        self._file.unlink()
        self._looked_at = time.monotonic()
        return True

    def take(self) -> None:
        """Have it there, as long as that leaves as much again; looks again only every LOOK_EVERY_S."""
        if time.monotonic() < self._looked_at + LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        room = os.statvfs(self._file.parent)
        if self._file.exists() or room.f_bavail * room.f_frsize < 2 * self._size_bytes:
            return
        partial = self._file.with_name(f"{self._file.name}.partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._size_bytes)
        except OSError:
            partial.unlink()  # somebody else took the room meanwhile
        else:
            partial.replace(self._file)
        finally:
            os.close(descriptor)
