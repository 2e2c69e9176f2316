"""The port between the manager's controllers and the snapshot service.

`SnapshotClient` (client.py) is the real one, `FakeSnapshotService` (fakes/snapshots.py) the shipped fake;
tests/snapshot_service_contract.py is the contract of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.ssh.port import Host

SNAPSHOT_DEADLINE_S = 120.0
RECOVER_DEADLINE_S = 90.0
RESTORE_DEADLINE_S = 300.0
CONNECT_DEADLINE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Home:
    """A rental's home on a worker, at one epoch. `owner` has a share of the transfers and of the disk."""

    rental_id: str
    uid: int
    epoch: int
    host: Host
    owner: str = ""


@dataclass(frozen=True)
class Taken:
    """A snapshot that was taken, and what is kept with it."""

    snapshot: Snapshot
    kept: tuple[Snapshot, ...]
    """All complete snapshots of the rental, this one included, oldest first."""
    pause_s: float = 0.0
    """The seconds for which the rental's processes were stopped for it."""


class SnapshotError(Exception):
    """A call of the snapshot service failed. The message is for a person and holds no secret; `code` is stable.

    `restored`: with ALREADY_ACTIVATED, the snapshot that the home was filled with before; else empty.
    """

    def __init__(self, code: str, message: str, restored: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.restored = restored


NO_PROGRESS_CODES = frozenset(("timed_out", "stalled", "no_answer", "unreachable"))
"""Codes of transfers that used up time and made no progress."""
WORKER_CODES = frozenset(
    {"failed", "refused", "no_home", "stale_epoch", "purged", "unknown_rental", "broken"}
    | {"timed_out", "stalled", "unreachable"}
)
"""Codes after which another worker may do better: a restore is tried again elsewhere."""
ALREADY_ACTIVATED = "let_in"
"""The renter was activated at this epoch, so nothing may overwrite its files."""
NOTHING_TO_RECOVER = "nothing_to_salvage"
NO_SUCH_SNAPSHOT = "no_such_generation"
NO_BASE = "no_base"
"""The home is not known to hold the snapshot from which it should be brought up to date."""
OVER_LIMIT = "over_limit"
OVER_SHARE = "over_share"
"""The snapshots of the owner's rentals use their whole share of the disk."""
PAUSE_TOO_LONG = "pause_too_long"
"""The rental's processes would have to be stopped for longer than allowed, so they were not stopped."""
PAUSE_TOO_SHORT = "pause_in_vain"
"""The rental's processes were stopped for as long as allowed, and that was too short."""


class SnapshotService(Protocol):
    """The snapshot service. Every call ends at its deadline or soon after, and raises SnapshotError on failure."""

    async def take(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SNAPSHOT_DEADLINE_S,
        protected: SnapshotId | None = None,
        for_migration: bool = False,
    ) -> Taken:
        """Take a snapshot of the home. Earlier snapshots stay untouched until this one is complete.

        Then older ones are removed, except `protected`, which a restore is about to need. `for_migration`: the call
        ends another one for this rental, and fails if a file cannot be transferred completely. Beyond the owner's share
        of the disk, the oldest snapshots that may go are removed first. If that is not enough, the call fails with
        OVER_SHARE, and each rental of the owner keeps only what it must from then on.
        """

    async def recover(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = RECOVER_DEADLINE_S,
        protected: SnapshotId | None = None,
    ) -> Taken:
        """Take a recovered snapshot of a home whose placement was lost, after ending its processes.

        If the home is the same as a snapshot of its epoch, that one is returned. Raise SnapshotError with
        NOTHING_TO_RECOVER if the renter was never activated there. Older snapshots are removed as for `take`.
        """

    async def restore(
        self,
        home: Home,
        snapshot_id: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        previous: SnapshotId | None = None,
        precopy: bool = False,
    ) -> Snapshot | None:
        """Fill the locked home with a snapshot, the newest if none is named. Return None if there is none.

        `previous`: the snapshot that the home was filled with before; then only the changes since may be sent.
        `precopy`: another snapshot will follow, for which a renter waits, and is prepared now. This ends another call
        for the same rental, which raises the code "superseded". It may be repeated until the renter is activated.
        """

    async def connect(self, host: Host, deadline_s: float = CONNECT_DEADLINE_S) -> None:
        """Open a connection to this worker and keep it for a minute, because a restore may follow."""

    async def snapshots(self, rental_id: str, uid: int) -> list[Snapshot]:
        """Return the complete snapshots of a rental, oldest first."""

    async def remove(self, rental_id: str, uid: int) -> None:
        """Remove all snapshots of the rental. This may be repeated."""

    async def rentals(self) -> list[str]:
        """Return the ids of rentals that have anything stored."""

    async def short_of_room(self) -> list[str]:
        """Return the owners of rentals whose last snapshot failed with OVER_SHARE."""
