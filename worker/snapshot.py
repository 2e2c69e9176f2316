"""What changed in a home since its last snapshot, and setting that aside on the worker as it was at one moment.

A scan lists every entry of a home with its inode, size, mode and times: the kernel sets the time of change of an
inode (ctime) at each write, and no program can set it. Two scans so tell what changed between them. Two kinds of files
may change without a new ctime, and count as doubtful: one whose ctime is as young as the scan (the kernel's clock has a
granularity), and one that a program has mapped for writing. A doubtful file is copied again, or its content compared.

What changed is copied into a tree beside the homes, which no renter reaches. The tree is written as `rsync
--fake-super` writes: owner, mode and access list of an entry stand in its attributes. So an unprivileged rsync of an
account of its own can send the tree, and the renter can neither stop that rsync nor shut a file from it.

Everything here is done by root, whom the renter cannot shut out. So every step goes from an open directory to an entry
in it without following a link, and the content of a file is read only after its owner has been looked at.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import stat
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import traces
from ledger import Refused

FIND = ("/usr/bin/find", ".", "-xdev", "-printf", r"%i %n %s %m %T@ %C@ %y %U %p\0%i %b %s\0")
"""Two records for each entry. Its blocks are no part of the first: they may change long after the entry has, as when
the kernel writes to the disk."""
BLOCK_BYTES = 4096
"""The least that an entry counts for, as domain/copies.py counts: a directory has a block on most disks."""
RACY_S = 0.02
"""Seconds before a scan within which a change of a file may have got the same ctime as a change after the scan."""
LINE_BYTES = 190
"""Bytes of a scan for each entry that a home may hold, on average: a limit of the memory that a scan takes."""
LONGEST_PATH = 4000
"""Bytes of the longest path that rsync carries."""
LARGEST_HASHED = 64 << 20
"""Bytes of the largest doubtful file that is compared by its content."""
CHUNK = 8 << 20
FICLONE = 0x40049409
"""ioctl_ficlone(2): a copy that shares its blocks, where the file system can."""
STAT = "user.rsync.%stat"
LISTS = {"system.posix_acl_access": "user.rsync.%aacl", "system.posix_acl_default": "user.rsync.%dacl"}
RESERVED = "user.rsync.%"
"""The beginning of the names of attributes that rsync keeps for itself."""
NAMES_SHOWN = 20


@dataclass(frozen=True)
class Scan:
    """The entries of a home, one line each, and the Unix time at which the scan began."""

    lines: frozenset[bytes]
    at: float
    sizes: bytes = b""
    """The inode, the blocks of 512 bytes and the size of each entry, one line each."""


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds: the scan of its home, and what that scan cannot vouch for."""

    scan: Scan
    doubtful: dict[bytes, str] = field(default_factory=dict)
    """The SHA-256 of each doubtful file as it is in the snapshot, by path; empty for one too large to compare."""
    missing: dict[bytes, str] = field(default_factory=dict)
    """What the snapshot lacks of the home, wholly or in part: the reason by path."""


@dataclass(frozen=True)
class Entry:
    inode: int
    size: int
    changed_at: float
    kind: bytes
    """As find's %y: f, d, l, p, s, b or c."""
    path: bytes


def entry(line: bytes) -> Entry:
    inode, _, size, _, _, changed_at, kind, _, path = line.split(b" ", 8)
    return Entry(int(inode), int(size), float(changed_at), kind, path)


def path_of(line: bytes) -> bytes:
    return line.split(b" ", 8)[8]


def scan(most_entries: int, last_moment: float, strict: bool) -> Scan:
    """Return a scan of the current directory. `last_moment`: monotonic seconds. `strict`: nothing runs in it.

    Raise Refused for more than `most_entries` entries, for names that are too long altogether, and, if strict, for what
    cannot be looked at.
    """
    at = time.time()
    find = subprocess.Popen(
        FIND, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"LC_ALL": "C"}
    )
    assert find.stdout and find.stderr  # noqa: S101, PT018 - they were asked for
    os.set_blocking(find.stderr.fileno(), False)
    content = bytearray()
    records = 0
    try:
        while part := _read_by(last_moment, find.stdout.fileno()):
            content += part
            records += part.count(b"\0")
            if records > 2 * most_entries:
                raise Refused("over_limit", f"its home holds more than {most_entries} files and directories")
            if len(content) > LINE_BYTES * most_entries + (1 << 20):
                raise Refused("over_limit", "the names of the files in its home are too long altogether")
            with suppress(BlockingIOError):
                os.read(find.stderr.fileno(), 1 << 16)  # so that it never waits to complain
        status = find.wait()
    finally:
        find.kill()
        find.wait()
        find.stdout.close()
        find.stderr.close()
    if strict and status:
        raise Refused("failed", "its home cannot be looked through")
    found = bytes(content).split(b"\0")[:-1]
    return Scan(frozenset(found[::2]), at, b"\n".join(found[1::2]))


def _read_by(last_moment: float, descriptor: int) -> bytes:
    """Return what is said next, empty at the end. Raise Refused if nothing is until that moment (monotonic seconds)."""
    left_s = last_moment - time.monotonic()
    if left_s < 0 or not select.select([descriptor], [], [], left_s)[0]:
        raise Refused("timed_out", "looking through its home took longer than it may")
    return os.read(descriptor, 1 << 20)


def size_of(of: Scan) -> int:
    """Return the bytes for which a home counts, as the manager counts a copy of it (`counted` of domain/copies.py).

    An entry of any kind counts for its blocks or for its size with holes, whichever is more, and for BLOCK_BYTES at
    least. A file with several names counts once.
    """
    entries = map(bytes.split, set(of.sizes.splitlines()))
    return sum(max(512 * int(blocks), int(size), BLOCK_BYTES) for _, blocks, size in entries)


def odd_folders(of: Scan) -> dict[bytes, int]:
    """Return the modes of directories that their owner may write to and not list or enter, by path.

    rsync opens such a directory to fill it, and does not close it again.
    """
    found = {}
    for line in of.lines:
        _, _, _, mode, _, _, kind, _, path = line.split(b" ", 8)
        if kind == b"d" and int(mode, 8) & 0o200 and int(mode, 8) & 0o500 != 0o500:
            found[path] = int(mode, 8)
    return found


def close_folders(home: int, folders: Mapping[bytes, int], uid: int) -> None:
    """Give these directories of a home their modes, those that lie deeper first. What is not there is passed over."""
    for path, mode in sorted(folders.items(), key=lambda each: -each[0].count(b"/")):
        with suppress(OSError):
            folder = _open_below(home, path.split(b"/")[1:])
            try:
                if os.fstat(folder).st_uid == uid:
                    os.fchmod(folder, mode)
            finally:
                os.close(folder)


def _open_below(home: int, names: Iterable[bytes]) -> int:
    folder = os.dup(home)
    try:
        for name in names:
            if name == b"..":
                raise FileNotFoundError(errno.ENOENT, "not below the home")
            inner = os.open(name, traces.OPEN_FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
    except BaseException:
        os.close(folder)
        raise
    return folder


def fresh(now: Scan, before: Scan) -> dict[bytes, Entry]:
    """Return what is new or other than before, by path."""
    return {found.path: found for found in map(entry, now.lines - before.lines)}


def gone(now: Scan, before: Scan) -> set[bytes]:
    """Return the paths of what was there before, and is not there any more under that name."""
    others = before.lines - now.lines
    if not others:
        return set()
    return {path_of(line) for line in others} - {path_of(line) for line in now.lines - before.lines}


def racy(found: Entry, at: float) -> bool:
    """Return whether a change after a scan at that time could have left the entry's line as it is."""
    return found.kind == b"f" and found.changed_at > at - RACY_S


def racy_in(of: Scan) -> list[Entry]:
    """Return the entries of a scan that are racy at its own time."""
    since = of.at - RACY_S
    return [found for line in of.lines if float(line.split(b" ", 6)[5]) > since and racy(found := entry(line), of.at)]


def topmost(paths: Collection[bytes], replaced: Collection[bytes]) -> list[bytes]:
    """Return those paths that lie below no other of them, and below nothing that is no directory any more."""
    covers = {*paths, *replaced}
    return [path for path in paths if not any(above in covers for above in _above(path))]


def _above(path: bytes) -> Iterator[bytes]:
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        yield path


def mapped_inodes(uid: int) -> frozenset[int]:
    """Return the inodes of files that a process of this uid has mapped shared and writable.

    The kernel shows the maps of a process to its own uid: this process has it meanwhile as its effective one, so that
    no signal of the renter's reaches it.
    """
    before = os.geteuid(), os.getegid()
    os.setegid(uid)
    os.seteuid(uid)
    try:
        return frozenset(_mapped(uid))
    finally:
        os.seteuid(before[0])
        os.setegid(before[1])


def _mapped(uid: int) -> set[int]:
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
    return found


class Aside:
    """Copies of entries of a home in a tree of their own, under the names that they have at home."""

    def __init__(self, home: int, place: Path, uid: int, sender: int) -> None:
        """`home`: its open directory. `place`: made anew. `uid`: the renter's. `sender`: the uid that is to read it."""
        self._home = home
        self._uid = uid
        self.sender = sender
        self.place = place
        self.tree = place / "tree"
        self.missing: dict[bytes, str] = {}
        """Why an entry cannot be carried, by path."""
        self.poorer: dict[bytes, str] = {}
        """Why an entry is carried without some of its attributes, by path."""
        self.vanished: set[bytes] = set()
        """The paths of what was not there any more when it was to be copied."""
        self._times: dict[bytes, tuple[int, int]] = {}
        """The times of the directories, set at the end: each entry that is made in one changes them."""
        self._staged: set[bytes] = set()
        """The paths of what was copied."""
        self._can_clone = True
        self._look: Callable[[], None] = lambda: None
        """Called between two parts of a file; may raise."""
        remove_tree(place)
        self.tree.mkdir(mode=0o700, parents=True)
        for made in (place, self.tree):
            os.chown(made, sender, sender)
        self.top = os.open(self.tree, traces.OPEN_FOLDER)

    def remove(self) -> None:
        """Remove all that was set aside."""
        os.close(self.top)
        remove_tree(self.place)

    def write_list(self, paths: Iterable[bytes]) -> None:
        """Write the list of what rsync is to send; what is in the list and not in the tree is removed there."""
        with (self.place / "list").open("wb") as file:
            file.write(b"\0".join(paths))
            os.fchown(file.fileno(), self.sender, self.sender)

    def keep(self, entries: Iterable[Entry], look: Callable[[], None]) -> int:
        """Copy these as they are now, over what was copied before; return the bytes of the files. `look` may raise."""
        self._attributes(self._home, self.top, os.fstat(self._home), b".")
        self._look = look
        copied = 0
        chain: list[tuple[bytes, int, int]] = []
        written: dict[int, bytes] = {}
        try:
            for each in sorted(entries, key=lambda one: one.path.split(b"/")):
                look()
                for noted in (self.missing, self.poorer):
                    noted.pop(each.path, None)
                self.vanished.discard(each.path)
                try:
                    copied += self._keep(each, chain, written)
                except (FileNotFoundError, NotADirectoryError):
                    self.vanished.add(each.path)
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        self.vanished.add(each.path)
                    elif error.errno in {errno.ENOSPC, errno.EDQUOT}:
                        raise Refused("no_room", "the worker's disk has no room to set aside what changed") from error
                    else:
                        self._cannot(each.path, error.strerror or str(error))
        finally:
            for _, at_home, beside in chain:
                os.close(at_home)
                os.close(beside)
        return copied

    def settle(self, wanted: Collection[bytes]) -> None:
        """Leave in the tree only these paths and the directories above them, with the times that they have at home."""
        above = {folder for path in wanted for folder in _above(path)}
        for path in self._staged - {*wanted, *above}:
            self._clear_path(path)
        for path in sorted(self._times, key=len, reverse=True):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.utime(_relative(path), ns=self._times[path], dir_fd=self.top, follow_symlinks=False)

    def digest(self, path: bytes) -> str:
        """Return the SHA-256 of a file that was copied; empty where it is too large to be compared."""
        try:
            descriptor = os.open(_relative(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.top)
        except OSError:
            return ""
        try:
            return digest(descriptor)
        finally:
            os.close(descriptor)

    def _keep(self, each: Entry, chain: list[tuple[bytes, int, int]], written: dict[int, bytes]) -> int:
        parts = each.path.split(b"/")[1:]
        if len(each.path) > LONGEST_PATH:
            self._cannot(each.path, "its path is too long")
            return 0
        if not parts:
            return 0
        at_home, beside = self._enter(parts[:-1], chain)
        name = parts[-1]
        status = os.stat(name, dir_fd=at_home, follow_symlinks=False)
        if status.st_uid != self._uid:
            self._cannot(each.path, "it belongs to somebody else")
            return 0
        if stat.S_ISDIR(status.st_mode):
            self._keep_folder(each.path, name, at_home, beside)
            return 0
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode) or _is_special(status.st_mode)):
            self._cannot(each.path, "it is a device")
            return 0
        self._times.pop(each.path, None)
        if status.st_ino in written:
            self._link(each.path, name, beside, written[status.st_ino])
            return 0
        self._staged.add(each.path)
        if stat.S_ISLNK(status.st_mode):
            _make_link(os.readlink(name, dir_fd=at_home), name, beside, self.sender, status)
            written[status.st_ino] = each.path
            return 0
        copied = self._keep_file(each.path, name, at_home, beside, status)
        written[status.st_ino] = each.path
        return copied

    def _enter(self, folders: list[bytes], chain: list[tuple[bytes, int, int]]) -> tuple[int, int]:
        """Return the open directory at home and the one beside it, below which the chain of open ones leads."""
        same = 0
        while same < min(len(chain), len(folders)) and chain[same][0] == folders[same]:
            same += 1
        while len(chain) > same:
            _, at_home, beside = chain.pop()
            os.close(at_home)
            os.close(beside)
        for depth in range(same, len(folders)):
            at_home, beside = chain[-1][1:] if chain else (self._home, self.top)
            name = folders[depth]
            inner = os.open(name, traces.OPEN_FOLDER, dir_fd=at_home)
            try:
                made = self._folder(name, beside)
                if made[1]:
                    self._attributes(inner, made[0], os.fstat(inner), b"/".join((b".", *folders[: depth + 1])))
            except BaseException:
                os.close(inner)
                raise
            chain.append((name, inner, made[0]))
        return chain[-1][1:] if chain else (self._home, self.top)

    def _folder(self, name: bytes, beside: int) -> tuple[int, bool]:
        """Return the open directory of that name, and whether it was made just now."""
        try:
            os.mkdir(name, 0o700, dir_fd=beside)
            made = True
        except FileExistsError:
            made = False
            if not stat.S_ISDIR(os.stat(name, dir_fd=beside, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=beside)
                os.mkdir(name, 0o700, dir_fd=beside)
                made = True
        return os.open(name, traces.OPEN_FOLDER, dir_fd=beside), made

    def _keep_folder(self, path: bytes, name: bytes, at_home: int, beside: int) -> None:
        inner = os.open(name, traces.OPEN_FOLDER, dir_fd=at_home)
        try:
            made, _ = self._folder(name, beside)
            try:
                self._attributes(inner, made, os.fstat(inner), path)
            finally:
                os.close(made)
            self._staged.add(path)
        finally:
            os.close(inner)

    def _keep_file(self, path: bytes, name: bytes, at_home: int, beside: int, expected: os.stat_result) -> int:
        special = _is_special(expected.st_mode)
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_PATH if special else os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME)
        source = os.open(name, flags, dir_fd=at_home)
        try:
            status = os.fstat(source)
            if status.st_uid != self._uid or stat.S_IFMT(status.st_mode) != stat.S_IFMT(expected.st_mode):
                raise FileNotFoundError(name)  # something else has taken its place
            target = _open_file(name, beside)
            try:
                copied = 0 if special else self._copy(source, target, status)
                self._attributes(source, target, status, path, plain=not special)
                os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
            finally:
                os.close(target)
        finally:
            os.close(source)
        return copied

    def _copy(self, source: int, target: int, status: os.stat_result) -> int:
        if self._can_clone and status.st_size:
            try:
                fcntl.ioctl(target, FICLONE, source)
                return status.st_size
            except OSError:
                self._can_clone = False
        if status.st_blocks * 512 < status.st_size:
            os.ftruncate(target, 0)
        position = copied = 0
        while position < status.st_size:
            try:
                begin = os.lseek(source, position, os.SEEK_DATA)
                end = min(os.lseek(source, begin, os.SEEK_HOLE), status.st_size)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            while begin < end:
                self._look()
                moved = _move_bytes(source, target, begin, min(CHUNK, end - begin))
                if not moved:
                    break  # it was made shorter meanwhile: it is a file that is copied again
                begin += moved
                copied += moved
            position = max(end, begin)
        os.ftruncate(target, os.fstat(source).st_size)
        return copied

    def _attributes(self, source: int, target: int, status: os.stat_result, path: bytes, plain: bool = True) -> None:
        """Write owner, mode, access lists and attributes as rsync --fake-super reads them; note a directory's times."""
        os.fchown(target, self.sender, self.sender)
        for name in os.listxattr(target):
            if name.startswith("user."):
                os.removexattr(target, name)
        os.setxattr(target, STAT, f"{status.st_mode:o} 0,0 {status.st_uid}:{status.st_gid}".encode())
        try:
            for name in os.listxattr(source) if plain else ():
                if name in LISTS:
                    default = name.endswith("default")
                    os.setxattr(target, LISTS[name], access_list(os.getxattr(source, name), default))
                elif name.startswith(RESERVED):
                    self.poorer[path] = f"the attribute {name} is reserved"
                elif name.startswith("user."):
                    os.setxattr(target, name, os.getxattr(source, name))
        except (OSError, ValueError) as error:
            self.poorer[path] = f"its attributes cannot be carried: {error}"
        if stat.S_ISDIR(status.st_mode):
            self._times[path] = (status.st_atime_ns, status.st_mtime_ns)

    def _link(self, path: bytes, name: bytes, beside: int, first: bytes) -> None:
        """Make it another name of what was copied under the path `first`."""
        _clear(beside, name)
        os.link(_relative(first), name, src_dir_fd=self.top, dst_dir_fd=beside, follow_symlinks=False)
        self._staged.add(path)

    def _cannot(self, path: bytes, why: str) -> None:
        self.missing[path] = why
        self._clear_path(path)

    def _clear_path(self, path: bytes) -> None:
        """Take it out of the tree, with what is below it."""
        self._staged.discard(path)
        self._times.pop(path, None)
        folder, _, name = _relative(path).rpartition(b"/")
        with suppress(OSError):
            parent = os.open(folder or b".", traces.OPEN_FOLDER, dir_fd=self.top)
            try:
                _clear(parent, name)
            finally:
                os.close(parent)


def access_list(kept: bytes, default: bool = False) -> bytes:
    """Return an access list as rsync writes it into an attribute, from the kernel's form of it (acl(5), version 2).

    Four numbers for owner, group, mask and others (0x80: none), then an id and its rights for each named user and
    group; the highest bit says that it is a user. All are little-endian and 32 bits wide. Of a list that is not a
    directory's default, rsync leaves out what the mode says as well.
    """
    (version,) = struct.unpack_from("<I", kept)
    if version != 2:
        raise ValueError("its access list is of an unknown form")
    base = {0x01: 0x80, 0x04: 0x80, 0x10: 0x80, 0x20: 0x80}
    users: list[tuple[int, int]] = []
    groups: list[tuple[int, int]] = []
    for tag, rights, number in struct.iter_unpack("<HHI", kept[4:]):
        if tag in base:
            base[tag] = rights
        else:
            (users if tag == 0x02 else groups).append((number, rights))
    if not default:
        mask = base[0x10]
        base[0x01] = base[0x20] = 0x80
        if mask in {0x80, base[0x04]}:
            base[0x04] = 0x80
    named = [(number, rights | 1 << 31) for number, rights in sorted(users)] + sorted(groups)
    return struct.pack("<4I", *base.values()) + b"".join(struct.pack("<2I", *pair) for pair in named)


def digest(descriptor: int) -> str:
    """Return the SHA-256 of an open file, from its beginning; empty where it is too large to be compared."""
    if os.fstat(descriptor).st_size > LARGEST_HASHED:
        return ""
    found = hashlib.sha256()
    position = 0
    while part := os.pread(descriptor, CHUNK, position):
        found.update(part)
        position += len(part)
    return found.hexdigest()


def digest_at(home: int, path: bytes, uid: int) -> str:
    """Return the SHA-256 of a file in a home; empty where it cannot be compared."""
    *folders, name = path.split(b"/")[1:]
    try:
        folder = _open_below(home, folders)
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError:
        return ""
    try:
        status = os.fstat(descriptor)
        return digest(descriptor) if stat.S_ISREG(status.st_mode) and status.st_uid == uid else ""
    finally:
        os.close(descriptor)


class Manifests:
    """The manifests of the last snapshots of each rental, root's, under the marks that the manager gave them."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "var/lib/orion/manifests"

    def read(self, rental_id: str, mark: str) -> Manifest | None:
        """Return the manifest; None where there is none, or not the whole of it."""
        try:
            head, _, lines = (self._folder / rental_id / mark).read_bytes().partition(b"\0")
            about = json.loads(head)
            if about["sum"] != zlib.crc32(lines):
                return None
            doubtful = {bytes.fromhex(path): found for path, found in about["doubtful"].items()}
            missing = {bytes.fromhex(path): why for path, why in about["missing"].items()}
            return Manifest(Scan(frozenset(lines.split(b"\0")), about["at"]), doubtful, missing)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, rental_id: str, mark: str, manifest: Manifest, stays: str = "") -> None:
        """Write it, and forget all of this rental but `stays`, the mark of the one before.

        Nothing waits for the disk: what a loss of power leaves half written is recognised by its sum.
        """
        folder = self._folder / rental_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = b"\0".join(manifest.scan.lines)
        about = {
            "at": manifest.scan.at,
            "sum": zlib.crc32(lines),
            "doubtful": {path.hex(): found for path, found in manifest.doubtful.items()},
            "missing": {path.hex(): why for path, why in manifest.missing.items()},
        }
        for place in folder.iterdir():
            if place.name not in {mark, stays}:
                place.unlink(missing_ok=True)
        new = folder / f".{mark}"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(json.dumps(about).encode() + b"\0" + lines)
        new.replace(folder / mark)

    def forget(self, rental_id: str) -> None:
        shutil.rmtree(self._folder / rental_id, ignore_errors=True)


def remove_tree(place: Path) -> None:
    """Remove a directory of root's with all that is in it, if it is there."""
    with suppress(FileNotFoundError):
        folder = os.open(place.parent, traces.OPEN_FOLDER)
        try:
            traces.remove_entry(folder, place.name)
        finally:
            os.close(folder)


def _is_special(mode: int) -> bool:
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _relative(path: bytes) -> bytes:
    return path[2:] if path.startswith(b"./") else path


def _open_file(name: bytes, beside: int) -> int:
    """Return the open file of that name, made where there is none, and in the place of whatever else has the name."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=beside, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            _clear(beside, name)
    return os.open(name, flags, 0o600, dir_fd=beside)


def _make_link(to: bytes, name: bytes, beside: int, owner: int, status: os.stat_result) -> None:
    _clear(beside, name)
    os.symlink(to, name, dir_fd=beside)
    os.chown(name, owner, owner, dir_fd=beside, follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=beside, follow_symlinks=False)


def _clear(folder: int, name: bytes) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            traces.remove_entry(folder, os.fsdecode(name))
        else:
            os.unlink(name, dir_fd=folder)


def _move_bytes(source: int, target: int, at: int, number: int) -> int:
    """Copy within the kernel; return how many bytes that were."""
    try:
        return os.copy_file_range(source, target, number, at, at)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
    os.lseek(target, at, os.SEEK_SET)
    return os.sendfile(target, source, at, number)
