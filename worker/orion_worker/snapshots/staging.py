"""The staging tree: entries of a home that changed since its last snapshot, copied on the worker as they were at once.

Two scans tell what changed between them, because the kernel sets an inode's time of change (ctime) at each write, and
no program can set it. Two kinds of files may change without a new ctime, and count as doubtful: a file whose ctime is
as young as the scan (the kernel's clock has a granularity), and a file that a program has mapped for writing. A
doubtful file is copied again, or its content compared.

The tree is outside the homes, where no renter reaches it, in the form that `rsync --fake-super` writes: attributes of
an entry hold its owner, mode and access list. So an unprivileged rsync with an account of its own can send the tree,
and the renter can neither stop that rsync nor deny it a file.

Root does everything here, and can open what the renter's modes forbid. So every step goes from an open directory to an
entry in it without following a link, and the content of a file is read only after its owner has been checked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from orion_worker.records import RequestRefused
from orion_worker.snapshots.scan import CHUNK, HomeEntry, digest, folders_above, opened
from orion_worker.system import trees

LONGEST_PATH = 4000
"""Bytes of the longest path that rsync carries."""
FICLONE = 0x40049409
"""ioctl_ficlone(2): a copy that shares its blocks, where the file system can."""
STAT = "user.rsync.%stat"
LISTS = {"system.posix_acl_access": "user.rsync.%aacl", "system.posix_acl_default": "user.rsync.%dacl"}
RESERVED = "user.rsync.%"
"""The prefix of attributes that rsync keeps for itself."""
NAMES_SHOWN = 20
SPECIAL = (stat.S_IFIFO, stat.S_IFSOCK)


class StagingTree:
    """Copies of entries of a home in a tree of their own, under the same paths."""

    def __init__(self, *, home: int, place: Path, uid: int, sender: int) -> None:
        """Make an empty tree at `place`, readable by the uid `sender`, for the open home of the renter `uid`."""
        self._home = home
        self._uid = uid
        self.sender = sender
        self.place = place
        self.tree = place / "tree"
        self.missing: dict[bytes, str] = {}
        """Why an entry cannot be carried, by path."""
        self.incomplete: dict[bytes, str] = {}
        """Why an entry is carried without some of its attributes, by path."""
        self.vanished: set[bytes] = set()
        """The paths of entries that were gone when they were to be copied."""
        self._times: dict[bytes, tuple[int, int]] = {}
        """The times of directories by path, set at the end, because each entry that is made in one changes them."""
        self._staged: set[bytes] = set()
        """The paths of the entries that were copied."""
        self._can_clone = True
        self._look: Callable[[], None] = lambda: None
        """The function that is called between two parts of a file, and may raise."""
        trees.remove_tree(place)
        self.tree.mkdir(mode=0o700, parents=True)
        for made in (place, self.tree):
            os.chown(made, sender, sender)
        self.top = os.open(self.tree, trees.OPEN_FOLDER)

    def remove(self) -> None:
        os.close(self.top)
        trees.remove_tree(self.place)

    def write_list(self, paths: Iterable[bytes]) -> None:
        """Write the list of paths that rsync sends; a path that is not in the tree is removed on the other side."""
        with (self.place / "list").open("wb") as file:
            file.write(b"\0".join(paths))
            os.fchown(file.fileno(), self.sender, self.sender)

    def stage(self, entries: Iterable[HomeEntry], look: Callable[[], None]) -> None:
        """Copy these entries as they are now, over earlier copies. `look` is called in between, and may raise."""
        self._attributes(self._home, self.top, os.fstat(self._home), b".")
        self._look = look
        chain: list[tuple[bytes, int, int]] = []
        written: dict[int, bytes] = {}
        try:
            for each in sorted(entries, key=lambda one: one.path.split(b"/")):
                look()
                self.missing.pop(each.path, None)
                self.incomplete.pop(each.path, None)
                self.vanished.discard(each.path)
                try:
                    self._stage(each.path, chain, written)
                except (FileNotFoundError, NotADirectoryError):
                    self.vanished.add(each.path)
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        self.vanished.add(each.path)
                    elif error.errno in {errno.ENOSPC, errno.EDQUOT}:
                        problem = "the worker's disk has no room to stage the files that changed"
                        raise RequestRefused("no_room", problem) from error
                    else:
                        self.missing[each.path] = error.strerror or str(error)
                        self._clear_path(each.path)
        finally:
            _close_from(0, chain)

    def keep_only(self, wanted: Collection[bytes]) -> None:
        """Leave in the tree only these paths and the directories above them, with their times in the home."""
        above = {folder for path in wanted for folder in folders_above(path)}
        for path in self._staged - {*wanted, *above}:
            self._clear_path(path)
        for path in sorted(self._times, key=len, reverse=True):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.utime(path.removeprefix(b"./"), ns=self._times[path], dir_fd=self.top, follow_symlinks=False)

    def digest(self, path: bytes) -> str:
        """Return the SHA-256 of a copied file; empty for one that is too large to be compared."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with suppress(OSError), opened(path.removeprefix(b"./"), flags, self.top) as descriptor:
            return digest(descriptor)
        return ""

    def _stage(self, path: bytes, chain: list[tuple[bytes, int, int]], written: dict[int, bytes]) -> None:
        """Copy one entry. Raise OSError with the reason if it cannot be carried.

        `chain`: the directories above the last entry, open in the home and in the tree. `written`: the path at which
        each inode was copied.
        """
        if len(path) > LONGEST_PATH:
            raise OSError(errno.ENAMETOOLONG, "its path is too long")
        if path == b".":
            return
        *folders, name = path.split(b"/")[1:]
        in_home, in_tree = self._enter(folders, chain)
        status = os.stat(name, dir_fd=in_home, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if status.st_uid != self._uid:
            raise OSError(errno.EPERM, "it belongs to somebody else")
        if kind not in {stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, *SPECIAL}:
            raise OSError(errno.ENOTSUP, "it is a device")
        if kind == stat.S_IFDIR:
            self._stage_folder(path, name, in_home, in_tree)
            return
        self._times.pop(path, None)
        self._staged.add(path)
        if first := written.get(status.st_ino):
            _clear(in_tree, name)
            os.link(first.removeprefix(b"./"), name, src_dir_fd=self.top, dst_dir_fd=in_tree, follow_symlinks=False)
        elif kind == stat.S_IFLNK:
            _make_link(os.readlink(name, dir_fd=in_home), name, in_tree, self.sender, status)
        else:
            self._stage_file(path, name, in_home, in_tree, status)
        written.setdefault(status.st_ino, path)

    def _enter(self, folders: list[bytes], chain: list[tuple[bytes, int, int]]) -> tuple[int, int]:
        """Open these directories in the home and in the tree, one below the other; return the last two."""
        same = 0
        while same < min(len(chain), len(folders)) and chain[same][0] == folders[same]:
            same += 1
        _close_from(same, chain)
        for depth in range(same, len(folders)):
            in_home, in_tree = chain[-1][1:] if chain else (self._home, self.top)
            name = folders[depth]
            inner = os.open(name, trees.OPEN_FOLDER, dir_fd=in_home)
            try:
                is_new = _make_folder(name, in_tree)
                made = os.open(name, trees.OPEN_FOLDER, dir_fd=in_tree)
            except BaseException:
                os.close(inner)
                raise
            chain.append((name, inner, made))
            if is_new:
                self._attributes(inner, made, os.fstat(inner), b"/".join((b".", *folders[: depth + 1])))
        return chain[-1][1:] if chain else (self._home, self.top)

    def _stage_folder(self, path: bytes, name: bytes, in_home: int, in_tree: int) -> None:
        with opened(name, trees.OPEN_FOLDER, in_home) as inner:
            _make_folder(name, in_tree)
            with opened(name, trees.OPEN_FOLDER, in_tree) as made:
                self._attributes(inner, made, os.fstat(inner), path)
            self._staged.add(path)

    def _stage_file(self, path: bytes, name: bytes, in_home: int, in_tree: int, expected: os.stat_result) -> None:
        special = stat.S_IFMT(expected.st_mode) in SPECIAL
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_PATH if special else os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME)
        with opened(name, flags, in_home) as source:
            status = os.fstat(source)
            if status.st_uid != self._uid or stat.S_IFMT(status.st_mode) != stat.S_IFMT(expected.st_mode):
                raise FileNotFoundError(name)  # something else has taken its place
            with _opened_file(name, in_tree) as target:
                if not special:
                    self._copy(source, target, status)
                self._attributes(source, target, status, path, plain=not special)
                os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _copy(self, source: int, target: int, status: os.stat_result) -> None:
        if self._can_clone and status.st_size:
            try:
                fcntl.ioctl(target, FICLONE, source)
                return
            except OSError:
                self._can_clone = False
        if status.st_blocks * 512 < status.st_size:
            os.ftruncate(target, 0)
        position = 0
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
                    break  # the file became shorter meanwhile, so it changed and is copied again
                begin += moved
            position = max(end, begin)
        os.ftruncate(target, os.fstat(source).st_size)

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
                    self.incomplete[path] = f"the attribute {name} is reserved"
                elif name.startswith("user."):
                    os.setxattr(target, name, os.getxattr(source, name))
        except (OSError, ValueError) as error:
            self.incomplete[path] = f"its attributes cannot be carried: {error}"
        if stat.S_ISDIR(status.st_mode):
            self._times[path] = (status.st_atime_ns, status.st_mtime_ns)

    def _clear_path(self, path: bytes) -> None:
        """Remove an entry from the tree, with all below it."""
        self._staged.discard(path)
        self._times.pop(path, None)
        folder, _, name = path.removeprefix(b"./").rpartition(b"/")
        with suppress(OSError), opened(folder or b".", trees.OPEN_FOLDER, self.top) as parent:
            _clear(parent, name)


def access_list(kept: bytes, default: bool = False) -> bytes:
    """Return an access list as rsync writes it into an attribute, from the kernel's form of it (acl(5), version 2).

    Four numbers for owner, group, mask and others (0x80: none), then an id and its rights for each named user and
    group; the highest bit says that it is a user. All are little-endian and 32 bits wide. Of a list that is not a
    directory's default, rsync leaves out what the mode says as well.
    """
    (version,) = struct.unpack_from("<I", kept)
    if version != 2:
        raise ValueError("its access list is of an unknown form")
    base = dict.fromkeys((0x01, 0x04, 0x10, 0x20), 0x80)
    users, groups = list[tuple[int, int]](), list[tuple[int, int]]()
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


def _close_from(depth: int, chain: list[tuple[bytes, int, int]]) -> None:
    while len(chain) > depth:
        for descriptor in chain.pop()[1:]:
            os.close(descriptor)


def _make_folder(name: bytes, in_tree: int) -> bool:
    """Make a directory, also in place of anything but a directory; return False if there is one already."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=in_tree, follow_symlinks=False).st_mode):
            return False
        os.unlink(name, dir_fd=in_tree)
    os.mkdir(name, 0o700, dir_fd=in_tree)
    return True


def _opened_file(name: bytes, in_tree: int) -> AbstractContextManager[int]:
    """Give the open file of that name. Make it if there is none, and in place of anything but a file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=in_tree, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            _clear(in_tree, name)
    return opened(name, flags, in_tree, mode=0o600)


def _make_link(to: bytes, name: bytes, in_tree: int, owner: int, status: os.stat_result) -> None:
    _clear(in_tree, name)
    os.symlink(to, name, dir_fd=in_tree)
    os.chown(name, owner, owner, dir_fd=in_tree, follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=in_tree, follow_symlinks=False)


def _clear(folder: int, name: bytes) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            trees.remove_entry(folder, os.fsdecode(name))
        else:
            os.unlink(name, dir_fd=folder)


def _move_bytes(source: int, target: int, at: int, number: int) -> int:
    """Copy within the kernel; return the number of bytes."""
    try:
        return os.copy_file_range(source, target, number, at, at)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
    os.lseek(target, at, os.SEEK_SET)
    return os.sendfile(target, source, at, number)
