"""What the manager and the vault say to each other, by channel.py: one message each, one connection for each request.

The vault checks what it is told as if the manager were a stranger: it alone may act under the rentals' uids.
"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from orion.manager.domain.pacing import LONGEST_PAUSE_S
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.messages import MAX_DEADLINE_S, HostMessage
from orion.wire import Id

MAX_REQUEST_BYTES = 1 << 17
"""Bytes of a request, which may name eight host keys of 8 KB."""


class SnapshotAction(StrEnum):
    COPY = "copy"
    SALVAGE = "salvage"
    RESTORE = "restore"
    LIST = "list"
    REMOVE = "remove"
    RENTALS = "rentals"
    SHORT_OF_ROOM = "short_of_room"
    CONNECT = "connect"


class SnapshotLine(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SnapshotRequest(SnapshotLine):
    action: SnapshotAction
    rental_id: Id = "-"
    uid: int = Field(100_000, ge=100_000, lt=2**31)
    epoch: int = Field(1, ge=1, lt=2**53)
    host: HostMessage | None = None
    generation: Annotated[str, StringConstraints(pattern=r"^([1-9][0-9]{0,15}-[1-9][0-9]{0,15})?$")] = ""
    """To restore; of a copy, one that is to stay. Empty: the newest, or none in particular."""
    previous: Annotated[str, StringConstraints(pattern=r"^([1-9][0-9]{0,15}-[1-9][0-9]{0,15})?$")] = ""
    """Of a restore, the copy with which the home was filled before. Empty: it is not known."""
    precopy: bool = False
    """Whether a restore is followed by another copy, which is prepared as far as it can be."""
    max_files: int = Field(0, ge=0, lt=2**53)
    max_bytes: int = Field(0, ge=0, lt=2**53)
    owner: Annotated[str, StringConstraints(max_length=200)] = ""
    owner_share: float = Field(1.0, gt=0, le=1)
    """The share of the disk for the copies of all rentals of this owner."""
    for_migration: bool = False
    pause_s: float = Field(LONGEST_PAUSE_S, gt=0, le=LONGEST_PAUSE_S)
    """The seconds for which the programs of the rental may stand still for a copy."""
    deadline_s: float = Field(gt=0, le=MAX_DEADLINE_S)


class SnapshotReply(SnapshotLine):
    ok: bool
    code: str = ""
    message: str = ""
    restored: str = ""
    copies: list[dict[str, Any]] = []
    """Complete copies, as `written` writes them; oldest first."""
    done: dict[str, Any] | None = None
    """The copy that was made or restored."""
    rentals: list[str] = []
    owners: list[str] = []
    """Those of whom a rental is short of room."""
    pause_s: float = 0.0
    """The seconds for which the programs of the rental stood still."""


def written(copy: Snapshot) -> dict[str, Any]:
    return asdict(copy) | {"generation": str(copy.generation), "skipped": list(copy.skipped)}


def read(data: dict[str, Any]) -> Snapshot:
    """Raises ValueError, TypeError or KeyError for what `written` did not write."""
    generation = SnapshotId.parse(data["generation"])
    if generation is None:
        raise ValueError("not a generation")
    return Snapshot(
        generation=generation,
        at=float(data["at"]),
        bytes=int(data["bytes"]),
        files=int(data["files"]),
        skipped=tuple(str(name) for name in data["skipped"]),
        salvage=bool(data.get("salvage", False)),
    )
