"""How often homes are copied, how many at a time, and what one copy may hold: plain values that an operator sets."""

from __future__ import annotations

from dataclasses import dataclass, field

from orion.manager.domain.pacing import LONGEST_PAUSE_S, Pace


@dataclass(frozen=True)
class SnapshotLimits:
    """What a copy may hold at most."""

    max_files: int = 200_000
    max_bytes: int = 2 << 30
    pause_s: float = LONGEST_PAUSE_S
    """The seconds for which the programs of a rental may stand still for a copy that is not for a planned move."""
    owner_share: float = 0.5
    """The share of the disk, of its bytes and of its inodes, for the copies of all rentals of one owner."""


@dataclass(frozen=True)
class SnapshotPlan:
    """How the copies loop spends its time, and what each copy may hold."""

    interval_s: float = 30.0
    """The seconds between copies of one rental."""
    at_once: int = 8
    """Copies of all owners under way at a time, of which one owner has half at most."""
    limits: SnapshotLimits = field(default_factory=SnapshotLimits)
    paused_share: float = 0.005
    """The share of its time for which the programs of a rental may be stopped for copies."""

    def pace(self) -> Pace:
        """Return the pace of a rental that was not copied yet."""
        return Pace(usual_s=self.interval_s, share=self.paused_share, wait_s=self.interval_s)
