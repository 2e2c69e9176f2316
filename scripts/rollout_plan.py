"""What `make up` changes of a platform that stands already, and what that means for those who rent. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WORKER = "worker"
SERVICES = {"manager_app": "manager", "manager_proxy": "proxy"}
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Container:
    """One container of the platform, as the engine shows it."""

    id: str
    service: str
    number: int
    running: bool
    outdated: bool
    """Its settings or its image are others than Compose would give it now."""
    restarts: int = 0
    foreign: bool = False
    """Its program and the manager that would start now carry files in different ways."""

    @property
    def hostname(self) -> str:
        """What a worker in it calls itself."""
        return self.id[:12]


@dataclass(frozen=True)
class Pool:
    """What the manager says of the workers in these containers, by hostname."""

    rentals: Mapping[str, Sequence[str]]
    """The names of the rentals on each."""
    free: Mapping[str, int]
    """The free slots of each that may take rentals."""
    known: bool = True
    """False: the manager does not answer, so nobody knows who rents."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order: services anew, new workers, then the old ones are emptied and removed."""

    services: tuple[str, ...]
    create: int
    outdated: tuple[Container, ...]
    surplus: tuple[Container, ...]

    @property
    def retire(self) -> tuple[Container, ...]:
        return self.outdated + self.surplus

    @property
    def changes_nothing(self) -> bool:
        return not (self.services or self.retire)


def number_wanted(containers: Sequence[Container], given: str, kept: str) -> int:
    """Return how many workers there are to be: as was said, else as many as there are, else as there were, else 3.

    While a rollout is under way there are new ones and old ones: the larger number of the two is meant.
    """
    if given:
        return int(given)
    workers = [one for one in containers if one.service == WORKER]
    outdated = sum(one.outdated for one in workers)
    return max(outdated, len(workers) - outdated) or int(kept or 3)


def plan(containers: Sequence[Container], wanted: int, pool: Pool) -> Plan:
    """Return what makes the platform as it is wanted. Of too many workers, those with the fewest rentals go."""
    services = tuple(sorted(one.service for one in containers if one.service != WORKER and one.outdated))
    workers = [one for one in containers if one.service == WORKER]
    current = [one for one in workers if not one.outdated]
    cheapest = sorted(current, key=lambda one: (len(pool.rentals.get(one.hostname, ())), -one.number))
    surplus = cheapest[: max(0, len(current) - wanted)]
    outdated = tuple(one for one in workers if one.outdated)
    return Plan(services, max(0, wanted - len(current)), outdated, tuple(surplus))


def homeless(planned: Plan, pool: Pool, containers: Sequence[Container], slots: int) -> int:
    """Return how many rentals of the workers that go find no place afterwards. `slots`: of each new worker."""
    gone = {one.hostname for one in planned.retire}
    stay = [one.hostname for one in containers if one.service == WORKER and one.hostname not in gone]
    places = planned.create * slots + sum(pool.free.get(hostname, 0) for hostname in stay)
    return max(0, len(concerned(planned, pool)) - places)


def concerned(planned: Plan, pool: Pool) -> list[str]:
    """Return the names of the rentals on the workers that go."""
    return sorted(name for one in planned.retire for name in pool.rentals.get(one.hostname, ()))


def stranded(containers: Sequence[Container], is_empty: Callable[[Container], bool], again: str) -> str:
    """Return what is in the way where workers of another version hold rentals, and the way out; empty: nothing is.

    `again`: the command that was typed. The new manager cannot ask such a worker for its files; the former one can.
    """
    workers = [one for one in containers if one.service == WORKER and one.foreign]
    full = [one.hostname for one in workers if not is_empty(one)]
    if not full:
        return ""
    what = f"{shown(full)} of another version hold rentals, and this version cannot fetch their files"
    if all(one.running for one in containers if one.service in SERVICES):
        return f"{what}. Type: make down (it parks them with all their files), then: {again} (it brings them back)"
    return f"{what}. With the former version: make up, then make down until all is parked; then: {again}"


def must_ask(planned: Plan, pool: Pool) -> bool:
    """Whether somebody who rents would notice."""
    if planned.changes_nothing:
        return False
    return not pool.known or any(pool.rentals.values())


def told(planned: Plan, pool: Pool, containers: Sequence[Container], slots: int) -> list[str]:
    """Return what would happen to whom, a line each."""
    lines = []
    if planned.services:
        services = " and ".join(SERVICES.get(name, name) for name in planned.services)
        start = "start" if len(planned.services) > 1 else "starts"
        lines.append(f"the {services} {start} anew: open sessions break, and the API is away for some seconds")
    if planned.outdated:
        number = len(planned.outdated)
        others = f"{number} worker{'s have' if number > 1 else ' has'} other settings, or another image"
        lines.append(f"{others}: {planned.create} new first, then {'they go' if number > 1 else 'it goes'}")
    if planned.surplus:
        lines.append(f"{len(planned.surplus)} worker{'s' if len(planned.surplus) > 1 else ''} fewer")
    if not pool.known:
        return [*lines, "the manager does not answer, so it is not known who rents: it starts anew first"]
    names = concerned(planned, pool)
    if names:
        lines.append(
            f"{_rentals(len(names))} there move{'s' if len(names) == 1 else ''}, files and all: {shown(names)}"
        )
    without = homeless(planned, pool, containers, slots)
    if without:
        lines.append(
            f"{without} of them would find no place, and WAIT without a worker, files kept, until there is one"
        )
    return lines


def shown(names: Sequence[str]) -> str:
    """Return the names, or the first of them and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _rentals(number: int) -> str:
    return f"{number} rental{'' if number == 1 else 's'}"
