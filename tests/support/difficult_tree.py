"""A tree of all files that are difficult to copy, and a listing of a tree that shows all its contents and modes.

    python3 difficult_tree.py make FOLDER [MEGABYTES]  make it, with this many megabytes of attributes
    python3 difficult_tree.py describe FOLDER          print a line for each entry, always in the same order

Both run as the owner of the tree. Files that the owner may not read are made readable for a moment.
Standard library only, Python 3.11 or later.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

LARGE_BYTES = 2 << 20
LARGEST_ATTRIBUTE = 3800
"""Bytes of an attribute; ext4 has one block of 4,096 for all attributes of a file and their names."""
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
OWNER, USER, GROUP, MASK, OTHER = 1, 2, 4, 16, 32
"""The tags of an access control list, as the kernel has them (uapi/linux/posix_acl.h)."""
UNDEFINED_ID = 0xFFFFFFFF
UNKNOWN_UID = 12_345
"""A uid without an account."""
NAMES = (
    *(
        b"new\nline",
        b"'single' \"double\" `back` $(id) $HOME",
        b" blanks ",
        b"tab\t",
        b"-rf",
        b"--delete",
        b"*",
        b"[a]?",
    ),
    *(b"\\", b"\\n", b"\x1b[2J", b"\x01\x7f", b"\xff\xfe not utf-8 \xc3", b"a" * 255, b"\xc3\xa9" * 127, b"...", b"~"),
    *(b"\xc3\xa9", b"e\xcc\x81", b"#hash", b"%41", b".rsync-filter", b".~tmp~", b".name.Xa3Yz9", b"CASE", b"case"),
)
"""The last ones: one letter in two encodings, names that rsync uses itself, two that some file systems treat as one."""
FILE_MODES = (
    0o000,
    0o001,
    0o100,
    0o200,
    0o222,
    0o400,
    0o444,
    0o600,
    0o640,
    0o755,
    0o777,
    0o1644,
    0o2755,
    0o4755,
    0o6711,
)
FOLDER_MODES = (0o000, 0o100, 0o300, 0o400, 0o500, 0o700, 0o755, 0o1777, 0o2775, 0o3770, 0o6755)
ODD_NS = 1_234_567_890_123_456_789


def make(folder: str, attribute_megabytes: int = 0) -> None:
    """Make the tree in a new folder."""
    os.mkdir(folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        _contents()
        _names()
        _links()
        _specials()
        _attributes(attribute_megabytes)
        _access_lists()
        _times()
        _modes()  # the last one, because files cannot be made in unreadable directories
        _date(b".", 9)
    finally:
        os.chdir(here)


def describe(folder: str) -> list[str]:
    """Return a line for the folder and for each entry below it."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        first_names: dict[tuple[int, int], bytes] = {}
        return [_line(path, first_names) for path in _walk(b".")]
    finally:
        os.chdir(here)


def _contents() -> None:
    chance = random.Random(10)  # noqa: S311 - the same in each tree
    _put(b"large", chance.randbytes(LARGE_BYTES))
    _put(b"empty", b"")
    _put(b"small", b"content")
    os.mkdir(b"empty folder")
    with open(b"sparse", "wb") as file:
        for at in (0, 5 << 20, 30 << 20):
            file.seek(at)
            file.write(b"data")
        file.truncate(40 << 20)
    with open(b"hole alone", "wb") as file:
        file.truncate(3 << 20)
    deep = b"deep"
    while len(deep) < 3500:
        os.mkdir(deep)
        deep += b"/" + b"d" * 120
    os.mkdir(deep)
    _put(deep + b"/bottom", b"found")


def _names() -> None:
    os.mkdir(b"names")
    os.mkdir(b"names of folders")
    for name in NAMES:
        _put(b"names/" + name, name)
        os.mkdir(b"names of folders/" + name)
        _put(b"names of folders/" + name + b"/inside", name)


def _links() -> None:
    os.mkdir(b"links")
    _put(b"links/one", b"linked")
    os.link(b"links/one", b"links/two")
    os.link(b"links/one", b"names/elsewhere")
    for name, to in (
        (b"dangling", b"nowhere"),
        (b"absolute", b"/etc/shadow"),
        (b"up", b".."),
        (b"far up", b"../../../../.."),
        (b"itself", b"itself"),
        (b"folder", b"../names"),
        (b"odd", b"\xff\n'"),
        (b"long", b"x" * 3000),
    ):
        os.symlink(to, b"links/" + name)
    os.link(b"links/dangling", b"links/dangling too", follow_symlinks=False)


def _specials() -> None:
    os.mkdir(b"specials")
    os.mkfifo(b"specials/fifo", 0o640)
    os.link(b"specials/fifo", b"specials/fifo too")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("specials/socket")
    os.chmod(b"specials/socket", 0o705)


def _attributes(megabytes: int) -> None:
    """Make extended attributes, as far as the file system has them, which `describe` shows as well."""
    os.mkdir(b"attributes")
    _put(b"attributes/file", b"attributed")
    with suppress(OSError):
        os.setxattr(b"attributes/file", "user.small", b"\x00\xff\n")
        os.setxattr(b"attributes/file", "user.empty", b"")
        os.setxattr(b"attributes/file", "user.\u00e9 ='\"", b"an odd name")
        os.setxattr(b"attributes", "user.of a folder", b"1")
        for number in range(megabytes * (1 << 20) // LARGEST_ATTRIBUTE):
            name = b"attributes/%d" % number
            _put(name, b"")
            os.setxattr(name, "user.large", (b"%d " % number) * (LARGEST_ATTRIBUTE // (len(str(number)) + 1)))


def _access_lists() -> None:
    """Make access control lists, if the file system has them, which `describe` shows as well."""
    os.mkdir(b"lists")
    _put(b"lists/file", b"shared", 0o640)
    os.mkdir(b"lists/folder")
    entries = ((OWNER, 7, UNDEFINED_ID), (USER, 5, UNKNOWN_UID), (GROUP, 4, UNDEFINED_ID), (MASK, 5, UNDEFINED_ID))
    content = struct.pack("<I", 2)
    content += b"".join(struct.pack("<HHI", *entry) for entry in (*entries, (OTHER, 0, UNDEFINED_ID)))
    with suppress(OSError):
        os.setxattr(b"lists/file", ACCESS, content)
        os.setxattr(b"lists/folder", ACCESS, content)
        os.setxattr(b"lists/folder", DEFAULT, content)


def _times() -> None:
    os.mkdir(b"times")
    for number, name in enumerate((b"file", b"folder", b"link", b"fifo", b"before 1970", b"far")):
        path = b"times/" + name
        if name == b"folder":
            os.mkdir(path)
        elif name == b"link":
            os.symlink(b"file", path)
        elif name == b"fifo":
            os.mkfifo(path)
        else:
            _put(path, name)
        _date(path, number)
    os.utime(b"times/before 1970", ns=(-86_400_000_000_001, -86_400_000_000_001))
    os.utime(b"times/far", ns=(4_500_000_000_000_000_003, 4_500_000_000_000_000_003))  # the year 2112
    for number, name in enumerate((b"specials/socket", b"times", b"empty folder", b"names", b"links/dangling")):
        _date(name, 20 + number)


def _modes() -> None:
    os.mkdir(b"modes")
    for mode in FILE_MODES:
        _put(b"modes/file %04o" % mode, b"%o" % mode, mode)
    for mode in FOLDER_MODES:
        path = b"modes/folder %04o" % mode
        os.mkdir(path)
        _put(path + b"/inside", b"%o" % mode, 0 if mode == 0 else 0o644)
        os.mkdir(path + b"/within")
        _date(path, mode)
        os.chmod(path, mode)


def _put(path: bytes, content: bytes, mode: int = 0o644) -> None:
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, mode)


def _date(path: bytes, number: int) -> None:
    at = ODD_NS + number * 1_000_000_007
    os.utime(path, ns=(at, at), follow_symlinks=False)


def _walk(path: bytes) -> Iterator[bytes]:
    yield path
    if stat.S_ISDIR(os.lstat(path).st_mode):
        with _readable(path):
            for name in sorted(os.listdir(path)):
                yield from _walk(os.path.join(path, name))


@contextmanager
def _readable(path: bytes) -> Iterator[None]:
    """Make an entry readable to its owner for the length of a block; its times stay as they are."""
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    wanted = mode | (0o500 if os.path.isdir(path) else 0o400)
    closed = wanted != mode and not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0))
    if closed:
        os.chmod(path, wanted)
    try:
        yield
    finally:
        if closed:
            os.chmod(path, mode)


def _line(path: bytes, first_names: dict[tuple[int, int], bytes]) -> str:
    status = os.lstat(path)
    kind = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo"}
    kind |= {stat.S_IFSOCK: "socket", stat.S_IFBLK: "block", stat.S_IFCHR: "character"}
    parts = [repr(path)[1:], kind[stat.S_IFMT(status.st_mode)], f"{stat.S_IMODE(status.st_mode):04o}"]
    parts += [f"{status.st_uid}:{status.st_gid}", f"at {status.st_mtime_ns}"]
    if stat.S_ISREG(status.st_mode):
        with _readable(path), open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        has_holes = status.st_blocks * 512 < status.st_size - 65_536
        parts += [f"{status.st_size} bytes", content[:32], *(["with holes"] if has_holes else [])]
    elif stat.S_ISLNK(status.st_mode):
        parts += [f"to {os.readlink(path)!r}"]
    if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
        first = first_names.setdefault((status.st_dev, status.st_ino), path)
        parts += [f"{status.st_nlink} links", f"as {first!r}"]
    return " ".join([*parts, *_attributes_of(path)])


def _attributes_of(path: bytes) -> Iterator[str]:
    """Return whether a renter can set the attribute; others are the kernel's or root's."""
    with _readable(path) if not os.path.islink(path) else nullcontext():
        for name in sorted(os.listxattr(path, follow_symlinks=False)):
            if name.startswith("user.") or name in {ACCESS, DEFAULT}:
                value = os.getxattr(path, name, follow_symlinks=False)
                yield f"{name!r}={value[:24].hex()}/{len(value)}/{hashlib.sha256(value).hexdigest()[:16]}"


def main(command: str, folder: str, *more: str) -> None:
    if command == "make":
        make(folder, *(int(megabytes) for megabytes in more))
    else:
        print("\n".join(describe(folder)))  # noqa: T201 - it is a program


if __name__ == "__main__":
    main(*sys.argv[1:])
