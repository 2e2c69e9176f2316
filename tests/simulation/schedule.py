"""Schedules: the faults of one simulation as plain data, which can be printed, replayed and shrunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

FIRST_FAULT_S = 0.1
OUTAGES_AT_MOST_S = 250.0
"""The length of all outages of a schedule with outages alone: below `brake_max`, after which silence counts."""


@dataclass(frozen=True)
class Fault:
    """An event at `at_s`. `lasts_s`: the time until it is undone, if it is undone at all."""

    at_s: float
    kind: str
    target: int = 0
    lasts_s: float = 0.0
    figure: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.at_s:7.1f}  {self.kind}({self.target}){lasting} [{self.figure:g}]"


@dataclass(frozen=True)
class Schedule:
    """The workers and the faults of one simulation."""

    seed: int
    slots: tuple[int, ...]
    """The number of slots of each worker that exists from the beginning."""
    faults: tuple[Fault, ...]
    length_s: float
    only_outages: bool
    """Whether only the proxy and the manager go away; then no rental may move."""


def make_schedule(seed: int) -> Schedule:
    """Make a schedule from its seed. Faults often come together, because combinations find errors."""
    random = Random(f"schedule {seed}")
    slots = tuple(random.choice([1, 1, 2]) for _ in range(random.choice([1, 2, 2, 3, 3, 4])))
    only_outages = random.random() < 0.2
    length_s = random.choice([60.0, 120.0, 180.0, 260.0, 350.0]) * random.uniform(0.8, 1.2)
    faults = [_rent(random, number, 20.0) for number in range(random.randint(1, 3))]
    if only_outages:
        faults += _away_in_turn(random, length_s)
    else:
        kinds, weights = zip(*FAULTS, strict=True)
        at_s = 0.0
        for make in random.choices(kinds, weights, k=random.randint(2, 9)):
            together = random.random() < 0.4
            at_s = at_s + random.uniform(0.0, 8.0) if together else FIRST_FAULT_S + length_s * random.random() ** 1.5
            faults.append(make(random, min(at_s, length_s)))
    return Schedule(seed, slots, tuple(sorted(faults, key=lambda f: f.at_s)), length_s, only_outages)


def _away_in_turn(random: Random, length_s: float) -> list[Fault]:
    found = []
    number = random.choice([1, 1, 2])
    for at_s in [random.uniform(FIRST_FAULT_S, length_s) for _ in range(number)]:
        kind = random.choice(["the proxy is away", "the manager is killed"])
        lasts_s = random.uniform(1.0, OUTAGES_AT_MOST_S / number)
        found.append(Fault(at_s, kind, random.randrange(30), lasts_s))
    return found


def _rent(random: Random, number: int, within_s: float) -> Fault:
    return Fault(random.uniform(0.0, within_s), "a client rents", number, 0.0, random.choice([60, 120, 3600, 3600]))


Make = Callable[[Random, float], Fault]


def _short(kind: str, low_s: float, high_s: float) -> Make:
    return lambda random, at_s: Fault(at_s, kind, random.randrange(60), random.uniform(low_s, high_s))


def _once(kind: str, *figures: float) -> Make:
    return lambda random, at_s: Fault(at_s, kind, random.randrange(60), 0.0, random.choice(figures or (0.0,)))


def _long(kind: str) -> Make:
    """Return a maker of faults that are mostly short, sometimes longer than a lease, sometimes for ever."""
    return lambda random, at_s: Fault(
        at_s,
        kind,
        random.randrange(60),
        random.choice([3.0, 20.0, 70.0, 110.0, 150.0, 250.0, 9e9, 9e9]) * random.uniform(0.8, 1.2),
    )


def _closing(kind: str, low_s: float, high_s: float) -> Make:
    """Return a maker of faults whose `figure` is the delay between their parts, mostly short."""
    return lambda random, at_s: Fault(
        at_s, kind, random.randrange(60), random.uniform(low_s, high_s), 2.0 * random.random() ** 2
    )


FAULTS: tuple[tuple[Make, int], ...] = (
    (_long("a worker is killed"), 4),
    (_long("a worker is stopped"), 3),
    (_long("a worker is recreated"), 3),
    (_long("a worker is cut off"), 4),
    (_short("a worker cannot be reached by SSH", 5.0, 120.0), 2),
    (_once("a worker's sshd is killed"), 2),
    (_long("a worker is cut off whole"), 2),
    (_closing("a worker is cut off as its sshd is killed", 5.0, 150.0), 3),
    (_short("a worker is paused", 5.0, 250.0), 3),
    (_short("a worker's disk fails", 5.0, 400.0), 3),
    (_short("the network is bad", 10.0, 120.0), 4),
    (_short("the proxy is away", 1.0, 200.0), 2),
    (_short("the manager is killed", 0.0, 150.0), 4),
    (_once("the manager's clocks change", 0.4, 0.6, 1.0), 1),
    (_short("the manager's disk is slow", 10.0, 60.0), 1),
    (_once("the wall clock jumps", 3600.0, -3600.0, 1.0, -1.0, 90.0), 2),
    (_once("a worker is added", 1, 2), 2),
    (_once("a worker is drained"), 4),
    (_once("a worker is resumed"), 1),
    (_once("a worker is removed"), 1),
    (_short("a worker is given up", 100.0, 250.0), 2),
    (_once("a client rents", 60, 120, 3600), 4),
    (_once("a client renews", 60, 600), 2),
    (_once("a client releases"), 4),
    (_once("a client repeats its request"), 2),
    (_once("a client migrates"), 9),
    (_closing("all workers are stopped", 5.0, 150.0), 2),
)
