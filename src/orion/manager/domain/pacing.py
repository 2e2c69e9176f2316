"""The pace of a rental's snapshots, for which its programs are paused.

Programs may be paused for a share of the time. A pause that is longer than the share of one interval is a debt, which
the time after it pays off. Until then snapshots are tried at growing intervals, with short pauses only, which are
enough if little changes.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_PAUSE_S = 10.0
"""Seconds of the longest pause; the worker has the same limit (orion_worker/snapshots/transfer.py)."""
SHORT_PAUSE_S = 0.1
"""Seconds of a pause that every snapshot may take: the goal for p99 of a pause with 100 MB changed."""
WARN_FROM = 1.5
"""The multiple of the usual interval at which the owner is warned of fewer snapshots."""
WAIT_UP_TO = 2.0
"""The multiple of the usual interval up to which the end of a debt is awaited, without a try before."""


@dataclass(kw_only=True)
class Pace:
    """The pace of one rental. Times are monotonic seconds; `share` of the time is for pauses."""

    usual_s: float
    share: float
    paid_at: float = float("-inf")
    """The time at which all pauses so far are paid off."""
    wait_s: float = 0.0
    """The seconds until the next try."""
    pause_s: float = 0.0
    """The seconds of the last long pause, or of the last one that began without a debt."""
    refused: int = 0
    """The number of tries in succession without a snapshot, because the pause would have been too long."""
    is_slower: bool = False
    """Whether the owner was informed that snapshots are taken less often."""

    def allowed_s(self, now: float) -> float:
        """Return the seconds for which a snapshot may pause the programs now."""
        return LONGEST_PAUSE_S if now >= self.paid_at else SHORT_PAUSE_S

    @property
    def interval_s(self) -> float:
        """The seconds between snapshots; if they are less frequent, with pauses as long as the last long one."""
        return max(self.usual_s, self.pause_s / self.share) if self.is_slower else self.usual_s

    def copied(self, now: float, pause_s: float) -> bool:
        """Note a snapshot and its pause; return whether the interval that the owner sees has changed."""
        self.refused = 0
        is_paid, cost_s = now >= self.paid_at, pause_s / self.share
        self._owe(now, cost_s)
        if is_paid or cost_s > self.usual_s:
            self.pause_s = pause_s
        owed_s = self.paid_at - now
        # The worker did not foresee a pause that was longer than allowed, and would not foresee it next time.
        is_waited_for = self.usual_s < owed_s <= WAIT_UP_TO * self.usual_s or (not is_paid and cost_s > self.usual_s)
        self.wait_s = owed_s if is_waited_for else self.usual_s
        was_slower, is_long = self.is_slower, cost_s > WARN_FROM * self.usual_s
        self.is_slower = is_long and (was_slower or self.wait_s > self.usual_s)
        return self.is_slower != was_slower

    def too_long(self, now: float, paused_s: float) -> bool:
        """Note that a snapshot would have needed a longer pause; return whether the owner is to be informed.

        `paused_s`: the seconds for which the programs were paused in vain.
        """
        self.refused += 1
        self._owe(now, paused_s / self.share)
        wait_s = self.usual_s * 2**self.refused
        owed_s = self.paid_at - now
        self.wait_s = min(wait_s, owed_s if owed_s > 0 else LONGEST_PAUSE_S / self.share)
        was_slower, self.is_slower = self.is_slower, True
        return not was_slower

    def _owe(self, now: float, cost_s: float) -> None:
        self.paid_at = min(max(self.paid_at, now) + cost_s, now + LONGEST_PAUSE_S / self.share)
