"""The directory of one rental's copies. Everything here runs under the rental's own uid, which owns all of it.

    incoming/          a copy that is being made, or what is left of one
    next-E-N/          a tree of hard links to the home of E-N, made before the copy that begins from it
    old-E-N/           a copy that made room and is still to be removed
    E-N/home/          a complete copy: generation N of epoch E
    E-N/about.json     when, how large, what of it is shared, what is missing, its mark, and what it was made from
    E-N/changes        the paths that differ from the one that it was made from, each followed by a zero byte

A copy is made complete by one rename, after all of it was written to the disk: a crash at any instant leaves it whole
or not at all. Unchanged files are hard links to the copy before. A mark names a state of a home, at the worker too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from orion.manager.domain.snapshots import Snapshot, SnapshotId, base_of, counted, may_stay, next_number
from orion.manager.snapshots.disk import Usage
from orion.manager.snapshots.protocol import read, written

INCOMING = "incoming"
NEXT, OLD = "next-", "old-"
CHANGES = "changes"


@dataclass(frozen=True)
class NewSnapshot:
    """What is known of a copy that is complete in `incoming`."""

    at: float
    mark: str
    skipped: tuple[str, ...]
    folders: dict[str, int]
    """Modes that directories have to get when a home is filled with it, by path in hexadecimal."""
    salvage: bool = False


class TreeSize(NamedTuple):
    """Size of a tree. The bytes are those of `counted`; a file with several names is one inode, and counts once."""

    files: int
    """Entries of every kind, each name of them counted."""
    whole: Usage
    own: Usage
    """Disk use that no other tree shares: its directories, and the files of which all names are in it."""


def found(folder: Path) -> list[Snapshot]:
    """Return the complete copies, oldest first."""
    copies = [_about(place) for place in folder.iterdir() if SnapshotId.parse(place.name)]
    return sorted((copy for copy in copies if copy), key=lambda copy: copy.generation)


def begin(folder: Path, epoch: int, salvage: bool) -> dict[str, Any]:
    """Make room for a new copy; return the name and the mark of the one that it is made from, empty for none.

    `prepared` is whether `prepare` was done for it: a renter waits.
    """
    complete = found(folder)
    base = base_of(complete, epoch, salvage)
    _sweep(folder, complete, str(base.generation) if base else "")
    (folder / INCOMING).mkdir(mode=0o700)
    if base is None:
        return {"generation": "", "mark": "", "same_epoch": False, "folders": {}, "prepared": False}
    about = _read(folder / str(base.generation))
    return {
        "generation": str(base.generation), "mark": str(about.get("mark", "")),
        "same_epoch": base.generation.epoch == epoch, "folders": about.get("folders", {}),
        "prepared": (folder / f"{NEXT}{base.generation}").exists(),
    }  # fmt: skip


def prepare(folder: Path, generation: str) -> bool:
    """Do beforehand what depends on the number of files in a copy that begins from this one."""
    _sweep(folder, found(folder), generation)
    prepared = folder / f"{NEXT}{generation}"
    if not prepared.exists():
        (folder / INCOMING).mkdir(mode=0o700)
        clone(folder, generation)
        (folder / INCOMING / "home").rename(prepared)
        (folder / INCOMING).rmdir()
    _flush_all(folder)
    return True


def clone(folder: Path, generation: str) -> bool:
    """Fill `incoming` with hard links to a complete copy; of none, with an empty home."""
    target = folder / INCOMING / "home"
    if not generation:
        target.mkdir(mode=0o700)
        return True
    with suppress(FileNotFoundError):
        (folder / f"{NEXT}{generation}").rename(target)
        return True
    source = folder / generation / "home"
    done = subprocess.run(["cp", "-al", "--", source, target], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise OSError(f"copy {generation} cannot be begun from: {done.stderr[:200]}")
    return True


def renew(folder: Path, generation: str, at: float) -> Snapshot:
    """Make a complete copy younger: the home is still as it says."""
    about = _read(folder / generation)
    renewed = replace(read(about | {"generation": generation}), at=at)
    _write(folder / generation, about | written(renewed))
    return renewed


def describe(
    folder: Path,
    epoch: int,
    made: NewSnapshot,
    limits: tuple[int, int],
    base: str,
    changed: Sequence[bytes] | None,
) -> bool:
    """Write down what is in `incoming`, all of which has come, and which copy it will be.

    `limits`: the most files and bytes that it may hold; OSError is raised for more. `changed`: the paths that differ
    from `base`; None: they are not known.
    """
    measured = _measure(folder / INCOMING / "home")
    files, size = measured.files, measured.whole.bytes
    if files > limits[0] or size > limits[1]:
        raise OSError(errno.EFBIG, f"it holds {files} files and {size} bytes, which is more than a copy may")
    generation = SnapshotId(epoch, next_number([each.generation for each in found(folder)], epoch))
    about = written(
        Snapshot(generation=generation, at=made.at, bytes=size, files=files, skipped=made.skipped, salvage=made.salvage)
    )
    about |= {"mark": made.mark, "base": "", "folders": made.folders}
    about |= {"made_from": base, "whole": measured.whole, "own": measured.own}
    if base and changed is not None and all(_is_inside(path) for path in changed):
        about["base"] = base
        (folder / INCOMING / CHANGES).write_bytes(b"".join(path.rstrip(b"/") + b"\0" for path in changed))
    _write(folder / INCOMING, about)
    return True


def choices(folder: Path, protected: SnapshotId | None) -> list[Usage]:
    """Return what all copies take, with what is described in `incoming`, for each choice of which stay.

    The choices are those of `may_stay`. What a copy shares with the one that it was made from counts once, if that one
    stays as well; what it shares with any other counts twice. So this is never less than what they take.
    """
    abouts = {str(copy.generation): _read(folder / str(copy.generation)) for copy in found(folder)}
    with suppress(OSError):
        about = _read(folder / INCOMING)
        abouts[about["generation"]] = about
    copies = [read(about | {"generation": name}) for name, about in abouts.items()]
    return [_taken(abouts, {str(generation) for generation in staying}) for staying in may_stay(copies, protected)]


def finish(folder: Path, protected: SnapshotId | None = None, choice: int = 0, in_haste: bool = False) -> Snapshot:
    """Make what is described in `incoming` a complete copy. Older ones make room: see `make_room`."""
    about = _read(folder / INCOMING)
    _flush_all(folder)
    (folder / INCOMING).rename(folder / about["generation"])
    _flush(folder)
    make_room(folder, protected, choice, in_haste)
    return read(about)


def make_room(folder: Path, protected: SnapshotId | None, choice: int, in_haste: bool = False) -> bool:
    """Remove the copies that do not stay by this choice, by its number in `choices`.

    `in_haste`: a renter waits, and they are removed later, by `tidy` or by the next copy.
    """
    complete = found(folder)
    staying = may_stay(complete, protected)[choice]
    for each in complete:
        if each.generation not in staying:
            old = (folder / str(each.generation)).rename(folder / f"{OLD}{each.generation}")
            if not in_haste:
                _remove(old)
    return True


def give_up(folder: Path) -> bool:
    """Remove what has come of a copy that is not made."""
    _remove(folder / INCOMING)
    return True


def marks(folder: Path, generation: str, previous: str) -> dict[str, Any]:
    """Return what a worker has to know that is filled with a copy: its mark and the modes of some directories.

    `base` is the mark of `filled` if the copy is that one or was made from it, else empty.
    """
    about = _read(folder / generation)
    base = str(about.get("mark", "")) if previous == generation else ""
    with suppress(OSError, ValueError):
        if previous and about.get("base") == previous:
            base = str(_read(folder / previous).get("mark", ""))
    return {"mark": str(about.get("mark", "")), "base": base, "folders": about.get("folders", {})}


def wipe(folder: Path) -> None:
    for place in folder.iterdir():
        _remove(place)


def tidy(folder: Path) -> bool:
    """Remove the copies that made room for one in haste."""
    for place in folder.glob(f"{OLD}*"):
        _remove(place)
    return True


def _sweep(folder: Path, complete: Sequence[Snapshot], begun_from: str) -> None:
    """Remove all but the complete copies, and what was prepared for one that begins from `begun_from`."""
    staying = {str(copy.generation) for copy in complete} | {f"{NEXT}{begun_from}"}
    for place in folder.iterdir():
        if place.name not in staying:
            _remove(place)


def _measure(home: Path) -> TreeSize:
    looked = subprocess.run(["find", ".", "-printf", r"%y %i %n %b %s\n"], cwd=home, capture_output=True, check=True)
    inodes = Counter(looked.stdout.splitlines())  # the names of one inode have the same line
    whole, own = [], []
    for line, names in inodes.items():
        kind, _, links, blocks, size = line.split()
        whole.append(counted(int(blocks), int(size)))
        if kind == b"d" or int(links) == names:
            own.append(whole[-1])
    return TreeSize(inodes.total(), Usage(len(whole), sum(whole)), Usage(len(own), sum(own)))


def _taken(abouts: Mapping[str, Mapping[str, Any]], staying: Collection[str]) -> Usage:
    total = Usage()
    for about in (abouts[name] for name in staying):
        part = "own" if about.get("made_from") in staying else "whole"
        total = total.plus(Usage(*about.get(part, (about["files"], about["bytes"]))))
    return total


def _is_inside(path: bytes) -> bool:
    return not path.startswith(b"/") and b".." not in path.split(b"/")


def _about(place: Path) -> Snapshot | None:
    try:
        return read(_read(place) | {"generation": place.name})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / "about.json").read_text()))


def _write(place: Path, about: dict[str, Any]) -> None:
    partial = place / "about.partial"
    partial.write_text(json.dumps(about))
    partial.replace(place / "about.json")


def _remove(place: Path) -> None:
    """By rm, which knows trees of any depth. Raises OSError."""
    done = subprocess.run(["rm", "-rf", "--", place], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise OSError(f"{place.name} cannot be removed: {done.stderr[:200]}")


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    """Everything of this file system to the disk: syncfs(2)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)
