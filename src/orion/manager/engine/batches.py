"""Which of the waiting jobs make the next run: a pure decision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orion.manager.engine.port import Action
from orion.manager.engine.protocol import HostLine

MOST_HOSTS = 16
MOST_RENTALS = 16
"""Of one worker in one run: what more there is waits for the next, and others need not wait for all of it."""


@dataclass(frozen=True)
class Waiting:
    """A job that could start now."""

    number: int
    action: Action
    host: HostLine
    alone: bool
    """It was in a run that failed."""
    suspect: bool
    """Its worker failed lately."""


def choose(waiting: Sequence[Waiting], suspects_too: bool) -> list[int]:
    """The numbers of those that make one run; `waiting` is in order of arrival, and the first decides the action.

    A suspect job never shares a run with another worker's, one that is tried again shares it with nobody.
    """
    first = next((job for job in waiting if suspects_too or not job.suspect), None)
    if first is None:
        return []
    if first.alone:
        return [first.number]
    chosen: list[int] = []
    rentals: Counter[HostLine] = Counter()
    names: dict[str, HostLine] = {}
    for job in waiting:
        if job.action is not first.action or job.alone or _keeps_apart(job, first):
            continue
        if names.setdefault(job.host.worker_id, job.host) != job.host:
            continue  # a worker that is reached in another way now: Ansible knows it by its name alone
        if rentals[job.host] == MOST_RENTALS or (not rentals[job.host] and len(rentals) == MOST_HOSTS):
            continue
        rentals[job.host] += 1
        chosen.append(job.number)
    return chosen


def _keeps_apart(job: Waiting, first: Waiting) -> bool:
    return (job.suspect or first.suspect) and job.host != first.host
