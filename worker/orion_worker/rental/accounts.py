"""The account files /etc/passwd, /etc/group and /etc/shadow: one line per rental, replaced whole or not at all.

A killed `useradd` leaves a lock file; a writer killed here leaves the old files. The lock is the one that shadow's own
tools take (lckpwdf(3)), which ends with its holder.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from orion_worker.records import locked_or_refused
from orion_worker.system.files import write_atomically

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
                _replace(etc / name, [*_without(name, lines, username), line])
                changed = True
    return changed


def remove(etc: Path, username: str, uid: int) -> bool:
    """Remove all lines with this name or this uid; return whether anything was written."""
    changed = False
    with _locked(etc):
        for name in reversed(FILES):
            lines = _read(etc / name)
            others = _without(name, lines, username, uid)
            if others != lines:
                _replace(etc / name, others)
                changed = True
    return changed


def found(etc: Path, username: str, uid: int) -> list[str]:
    """Return the files that hold a line with this name or uid. Each is read once: others may replace it meanwhile."""
    lines = {name: _read(etc / name) for name in FILES}
    return [str(etc / name) for name in FILES if _without(name, lines[name], username, uid) != lines[name]]


def taken_by_another(etc: Path, username: str, uid: int) -> bool:
    """Return whether the name has another uid, or the uid another name."""
    lines = (line.split(":") for line in _read(etc / "passwd"))
    return any((fields[0] == username) != (fields[2] == str(uid)) for fields in lines)


def _without(name: str, lines: Iterable[str], username: str, uid: int | None = None) -> list[str]:
    """Return the lines of the file `name` that have neither this name nor this uid."""
    field = None if uid is None else _UID_FIELD.get(name)
    each = ((line, line.split(":")) for line in lines)
    return [line for line, fields in each if fields[0] != username and (field is None or fields[field] != str(uid))]


def _read(file: Path) -> list[str]:
    return file.read_text().splitlines()


def _replace(file: Path, lines: list[str]) -> None:
    status, text = file.stat(), "".join(f"{line}\n" for line in lines)
    write_atomically(file, text, status.st_mode & 0o777, status.st_gid, status.st_uid)


def _locked(etc: Path) -> AbstractContextManager[int]:
    reason = "another program holds the lock of the account files"
    return locked_or_refused(etc / ".pwd.lock", LOCK_WAIT_S, reason, fcntl.lockf)
