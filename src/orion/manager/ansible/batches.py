"""Which of the waiting jobs make the next run: a pure decision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orion.manager.ansible.port import Action
from orion.manager.domain.fair_share import Claim
from orion.manager.messages import HostMessage

MAX_HOSTS = 16
MAX_RENTALS = 16
"""Of one worker in one run: what more there is waits for the next, and others need not wait for all of it."""


@dataclass(frozen=True)
class WaitingJob:
    """A job that could start now."""

    number: int
    action: Action
    host: HostMessage
    alone: bool
    """It was in a run that failed."""
    suspect: bool
    """Its worker failed lately."""
    owner: str = ""

    @property
    def claim(self) -> Claim:
        """Return the owner for whom a run over its worker alone is counted: the worker, where the rental has none."""
        return Claim(self.owner or self.host.worker_id, self.suspect)


def choose(waiting: Sequence[WaitingJob], may_hold: Callable[[Claim], bool]) -> list[int]:
    """The numbers of those that make one run; `waiting` is in order of arrival, and the first decides the action.

    A suspect job never shares a run with another worker's, one that is tried again shares it with nobody. A run over
    one worker may be held up by that until its deadline: it begins only where `may_hold` allows its claim. One over
    several is soon given up (PATIENCE_S in pool.py), and begins whoever's it is.
    """
    refused: set[tuple[Action, Claim]] = set()
    for first in waiting:
        if first.alone or first.suspect:
            if may_hold(first.claim):
                return [job.number for job in _with(first, waiting)]
        elif (first.action, first.claim) not in refused:
            chosen = _with(first, waiting)
            if len({job.host for job in chosen}) > 1 or may_hold(first.claim):
                return [job.number for job in chosen]
            refused.add((first.action, first.claim))  # all others of these are on the same worker
    return []


def _with(first: WaitingJob, waiting: Sequence[WaitingJob]) -> list[WaitingJob]:
    """Return the jobs of a run that this one decides."""
    if first.alone:
        return [first]
    chosen: list[WaitingJob] = []
    rentals: Counter[HostMessage] = Counter()
    names: dict[str, HostMessage] = {}
    for job in waiting:
        if job.action is not first.action or job.alone or _may_not_share(job, first):
            continue
        if names.setdefault(job.host.worker_id, job.host) != job.host:
            continue  # a worker that is reached in another way now: Ansible knows it by its name alone
        if rentals[job.host] == MAX_RENTALS or (not rentals[job.host] and len(rentals) == MAX_HOSTS):
            continue
        rentals[job.host] += 1
        chosen.append(job)
    return chosen


def _may_not_share(job: WaitingJob, first: WaitingJob) -> bool:
    return (job.suspect or first.suspect) and job.host != first.host
