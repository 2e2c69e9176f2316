"""Frozen records of the rows that decisions read, and of the items of inventories.

store/schema.py says which column has another name than its field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from orion.manager.domain.states import Health, Intent, PlacementState, RentalState

BOOT = "boot"
"""The word in an agent's version that says that its orders may name a boot id (orion_worker/agent/node.py)."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    id: str
    hostname: str
    address: str
    host_keys: tuple[str, ...]
    slots: int
    health: Health
    intent: Intent
    session_id: str | None
    boot_id: str
    verified_session: str | None = None
    """The session in which the manager reached the worker by SSH and found nothing stale."""
    fault: str = ""
    """The fault that keeps the worker in quarantine until an operator resumes it; empty: none."""
    explanation: str = ""
    agent_version: str = ""
    """The version of the agent. The words after a plus sign, separated by dots, are features of its orders."""

    @property
    def verified(self) -> bool:
        """Whether the worker was verified in its current session."""
        return self.session_id is not None and self.verified_session == self.session_id

    @property
    def ordered_boot_id(self) -> str:
        """The boot id for orders to the worker; empty for an older worker, which would refuse orders that have one."""
        return self.boot_id if BOOT in self.agent_version.partition("+")[2].split(".") else ""


class Origin(NamedTuple):
    """The snapshot that a rental's home was filled with before its renter was activated at one epoch."""

    epoch: int
    snapshot: str
    """The name of the snapshot; empty: the home was empty."""
    requested: bool
    """Whether this snapshot, or an empty home, was requested; otherwise the newest was taken."""


@dataclass(frozen=True, kw_only=True)
class Rental:
    id: str
    name: str
    owner: str
    username: str
    uid: int
    state: RentalState
    epoch: int
    public_key: str
    """The public keys of its renter, one on each line."""
    ttl_s: int
    created_at: float
    activated_at: float | None = None
    expires_at: float | None = None
    end: Literal["released", "expired"] | None = None
    failures: int = 0
    explanation: str = ""
    last_snapshot_at: float | None = None
    """UTC seconds at which the last complete snapshot was begun."""
    snapshot_problem: str = ""
    """The reason why no snapshot can be taken at present; empty: none."""
    home_warning: str = ""
    """The warning for the owner about the home: see snapshots.nearly_full and snapshots.slower_warning."""
    restore_from: str | None = None
    """The snapshot, or `empty`, that was requested for the next placement; None: the newest is taken."""
    activated_epoch: int = 0
    """The latest epoch at which the renter was activated, as far as the manager knows."""
    began_with: str = ""
    """The snapshot that the home was filled with at that epoch, or that was recovered from it; empty: none is known."""
    lineage: tuple[Origin, ...] = ()
    """The origins of the latest epochs, oldest first. Epochs from before this column have none."""
    start: str = ""
    """The start command, a line for the shell; empty: there is none. See start_commands.py."""
    start_run: int = 1
    """The number of the wanted run of the start command; each request of the owner adds one."""
    start_problem: str = ""
    """The reason why the start command is not run any more; empty: none."""
    takeovers: tuple[float, ...] = ()
    """UTC seconds of recent losses of a worker on which the start command may have run."""
    last_epoch: int = 0
    """The highest epoch that a planned migration was given; see migration.py."""

    @property
    def next_epoch(self) -> int:
        """An epoch that was never given; workers also remember those of migrations that failed."""
        return max(self.epoch, self.last_epoch) + 1


@dataclass(frozen=True, kw_only=True)
class Placement:
    id: str
    rental_id: str
    worker_id: str
    slot: int
    epoch: int
    state: PlacementState
    public_key: str = ""
    """The public keys that were last put on the worker; they are put there again if the rental has others."""
    start_mark: str = ""
    """The mark of the last run of the start command there: see start_commands.py."""
    start_end: str = ""
    """The end of that run, as CommandEnd.how; empty: no end is known."""
    start_ended_at: float | None = None
    """UTC seconds of that end."""
    files_recovered: bool = False
    """Whether the files of a lost placement were recovered from its worker, or given up."""
    is_target: bool = False
    """Whether the placement is the target of a planned migration before the cutover."""
    quiesced_for: int = 0
    """The number of the planned migration for which the placement is, or was at its stop, quiesced; 0: none."""
    target_snapshot: str = ""
    """The snapshot that precopy or the final sync has put into the target."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A rental in a worker's inventory; it is believed about that worker only."""

    rental_id: str
    username: str
    uid: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class CommandEnd:
    """The end of a run of a start command, as a worker reports it; it is believed about placements there only."""

    rental_id: str
    epoch: int
    run: str
    """The mark of the run, as in Placement.started."""
    how: str
    """`status N`, `signal N` or `unseen`."""
    at: float
    """UTC seconds."""
