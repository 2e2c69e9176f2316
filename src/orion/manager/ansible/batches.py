"""The choice of the waiting jobs that make the next run: a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orion.manager.ansible.port import Action
from orion.manager.domain.fair_share import Claim
from orion.manager.messages import HostMessage

MAX_HOSTS = 16
MAX_RENTALS = 16
"""The most rentals of one worker in one run, so that other workers need not wait for all of them."""


@dataclass(frozen=True, kw_only=True)
class WaitingJob:
    """A job that could start now."""

    number: int
    action: Action
    host: HostMessage
    alone: bool
    """Whether the job was in a run that failed, so that it runs alone."""
    suspect: bool
    """Whether the worker failed lately."""
    owner: str = ""

    @property
    def claim(self) -> Claim:
        """The claim of a run for this worker alone: that of the owner, or of the worker if there is no owner."""
        return Claim(self.owner or self.host.worker_id, self.suspect)


def choose(waiting: Sequence[WaitingJob], may_hold: Callable[[Claim], bool]) -> list[int]:
    """Return the numbers of the jobs of the next run. `waiting` is in order of arrival; the first sets the action.

    A suspect job never shares a run with other workers, and a job that is tried again shares none. A run for one worker
    may block its runner until the deadline, so it starts only if `may_hold` allows its claim. A run for several workers
    is given up soon (PATIENCE_S in pool.py), and always starts.
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
            refused.add((first.action, first.claim))  # all others with this action and claim are on the same worker
    return []


def _with(first: WaitingJob, waiting: Sequence[WaitingJob]) -> list[WaitingJob]:
    """Return the jobs of a run whose first job is this one."""
    if first.alone:
        return [first]
    chosen: list[WaitingJob] = []
    rentals: Counter[HostMessage] = Counter()
    names: dict[str, HostMessage] = {}
    for job in waiting:
        if job.action is not first.action or job.alone or ((job.suspect or first.suspect) and job.host != first.host):
            continue
        if names.setdefault(job.host.worker_id, job.host) != job.host:
            continue  # the same worker at another address or key: Ansible knows a worker by its name alone
        if rentals[job.host] == MAX_RENTALS or (not rentals[job.host] and len(rentals) == MAX_HOSTS):
            continue
        rentals[job.host] += 1
        chosen.append(job)
    return chosen
