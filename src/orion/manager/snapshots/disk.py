"""The use of the disk that holds the snapshots: in all, by rental, and by owner.

A disk is full when it has no bytes or no inodes left: 40,000 empty directories use few bytes but 40,000 inodes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from orion.manager.snapshots.port import OVER_SHARE, SnapshotError
from orion.manager.snapshots.protocol import SnapshotRequest

MAX_DISK_SHARE = 0.9
"""The used share of the disk's bytes or inodes above which a snapshot that is being received is given up. The snapshot
controller starts none from a lower share on."""


class Usage(NamedTuple):
    """An amount of inodes and bytes of a disk."""

    inodes: int = 0
    bytes: int = 0

    def plus(self, other: Usage) -> Usage:
        return Usage(self.inodes + other.inodes, self.bytes + other.bytes)

    def fits_in(self, most: Usage) -> bool:
        """Return whether this is at most `most`. A limit of no inodes means that inodes are not limited."""
        return self.bytes <= most.bytes and (self.inodes <= most.inodes or not most.inodes)


class Disk(NamedTuple):
    """The capacity and use of a disk, without what is reserved for root.

    File systems that create inodes on demand, such as btrfs, report none; there, inodes are not counted.
    """

    size: Usage
    used: Usage

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Return the disk of this directory. Raise OSError if it cannot be read."""
        status = os.statvfs(directory)
        taken, free = (status.f_blocks - status.f_bfree) * status.f_frsize, status.f_bavail * status.f_frsize
        if not status.f_files:
            return cls(Usage(0, taken + free), Usage(0, taken))
        used = Usage(status.f_files - status.f_ffree, taken)
        return cls(used.plus(Usage(status.f_favail, free)), used)

    @property
    def scarcest(self) -> tuple[float, str]:
        """Return the used share, from 0 to 1, of inodes or bytes, whichever is scarcer, and its name."""
        both = zip(self.used, self.size, Usage._fields, strict=True)
        return max((used / max(1, size), name) for used, size, name in both)

    def share(self, of_all: float) -> Usage:
        """Return this share, from 0 to 1, of the disk's capacity."""
        inodes = max(1, int(of_all * self.size.inodes)) if self.size.inodes else 0
        return Usage(inodes, int(of_all * self.size.bytes))


class _Entry(NamedTuple):
    owner: str
    usage: Usage
    was_refused: bool


class Usages:
    """The disk use of each rental's snapshots, with its owner, in a file that is replaced as a whole.

    The file is not flushed to the disk. After a loss of power it may be empty; then each rental is entered again at its
    next snapshot.
    """

    def __init__(self, file: Path, lock: Path) -> None:
        self._file = file
        self._lock = lock

    def is_room(self, rental_id: str, owner: str, most: Usage) -> bool:
        """Return whether the owner's other rentals leave any of `most`; if not, mark this rental as refused."""
        with self._changing() as entries:
            found = self._others(entries, rental_id, owner).plus(Usage(1, 1)).fits_in(most)
            if not found:
                self._refuse(entries, rental_id, owner)
            return found

    def choose(self, rental_id: str, owner: str, choices: Sequence[Usage], most: Usage) -> int | None:
        """Return the index of the first choice that fits into `most` with the owner's other rentals, and record it.

        Return None if none fits, and mark this rental as refused. If another rental of the owner is marked as refused,
        the last choice that fits is returned, so that it gets room.
        """
        with self._changing() as entries:
            others = self._others(entries, rental_id, owner)
            fitting = [number for number, choice in enumerate(choices) if others.plus(choice).fits_in(most)]
            if not fitting:
                self._refuse(entries, rental_id, owner)
                return None
            refused = {each.owner for name, each in entries.items() if each.was_refused and name != rental_id}
            chosen = fitting[-1 if owner in refused else 0]
            entries[rental_id] = _Entry(owner, choices[chosen], False)
            return chosen

    def forget(self, rental_id: str) -> None:
        with self._changing() as entries:
            entries.pop(rental_id, None)

    def refused(self) -> list[str]:
        """Return the owners of rentals that are marked as refused."""
        return sorted({each.owner for each in self._read().values() if each.was_refused})

    def _others(self, entries: dict[str, _Entry], rental_id: str, owner: str) -> Usage:
        usages = [each.usage for name, each in entries.items() if each.owner == owner and name != rental_id]
        return Usage(sum(usage.inodes for usage in usages), sum(usage.bytes for usage in usages))

    def _refuse(self, entries: dict[str, _Entry], rental_id: str, owner: str) -> None:
        """Mark the rental as refused, and keep its recorded use, because none of its snapshots was removed."""
        usage = entries[rental_id].usage if rental_id in entries else Usage()
        entries[rental_id] = _Entry(owner, usage, True)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, _Entry]]:
        """Give the entries under the lock, and write them at the end if they were changed."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            entries = self._read()
            yield entries
            if entries != self._read():
                partial = self._file.with_name(f"{self._file.name}.partial")
                partial.touch(mode=0o600)
                partial.write_text(json.dumps(entries))
                partial.replace(self._file)

    def _read(self) -> dict[str, _Entry]:
        try:
            return {
                name: _Entry(str(owner), Usage(*map(int, usage)), bool(was_refused))
                for name, (owner, usage, was_refused) in json.loads(self._file.read_text()).items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


@dataclass(frozen=True)
class OwnerShare:
    """The share of the disk for the snapshots of all rentals of one owner, as a job for one of them sees it."""

    snapshots: Path
    """The directory of all snapshots."""
    usages: Usages
    request: SnapshotRequest
    """The request of the job, which names the rental, its owner, and the share from 0 to 1."""

    def check_disk(self) -> None:
        """Raise SnapshotError if the disk is nearly full."""
        used, name = Disk.of(self.snapshots).scarcest
        if used > MAX_DISK_SHARE:
            raise SnapshotError("disk_full", f"the manager's disk is nearly full: it has hardly any {name} left")

    def check_room(self) -> None:
        """Raise SnapshotError if the owner's other rentals use the whole share, so that nothing need be received."""
        if not self.usages.is_room(self.request.rental_id, self.request.owner, self._limit()):
            raise self.refusal()

    def choose(self, choices: Sequence[Usage]) -> int | None:
        """Return the index of the choice of snapshots that fits into the share, as `Usages.choose` does."""
        return self.usages.choose(self.request.rental_id, self.request.owner, choices, self._limit())

    def refusal(self) -> SnapshotError:
        """Return the error for a snapshot that does not fit into the share."""
        what = f"the snapshots of all rentals of its owner would take more than {self.request.owner_share:.0%}"
        way_out = "release rentals, or remove files"
        return SnapshotError(OVER_SHARE, f"{what} of the manager's disk, of its bytes or of its inodes: {way_out}")

    def _limit(self) -> Usage:
        return Disk.of(self.snapshots).share(self.request.owner_share)
