"""The directory of one rental's copies. Everything here runs under the rental's own uid, which owns all of it.

    incoming/          a copy that is being made, or what is left of one
    E-N/home/          a complete copy: generation N of epoch E
    E-N/about.json     when, how large, what is missing

A copy is made complete by one rename, after all of it was written to the disk: a crash at any instant leaves it whole
or not at all. Unchanged files are hard links to the copy before.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orion.manager.domain.copies import Copy, Generation, begins_from, kept, next_number
from orion.manager.engine.vault.protocol import read, written

INCOMING = "incoming"


@dataclass(frozen=True)
class Made:
    """What rsync tells of a copy that it has completed in `incoming`."""

    at: float
    bytes: int
    files: int
    items: int
    """What it listed; with an unchanged home always the same number."""
    unchanged: bool
    """Each thing that it listed is as in the copy before."""
    skipped: tuple[str, ...]
    salvage: bool = False


def found(folder: Path) -> list[Copy]:
    """The complete copies, oldest first."""
    copies = [_about(place) for place in folder.iterdir() if Generation.parse(place.name)]
    return sorted((copy for copy in copies if copy), key=lambda copy: copy.generation)


def begin(folder: Path, epoch: int, salvage: bool) -> str:
    """Make room for a new copy; the name of the one that it is compared with, empty where there is none."""
    _remove(folder / INCOMING)
    complete = found(folder)
    for place in folder.iterdir():
        if place.name not in {str(copy.generation) for copy in complete}:
            _remove(place)
    (folder / INCOMING).mkdir(mode=0o700)
    # Its `home` is made by rsync: over one that is there it would say, each time, that something has changed.
    base = begins_from(complete, epoch, salvage)
    return str(base.generation) if base else ""


def finish(folder: Path, epoch: int, made: Made, spare: Generation | None = None) -> Copy:
    """Make what is in `incoming` a complete copy; or, where nothing has changed, renew the one before it.

    Older ones make room, but for `spare`.
    """
    complete = found(folder)
    copy = Copy(Generation(epoch, 1), made.at, made.bytes, made.files, made.skipped, made.salvage)
    base = begins_from(complete, epoch, made.salvage)
    if base and _is_same(folder, base, copy, made):
        renewed = replace(base, at=made.at)
        _write(folder / str(renewed.generation), renewed, made.items)
        _remove(folder / INCOMING)
        return renewed
    number = next_number([each.generation for each in complete], epoch)
    copy = replace(copy, generation=Generation(epoch, number))
    _write(folder / INCOMING, copy, made.items)
    _flush_all(folder)
    (folder / INCOMING).rename(folder / str(copy.generation))
    _flush(folder)
    staying = kept([*complete, copy])
    for each in complete:
        if each.generation not in {*staying, spare}:
            _remove(folder / str(each.generation))
    return copy


def wipe(folder: Path) -> None:
    for place in folder.iterdir():
        _remove(place)


def _is_same(folder: Path, base: Copy, copy: Copy, made: Made) -> bool:
    """Something that was deleted leaves no line of its own: then their number is another."""
    same = (base.files, base.bytes, base.skipped) == (copy.files, copy.bytes, copy.skipped)
    items = _read(folder / str(base.generation)).get("items")
    return made.unchanged and same and items == made.items and base.generation.epoch == copy.generation.epoch


def _about(place: Path) -> Copy | None:
    try:
        return read(_read(place) | {"generation": place.name})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / "about.json").read_text()))


def _write(place: Path, copy: Copy, items: int) -> None:
    partial = place / "about.partial"
    partial.write_text(json.dumps(written(copy) | {"items": items}))
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
