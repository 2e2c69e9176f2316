"""The pace of a rental's copies, where its programs have to stand still for them.

Programs may stand still for a share of the time. A pause that is longer than the share of one interval is paid off by
the time that follows it. Until that has passed the rental is tried again all the same, at growing intervals, for what
changes now may be little: then a copy needs a short pause only, and no longer one is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_PAUSE_S = 10.0
"""The worker's own limit as well (orion_worker/snapshots/transfer.py)."""
SHORT_PAUSE_S = 0.1
"""A pause that is allowed at each copy: p99 of a pause with 100 MB changed is to be no longer."""
WARN_FROM = 1.5
"""Times the usual interval from which on a rental is told that it is copied less often."""
WAIT_UP_TO = 2.0
"""Times the usual interval within which to wait for the end of a debt is better than to try in vain before."""


@dataclass(kw_only=True)
class Pace:
    """The copies of one rental. All times are monotonic seconds; `share` of the time is for pauses."""

    usual_s: float
    share: float
    paid_at: float = float("-inf")
    """The moment from which on the time that has passed covers all pauses so far."""
    wait_s: float = 0.0
    """The seconds until the next copy is tried."""
    pause_s: float = 0.0
    """The last long pause, or the last one that was paid for before another copy."""
    refused: int = 0
    """How often in succession a copy was not made because its pause would have been too long."""
    is_slower: bool = False
    """Whether its owner was told that it is copied less often."""

    def allowed_s(self, now: float) -> float:
        """Return the seconds for which its programs may stand still for a copy that is made now."""
        return LONGEST_PAUSE_S if now >= self.paid_at else SHORT_PAUSE_S

    @property
    def interval_s(self) -> float:
        """Return the seconds between copies, each with a pause like the last long one if it is copied less often."""
        return max(self.usual_s, self.pause_s / self.share) if self.is_slower else self.usual_s

    def copied(self, now: float, pause_s: float) -> bool:
        """Note a copy and its pause; return whether its owner is to be told of another interval."""
        self.refused = 0
        is_paid, cost_s = now >= self.paid_at, pause_s / self.share
        self._owe(now, cost_s)
        if is_paid or cost_s > self.usual_s:
            self.pause_s = pause_s
        owed_s = self.paid_at - now
        # Where it took longer than it was allowed to, the worker did not foresee that, and would not again.
        is_waited_for = self.usual_s < owed_s <= WAIT_UP_TO * self.usual_s or (not is_paid and cost_s > self.usual_s)
        self.wait_s = owed_s if is_waited_for else self.usual_s
        was_slower, is_long = self.is_slower, cost_s > WARN_FROM * self.usual_s
        self.is_slower = is_long and (was_slower or self.wait_s > self.usual_s)
        return self.is_slower != was_slower

    def too_long(self, now: float, stood_s: float) -> bool:
        """Note that a copy was not made, for it needs a longer pause; return whether its owner is to be told.

        `stood_s`: for how long programs stood still all the same.
        """
        self.refused += 1
        self._owe(now, stood_s / self.share)
        wait_s = self.usual_s * 2**self.refused
        owed_s = self.paid_at - now
        self.wait_s = min(wait_s, owed_s if owed_s > 0 else LONGEST_PAUSE_S / self.share)
        told, self.is_slower = self.is_slower, True
        return not told

    def _owe(self, now: float, cost_s: float) -> None:
        self.paid_at = min(max(self.paid_at, now) + cost_s, now + LONGEST_PAUSE_S / self.share)
