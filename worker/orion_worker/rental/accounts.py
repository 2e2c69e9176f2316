"""The account files /etc/passwd, /etc/group and /etc/shadow: one line per rental, replaced whole or not at all.

`useradd` starts several programs and leaves a lock file behind when it is killed; here a killed writer leaves
the old file. The lock is the one that shadow's own tools take (lckpwdf(3)), which dies with its holder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orion_worker.records import RequestRefused
from orion_worker.system.locks import got_record_lock, opened_lock

FILES = ("group", "passwd", "shadow")
"""The account files in the order of writing: an account can be used only when its last line is there."""
LOCK_WAIT_S = 10.0

_UID_FIELD = {"passwd": 2, "group": 2}


def lines_for(username: str, uid: int) -> dict[str, str]:
    """Return the account's line in each file. The password `*` matches nothing and, unlike `!`, lets a key log in."""
    return {
        "group": f"{username}:x:{uid}:",
        "passwd": f"{username}:x:{uid}:{uid}::/home/{username}:/bin/bash",
        "shadow": f"{username}:*:::::::",
    }


def add(etc: Path, username: str, uid: int) -> bool:
    """Make the account with this uid, which is its gid too; return whether anything was written."""
    changed = False
    with _locked(etc):
        for name, line in lines_for(username, uid).items():
            lines = _read(etc / name)
            if line not in lines:
                others = [each for each in lines if not _is_of(each, username)]
                _replace(etc / name, [*others, line])
                changed = True
    return changed


def remove(etc: Path, username: str, uid: int) -> bool:
    """Remove all lines with this name or this uid; return whether anything was written."""
    changed = False
    with _locked(etc):
        for name in reversed(FILES):
            lines = _read(etc / name)
            others = [each for each in lines if not _is_of(each, username, uid, _UID_FIELD.get(name))]
            if others != lines:
                _replace(etc / name, others)
                changed = True
    return changed


def found(etc: Path, username: str, uid: int) -> list[str]:
    """Return the files that hold a line with this name or uid."""
    return [
        str(etc / name)
        for name in FILES
        if any(_is_of(each, username, uid, _UID_FIELD.get(name)) for each in _read(etc / name))
    ]


def taken_by_another(etc: Path, username: str, uid: int) -> bool:
    """Return whether the name has another uid, or the uid another name."""
    for line in _read(etc / "passwd"):
        name, _, number = line.split(":")[:3]
        if (name == username) != (number == str(uid)):
            return True
    return False


def _is_of(line: str, username: str, uid: int | None = None, uid_field: int | None = None) -> bool:
    fields = line.split(":")
    return fields[0] == username or (uid_field is not None and fields[uid_field] == str(uid))


def _read(file: Path) -> list[str]:
    return file.read_text().splitlines()


def _replace(file: Path, lines: list[str]) -> None:
    status = file.stat()
    new = file.with_name(f".{file.name}.orion")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        os.fchown(descriptor, status.st_uid, status.st_gid)
        os.fchmod(descriptor, status.st_mode & 0o777)
        stream.write("".join(f"{line}\n" for line in lines))
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)


@contextmanager
def _locked(etc: Path) -> Iterator[None]:
    with opened_lock(etc / ".pwd.lock") as lock:
        if not got_record_lock(lock, LOCK_WAIT_S):
            raise RequestRefused("busy", "another program holds the lock of the account files; try again")
        yield
