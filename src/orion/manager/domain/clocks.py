"""The intervals of failover in seconds, and the inequalities that prevent two live copies of a rental.

The agent counts from the moment at which it sent its last acknowledged heartbeat, the manager from the moment at which
it received that heartbeat, so the agent's lease ends first. Source of the figures:
docs/decisions/004-leases-and-clocks.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

DRIFT = 0.01
"""The share of a time by which two monotonic clocks may run apart."""


@dataclass(frozen=True, kw_only=True)
class Clocks:
    heartbeat_s: float = 30.0
    suspect_after_s: float = 40.0
    freeze_after_s: float = 75.0
    freeze_budget_s: float = 5.0
    door_answer_s: float = 5.0
    takeover_after_s: float = 90.0
    wake_budget_s: float = 0.5
    slack_s: float = 3.0
    brake_max_s: float = 300.0
    goodbye_after_s: float = 5.0
    """Seconds from a worker's last heartbeat until its rentals are taken over: a restart of the worker is shorter."""
    flap_window_s: float = 3600.0

    def scaled(self, factor: float) -> Clocks:
        """Return the same clocks, each `factor` times as long."""
        return replace(self, **{field.name: getattr(self, field.name) * factor for field in fields(self)})

    def problems(self) -> list[str]:
        """Return the inequalities that do not hold, in words for the operator; empty if the clocks are safe."""
        found = [f"{f.name} must be positive" for f in fields(self) if getattr(self, f.name) <= 0]
        stopped_by = (self.freeze_after_s + self.door_answer_s + self.freeze_budget_s) * (1 + DRIFT) + self.slack_s
        taken_at = self.takeover_after_s * (1 - DRIFT)
        if stopped_by > taken_at:
            found.append(
                f"a worker may run until {stopped_by:.2f} s after its last heartbeat but is replaced after "
                f"{taken_at:.2f} s: raise takeover_after_s or lower freeze_after_s"
            )
        if not self.heartbeat_s * 1.1 < self.suspect_after_s < self.freeze_after_s:
            found.append(
                f"heartbeat_s * 1.1 < suspect_after_s < freeze_after_s must hold, not "
                f"{self.heartbeat_s * 1.1:.2f} < {self.suspect_after_s:.2f} < {self.freeze_after_s:.2f}"
            )
        return found
