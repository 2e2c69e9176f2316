"""The health of workers: ordered rules over one worker, its lease and the brake; the first that matches decides.

`now` is read before the rows and the lease are, so a heartbeat that comes in meanwhile can only shorten the silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orion.manager.domain.brake import Brake
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.leases import Lease
from orion.manager.domain.model import Worker
from orion.manager.domain.states import JOIN_DEADLINE_S, Health

MAX_FLAPS = 3
"""Losses of `ready` within the flap window that quarantine a worker. A restart of the manager forgets earlier ones."""
LIVENESS_ENDED = "its liveness connection was closed"
DECLARED_GONE = "an operator said that its container is not there any more"
FORGET_AFTER_S = 3600.0
"""Seconds after which a worker that is down, and from which no files are missing, is forgotten."""
FORGET_EVERY_S = 60.0
FORGOTTEN_AT_ONCE = 100


@dataclass(frozen=True)
class LivenessReport:
    """The state of a worker's liveness connection in its current session; see ssh/liveness.py."""

    closed_at: float | None = None
    """Monotonic seconds at which the worker's kernel closed the connection; None: it is open, or lost without proof."""
    proof: str = ""
    """The proof of death that was found since then; empty: none."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The inputs of one verdict. `joining_s`: seconds in `joining`; `losses`: those of `ready` within the window."""

    worker: Worker
    lease: Lease | None
    now: float
    clocks: Clocks
    brake: Brake
    has_destination: bool
    """Whether another worker is ready, active and not exiting, so that rentals can go there."""
    joining_s: float = 0.0
    losses: int = 0
    liveness: LivenessReport = LivenessReport()

    @property
    def exiting_at(self) -> float | None:
        return self.lease.exiting_at if self.lease else None

    @property
    def received_at(self) -> float | None:
        """The time of the worker's last heartbeat or registration; None: none came since this manager started."""
        return self.lease.received_at if self.lease else None

    @property
    def closed(self) -> bool:
        """Whether the liveness connection was closed, no heartbeat came since, and no last heartbeat announced that."""
        received_at, closed_at = self.received_at, self.liveness.closed_at
        heard = received_at is not None and closed_at is not None and received_at > closed_at
        return closed_at is not None and not heard and self.exiting_at is None

    @property
    def unheard_s(self) -> float:
        """Seconds since the worker's last heartbeat to this manager."""
        return self.now - (self.brake.disturbed_at if self.received_at is None else self.received_at)

    @property
    def silence_s(self) -> float:
        """Seconds of silence that count against the worker; each disturbance of the brake starts them again."""
        return min(self.unheard_s, self.now - self.brake.disturbed_at)

    @property
    def heard(self) -> bool:
        """Whether this manager had a heartbeat of the current session within `suspect_after_s`."""
        current = self.lease is not None and self.lease.session_id == self.worker.session_id
        return current and self.received_at is not None and self.now - self.received_at <= self.clocks.suspect_after_s

    @property
    def grace_s(self) -> float:
        """Seconds of silence after which the worker is down, by the lease that it may have.

        They are doubled if there was no heartbeat since this manager started, but not if another worker has the same
        address now: then no heartbeat will come. The worker may run on without a network, so its lease must pass.
        """
        known = self.received_at is not None or (self.lease is not None and bool(self.lease.displaced_by))
        longer = self.lease.lease_s / self.clocks.freeze_after_s if self.lease else 0.0
        return self.clocks.takeover_after_s * max(1.0, longer) * (1 if known else 2)


@dataclass(frozen=True)
class Verdict:
    """The next health of a worker, and the reason."""

    to: Health
    reason: str

    def is_loss(self, of: Worker) -> bool:
        """Return whether the verdict counts as a loss of `ready`.

        A closed liveness connection alone is no loss: otherwise a renter that can close it could have the worker
        quarantined.
        """
        if of.health is Health.READY:
            return self.to in {Health.SUSPECT, Health.JOINING, Health.DOWN} and self.reason != LIVENESS_ENDED
        was_closed = of.health is Health.SUSPECT and of.explanation == LIVENESS_ENDED
        return was_closed and self.to in {Health.JOINING, Health.DOWN}


Rule = Callable[[Evidence], Verdict | None]


def deadlines(evidence: Evidence) -> tuple[float, ...]:
    """Return the times at which time alone may change the verdict; some may have passed while the brake is on.

    Each change of another input wakes the health controller: a commit, a heartbeat, the end of the brake.
    """
    health, since = evidence.worker.health, evidence.now - evidence.joining_s
    if health is Health.DOWN:
        return ()
    silent = evidence.now - evidence.unheard_s + evidence.clocks.suspect_after_s
    passed = evidence.now - evidence.silence_s + evidence.grace_s
    exits = () if evidence.exiting_at is None else (evidence.exiting_at + evidence.clocks.goodbye_after_s,)
    joined = (since + JOIN_DEADLINE_S,) if health is Health.JOINING else ()
    return (silent, passed, *joined, *exits)


def judge(evidence: Evidence) -> Verdict | None:
    """Return the verdict on one worker; None: its health stays."""
    return next((verdict for rule in RULES[evidence.worker.health] if (verdict := rule(evidence))), None)


def _exited(e: Evidence) -> Verdict | None:
    # The delay and the destination are needed: when the whole pool is stopped or restarted, nothing is taken over.
    if e.exiting_at is None or e.brake.on or not e.has_destination or e.now - e.exiting_at < e.clocks.goodbye_after_s:
        return None
    return Verdict(Health.DOWN, "its last heartbeat announced that it stops")


def _proved_dead(e: Evidence) -> Verdict | None:
    # The brake does not matter: a proof is not silence.
    return Verdict(Health.DOWN, e.liveness.proof) if e.liveness.proof and e.closed else None


def _declared_gone(e: Evidence) -> Verdict | None:
    # The brake does not matter: the operator's word is not silence. A later heartbeat voids that word (leases.py).
    return Verdict(Health.DOWN, DECLARED_GONE) if e.lease and e.lease.gone else None


def _liveness_ended(e: Evidence) -> Verdict | None:
    return Verdict(Health.SUSPECT, LIVENESS_ENDED) if e.closed else None


def _lease_passed(e: Evidence) -> Verdict | None:
    if e.brake.on or e.silence_s <= e.grace_s:
        return None
    return Verdict(Health.DOWN, f"no heartbeat for {e.silence_s:.0f} s")


def _silent(e: Evidence) -> Verdict | None:
    # There is no grace, because a suspect worker only gets no new rentals.
    if e.unheard_s <= e.clocks.suspect_after_s:
        return None
    return Verdict(Health.SUSPECT, f"no heartbeat for {e.unheard_s:.0f} s")


def _unverified(e: Evidence) -> Verdict | None:
    return Verdict(Health.JOINING, "it registered: not checked yet") if e.heard and not e.worker.verified else None


def _verified(e: Evidence) -> Verdict | None:
    if not e.heard or not e.worker.verified or e.closed:
        return None
    return Verdict(Health.READY, "it is heard, it was reached by SSH, and nothing stale is on it")


def _at_fault(e: Evidence) -> Verdict | None:
    return _quarantine(e, e.worker.fault) if e.worker.fault else None


def _flapping(e: Evidence) -> Verdict | None:
    why = f"it was lost {e.losses} times within {e.clocks.flap_window_s:.0f} s"
    return _quarantine(e, why) if e.losses >= MAX_FLAPS else None


def _never_clean(e: Evidence) -> Verdict | None:
    why = e.worker.explanation or "it could not be reached by SSH"
    return _quarantine(e, why) if e.joining_s > JOIN_DEADLINE_S else None


def _quarantine(e: Evidence, why: str) -> Verdict:
    return Verdict(Health.QUARANTINED, f"{why}. Look at it, then: orion resume {e.worker.id}")


def _resumed(e: Evidence) -> Verdict | None:
    resumed = Verdict(Health.JOINING, "an operator resumed it: not checked yet")
    return resumed if e.heard and not e.worker.fault else None


def _manager_was_away(e: Evidence) -> Verdict | None:
    unheard = Verdict(Health.UNKNOWN, "the manager was away: waiting for its heartbeat")
    return unheard if e.lease and e.received_at is None else None


GONE: tuple[Rule, ...] = (_exited, _declared_gone, _proved_dead)
"""The rules by which a worker is down, whatever its lease says."""
RULES: dict[Health, tuple[Rule, ...]] = {
    Health.JOINING: (*GONE, _lease_passed, _silent, _at_fault, _flapping, _verified, _never_clean),
    Health.READY: (*GONE, _manager_was_away, _unverified, _liveness_ended, _silent),
    Health.SUSPECT: (*GONE, _lease_passed, _unverified, _verified),
    Health.UNKNOWN: (*GONE, _lease_passed, _unverified, _verified),
    Health.DOWN: (_unverified,),
    Health.QUARANTINED: (*GONE, _lease_passed, _resumed),
}
