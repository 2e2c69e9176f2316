"""The ports between those who decide and the database.

`SqlStateStore` (store/sql.py) is the real one, `MemoryStateStore` (store/memory.py) the shipped fake; one contract
holds both: tests/unit/test_store_state_contract.py.
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
"""Worker id, UTC seconds when it was heard, its load."""

QUEUED_AT_ONCE = 1000
"""Rentals of the queue that one look shows. No worker is free for those behind them before it is for one of these."""
DUE_AT_ONCE = 500

ADDRESS_REUSED = "its address is another worker's now"
REGISTERED_AGAIN = "the same machine has registered again, under another identity"


class StateStore(Protocol):
    """What the loops read and write. Each call is one transaction."""

    async def follow(self, follower: Callable[[Changes], None]) -> None:
        """Tell it all that there is, then what each commit changes: see domain/pool_index.py."""
        ...

    async def load(self) -> World:
        """All workers, living rentals, placements that are not purged, and the rentals of those."""
        ...

    async def load_part(self, whole: Collection[str], candidates: Collection[str]) -> World:
        """The part of the world that these workers are, and all that is in work: what model.World asks of a part.

        With every rental that is not at rest, but of those that wait in the queue only the first QUEUED_AT_ONCE; of
        `candidates` only the workers themselves and their taken slots.
        """
        ...

    async def never_placed(self, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
        """Of what inventories show, what was never placed on any worker, as (rental id, epoch)."""
        ...

    async def workers(self, ids: Iterable[str]) -> dict[str, Worker]:
        """Those of these workers that there are."""
        ...

    async def due(self, wall: float) -> list[Rental]:
        """Living rentals whose time is over at `wall` (UTC seconds), and that are not ending; DUE_AT_ONCE at most."""
        ...

    async def without_expiry(self) -> list[Rental]:
        """Living rentals that were active and have no end, and that are not ending; DUE_AT_ONCE at most."""
        ...

    async def apply(self, steps: Iterable[Step]) -> bool:
        """Apply the steps up to the first that finds a row not as it expected; False if there is one.

        That one leaves no trace, and neither do those after it. Raises, and changes nothing at all, when a step would
        break what the schema holds: one live placement of a rental, one placement in a slot, an epoch used once.
        """
        ...

    async def apply_each(self, steps: Iterable[Step]) -> list[bool]:
        """Apply steps that have nothing to do with each other in one transaction; of each, whether it was applied."""
        ...

    async def finish(self, ended: Sequence[TaskEnded], follow: Follow) -> None:
        """Apply the step that `follow` decides on for each task that has ended, unless a row is not as it expects.

        The world that `follow` gets has the placements of the task that are not purged, and their rentals, as the steps
        before left them.
        """
        ...

    async def forget(self, worker_ids: Collection[str]) -> tuple[str, ...]:
        """Forget those of these workers that are down and of which nothing is missing; return their ids.

        Missing is what a worker that is down may still have of a living rental, and nobody has copied aside. Those
        that an operator is draining stay: they may be away for long, and are to come back as what they are.
        """
        ...

    async def record_heartbeats(self, notes: Notes) -> None:
        """Write down when workers were last heard, for people to read."""
        ...


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A registration as it is believed: the address is the peer that the proxy saw."""

    address: str
    hostname: str
    host_keys: tuple[str, ...]
    slots: int
    labels: Mapping[str, str]
    boot_id: str
    agent_version: str


@dataclass(frozen=True, kw_only=True)
class Registered:
    worker_id: str
    session_id: str
    token: str | None
    """A new token; None when the worker keeps the one it has."""
    replaced: tuple[str, ...] = ()
    """Workers that were forgotten, because their address is this one's now."""


class Registry(Protocol):
    """What a worker that calls home is known by."""

    async def known_at(self, address: str) -> list[Worker]:
        """The workers, dead or alive, that are known at an address."""
        ...

    async def worker(self, worker_id: str) -> Worker | None: ...

    async def register(self, claim: Registration, worker_id: str | None, new_token: bool) -> Registered:
        """Record a registration as facts: the health loop judges them. `worker_id` None makes a new worker.

        Whoever else is known at its address, is joining or down and holds nothing is forgotten, unless an operator is
        draining it: else each new container would leave one behind, and whoever has the join
        token could fill the database from one address.
        """
        ...
