"""The port between the manager's loops and the place where copies of homes are kept.

`SnapshotClient` (client.py) is the real one, `FakeSnapshotService` (fake.py) the shipped fake;
tests/snapshot_service_contract.py holds both.
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


@dataclass(frozen=True)
class Home:
    """A rental's home on a worker, at one epoch."""

    rental_id: str
    uid: int
    epoch: int
    host: Host
    owner: str = ""
    """The owner of the rental, for its share of the places and of the disk."""


@dataclass(frozen=True)
class Taken:
    copy: Snapshot
    kept: tuple[Snapshot, ...]
    """All complete copies of the rental that are there now, oldest first, with this one."""
    pause_s: float = 0.0
    """The seconds for which the programs of the rental stood still for it."""


class SnapshotError(Exception):
    """It was not done; the message is for a person and holds no secret. `code` is stable, `restored` for let_in."""

    def __init__(self, code: str, message: str, restored: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.restored = restored


WORKER_CODES = frozenset(
    (
        *("unreachable", "failed", "refused", "no_home", "stale_epoch", "purged", "unknown_rental", "broken"),
        *("timed_out", "stalled"),
    )
)
"""Codes for which another worker might do better: what could not be restored here is restored elsewhere."""
NO_PROGRESS_CODES = frozenset(("timed_out", "stalled", "no_answer", "unreachable"))
"""Codes of what has held its place for long and did nothing with it."""
ALREADY_ACTIVATED = "let_in"
"""The renter was let in at this epoch: nothing is put over its files any more."""
NOTHING_TO_RECOVER = "nothing_to_salvage"
NO_SUCH_SNAPSHOT = "no_such_generation"
NO_BASE = "no_base"
"""The home is not known to hold the snapshot that it is to be brought up to date from."""
OVER_LIMIT = "over_limit"
OVER_SHARE = "over_share"
"""The copies of its owner's rentals have their share of the disk."""
PAUSE_TOO_LONG = "pause_too_long"
"""Programs would have to stand still for longer than they may; they did not."""
PAUSE_TOO_SHORT = "pause_in_vain"
"""They stood still for as long as they may, and that was too short."""


class SnapshotService(Protocol):
    """Every call ends within its deadline and a little, and raises SnapshotError for whatever goes wrong."""

    async def copy(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SNAPSHOT_DEADLINE_S,
        protected: SnapshotId | None = None,
        for_migration: bool = False,
    ) -> Taken:
        """Copy the home as it was at one moment. What was copied before stays untouched until this one is complete.

        Older copies make room then, but for `spare`, which somebody is about to ask for. `moving`: for a planned move;
        it ends another copy of the rental that is under way, and is refused where something cannot be carried whole.
        Beyond its owner's share of the disk, copies that need not stay go first, the oldest before; where that is not
        enough, it is refused with OVER_SHARE, and each rental of the owner keeps no more than it must from then on.
        """
        ...

    async def salvage(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = RECOVER_DEADLINE_S,
        protected: SnapshotId | None = None,
    ) -> Taken:
        """Copy aside a home whose placement was lost, of an epoch that may be long over: nothing of it runs any more.

        Its renter's processes there are ended first. The copy is marked as a salvage; where the home is as in a copy
        of its epoch that there is, it is that one. Refused with NOTHING_TO_SALVAGE where its renter was never let in.
        Older copies make room as for `copy`.
        """
        ...

    async def restore(
        self,
        home: Home,
        generation: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        previous: SnapshotId | None = None,
        precopy: bool = False,
    ) -> Snapshot | None:
        """Fill the locked home with a copy, the newest if none is named; None: there is none, and nothing was done.

        `filled`: the copy with which the home was filled before; what changed since then may be all that is sent.
        `again`: another copy will follow, for which a renter waits; what can be done for it beforehand is done.
        Ends a copy or another restore of the same rental that is under way: that raises with the code "superseded".
        Repeatable until the renter is let in.
        """
        ...

    async def connect(self, host: Host, deadline_s: float = CONNECT_DEADLINE_S) -> None:
        """Have a connection to this worker at hand, for a minute: something may be about to be restored there."""
        ...

    async def copies(self, rental_id: str, uid: int) -> list[Snapshot]:
        """The complete copies of a rental, oldest first."""
        ...

    async def remove(self, rental_id: str, uid: int) -> None:
        """No copy of the rental is left. Repeatable."""
        ...

    async def rentals(self) -> list[str]:
        """The rentals of which something is kept."""
        ...

    async def short_of_room(self) -> list[str]:
        """The owners of rentals whose last copy was refused with OVER_SHARE."""
        ...
