"""The listing of the difficult tree shows each change that a copy could make to it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import difficult_tree


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("difficult") / "tree"
    difficult_tree.make(str(folder))
    return folder


def test_the_tree_has_every_kind_of_entry_and_each_listing_of_it_is_the_same(made: Path) -> None:
    listed = difficult_tree.describe(str(made))
    assert listed == difficult_tree.describe(str(made)), "listing changes nothing"
    text = "\n".join(listed)
    for kind in (" file ", " folder ", " link ", " fifo ", " socket ", "with holes", " 3 links as b'./links/one'"):
        assert kind in text
    assert len(listed) > 150
    assert stat.S_IMODE((made / "modes/folder 0000").stat().st_mode) == 0


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda tree: _rewrite(tree / "small", b"CONTENT"),
    "a time, by a nanosecond": lambda tree: os.utime(tree / "times/file", ns=(0, difficult_tree.ODD_NS + 1)),
    "a folder's time": lambda tree: os.utime(tree / "empty folder"),
    "a link's time": lambda tree: os.utime(tree / "times/link", follow_symlinks=False),
    "where a link leads": lambda tree: _relink(tree / "links/up"),
    "a mode": lambda tree: (tree / "modes/file 0000").chmod(0o400),
    "a folder's mode": lambda tree: (tree / "modes/folder 2775").chmod(0o775),
    "a file in what is shut": lambda tree: _within(
        tree / "modes/folder 0000", lambda place: (place / "inside").unlink()
    ),
    "an attribute": lambda tree: os.setxattr(tree / "attributes/file", "user.small", b"other"),
    "a hard link": lambda tree: _copied(tree / "links/two"),
    "holes": lambda tree: _copied(tree / "hole alone"),
    "a fifo": lambda tree: (tree / "specials/fifo").unlink(),
    "a socket": lambda tree: (tree / "specials/socket").unlink(),
    "an empty folder": lambda tree: (tree / "empty folder").rmdir(),
    "an odd name": lambda tree: Path(os.fsdecode(bytes(tree / "names") + b"/new\nline")).unlink(),
    "one more": lambda tree: (tree / "more").touch(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_of_the_tree_changes_its_listing(what: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    difficult_tree.LARGE_BYTES = 1 << 16
    difficult_tree.make(str(tree))
    before = difficult_tree.describe(str(tree))
    times = {entry: (entry.lstat().st_atime_ns, entry.lstat().st_mtime_ns) for entry in (tree, tree / "names")}
    CHANGES[what](tree)
    for entry, time in times.items():
        os.utime(entry, ns=time)
    assert difficult_tree.describe(str(tree)) != before


def test_the_tree_program_runs_without_other_files(tmp_path: Path) -> None:
    program = shutil.copy(str(difficult_tree.__file__), tmp_path)
    tree = str(tmp_path / "tree")
    subprocess.run([sys.executable, "-I", program, "make", tree, "1"], check=True)
    listed = subprocess.run(
        [sys.executable, "-I", program, "describe", tree], check=True, capture_output=True, text=True
    )
    assert listed.stdout.splitlines() == difficult_tree.describe(tree)


def _rewrite(file: Path, content: bytes) -> None:
    """Rewrite a file with the same size and time."""
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copied(file: Path) -> None:
    """Replace a file by one with the same content and times, but another inode and no holes."""
    status, content = file.stat(), file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _relink(link: Path) -> None:
    status = link.lstat()
    link.unlink()
    link.symlink_to("elsewhere")
    os.utime(link, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _within(folder: Path, change: Callable[[Path], object]) -> None:
    status = folder.stat()
    folder.chmod(0o700)
    change(folder)
    os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))
    folder.chmod(stat.S_IMODE(status.st_mode))
