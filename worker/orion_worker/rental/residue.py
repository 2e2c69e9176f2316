"""What a renter can leave behind in files and in System V IPC: finding it and removing it, as root, without trust.

Nothing here follows a link or a path that a renter may change meanwhile: each step goes from an open directory to
an entry in it (openat with O_NOFOLLOW). The renter's own processes are dead by then; a neighbour's may not be.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orion_worker.system.trees import OPEN_FOLDER, remove_entry

DEEPEST = 200
"""Directories of others are searched so deep and no deeper: one open descriptor for each level."""
KERNEL_VIEWS = frozenset({
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl",
    "nsfs", "proc", "pstore", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs",
})  # fmt: skip
"""Not places where anybody can put a file. (A terminal in devpts goes with the process that holds it.)"""
NAMED_PLACES = (
    "home",
    "var/mail",
    "var/spool/mail",
    "var/spool/cron",
    "var/spool/cron/crontabs",
    "var/spool/cron/atjobs",
    "var/spool/at",
    "var/log/lastlog",
    "etc/orion/keys",
    "etc/orion/locked",
)
"""Where something may bear the renter's name whoever owns it: home, mail, cron, at, last log-in, keys."""
_IPC_DESTROYED = 0o1000


@dataclass(frozen=True)
class ResidueEntry:
    """An entry of an open directory. `theirs`: owned by the uid; else only its group is the renter's."""

    folder: int
    name: str
    status: os.stat_result
    path: str
    uid: int
    """Whose it is, of those that were looked for."""
    theirs: bool


def writable_mounts(mountinfo: str) -> list[str]:
    """Mount points on which somebody could write a file, from the text of /proc/self/mountinfo (see proc(5))."""
    points: dict[str, None] = {}
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        point, options = mount.split()[4:6]
        if source.split()[0] not in KERNEL_VIEWS and "ro" not in options.split(","):
            points[point.encode().decode("unicode_escape")] = None
    return [point for point in points if Path(point).is_dir()]


def find_owned(root: str, uids: Collection[int], unsearched: list[str]) -> Iterator[ResidueEntry]:
    """All that has one of these uids, or such a gid, on the file system of `root`; what is below a directory of theirs
    is not listed.

    `unsearched` receives the directories of others that are too deep.
    """
    top = os.open(root, OPEN_FOLDER)
    try:
        yield from _search(top, root.rstrip("/"), uids, os.fstat(top).st_dev, unsearched, 0)
    finally:
        os.close(top)


def remove(found: ResidueEntry) -> int:
    """Remove what is theirs and return the number of entries; give back what only has their group to its owner.

    What resists raises nothing: the next search finds it again.
    """
    try:
        if found.theirs:
            return remove_entry(found.folder, found.name, found.status)
        _give_back(found)
    except OSError:
        pass
    return 0


def find_named(root: Path, username: str) -> list[Path]:
    """What bears the renter's name in the places where a name counts."""
    places = (root / place / username for place in NAMED_PLACES)
    return [place for place in places if os.path.lexists(place)]


def find_ipc(uid: int) -> list[tuple[str, int]]:
    """(kind, id) of the shared memory, semaphores and message queues that this uid owns or made."""
    found = []
    for kind in ("shm", "sem", "msg"):
        with suppress(FileNotFoundError):
            table = Path("/proc/sysvipc", kind).read_text()
            found += [(kind, number) for number in ipc_ids_of(table, uid)]
    return found


def ipc_ids_of(table: str, uid: int) -> list[int]:
    """The ids in the text of one of /proc/sysvipc/*. What only waits for a neighbour to let go is gone already."""
    header, *rows = (line.split() for line in table.splitlines() if line.strip())
    found = []
    for row in rows:
        cell = dict(zip(header, row, strict=False))
        gone = int(cell["perms"], 8) & _IPC_DESTROYED
        if str(uid) in (cell["uid"], cell["cuid"]) and not gone:
            found.append(int(row[1]))
    return found


def remove_ipc(uid: int) -> int:
    """Done as the renter: the kernel wants the owner here, or a capability that a worker has not."""
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
                yield ResidueEntry(folder, entry.name, status, f"{path}/{entry.name}", uid, theirs)
            if stat.S_ISDIR(status.st_mode) and not theirs and status.st_dev == device:
                inner.append(entry.name)
    if inner and depth == DEEPEST:
        unsearched.append(path)
        return
    for name in inner:
        try:
            child = os.open(name, OPEN_FOLDER, dir_fd=folder)
        except OSError:
            continue  # a neighbour has replaced it meanwhile: what was there is not there any more
        try:
            yield from _search(child, f"{path}/{name}", uids, device, unsearched, depth + 1)
        finally:
            os.close(child)


def _give_back(found: ResidueEntry) -> None:
    """Through a descriptor: by its name, a neighbour could make us change the group of a file of root."""
    if stat.S_ISLNK(found.status.st_mode):
        return
    descriptor = os.open(found.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=found.folder)
    try:
        status = os.fstat(descriptor)
        if os.path.samestat(status, found.status) and status.st_gid == found.status.st_gid:
            os.chown(f"/proc/self/fd/{descriptor}", -1, status.st_uid)
    finally:
        os.close(descriptor)
