"""The settings of snapshots: their interval, their number at a time, and their limits."""

from __future__ import annotations

from dataclasses import dataclass, field

from orion.manager.domain.pacing import LONGEST_PAUSE_S, Pace


@dataclass(frozen=True, kw_only=True)
class SnapshotLimits:
    max_files: int = 200_000
    max_bytes: int = 2 << 30
    pause_s: float = LONGEST_PAUSE_S
    """The seconds for which a snapshot may pause the programs of a rental, except in a planned migration."""
    owner_share: float = 0.5
    """The share of the disk's bytes and inodes for the snapshots of one owner."""


@dataclass(frozen=True, kw_only=True)
class SnapshotPlan:
    interval_s: float = 30.0
    """The seconds between snapshots of one rental."""
    at_once: int = 8
    """The number of snapshots under way at a time; one owner has half of them at most."""
    limits: SnapshotLimits = field(default_factory=SnapshotLimits)
    paused_share: float = 0.005
    """The share of the time for which snapshots may pause the programs of a rental."""

    def pace(self) -> Pace:
        """Return the pace of a rental that has no snapshot yet."""
        return Pace(usual_s=self.interval_s, share=self.paused_share, wait_s=self.interval_s)
