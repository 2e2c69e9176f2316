"""Choosing a worker for a rental: filters that explain their refusals, then spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from orion.manager.domain.model import Worker
from orion.manager.domain.states import Health, Intent


@dataclass(frozen=True)
class Candidate:
    worker: Worker
    used: frozenset[int]
    """Slot numbers that are taken."""
    failed_here: bool
    """This rental could not be made here before."""
    leaving: bool


@dataclass(frozen=True)
class Chosen:
    worker_id: str
    slot: int


@dataclass(frozen=True)
class Refused:
    explanation: str


Filter = tuple[str, Callable[[Candidate], bool]]

FILTERS: tuple[Filter, ...] = (
    ("{health}", lambda c: c.worker.health not in {Health.READY, Health.UNKNOWN}),
    ("at fault", lambda c: bool(c.worker.fault)),
    ("draining", lambda c: c.worker.intent is not Intent.ACTIVE),
    ("leaving", lambda c: c.leaving),
    ("full", lambda c: len(c.used) >= c.worker.slots),
    ("failed to make it", lambda c: c.failed_here),
)


def choose(candidates: list[Candidate]) -> Chosen | Refused:
    """The least used worker that passes every filter; ties go to the lower id, so a replay decides the same.

    An unknown one, which was ready before the manager was away, is taken only where no ready one fits: so a restart
    of the manager does not close the shop until the next heartbeats.
    """
    refusals = {candidate.worker.id: _refusal(candidate) for candidate in candidates}
    fit = [candidate for candidate in candidates if refusals[candidate.worker.id] is None]
    if not fit:
        return Refused(_explain([reason for reason in refusals.values() if reason]))
    best = min(fit, key=_rank)
    slot = next(number for number in range(best.worker.slots) if number not in best.used)
    return Chosen(best.worker.id, slot)


def _rank(candidate: Candidate) -> tuple[bool, float, int, str]:
    worker, used = candidate.worker, len(candidate.used)
    return worker.health is not Health.READY, used / worker.slots, used, worker.id


def _refusal(candidate: Candidate) -> str | None:
    for reason, refuses in FILTERS:
        if refuses(candidate):
            return reason.format(health=candidate.worker.health)
    return None


def _explain(reasons: list[str]) -> str:
    if not reasons:
        return "waiting: the pool has no worker. It starts by itself when one joins"
    counted = [f"{number} {reason}" for reason, number in sorted(Counter(reasons).items())]
    total = f"{len(reasons)} worker{'s' if len(reasons) > 1 else ''}"
    return f"waiting: of {total}, {', '.join(counted)}. It starts by itself when one can take it"
