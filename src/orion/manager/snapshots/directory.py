"""The directory of one rental's snapshots. All functions here run under the rental's uid, which owns the directory.

    incoming/          a snapshot that is being received, or the rest of one that failed
    next-E-N/          hard links to the home of E-N, made in advance for the snapshot after it
    old-E-N/           a snapshot that is to be removed
    E-N/home/          a complete snapshot: number N of epoch E
    E-N/about.json     its time, sizes, missing files and mark, and the snapshot that it was made from
    E-N/changes        the paths that differ from the snapshot that it was made from, each followed by a zero byte

One rename makes a snapshot complete, after all of it was written to the disk, so a crash leaves all of it or nothing.
Unchanged files are hard links to the snapshot before. A mark names one state of a home, also on the worker.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orion.manager.domain.snapshots import Snapshot, SnapshotId, base_of, counted, described, may_stay, next_number
from orion.manager.snapshots.disk import Usage
from orion.manager.snapshots.protocol import read

INCOMING = "incoming"
NEXT, OLD = "next-", "old-"
CHANGES = "changes"


@dataclass(frozen=True, kw_only=True)
class NewSnapshot:
    """A snapshot whose files are all in `incoming`."""

    at: float
    mark: str
    skipped: tuple[str, ...]
    folders: dict[str, int]
    """The modes that a restore has to give to directories, by path in hexadecimal."""
    recovered: bool = False


def found(folder: Path) -> list[Snapshot]:
    """Return the complete snapshots, oldest first."""
    complete = []
    for place in folder.iterdir():
        if SnapshotId.parse(place.name):
            with suppress(OSError, ValueError, TypeError, KeyError):
                complete.append(read(_read(place) | {"generation": place.name}))
    return sorted(complete, key=lambda copy: copy.id)


def begin(folder: Path, epoch: int, recovered: bool) -> dict[str, Any]:
    """Start a new snapshot; return the name and mark of its base, which are empty if there is none.

    `prepared`: whether `prepare` was called for the base, because a renter waits for the new snapshot.
    """
    complete = found(folder)
    base = base_of(complete, epoch, recovered)
    name = str(base.id) if base else ""
    _sweep(folder, complete, name)
    (folder / INCOMING).mkdir(mode=0o700)
    about = _read(folder / name) if base else {}
    return {
        "generation": name, "mark": str(about.get("mark", "")), "folders": about.get("folders", {}),
        "same_epoch": base is not None and base.id.epoch == epoch,
        "prepared": base is not None and (folder / f"{NEXT}{name}").exists(),
    }  # fmt: skip


def prepare(folder: Path, generation: str) -> None:
    """Do the work that grows with the number of files in advance, for a snapshot that has this base."""
    _sweep(folder, found(folder), generation)
    prepared = folder / f"{NEXT}{generation}"
    if not prepared.exists():
        (folder / INCOMING).mkdir(mode=0o700)
        clone(folder, generation)
        (folder / INCOMING / "home").rename(prepared)
        (folder / INCOMING).rmdir()
    _flush(folder, _sync_file_system)


def clone(folder: Path, generation: str) -> None:
    """Fill `incoming` with hard links to a complete snapshot, or with an empty home if none is named."""
    target = folder / INCOMING / "home"
    prepared = folder / f"{NEXT}{generation}"
    if not generation:
        target.mkdir(mode=0o700)
    elif prepared.exists():
        prepared.rename(target)
    else:
        _run(f"snapshot {generation} cannot be linked", "cp", "-al", "--", folder / generation / "home", target)


def renew(folder: Path, generation: str, at: float) -> Snapshot:
    """Give a complete snapshot a new time, because the home has not changed."""
    about = _read(folder / generation)
    renewed = replace(read(about | {"generation": generation}), at=at)
    _write(folder / generation, about | described(renewed))
    return renewed


def describe(
    folder: Path, epoch: int, made: NewSnapshot, limits: tuple[int, int], base: str, changed: Sequence[bytes] | None
) -> None:
    """Write `about.json` of the snapshot in `incoming`. Raise OSError if it is larger than `limits`: files and bytes.

    `changed`: the paths that differ from `base`; None if they are not known.
    """
    files, whole, own = _measure(folder / INCOMING / "home")
    size = whole.bytes
    if files > limits[0] or size > limits[1]:
        raise OSError(errno.EFBIG, f"it holds {files} files and {size} bytes, which is more than a snapshot may")
    generation = SnapshotId(epoch, next_number([each.id for each in found(folder)], epoch))
    about = asdict(made) | {"generation": str(generation), "bytes": size, "files": files}
    about |= {"salvage": about.pop("recovered"), "base": "", "made_from": base, "whole": whole, "own": own}
    inside = (not path.startswith(b"/") and b".." not in path.split(b"/") for path in changed or ())
    if base and changed is not None and all(inside):
        about["base"] = base
        (folder / INCOMING / CHANGES).write_bytes(b"".join(path.rstrip(b"/") + b"\0" for path in changed))
    _write(folder / INCOMING, about)


def choices(folder: Path, protected: SnapshotId | None) -> list[Usage]:
    """Return the disk use of all snapshots, the one in `incoming` included, for each choice of `may_stay`.

    Files that a snapshot shares with its base count once if the base stays. Files that it shares with others count
    twice, so the result is never less than the real disk use.
    """
    abouts = {str(copy.id): _read(folder / str(copy.id)) for copy in found(folder)}
    with suppress(OSError):
        about = _read(folder / INCOMING)
        abouts[about["generation"]] = about
    copies = [read(about | {"generation": name}) for name, about in abouts.items()]
    return [_taken(abouts, {str(generation) for generation in staying}) for staying in may_stay(copies, protected)]


def finish(folder: Path, protected: SnapshotId | None = None, choice: int = 0, in_haste: bool = False) -> Snapshot:
    """Make the snapshot in `incoming` complete, and remove older ones as `make_room` does."""
    about = _read(folder / INCOMING)
    _flush(folder, _sync_file_system)
    (folder / INCOMING).rename(folder / about["generation"])
    _flush(folder)
    make_room(folder, protected, choice, in_haste)
    return read(about)


def make_room(folder: Path, protected: SnapshotId | None, choice: int, in_haste: bool = False) -> None:
    """Remove the snapshots that do not stay by this choice, which is an index of `choices`.

    `in_haste`: they are only renamed, and removed later, because a renter waits.
    """
    complete = found(folder)
    staying = may_stay(complete, protected)[choice]
    for each in complete:
        if each.id not in staying:
            old = (folder / str(each.id)).rename(folder / f"{OLD}{each.id}")
            if not in_haste:
                _remove(old)


def marks(folder: Path, generation: str, previous: str) -> dict[str, Any]:
    """Return the fields of a snapshot that a restore sends to the worker: its mark and the modes of directories.

    `base`: the mark of `previous` if the snapshot is that one or was made from it, else empty.
    """
    about = _read(folder / generation)
    base = str(about.get("mark", "")) if previous == generation else ""
    with suppress(OSError, ValueError):
        if previous and about.get("base") == previous:
            base = str(_read(folder / previous).get("mark", ""))
    return {"mark": str(about.get("mark", "")), "base": base, "folders": about.get("folders", {})}


def remove(folder: Path, pattern: str) -> None:
    """Remove everything in the directory whose name matches a shell pattern."""
    for place in folder.glob(pattern):
        _remove(place)


def _sweep(folder: Path, complete: Sequence[Snapshot], begun_from: str) -> None:
    """Remove everything except the complete snapshots and what was prepared for one with the base `begun_from`."""
    staying = {str(copy.id) for copy in complete} | {f"{NEXT}{begun_from}"}
    for place in folder.iterdir():
        if place.name not in staying:
            _remove(place)


def _measure(home: Path) -> tuple[int, Usage, Usage]:
    """Return the number of names in a tree, its disk use, and the disk use that no other tree shares.

    A file with several names is one inode and counts once. Bytes are by `counted`. Other trees share no directory, and
    no file that has all its names in this tree.
    """
    looked = subprocess.run(["find", ".", "-printf", r"%y %i %n %b %s\n"], cwd=home, capture_output=True, check=True)
    inodes = Counter(looked.stdout.splitlines())  # the names of one inode have the same line
    whole, own = [], []
    for line, names in inodes.items():
        kind, _, links, blocks, size = line.split()
        whole.append(counted(int(blocks), int(size)))
        if kind == b"d" or int(links) == names:
            own.append(whole[-1])
    return inodes.total(), Usage(len(whole), sum(whole)), Usage(len(own), sum(own))


def _taken(abouts: Mapping[str, Mapping[str, Any]], staying: Collection[str]) -> Usage:
    total = Usage()
    for about in (abouts[name] for name in staying):
        part = "own" if about.get("made_from") in staying else "whole"
        total = total.plus(Usage(*about.get(part, (about["files"], about["bytes"]))))
    return total


def _read(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / "about.json").read_text()))


def _write(place: Path, about: dict[str, Any]) -> None:
    partial = place / "about.partial"
    partial.write_text(json.dumps(about))
    partial.replace(place / "about.json")


def _remove(place: Path) -> None:
    """Remove a tree of any depth. Raise OSError if that fails."""
    _run(f"{place.name} cannot be removed", "rm", "-rf", "--", place)


def _run(failure: str, *command: str | Path) -> None:
    """Run a command. Raise OSError with `failure` and the command's message if it fails."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise OSError(f"{failure}: {done.stderr[:200]}")


def _flush(folder: Path, sync: Callable[[int], None] = os.fsync) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file_system(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
        raise OSError(ctypes.get_errno(), "syncfs")
