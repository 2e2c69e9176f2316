"""The history of one round as plain data: faults, answers to renters, ticks, events, and the final state.

All times are CLOCK_BOOTTIME of the one machine, in seconds. A host is the hostname of a worker's container.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tick:
    """A sign that a renter's process was alive at a time, and had written line `number`."""

    at: float
    rental: str
    host: str
    epoch: int
    pid: int
    number: int

    @staticmethod
    def parse(line: str) -> Tick:
        at, rental, host, epoch, pid, number = line.split()
        return Tick(float(at), rental, host, int(epoch), int(pid), int(number))


@dataclass(frozen=True)
class InjectedFault:
    """One fault that was injected into a container, with the begin and the end of the injection and of its undoing."""

    kind: str
    host: str
    """A worker's hostname, or the name of a service."""
    began_at: float
    done_at: float
    undone_from: float
    undone_at: float


@dataclass(frozen=True)
class Shown:
    """An answer of the API about a rental. `safe_at`: its last_safe_copy_at."""

    at: float
    rental: str
    epoch: int
    safe_at: float | None


@dataclass(frozen=True)
class Happened:
    """An event of the platform."""

    at: float
    kind: str
    rental: str | None
    worker: str | None
    epoch: int | None
    reason: str


@dataclass(frozen=True)
class Found:
    """The faults that a renter's bank found in its files when it was started; mostly none."""

    at: float
    rental: str
    host: str
    epoch: int
    faults: tuple[str, ...]

    @staticmethod
    def parse(line: str) -> Found:
        entry = json.loads(line)
        rental, host, epoch = entry["words"].split()
        return Found(entry["at"], rental, host, int(epoch), tuple(entry["faults"]))


@dataclass(frozen=True)
class GrantedRental:
    """A rental that the platform granted, and whether its renter released it."""

    rental: str
    name: str
    released: bool


@dataclass(frozen=True)
class End:
    """The state of a rental after the platform has settled.

    `lines`: the lines in its home, as its renter reads them. `faults`: the faults of its banks and its difficult tree.
    """

    state: str
    epoch: int
    worker: str | None
    username: str
    explanation: str
    lines: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerEnd:
    """The final state of a worker. `traces`: all of renters on it, as 'account r-x', 'process 7 of 100003', ..."""

    host: str
    health: str
    intent: str
    explanation: str
    traces: tuple[str, ...]


@dataclass(frozen=True)
class History:
    asked: tuple[GrantedRental, ...] = ()
    ticks: tuple[Tick, ...] = ()
    deeds: tuple[InjectedFault, ...] = ()
    shown: tuple[Shown, ...] = ()
    events: tuple[Happened, ...] = ()
    found: tuple[Found, ...] = ()
    ends: dict[str, End] = field(default_factory=dict)
    """The final states of rentals, by id."""
    workers: dict[str, WorkerEnd] = field(default_factory=dict)
    """The final states of workers, by id."""
    dirty_workers: tuple[str, ...] = ()
    """Everything else that had not settled in the end: the brake, pauses, overdue steps."""


@dataclass(frozen=True)
class Run:
    """Consecutive ticks of one process without a long pause."""

    first: Tick
    last: Tick
    number: int

    def __str__(self) -> str:
        one = self.first
        lines = f"lines {one.number} to {self.last.number}"
        return (
            f"{one.rental} lives on {one.host}, epoch {one.epoch}, process {one.pid}, until {self.last.at:.3f}: {lines}"
        )


def runs(ticks: Iterable[Tick], pause_s: float = 0.5) -> Iterator[Run]:
    """Yield the ticks of one rental, grouped by process where they are less than `pause_s` seconds apart."""
    open_runs: dict[tuple[str, int], Run] = {}
    for tick in sorted(ticks, key=lambda one: one.at):
        key = (tick.host, tick.pid)
        run = open_runs.get(key)
        if run and tick.at - run.last.at < pause_s and tick.epoch == run.last.epoch:
            open_runs[key] = Run(run.first, tick, run.number + 1)
            continue
        if run:
            yield run
        open_runs[key] = Run(tick, tick, 1)
    yield from open_runs.values()


def story(history: History, rental: str | None, since: float, until: float) -> str:
    """Return the faults, the platform's events and the ticks about a rental, or about none, in order of time."""
    hosts = {identity: worker.host for identity, worker in history.workers.items()}
    concerned = {one.worker for one in history.events if one.rental == rental}
    entries: list[tuple[float, str]] = []
    for deed in history.deeds:
        entries.append((deed.began_at, f"NEMESIS {deed.kind} of {deed.host} (done {deed.done_at:.3f})"))
        if deed.undone_at > deed.done_at:
            entries.append((deed.undone_from, f"NEMESIS undoes {deed.kind} of {deed.host} (done {deed.undone_at:.3f})"))
    for event in history.events:
        of_worker = event.rental is None and (rental is None or event.worker in concerned)
        if event.rental == rental or of_worker:
            where = f"on {hosts.get(event.worker, event.worker)}" if event.worker else ""
            epoch = f"epoch {event.epoch}" if event.epoch else ""
            entries.append((event.at, f"  event {event.kind} {event.rental or ''} {where} {epoch} - {event.reason}"))
    for found in history.found:
        if found.rental == rental:
            seen = "; ".join(found.faults) or "consistent"
            entries.append((found.at, f"  its bank on {found.host}, epoch {found.epoch}: {seen}"))
    entries += [(run.first.at, f"    {run}") for run in runs(one for one in history.ticks if one.rental == rental)]
    return "\n".join(f"  {at:12.3f} {text}" for at, text in sorted(entries) if since <= at <= until)
