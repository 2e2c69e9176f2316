"""Residue: the files and System V IPC objects that a renter can leave behind; root finds and removes them.

No step follows a link or a path that a renter may change meanwhile: each goes from an open directory to an entry in it
(openat with O_NOFOLLOW). The renter's own processes have ended by then, but not those of other renters.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orion_worker.system.files import closing
from orion_worker.system.trees import OPEN_FOLDER, remove_entry

DEEPEST = 200
"""The levels to which directories of other owners are searched: each level keeps one descriptor open."""
KERNEL_VIEWS = frozenset({
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl",
    "nsfs", "proc", "pstore", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs",
})  # fmt: skip
"""File systems in which no file can be created. (A terminal in devpts ends with the process that holds it.)"""
NAMED_PLACES = (
    "home", "var/mail", "var/spool/mail", "var/spool/cron", "var/spool/cron/crontabs", "var/spool/cron/atjobs",
    "var/spool/at", "var/log/lastlog", "etc/orion/keys", "etc/orion/locked",
)  # fmt: skip
"""Directories in which an entry with the renter's name is the renter's, whatever its owner."""
_IPC_DESTROYED = 0o1000


@dataclass(frozen=True, kw_only=True)
class ResidueEntry:
    """An entry that belongs to a renter by its owner or its group. `folder` is its directory, opened."""

    folder: int
    name: str
    status: os.stat_result
    path: str
    uid: int
    """The renter's uid."""


def writable_mounts(mountinfo: str) -> list[str]:
    """Return the mount points on which files can be written, from the text of /proc/self/mountinfo (see proc(5))."""
    points: dict[str, None] = {}
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        point, options = mount.split()[4:6]
        if source.split()[0] not in KERNEL_VIEWS and "ro" not in options.split(","):
            points[point.encode().decode("unicode_escape")] = None
    return [point for point in points if Path(point).is_dir()]


def find_owned(root: str, uids: Collection[int], unsearched: list[str]) -> Iterator[ResidueEntry]:
    """Yield the entries with one of these uids or gids on the file system of `root`, but none below one of their own.

    Directories of other owners that are too deep to be searched are appended to `unsearched`.
    """
    with closing(os.open(root, OPEN_FOLDER)) as top:
        yield from _search(top, root.rstrip("/"), uids, os.fstat(top).st_dev, unsearched, 0)


def remove(found: ResidueEntry) -> int:
    """Remove an entry that the renter owns, and return the number of entries that this removed.

    An entry that only has the renter's group gets its owner's group instead. A failure raises nothing: the next search
    finds the entry again.
    """
    with suppress(OSError):
        if found.status.st_uid == found.uid:
            return remove_entry(found.folder, found.name, found.status)
        _give_back(found)
    return 0


def find_named(root: Path, username: str) -> list[Path]:
    places = (root / place / username for place in NAMED_PLACES)
    return [place for place in places if os.path.lexists(place)]


def find_ipc(uid: int) -> list[tuple[str, int]]:
    """Return (kind, id) of the shared memory, semaphores and message queues that this uid owns or created."""
    found = []
    for kind in ("shm", "sem", "msg"):
        with suppress(FileNotFoundError):
            table = Path("/proc/sysvipc", kind).read_text()
            found += [(kind, number) for number in ipc_ids_of(table, uid)]
    return found


def ipc_ids_of(table: str, uid: int) -> list[int]:
    """Return the ids of this uid's objects in the text of one of /proc/sysvipc/*.

    Shared memory that is destroyed, and only waits until another process detaches it, is left out.
    """
    header, *rows = (line.split() for line in table.splitlines() if line.strip())
    cells = [dict(zip(header, row, strict=False)) | {"id": row[1]} for row in rows]
    theirs = [each for each in cells if str(uid) in (each["uid"], each["cuid"])]
    return [int(each["id"]) for each in theirs if not int(each["perms"], 8) & _IPC_DESTROYED]


def remove_ipc(uid: int) -> int:
    """Remove the uid's IPC objects and return their number.

    The kernel lets the owner do this, or a capability that a worker does not have; so it is done with the renter's uid.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    found = find_ipc(uid)
    os.seteuid(uid)
    try:
        for kind, number in found:
            if kind == "sem":
                libc.semctl(number, 0, 0)
            else:
                getattr(libc, f"{kind}ctl")(number, 0, None)
    finally:
        os.seteuid(os.getuid())
    return len(found)


def _search(
    folder: int, path: str, uids: Collection[int], device: int, unsearched: list[str], depth: int
) -> Iterator[ResidueEntry]:
    inner = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            theirs = status.st_uid in uids
            if theirs or status.st_gid in uids:
                uid = status.st_uid if theirs else status.st_gid
                yield ResidueEntry(folder=folder, name=entry.name, status=status, path=f"{path}/{entry.name}", uid=uid)
            if stat.S_ISDIR(status.st_mode) and not theirs and status.st_dev == device:
                inner.append(entry.name)
    if inner and depth == DEEPEST:
        unsearched.append(path)
        return
    for name in inner:
        try:
            child = os.open(name, OPEN_FOLDER, dir_fd=folder)
        except OSError:
            continue  # another renter has replaced the directory meanwhile, so it is gone
        with closing(child):
            yield from _search(child, f"{path}/{name}", uids, device, unsearched, depth + 1)


def _give_back(found: ResidueEntry) -> None:
    """Give an entry its owner's group, through a descriptor: by name, another renter could swap in a file of root's."""
    if stat.S_ISLNK(found.status.st_mode):
        return
    with closing(os.open(found.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=found.folder)) as descriptor:
        status = os.fstat(descriptor)
        if os.path.samestat(status, found.status) and status.st_gid == found.status.st_gid:
            os.chown(f"/proc/self/fd/{descriptor}", -1, status.st_uid)
