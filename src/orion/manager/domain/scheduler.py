"""The choice of a worker for a rental: filters that explain their refusals, then the least used worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from orion.manager.domain.model import Worker
from orion.manager.domain.ranking import Rank, Ranking
from orion.manager.domain.states import Health, Intent


class Eligibility(NamedTuple):
    """The properties of one worker that the filters use."""

    health: Health
    fault: bool
    intent: Intent
    full: bool
    exiting: bool = False
    failed_here: bool = False
    """Whether the rental could not be made on this worker before."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    worker: Worker
    used: frozenset[int]
    """The numbers of the slots in use."""
    failed_here: bool
    exiting: bool

    @property
    def eligibility(self) -> Eligibility:
        w, full = self.worker, is_full(len(self.used), self.worker.slots)
        available = Eligibility(health=w.health, fault=bool(w.fault), intent=w.intent, full=full)
        return available._replace(exiting=self.exiting, failed_here=self.failed_here)

    @property
    def rank(self) -> Rank:
        return rank(self.worker.id, len(self.used), self.worker.slots)


@dataclass(frozen=True)
class Chosen:
    worker_id: str
    slot: int


@dataclass(frozen=True)
class NoWorker:
    explanation: str
    counted: str = field(default="", compare=False)
    """The numbers of refusals without the rest of the explanation: see `counted`."""


Filter = tuple[str, Callable[[Eligibility], bool]]
FILTERS: tuple[Filter, ...] = (
    ("{health}", lambda s: s.health is not Health.READY),
    ("at fault", lambda s: s.fault),
    ("draining", lambda s: s.intent is not Intent.ACTIVE),
    ("exiting", lambda s: s.exiting),
    ("full", lambda s: s.full),
    ("failed to make it", lambda s: s.failed_here),
)


def choose(candidates: list[Candidate]) -> Chosen | NoWorker:
    """Return the least used worker that passes every filter. Ties go to the lower id, so a replay decides the same.

    A worker of health `unknown`, which was ready before the manager was away, is not taken: it may have no lease, and
    then it refuses an activation. A worker that can be reached sends a heartbeat within two seconds of the manager's
    return (orion_worker/agent/decisions.py).
    """
    fit = [candidate for candidate in candidates if not refusal(candidate.eligibility)]
    if not fit:
        reasons = Counter(refusal(candidate.eligibility) for candidate in candidates)
        return NoWorker(explain(reasons), counted(reasons))
    best = min(fit, key=lambda candidate: candidate.rank)
    slot = next(number for number in range(best.worker.slots) if number not in best.used)
    return Chosen(best.worker.id, slot)


def is_full(used: int, slots: int) -> bool:
    return used >= slots


def rank(worker_id: str, used: int, slots: int) -> Rank:
    return used / slots, used, worker_id


def refusal(eligibility: Eligibility) -> str:
    """Return the reason of the first filter that refuses; empty if none does."""
    for reason, refuses in FILTERS:
        if refuses(eligibility):
            return reason.format(health=eligibility.health)
    return ""


def explain(reasons: Mapping[str, int]) -> str:
    """Return the explanation of a rental that waits. `reasons`: the number of workers that each filter refuses."""
    if not reasons:
        return "waiting: the pool has no worker. It starts by itself when one joins"
    return f"waiting: {counted(reasons)}. It starts by itself when one can take it"


def counted(reasons: Mapping[str, int]) -> str:
    """Return the refusals in words, as `of 2 workers, 1 draining, 1 full`."""
    number = sum(reasons.values())
    listed = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    return f"of {number} worker{'s' if number > 1 else ''}, {listed}" if number else "the pool has no worker"


class Candidates:
    """The workers of one decision: each choice is that of `choose`, takes a slot from the next, and costs O(log n)."""

    def __init__(self, candidates: Iterable[Candidate], elsewhere: Mapping[str, int]) -> None:
        """`elsewhere`: the number of workers beyond the candidates that each filter refuses; "": not refused."""
        self._candidates = {candidate.worker.id: candidate for candidate in candidates}
        self._room = Ranking()
        self._reasons = Counter(elsewhere)
        for candidate in self._candidates.values():
            self._count(candidate, 1)

    def choose(self, failed: Collection[str], own: str = "") -> Chosen | NoWorker | None:
        """Choose a worker; return None if only one that is not a candidate could take the rental.

        `failed`: the workers where this rental could not be made; `own`: the worker that it is to leave.
        """
        best = self._room.best(1, without={*failed, own})
        if best:
            return choose([self._candidates[best[0]]])
        reasons = Counter(self._reasons)
        for worker_id in failed:
            candidate = self._candidates.get(worker_id)
            if candidate is not None:
                eligibility = candidate.eligibility
                reasons[refusal(eligibility)] -= 1
                reasons[refusal(eligibility._replace(failed_here=True))] += 1
        if own in self._candidates and own not in failed:
            reasons[refusal(self._candidates[own].eligibility)] -= 1
            reasons["where it is"] += 1
        return None if reasons[""] > 0 else NoWorker(explain(+reasons), counted(+reasons))

    def take(self, chosen: Chosen) -> None:
        candidate = self._candidates[chosen.worker_id]
        self._count(candidate, -1)
        after = self._candidates[chosen.worker_id] = replace(candidate, used=candidate.used | {chosen.slot})
        self._count(after, 1)

    def _count(self, candidate: Candidate, one: int) -> None:
        reason = refusal(candidate.eligibility)
        self._reasons[reason] += one
        self._room.put(candidate.worker.id, None if reason else candidate.rank)
