"""Manifests: files on the worker that list what the last snapshots of each rental hold."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from orion_worker.snapshots.scan import Scan


@dataclass(frozen=True)
class Manifest:
    """The content of a snapshot: the scan of its home, and the files for which that scan is not enough."""

    scan: Scan
    doubtful: dict[bytes, str] = field(default_factory=dict)
    """The SHA-256 of each doubtful file as it is in the snapshot, by path; empty for one too large to compare."""
    missing: dict[bytes, str] = field(default_factory=dict)
    """Why an entry of the home is not in the snapshot, or not whole, by path."""


class Manifests:
    """The manifests of all rentals on this worker, each under the mark that the manager gave its snapshot."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "var/lib/orion/manifests"

    def read(self, rental_id: str, mark: str) -> Manifest | None:
        """Return the manifest; None if there is none, or only a part of it."""
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
        """Write the manifest, and remove all others of this rental but the one with the mark `stays`.

        This does not wait for the disk: after a loss of power, `read` recognises a half-written manifest by its sum.
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
