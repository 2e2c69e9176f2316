"""The room that one snapshot may take: of the disk as a whole, and of its owner's share of the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orion.manager.snapshots.disk import Disk, Usage, Usages
from orion.manager.snapshots.port import OVER_SHARE, SnapshotError

MAX_DISK_SHARE = 0.9
"""The used share of the disk's bytes or inodes above which a snapshot that is being received is given up. The snapshot
controller starts none from a lower share on."""


@dataclass(frozen=True, kw_only=True)
class OwnerShare:
    """The share of the disk for the snapshots of all rentals of one owner, as a job for one of them sees it."""

    snapshots: Path
    """The directory of all snapshots."""
    usages: Usages
    rental_id: str
    owner: str
    share: float
    """The share of the disk, from 0 to 1."""

    def check_disk(self) -> None:
        """Raise SnapshotError if the disk is nearly full."""
        used, name = Disk.of(self.snapshots).scarcest
        if used > MAX_DISK_SHARE:
            raise SnapshotError("disk_full", f"the manager's disk is nearly full: it has hardly any {name} left")

    def check_room(self) -> None:
        """Raise SnapshotError if the owner's other rentals use the whole share, so that nothing need be received."""
        if not self.usages.is_room(self.rental_id, self.owner, self._limit()):
            raise self.refusal()

    def choose(self, choices: Sequence[Usage]) -> int | None:
        """Return the index of the choice of snapshots that fits into the share, as `Usages.choose` does."""
        return self.usages.choose(self.rental_id, self.owner, choices, self._limit())

    def refusal(self) -> SnapshotError:
        """Return the error for a snapshot that does not fit into the share."""
        what = f"the copies of all that its owner rents would take more than {self.share:.0%}"
        way_out = "release rentals, or remove files"
        return SnapshotError(OVER_SHARE, f"{what} of the manager's disk, of its bytes or of its inodes: {way_out}")

    def _limit(self) -> Usage:
        return Disk.of(self.snapshots).share(self.share)
