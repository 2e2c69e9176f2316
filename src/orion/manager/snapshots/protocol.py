"""Messages between the manager and the snapshot service: one request and one reply on each connection (channel.py).

The snapshot service checks each request and does not trust the manager, because it alone may act under rentals' uids.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from orion.manager.domain.pacing import LONGEST_PAUSE_S
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.messages import MAX_DEADLINE_S, HostMessage, Message
from orion.wire import Id

MAX_REQUEST_BYTES = 1 << 17
"""Bytes of a request, which may name eight host keys of 8 KB."""


SnapshotName = Annotated[str, StringConstraints(pattern=r"^([1-9][0-9]{0,15}-[1-9][0-9]{0,15})?$")]


class SnapshotAction(StrEnum):
    COPY = "copy"
    RECOVER = "salvage"
    RESTORE = "restore"
    LIST = "list"
    REMOVE = "remove"
    RENTALS = "rentals"
    SHORT_OF_ROOM = "short_of_room"
    CONNECT = "connect"


class SnapshotRequest(Message):
    action: SnapshotAction
    rental_id: Id = "-"
    uid: int = Field(100_000, ge=100_000, lt=2**31)
    epoch: int = Field(1, ge=1, lt=2**53)
    host: HostMessage | None = None
    generation: SnapshotName = ""
    """The snapshot to restore, empty for the newest; for a new snapshot, an older one that must stay."""
    previous: SnapshotName = ""
    """For a restore, the snapshot that the home was filled with before; empty if that is not known."""
    precopy: bool = False
    """Whether another snapshot will follow a restore, so that the service prepares for it."""
    max_files: int = Field(0, ge=0, lt=2**53)
    max_bytes: int = Field(0, ge=0, lt=2**53)
    owner: Annotated[str, StringConstraints(max_length=200)] = ""
    owner_share: float = Field(1.0, gt=0, le=1)
    """The share of the disk, from 0 to 1, for the snapshots of all rentals of this owner."""
    for_migration: bool = False
    pause_s: float = Field(LONGEST_PAUSE_S, gt=0, le=LONGEST_PAUSE_S)
    """The seconds for which the rental's processes may be stopped for a snapshot."""
    deadline_s: float = Field(gt=0, le=MAX_DEADLINE_S)


class SnapshotReply(Message):
    ok: bool
    code: str = ""
    message: str = ""
    restored: str = ""
    copies: list[dict[str, Any]] = Field(default_factory=list)
    """Complete snapshots in the form of `described`, oldest first."""
    done: dict[str, Any] | None = None
    """The snapshot that was taken or restored."""
    rentals: list[str] = Field(default_factory=list)
    owners: list[str] = Field(default_factory=list)
    """The owners of rentals that lack room."""
    pause_s: float = 0.0
    """The seconds for which the rental's processes were stopped."""


def read(data: dict[str, Any]) -> Snapshot:
    """Return the snapshot in these fields. Raise ValueError, TypeError or KeyError if `described` did not make them."""
    snapshot_id = SnapshotId.parse(data["generation"])
    if snapshot_id is None:
        raise ValueError("not the id of a snapshot")
    return Snapshot(
        id=snapshot_id,
        at=float(data["at"]),
        bytes=int(data["bytes"]),
        files=int(data["files"]),
        skipped=tuple(str(name) for name in data["skipped"]),
        recovered=bool(data.get("salvage", False)),
    )
