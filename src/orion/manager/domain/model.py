"""What decisions are made from and made of: rows as frozen records, and steps, which are guarded writes with events.

A step is one unit: every write finds its row as expected, or the whole step is dropped, because somebody else acted.
`World` applies steps in memory; the store applies the same steps to the database.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from orion.manager.domain.states import (
    Health,
    Intent,
    PlacementState,
    RentalState,
)

BOOT = "boot"
"""The word in an agent's version by which orders to it may name a boot id (orion_worker/agent/node.py)."""


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
    """The session for which the manager reached it by SSH and found nothing stale; ready only while it is current."""
    fault: str = ""
    """What is wrong with it, until an operator resumes it: a clean-up that passed its deadline, flapping."""
    explanation: str = ""
    agent_version: str = ""
    """The version of its agent. Words behind a plus sign, with dots between them, say which orders it takes besides."""

    @property
    def ordered_boot_id(self) -> str:
        """The boot id that orders to it name; empty for a worker from before that, which would refuse these orders."""
        return self.boot_id if BOOT in self.agent_version.partition("+")[2].split(".") else ""


class Origin(NamedTuple):
    """What a rental's home was filled with before its renter was let in at one epoch."""

    epoch: int
    generation: str
    """The name of the copy; empty: the home was empty."""
    asked: bool
    """Somebody had asked for this copy, or for an empty home; else it was the newest known."""


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
    """The keys that open it, one a line."""
    ttl_s: int
    created_at: float
    activated_at: float | None = None
    expires_at: float | None = None
    end: Literal["released", "expired"] | None = None
    failures: int = 0
    explanation: str = ""
    last_safe_copy_at: float | None = None
    """UTC seconds at which the last complete copy of its files was begun."""
    copy_problem: str = ""
    """Why its files cannot be copied at present."""
    home_warning: str = ""
    """The warning that its owner should see of its home: see copies.nearly_full and copies.copied_rarely."""
    restore_from: str | None = None
    """What its next placement begins with, where that is not the newest copy: see domain/snapshots.py."""
    let_in_epoch: int = 0
    """The latest epoch at which its renter was let in, as far as the manager was told."""
    began_with: str = ""
    """The copy of its files that it began with at that epoch, or that was made of its end; empty: none is known."""
    lineage: tuple[Origin, ...] = ()
    """The origins of its latest epochs, oldest first; none is known of an epoch from before these were written down."""
    start: str = ""
    """Its start command, a line for its shell; empty: it has none. See domain/start_commands.py."""
    start_run: int = 1
    """Which run of it is wanted: one more each time that its owner asks for it."""
    start_problem: str = ""
    """Why it is not run any more."""
    takeovers: tuple[float, ...] = ()
    """UTC seconds at which it lately lost a worker on which its start command may have been run."""
    last_epoch: int = 0
    """The highest number that a planned move of it was given; see domain/migration.py."""

    @property
    def next_epoch(self) -> int:
        """Never given before: workers remember those of moves that came to nothing, too."""
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
    """The keys that were last put on the worker; others in the rental mean that they must be put there again."""
    started: str = ""
    """The run of the start command that it has had there: see domain/start_commands.py."""
    start_end: str = ""
    """How that run ended, as CommandEnd.how; empty: it goes on, as far as is known."""
    start_ended_at: float | None = None
    salvaged: bool = False
    """Of a lost one: what its worker still has of it was copied aside, or was given up."""
    standby: bool = False
    """It is being filled beside the one that runs; it becomes its rental's with the step that raises the epoch."""
    held: int = 0
    """The planned move for which it stands still; 0: none. Once it is stopping: that it stood still before."""
    filled: str = ""
    """The copy that a standby was filled with."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A rental as a worker's inventory tells it: believed only about that worker."""

    rental_id: str
    username: str
    uid: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class CommandEnd:
    """How a run of a start command ended, as its worker tells it: believed only about what is placed on that worker."""

    rental_id: str
    epoch: int
    run: str
    """As Placement.started."""
    how: str
    """`status N`, `signal N` or `unseen`."""
    at: float
    """UTC seconds."""
