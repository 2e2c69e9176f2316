"""Registration and heartbeats of workers: identity, lease, and orders for what a worker holds.

It knows nothing of HTTP: the routes (api/workers.py, api/heartbeat.py) and the simulation both call it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orion.manager.domain.heartbeat_orders import orders
from orion.manager.domain.leases import Heartbeat, Leases
from orion.manager.domain.model import Item, Worker
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.states import Health
from orion.manager.ssh.port import Host, Reach, Reached
from orion.manager.store.port import Registered, Registration, Registry

PROBE_TIMEOUT_S = 3.0

Orders = list[tuple[Item, str]]
"""Each item of a worker's inventory, with what the worker must do with it: run, hold or purge."""


class CallRefused(Exception):
    """A refused call. The agent acts on `code`: stale_session, host_key_changed, address_in_use or identity_in_use."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class CallHome:
    registry: Registry
    pool_index: PoolIndex
    leases: Leases
    reach: Reach
    monotonic: Callable[[], float]
    on_inventory: Callable[[str, Sequence[Item]], None]
    """Called with a worker's id and the inventory of each of its calls."""
    on_return: Callable[[str], None]
    """Called after a call of a worker that is not ready."""
    _registering: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def register(
        self, own_id: str | None, claim: Registration, items: Sequence[Item]
    ) -> tuple[Registered, Orders]:
        """Register a worker and open its session. Raise CallRefused if it is not what it claims to be.

        `own_id` is the worker whose token came with the call; None means that it was the join token, and the worker
        gets a token of its own.
        """
        async with self._registering[claim.address]:
            known = await self.registry.known_at(claim.address)
            worker_id = await self._identify(own_id, claim, known)
            registered = await self.registry.register(claim, worker_id, own_id is None)
        for worker_id in registered.replaced:
            self.leases.end(worker_id)
        self.leases.open(registered.worker_id, registered.session_id, self.monotonic(), items)
        self.leases.displace((holder.id for holder in known), registered.worker_id)
        self.on_return(registered.worker_id)
        return registered, self._orders(registered.worker_id, items)

    def heartbeat(self, worker_id: str, beat: Heartbeat, address: str) -> Orders:
        """Renew the worker's lease and return its orders. Raise CallRefused if its session is not current.

        It reads memory only (domain/pool_index.py). A worker whose network was cut may return with another address
        within its lease. The manager connects to the address of the registration, so the worker must register again.
        """
        known = self.pool_index.worker(worker_id)
        if known is not None and known.address != address:
            raise CallRefused("stale_session", f"you registered from {known.address}: register again from {address}")
        if not self.leases.renew(worker_id, beat, self.monotonic()):
            raise CallRefused("stale_session", "this session is over: register again")
        if beat.exiting or known is None or known.health is not Health.READY:
            self.on_return(worker_id)
        return self._orders(worker_id, beat.inventory)

    async def _identify(self, own_id: str | None, claim: Registration, known: Sequence[Worker]) -> str | None:
        """Return the id of the worker that registers, or None for a new worker. Raise CallRefused.

        `known` are the workers that registered from its address. A worker with a token of its own is accepted if its
        host keys are the pinned ones. A worker with the join token is new, unless a worker with the same host keys is
        known at this address: then the reply to that worker's registration was lost, and it is the same one. A worker
        is refused while another one still answers at its address with the pinned host key. It is also refused if it
        has another boot id and its former address still answers: then its volume is a copy.
        """
        if own_id is not None:
            own = await self.registry.worker(own_id)
            if own is None or own.host_keys != claim.host_keys:
                detail = "your host keys are not the pinned ones: register as a new worker, with the join token"
                raise CallRefused("host_key_changed", detail)
            if claim.boot_id != own.boot_id and claim.address != own.address and await self.is_reachable(own):
                detail = f"worker {own.id} still answers at {own.address}: your volume is a copy of its own, remove it"
                raise CallRefused("identity_in_use", detail)
        same = [holder for holder in known if holder.host_keys == claim.host_keys]
        if own_id is None and same:
            return same[0].id
        for holder in known:
            if holder not in same and await self.is_reachable(holder):
                raise CallRefused("address_in_use", f"worker {holder.id} still answers at {claim.address}")
        return own_id

    async def is_reachable(self, worker: Worker) -> bool:
        """Return whether the worker answers at its registered address with its pinned host key."""
        return await self.reach.reach(Host.of(worker), PROBE_TIMEOUT_S) is Reached.YES

    def _orders(self, worker_id: str, items: Sequence[Item]) -> Orders:
        self.on_inventory(worker_id, items)
        if not items:
            return []
        known = self.pool_index.worker(worker_id)
        return orders(
            items, self.pool_index.placements_on(worker_id), known is not None and known.health is Health.DOWN
        )
