"""The ports of the controllers to the database.

`SqlStateStore` (store/sql.py) is the real implementation, `MemoryStateStore` (store/memory.py) the shipped fake;
tests/unit/test_store_state_contract.py is the contract of both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orion.manager.domain.model import Item, Rental, Worker
from orion.manager.domain.pool_index import Changes
from orion.manager.domain.steps import Step
from orion.manager.domain.tasks import Follow, TaskEnded
from orion.manager.domain.world import World

Notes = Iterable[tuple[str, float, Mapping[str, Any]]]
"""Worker id, time of its last heartbeat (UTC seconds), and the load in it."""

QUEUED_AT_ONCE = 1000
"""Queued rentals that `load_part` returns: the queue is served in order, so those behind them cannot be placed yet."""
DUE_AT_ONCE = 500
"""The largest number of rentals that `due` and `without_expiry` return."""

# Reasons of `worker.removed`, when a registration takes the place of a worker.
ADDRESS_REUSED = "its address is another worker's now"
REGISTERED_AGAIN = "the same machine has registered again, under another identity"


class StateStore(Protocol):
    """The rows that the controllers read and write. Each call is one transaction."""

    async def follow(self, follower: Callable[[Changes], None]) -> None:
        """Call the follower with the whole pool, then with what each commit changes: see domain/pool_index.py."""

    async def load(self) -> World:
        """Return all workers, living rentals, placements that are not purged, and the rentals of these placements."""

    async def load_part(self, whole: Collection[str], candidates: Collection[str]) -> World:
        """Return a part of the world as domain/world.py needs it.

        The part holds the workers `whole` with their placements; every rental that is neither active nor queued, or has
        a target placement; the first QUEUED_AT_ONCE queued ones; of `candidates` the worker rows and the taken slots.
        """

    async def never_placed(self, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
        """Return, as (rental id, epoch), the items of inventories that were never placed on any worker."""

    async def workers(self, ids: Iterable[str]) -> dict[str, Worker]:
        """Return the workers with these ids, by id, without those that do not exist."""

    async def due(self, wall: float) -> list[Rental]:
        """Return rentals that are to expire at `wall` (UTC seconds): alive, not releasing, at most DUE_AT_ONCE."""

    async def without_expiry(self) -> list[Rental]:
        """Return rentals that were activated and have no `expires_at`: alive, not releasing, at most DUE_AT_ONCE."""

    async def apply(self, steps: Iterable[Step]) -> bool:
        """Apply the steps up to the first whose rows are not as it expects; return False if there is one.

        That step and those after it change nothing: they were decided as if it had been applied. Raises, and applies
        none of the steps, when a step would violate a constraint of the schema: one live placement of a rental, one
        placement in a slot, each epoch used once.
        """

    async def apply_each(self, steps: Iterable[Step]) -> list[bool]:
        """Apply independent steps in one transaction; return for each of them whether it was applied."""

    async def finish(self, ended: Sequence[TaskEnded], follow: Follow) -> None:
        """Apply the step that `follow` decides for each task that has ended, unless a row is not as the step expects.

        `follow` gets a world with the placements of the tasks that are not purged, and their rentals, as the steps of
        the tasks before it left them.
        """

    async def forget(self, worker_ids: Collection[str]) -> tuple[str, ...]:
        """Remove those of these workers that are down and hold no files that are needed; return their ids.

        A worker holds needed files while it has a placement of a living rental that is neither purged nor recovered.
        Workers that an operator drains stay: they may be away for long, and keep their identity.
        """

    async def record_heartbeats(self, notes: Notes) -> None:
        """Write the times and loads of workers' last heartbeats. They are shown, and no decision reads them."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A checked registration of a worker. `address` is the peer that the proxy saw, not a claim of the worker."""

    address: str
    hostname: str
    host_keys: tuple[str, ...]
    slots: int
    labels: Mapping[str, str]
    boot_id: str
    agent_version: str


@dataclass(frozen=True, kw_only=True)
class Registered:
    """The identity and the session that a registration got."""

    worker_id: str
    session_id: str
    token: str | None
    """A new token; None when the worker keeps the one it has."""
    replaced: tuple[str, ...] = ()
    """Ids of the workers that were removed because the registration takes their place."""


class Registry(Protocol):
    """The identities of workers that call home."""

    async def known_at(self, address: str) -> list[Worker]:
        """Return the workers with this address, whatever their health."""

    async def worker(self, worker_id: str) -> Worker | None: ...

    async def register(self, claim: Registration, worker_id: str | None, new_token: bool) -> Registered:
        """Write a registration as observations, which the health controller judges. `worker_id` None makes a worker.

        Another worker at the same address that is joining or down and has no placement is removed, unless an operator
        drains it. Otherwise each new container would leave a worker behind, and a client with the join token could
        fill the database from one address.
        """
