"""The directory of one rental's copies. Everything here runs under the rental's own uid, which owns all of it.

    incoming/          a copy that is being made, or what is left of one
    next-E-N/          a tree of hard links to the home of E-N, made before the copy that begins from it
    old-E-N/           a copy that made room and is still to be removed
    E-N/home/          a complete copy: generation N of epoch E
    E-N/about.json     when, how large, what is missing, its mark, and the mark of the one that it was made from
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orion.manager.domain.copies import Copy, Generation, begins_from, kept, next_number
from orion.manager.engine.vault.protocol import read, written

INCOMING = "incoming"
NEXT, OLD = "next-", "old-"
CHANGES = "changes"


@dataclass(frozen=True)
class Made:
    """What is known of a copy that is complete in `incoming`."""

    at: float
    mark: str
    skipped: tuple[str, ...]
    folders: dict[str, int]
    """Modes that directories have to get when a home is filled with it, by path in hexadecimal."""
    salvage: bool = False


def found(folder: Path) -> list[Copy]:
    """Return the complete copies, oldest first."""
    copies = [_about(place) for place in folder.iterdir() if Generation.parse(place.name)]
    return sorted((copy for copy in copies if copy), key=lambda copy: copy.generation)


def begin(folder: Path, epoch: int, salvage: bool) -> dict[str, Any]:
    """Make room for a new copy; return the name and the mark of the one that it is made from, empty for none.

    `prepared` is whether `prepare` was done for it: a renter waits.
    """
    complete = found(folder)
    base = begins_from(complete, epoch, salvage)
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


def renew(folder: Path, generation: str, at: float) -> Copy:
    """Make a complete copy younger: the home is still as it says."""
    about = _read(folder / generation)
    renewed = replace(read(about | {"generation": generation}), at=at)
    _write(folder / generation, about | written(renewed))
    return renewed


def finish(
    folder: Path,
    epoch: int,
    made: Made,
    limits: tuple[int, int],
    base: str,
    changed: Sequence[bytes] | None,
    spare: Generation | None = None,
    in_haste: bool = False,
) -> Copy:
    """Make what is in `incoming` a complete copy. Older ones make room, but for `spare`.

    `in_haste`: a renter waits, and they are removed later, by `tidy` or by the next copy.

    `limits`: the most files and bytes that it may hold; OSError is raised for more. `changed`: the paths that differ
    from `base`; None: they are not known.
    """
    complete = found(folder)
    files, size = _measure(folder / INCOMING / "home")
    if files > limits[0] + 1 or size > limits[1]:
        raise OSError(errno.EFBIG, f"it holds {files} files and {size} bytes, which is more than a copy may")
    generation = Generation(epoch, next_number([each.generation for each in complete], epoch))
    copy = Copy(generation, made.at, size, files, made.skipped, made.salvage)
    about = written(copy) | {"mark": made.mark, "base": "", "folders": made.folders}
    if base and changed is not None and all(_is_inside(path) for path in changed):
        about["base"] = base
        (folder / INCOMING / CHANGES).write_bytes(b"".join(path.rstrip(b"/") + b"\0" for path in changed))
    _write(folder / INCOMING, about)
    _flush_all(folder)
    (folder / INCOMING).rename(folder / str(generation))
    _flush(folder)
    staying = kept([*complete, copy])
    for each in complete:
        if each.generation not in {*staying, spare}:
            old = (folder / str(each.generation)).rename(folder / f"{OLD}{each.generation}")
            if not in_haste:
                _remove(old)
    return copy


def marks(folder: Path, generation: str, filled: str) -> dict[str, Any]:
    """Return what a worker has to know that is filled with a copy: its mark and the modes of some directories.

    `base` is the mark of `filled` if the copy is that one or was made from it, else empty.
    """
    about = _read(folder / generation)
    base = str(about.get("mark", "")) if filled == generation else ""
    with suppress(OSError, ValueError):
        if filled and about.get("base") == filled:
            base = str(_read(folder / filled).get("mark", ""))
    return {"mark": str(about.get("mark", "")), "base": base, "folders": about.get("folders", {})}


def wipe(folder: Path) -> None:
    for place in folder.iterdir():
        _remove(place)


def tidy(folder: Path) -> bool:
    """Remove the copies that made room for one in haste."""
    for place in folder.glob(f"{OLD}*"):
        _remove(place)
    return True


def _sweep(folder: Path, complete: Sequence[Copy], begun_from: str) -> None:
    """Remove all but the complete copies, and what was prepared for one that begins from `begun_from`."""
    staying = {str(copy.generation) for copy in complete} | {f"{NEXT}{begun_from}"}
    for place in folder.iterdir():
        if place.name not in staying:
            _remove(place)


def _measure(home: Path) -> tuple[int, int]:
    """Return the number of entries, and the bytes of files with their holes."""
    looked = subprocess.run(["find", ".", "-printf", r"%y%s\n"], cwd=home, capture_output=True, check=True)
    lines = looked.stdout.splitlines()
    return len(lines), sum(int(line[1:]) for line in lines if line[:1] == b"f")


def _is_inside(path: bytes) -> bool:
    return not path.startswith(b"/") and b".." not in path.split(b"/")


def _about(place: Path) -> Copy | None:
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
