"""Plan what `make up` changes on a platform that exists, and describe what that means for rentals. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WORKER = "worker"
SERVICES = {"manager_app": "manager", "manager_proxy": "proxy"}
NAMES_SHOWN = 8


@dataclass(frozen=True)
class PlatformContainer:
    """One container of the platform, as the engine shows it."""

    id: str
    service: str
    number: int
    running: bool
    outdated: bool
    """Whether Compose would give the container other settings or another image now."""
    restarts: int = 0
    incompatible: bool = False
    """Whether this worker and the manager that would start now transfer files by different protocols."""

    @property
    def hostname(self) -> str:
        """The hostname by which a worker in the container registers."""
        return self.id[:12]


@dataclass(frozen=True)
class PoolState:
    """The manager's view of the workers in the containers, by hostname."""

    rentals: Mapping[str, Sequence[str]]
    """The names of the rentals on each worker."""
    free: Mapping[str, int]
    """The number of free slots of each worker that accepts rentals."""
    known: bool = True
    """False if the manager does not answer, so that the rentals are not known."""


@dataclass(frozen=True)
class RolloutPlan:
    """The steps of a rollout, in this order: restart services, create workers, then empty and remove old workers."""

    services: tuple[str, ...]
    create: int
    outdated: tuple[PlatformContainer, ...]
    surplus: tuple[PlatformContainer, ...]

    @property
    def retire(self) -> tuple[PlatformContainer, ...]:
        return self.outdated + self.surplus

    @property
    def changes_nothing(self) -> bool:
        return not (self.services or self.retire)


def wanted_number(containers: Sequence[PlatformContainer], given: str, kept: str) -> int:
    """Return the wanted number of workers: the given one, else the present one, else the saved one, else 3.

    During a rollout there are new and old workers; the present number is then the larger of the two.
    """
    if given:
        return int(given)
    workers = [one for one in containers if one.service == WORKER]
    outdated = sum(one.outdated for one in workers)
    return max(outdated, len(workers) - outdated) or int(kept or 3)


def plan(containers: Sequence[PlatformContainer], wanted: int, pool: PoolState) -> RolloutPlan:
    """Return the steps to the wanted platform. Surplus workers with the fewest rentals are removed first."""
    services = tuple(sorted(one.service for one in containers if one.service != WORKER and one.outdated))
    workers = [one for one in containers if one.service == WORKER]
    current = [one for one in workers if not one.outdated]
    cheapest = sorted(current, key=lambda one: (len(pool.rentals.get(one.hostname, ())), -one.number))
    surplus = cheapest[: max(0, len(current) - wanted)]
    outdated = tuple(one for one in workers if one.outdated)
    return RolloutPlan(services, max(0, wanted - len(current)), outdated, tuple(surplus))


def count_without_place(
    planned: RolloutPlan, pool: PoolState, containers: Sequence[PlatformContainer], slots: int
) -> int:
    """Return how many rentals of the removed workers have no slot afterwards. `slots`: number for each new worker."""
    gone = {one.hostname for one in planned.retire}
    stay = [one.hostname for one in containers if one.service == WORKER and one.hostname not in gone]
    places = planned.create * slots + sum(pool.free.get(hostname, 0) for hostname in stay)
    return max(0, len(affected_rentals(planned, pool)) - places)


def affected_rentals(planned: RolloutPlan, pool: PoolState) -> list[str]:
    """Return the names of the rentals on the workers that the plan removes."""
    return sorted(name for one in planned.retire for name in pool.rentals.get(one.hostname, ()))


def incompatible_workers(
    containers: Sequence[PlatformContainer], is_empty: Callable[[PlatformContainer], bool], again: str
) -> str:
    """Return an error and its solution if workers of an incompatible version have rentals, else an empty string.

    The new manager cannot fetch files from such a worker; the former manager can. `again`: the command that was typed.
    """
    workers = [one for one in containers if one.service == WORKER and one.incompatible]
    full = [one.hostname for one in workers if not is_empty(one)]
    if not full:
        return ""
    what = f"workers of another version have rentals, and this version cannot fetch their files: {shorten(full)}"
    if all(one.running for one in containers if one.service in SERVICES):
        return f"{what}. Run make down (which parks the rentals with all files), then {again} (which starts them again)"
    return f"{what}. With the former version run make up, then make down until all rentals are parked; then {again}"


def needs_confirmation(planned: RolloutPlan, pool: PoolState) -> bool:
    """Return whether the plan affects rentals, or may affect them because they are not known."""
    if planned.changes_nothing:
        return False
    return not pool.known or any(pool.rentals.values())


def describe(planned: RolloutPlan, pool: PoolState, containers: Sequence[PlatformContainer], slots: int) -> list[str]:
    """Return a line for each effect of the plan."""
    lines = []
    if planned.services:
        services = " and ".join(SERVICES.get(name, name) for name in planned.services)
        restart = "restart" if len(planned.services) > 1 else "restarts"
        lines.append(f"the {services} {restart}: open sessions break, and the API does not answer for some seconds")
    if planned.outdated:
        number = len(planned.outdated)
        others = f"{number} worker{'s have' if number > 1 else ' has'} other settings, or another image"
        removed = "they are" if number > 1 else "it is"
        lines.append(f"{others}: {planned.create} new start first, then {removed} emptied and removed")
    if planned.surplus:
        lines.append(f"{len(planned.surplus)} worker{'s' if len(planned.surplus) > 1 else ''} fewer")
    if not pool.known:
        return [*lines, "the manager does not answer, so the rentals are not known: it is restarted first"]
    names = affected_rentals(planned, pool)
    if names:
        lines.append(f"{_rentals(len(names))} on them will migrate, with all files: {shorten(names)}")
    without = count_without_place(planned, pool, containers, slots)
    if without:
        lines.append(f"{without} of them will WAIT without a worker, with all files, until there is a free slot")
    return lines


def shorten(names: Sequence[str]) -> str:
    """Return the names as a list, or the first of them and the number of the others."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _rentals(number: int) -> str:
    return f"{number} rental{'' if number == 1 else 's'}"
