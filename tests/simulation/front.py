"""Requests of clients and operators to the state store in memory, as store/rentals.py and store/workers.py do them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orion.manager.domain.expiry import release, renew
from orion.manager.domain.leases import Leases
from orion.manager.domain.model import Rental
from orion.manager.domain.states import ENDED, HOLDING, Health, Intent, RentalState
from orion.manager.domain.steps import Event
from orion.manager.store.memory import MemoryStateStore
from simulation.agents import CRASHES, SERVES

FIRST_UID = 100_000


class Front:
    """Changes rentals and workers as the API does."""

    def __init__(self, state_store: MemoryStateStore, leases: Leases, wall: Callable[[], float]) -> None:
        self._state_store = state_store
        self._leases = leases
        self._wall = wall

    def rent(self, owner: str, key: str, ttl_s: int) -> str:
        """Return the id of the rental of an idempotency key; make it if there is none."""
        rentals = self._state_store.world.rentals
        identity = f"rental-{key}"
        if identity not in rentals:
            rentals[identity] = Rental(
                id=identity,
                name=f"name-{key}",
                owner=owner,
                username=f"r-{key}",
                uid=FIRST_UID + len(rentals),
                state=RentalState.QUEUED,
                epoch=0,
                public_key=f"key-{key}",
                ttl_s=ttl_s,
                created_at=self._wall(),
                start=CRASHES if int(key) % 4 == 3 else SERVES if int(key) % 2 else "",
            )
            self._state_store.events.append(
                Event(kind="rental.queued", actor=owner, reason="asked for", owner=owner, rental_id=identity, epoch=0)
            )
            self._state_store.publish(rental_ids=[identity])
        return identity

    async def renew(self, rental_id: str, ttl_s: int) -> bool:
        rental = self._state_store.world.rentals[rental_id]
        if rental.state in ENDED | {RentalState.RELEASING}:
            return False
        return await self._state_store.apply([renew(rental, ttl_s, rental.owner, self._wall())])

    async def release(self, rental_id: str) -> None:
        rental = self._state_store.world.rentals[rental_id]
        if rental.state not in ENDED | {RentalState.RELEASING}:
            await self._state_store.apply([release(rental, "released", rental.owner, "asked for")])

    def set_intent(self, worker_id: str, to: Intent) -> None:
        worker = self._state_store.world.workers.get(worker_id)
        if worker is None:
            return
        resumed = to is Intent.ACTIVE
        already = worker.intent is to or (to is Intent.DRAINING and worker.intent is Intent.DRAINED)
        if not already or (resumed and (worker.fault or worker.health is Health.QUARANTINED)):
            cleared = {"fault": "", "verified_session": None} if resumed else {}
            self._state_store.world.workers[worker_id] = replace(worker, intent=to, **cleared)
            self._state_store.publish([worker_id])
            kind = "worker.resumed" if resumed else "worker.drain_started"
            self._state_store.events.append(Event(kind=kind, actor="operator", reason="asked for", worker_id=worker_id))
        if resumed:
            self._leases.forgive(worker_id)

    def remove(self, worker_id: str) -> bool:
        world = self._state_store.world
        worker = world.workers.get(worker_id)
        used = any(p.worker_id == worker_id and p.state in HOLDING for p in world.placements.values())
        if worker is None or (worker.health is not Health.DOWN and used):
            return False
        del world.workers[worker_id]
        self._state_store.tokens.pop(worker_id, None)
        self._state_store.events.append(
            Event(kind="worker.removed", actor="operator", reason="asked for", worker_id=worker_id)
        )
        self._state_store.publish([worker_id])
        self._leases.end(worker_id)
        return True
