"""Scans of a home: its entries at one time, what changed between two scans, and which files are doubtful in one."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import stat
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orion_worker.records import RequestRefused
from orion_worker.system import trees

FIND = ("/usr/bin/find", ".", "-xdev", "-printf", r"%i %n %s %m %T@ %C@ %y %U %p\0%i %b %s\0")
"""The command of a scan, which writes two records for each entry. The number of blocks is not in the first, because it
may change without a change of the entry, as when the kernel writes to the disk."""
BLOCK_BYTES = 4096
"""The least bytes that an entry counts for, as in the manager's domain/snapshots.py."""
RACY_S = 0.02
"""Seconds before a scan within which a change of a file may have got the same ctime as a change after the scan."""
LINE_BYTES = 190
"""Bytes of a scan for each entry that a home may hold, on average: a limit of the memory that a scan takes."""
LARGEST_HASHED = 64 << 20
"""Bytes of the largest doubtful file that is compared by its content."""
CHUNK = 8 << 20


@dataclass(frozen=True)
class Scan:
    """The entries of a home at one time."""

    lines: frozenset[bytes]
    """The first record of each entry, as FIND writes it."""
    at: float
    """The Unix time at which the scan began."""
    sizes: bytes = b""
    """The second records, one line each: the inode, the blocks of 512 bytes, and the size."""


@dataclass(frozen=True, kw_only=True)
class HomeEntry:
    """An entry of a home as a scan found it: `size` in bytes, its ctime `changed_at` in Unix seconds."""

    inode: int
    size: int
    changed_at: float
    kind: bytes
    """The letter of find's %y: f, d, l, p, s, b or c."""
    path: bytes


def parse_entry(line: bytes) -> HomeEntry:
    inode, _, size, _, _, changed_at, kind, _, path = line.split(b" ", 8)
    return HomeEntry(inode=int(inode), size=int(size), changed_at=float(changed_at), kind=kind, path=path)


def path_of(line: bytes) -> bytes:
    return line.split(b" ", 8)[8]


def scan(most_entries: int, deadline: float, strict: bool) -> Scan:
    """Return a scan of the current directory. `deadline`: monotonic seconds. `strict`: no process runs in it.

    Raise RequestRefused for more than `most_entries` entries, for names that are too long altogether, and, if strict,
    for entries that cannot be read.
    """
    at, pipe = time.time(), subprocess.PIPE
    content, records = bytearray(), 0
    with subprocess.Popen(FIND, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env={"LC_ALL": "C"}) as find:
        assert find.stdout and find.stderr  # noqa: S101, PT018 - they are pipes
        os.set_blocking(find.stderr.fileno(), False)
        try:
            while part := _read_by(deadline, find.stdout.fileno()):
                content += part
                records += part.count(b"\0")
                if records > 2 * most_entries:
                    raise RequestRefused("over_limit", f"its home holds more than {most_entries} files and directories")
                if len(content) > LINE_BYTES * most_entries + (1 << 20):
                    raise RequestRefused("over_limit", "the names of the files in its home are too long altogether")
                with suppress(BlockingIOError):
                    os.read(find.stderr.fileno(), 1 << 16)  # so that find never blocks on a full pipe
            status = find.wait()
        finally:
            find.kill()
    if strict and status:
        raise RequestRefused("failed", "its home cannot be scanned")
    found = bytes(content).split(b"\0")[:-1]
    return Scan(frozenset(found[::2]), at, b"\n".join(found[1::2]))


def _read_by(deadline: float, descriptor: int) -> bytes:
    """Return the next bytes, empty at the end. Raise RequestRefused if none come by `deadline`, monotonic seconds."""
    left_s = deadline - time.monotonic()
    if left_s < 0 or not select.select([descriptor], [], [], left_s)[0]:
        raise RequestRefused("timed_out", "scanning its home took longer than it may")
    return os.read(descriptor, 1 << 20)


def size_of(of: Scan) -> int:
    """Return the bytes that a home counts for, as the manager counts a snapshot (`counted` of domain/snapshots.py).

    An entry of any kind counts for its blocks or for its size with holes, whichever is more, and for BLOCK_BYTES at
    least. A file with several names counts once.
    """
    entries = map(bytes.split, set(of.sizes.splitlines()))
    return sum(max(512 * int(blocks), int(size), BLOCK_BYTES) for _, blocks, size in entries)


def closed_folders(of: Scan) -> dict[bytes, int]:
    """Return by path the modes of directories that their owner may write to but not list or enter.

    rsync adds rights to such a directory to fill it, and leaves them there.
    """
    found = {}
    for line in of.lines:
        _, _, _, mode, _, _, kind, _, path = line.split(b" ", 8)
        if kind == b"d" and int(mode, 8) & 0o200 and int(mode, 8) & 0o500 != 0o500:
            found[path] = int(mode, 8)
    return found


def restore_modes(home: int, folders: Mapping[bytes, int], uid: int) -> None:
    """Give these directories of a home their modes, deeper ones first. Skip those that are missing."""
    for path, mode in sorted(folders.items(), key=lambda each: -each[0].count(b"/")):
        with suppress(OSError), _opened_below(home, path.split(b"/")[1:]) as folder:
            if os.fstat(folder).st_uid == uid:
                os.fchmod(folder, mode)


@contextmanager
def opened(path: bytes | Path, flags: int, dir_fd: int | None = None, mode: int = 0o777) -> Iterator[int]:
    """Give the descriptor of an opened file or directory, and close it at the end."""
    descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _opened_below(home: int, names: Iterable[bytes]) -> Iterator[int]:
    """Give the directory that these names lead to, one below the other, opened without following a link."""
    folder = os.dup(home)
    try:
        for name in names:
            if name == b"..":
                raise FileNotFoundError(errno.ENOENT, "not below the home")
            inner = os.open(name, trees.OPEN_FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def changed_entries(now: Scan, before: Scan) -> dict[bytes, HomeEntry]:
    """Return by path the entries that are new or differ from before."""
    return {found.path: found for found in map(parse_entry, now.lines - before.lines)}


def is_racy(found: HomeEntry, at: float) -> bool:
    """Return whether a change after a scan at that time could have left the entry's line as it is."""
    return found.kind == b"f" and found.changed_at > at - RACY_S


def racy_entries(of: Scan) -> list[HomeEntry]:
    """Return the entries of a scan that are racy at its own time."""
    since = of.at - RACY_S
    young = [parse_entry(line) for line in of.lines if float(line.split(b" ", 6)[5]) > since]
    return [found for found in young if is_racy(found, of.at)]


def topmost(paths: Collection[bytes], replaced: Collection[bytes]) -> list[bytes]:
    """Return the paths that are below no other of them, and below no path that has been replaced by a file."""
    covers = {*paths, *replaced}
    return [path for path in paths if not any(above in covers for above in folders_above(path))]


def folders_above(path: bytes) -> Iterator[bytes]:
    """Yield the directories above a path, nearest first."""
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        yield path


def mapped_inodes(uid: int) -> frozenset[int]:
    """Return the inodes of files that a process of this uid has mapped shared and writable.

    The kernel shows the maps of a process to its own uid, so that becomes the effective uid of this process meanwhile.
    Its real uid stays root's, so the renter cannot signal it.
    """
    before = os.geteuid(), os.getegid()
    os.setegid(uid)
    os.seteuid(uid)
    try:
        return _mapped(uid)
    finally:
        os.seteuid(before[0])
        os.setegid(before[1])


def _mapped(uid: int) -> frozenset[int]:
    found = set()
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with suppress(OSError):
            if place.stat().st_uid != uid:
                continue
            for line in (place / "maps").read_bytes().splitlines():
                fields = line.split(None, 5)
                if len(fields) > 5 and fields[1][1:2] == b"w" and fields[1][3:4] == b"s":
                    found.add(int(fields[4]))
    return frozenset(found)


def digest(descriptor: int) -> str:
    """Return the SHA-256 of an open file, from its beginning; empty for one that is too large to be compared."""
    if os.fstat(descriptor).st_size > LARGEST_HASHED:
        return ""
    found, position = hashlib.sha256(), 0
    while part := os.pread(descriptor, CHUNK, position):
        found.update(part)
        position += len(part)
    return found.hexdigest()


def digest_at(home: int, path: bytes, uid: int) -> str:
    """Return the SHA-256 of a file in a home; empty if it cannot be compared."""
    *folders, name = path.split(b"/")[1:]
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME
    with suppress(OSError), _opened_below(home, folders) as folder, opened(name, flags, folder) as descriptor:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_uid == uid:
            return digest(descriptor)
    return ""
