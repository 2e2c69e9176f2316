"""The ports between those who decide and the database.

`SqlLedger` (store/sql.py) is the real one, `MemoryLedger` (store/memory.py) the shipped fake; one contract holds both:
tests/unit/test_store_ledger_contract.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from orion.manager.domain.model import Item, Placement, Rental, Step, Worker, World
from orion.manager.domain.reconcile import Task

Notes = Iterable[tuple[str, float, Mapping[str, Any]]]
"""Worker id, UTC seconds when it was heard, its load."""

ADDRESS_REUSED = "its address is another worker's now"


class Ledger(Protocol):
    """What the loops read and write. Each call is one transaction."""

    async def load(self) -> World:
        """All workers, living rentals, placements that are not purged, and the rentals of those."""
        ...

    async def never_placed(self, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
        """Of what inventories show, what was never placed on any worker, as (rental id, epoch)."""
        ...

    async def load_workers(self) -> dict[str, Worker]: ...

    async def due(self, wall: float) -> list[Rental]:
        """Living rentals whose time is over at `wall` (UTC seconds)."""
        ...

    async def apply(self, steps: Iterable[Step]) -> bool:
        """Apply the steps up to the first that finds a row not as it expected; False if there is one.

        That one leaves no trace, and neither do those after it. Raises, and changes nothing at all, when a step would
        break what the schema holds: one live placement of a rental, one placement in a slot, an epoch used once.
        """
        ...

    async def succeed(self, task: Task, report: Mapping[str, Any], wall: float) -> None:
        """Write what follows from a task that succeeded, if that is still of any use."""
        ...

    async def fail(self, task: Task, message: str, attempts: int) -> None: ...

    async def heard(self, notes: Notes) -> None:
        """Write down when workers were last heard, for people to read."""
        ...


@dataclass(frozen=True)
class Registration:
    """A registration as it is believed: the address is the peer that the proxy saw."""

    address: str
    hostname: str
    host_keys: tuple[str, ...]
    slots: int
    labels: Mapping[str, str]
    boot_id: str
    agent_version: str


@dataclass(frozen=True)
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

    async def placements_of(self, worker_id: str) -> tuple[list[Placement], bool]:
        """What a worker has or may still have, its placements that are not purged; and whether it is down."""
        ...
