"""What was seen of one round, as plain data: what the nemesis did, what renters were told, ticks, events, and the end.

All times are CLOCK_BOOTTIME of the one machine, in seconds; a host is a worker's container as it calls itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tick:
    """A renter's process was alive at this moment, and had written line `number`."""

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
class Deed:
    """One act of the nemesis on a container, and its undoing, each with when it was asked for and when it was done."""

    kind: str
    host: str
    """A worker's hostname, or the name of a service."""
    began_at: float
    done_at: float
    undone_from: float
    undone_at: float


@dataclass(frozen=True)
class Shown:
    """An answer about a rental: `safe_at` is its last_safe_copy_at."""

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
    """What a renter's bank found wrong with the files that it was to go on with; in most cases nothing."""

    at: float
    rental: str
    host: str
    epoch: int
    faults: tuple[str, ...]

    @staticmethod
    def parse(line: str) -> Found:
        told = json.loads(line)
        rental, host, epoch = told["words"].split()
        return Found(told["at"], rental, host, int(epoch), tuple(told["faults"]))


@dataclass(frozen=True)
class Asked:
    """A rental that was answered with success, and what its renter did with it in the end."""

    rental: str
    name: str
    released: bool


@dataclass(frozen=True)
class End:
    """How a rental was found when all had come to rest. `lines`: of its home, as its renter reads them.

    `faults`: what is wrong with its banks and with its difficult tree.
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
    """How a worker was found. `traces`: all that looks like a renter's: 'account r-x', 'process 7 of 100003', ..."""

    host: str
    health: str
    intent: str
    explanation: str
    traces: tuple[str, ...]


@dataclass(frozen=True)
class History:
    asked: tuple[Asked, ...] = ()
    ticks: tuple[Tick, ...] = ()
    deeds: tuple[Deed, ...] = ()
    shown: tuple[Shown, ...] = ()
    events: tuple[Happened, ...] = ()
    found: tuple[Found, ...] = ()
    ends: dict[str, End] = field(default_factory=dict)
    """By rental."""
    workers: dict[str, WorkerEnd] = field(default_factory=dict)
    """By the platform's id of it."""
    dirty_workers: tuple[str, ...] = ()
    """What else was not at rest in the end: the brake, pauses, what is overdue."""


@dataclass(frozen=True)
class Run:
    """Ticks of one process, one after the other, without a pause that is worth telling."""

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
    """The ticks of one rental, put together where they are of one process and less than `pause_s` apart."""
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
    """What the nemesis did, what the platform wrote down and who was alive, in one order. None: of no rental."""
    hosts = {identity: worker.host for identity, worker in history.workers.items()}
    concerned = {one.worker for one in history.events if one.rental == rental}
    told: list[tuple[float, str]] = []
    for deed in history.deeds:
        told.append((deed.began_at, f"NEMESIS {deed.kind} of {deed.host} (done {deed.done_at:.3f})"))
        if deed.undone_at > deed.done_at:
            told.append((deed.undone_from, f"NEMESIS undoes {deed.kind} of {deed.host} (done {deed.undone_at:.3f})"))
    for event in history.events:
        of_worker = event.rental is None and (rental is None or event.worker in concerned)
        if event.rental == rental or of_worker:
            where = f"on {hosts.get(event.worker, event.worker)}" if event.worker else ""
            epoch = f"epoch {event.epoch}" if event.epoch else ""
            told.append((event.at, f"  event {event.kind} {event.rental or ''} {where} {epoch} - {event.reason}"))
    for found in history.found:
        if found.rental == rental:
            seen = "; ".join(found.faults) or "all is as it was at one moment"
            told.append((found.at, f"  its bank on {found.host}, epoch {found.epoch}: {seen}"))
    told += [(run.first.at, f"    {run}") for run in runs(one for one in history.ticks if one.rental == rental)]
    return "\n".join(f"  {at:12.3f} {text}" for at, text in sorted(told) if since <= at <= until)
