"""What a worker that calls home is told: who it is, whether its lease is renewed, what to do with what it holds.

Nothing of HTTP here: the routes (api/workers.py) and the simulation both call it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orion.manager.domain.heartbeat_orders import orders
from orion.manager.domain.leases import Heartbeat, Leases
from orion.manager.domain.model import Item, Worker
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import Health
from orion.manager.ssh.port import Host, Reach, Reached
from orion.manager.store.port import Registered, Registration, Registry

PROBE_TIMEOUT_S = 3.0

Orders = list[tuple[Item, str]]
"""What to do with each thing that it holds: run, hold or purge."""


class CallRefused(Exception):
    """Its agent goes by the code: `stale_session`, `host_key_changed`, `address_in_use` or `identity_in_use`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True)
class Welcome:
    registered: Registered
    orders: Orders


class CallHome:
    def __init__(
        self,
        registry: Registry,
        pool_index: PoolIndex,
        leases: Leases,
        reach: Reach,
        monotonic: Callable[[], float],
        on_inventory: Callable[[str, Sequence[Item]], None],
        on_return: Callable[[str], None],
    ) -> None:
        """`on_inventory`: told what each call shows. `on_return`: told of a call of one that is not ready."""
        self._registry = registry
        self._roster = pool_index
        self._on_inventory = on_inventory
        self._on_return = on_return
        self._leases = leases
        self._reach = reach
        self._monotonic = monotonic
        self._registering: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def register(self, own_id: str | None, claim: Registration, items: Sequence[Item]) -> Welcome:
        """`own_id`: whose token it came with; None: it came with the join token, and gets one of its own."""
        async with self._registering[claim.address]:
            known = await self._registry.known_at(claim.address)
            worker_id = await self._identify(own_id, claim, known)
            registered = await self._registry.register(claim, worker_id, own_id is None)
        for worker_id in registered.replaced:
            self._leases.end(worker_id)
        self._leases.open(registered.worker_id, registered.session_id, self._monotonic(), items)
        self._leases.displace((holder.id for holder in known), registered.worker_id)
        self._on_return(registered.worker_id)
        return Welcome(registered, self._orders(registered.worker_id, items))

    def heartbeat(self, worker_id: str, beat: Heartbeat, address: str) -> Orders:
        """It renews the worker's lease, if its session is current. Asks nobody but memory: see domain/pool_index.py.

        A worker that was cut off may come back with another address within its lease. Everything goes to where it
        registered from, so it must register again before anything of it counts.
        """
        known = self._roster.worker(worker_id)
        if known is not None and known.address != address:
            raise CallRefused("stale_session", f"you registered from {known.address}: register again from {address}")
        if not self._leases.renew(worker_id, beat, self._monotonic()):
            raise CallRefused("stale_session", "this session is over: register again")
        if beat.exiting or known is None or known.health is not Health.READY:
            self._on_return(worker_id)
        return self._orders(worker_id, beat.inventory)

    async def _identify(self, own_id: str | None, claim: Registration, known: Sequence[Worker]) -> str | None:
        """Which worker this is; None: a new one. `known`: the workers that are known at its address.

        With its own token it is itself, as long as its host keys are the pinned ones. With the join token it is new,
        unless a worker with these very host keys is known at this address: then it is that one, whose answer was lost.
        An address is refused only while the worker that holds it still answers there with its pinned host key. So is
        another life of a worker that still answers where it was: a copy of its volume is no worker of its own.
        """
        if own_id is not None:
            own = await self._registry.worker(own_id)
            if own is None or own.host_keys != claim.host_keys:
                raise CallRefused(
                    "host_key_changed", "your host keys are not the pinned ones: register as a new worker"
                )
            if claim.boot_id != own.boot_id and claim.address != own.address and await self._answers(own):
                detail = f"worker {own.id} still answers at {own.address}: your volume is a copy of its own, remove it"
                raise CallRefused("identity_in_use", detail)
        same = [holder for holder in known if holder.host_keys == claim.host_keys]
        if own_id is None and same:
            return same[0].id
        for holder in known:
            if holder not in same and await self._answers(holder):
                raise CallRefused("address_in_use", f"worker {holder.id} still answers at {claim.address}")
        return own_id

    async def _answers(self, worker: Worker) -> bool:
        """Return whether it answers where it registered from, with its pinned host key."""
        host = Host(worker.id, worker.address, worker.host_keys)
        return await self._reach.reach(host, PROBE_TIMEOUT_S) is Reached.YES

    def _orders(self, worker_id: str, items: Sequence[Item]) -> Orders:
        self._on_inventory(worker_id, items)
        if not items:
            return []
        known = self._roster.worker(worker_id)
        return orders(items, self._roster.placements_on(worker_id), known is not None and known.health is Health.DOWN)
