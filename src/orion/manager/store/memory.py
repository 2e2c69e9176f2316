"""The ledger and the registry in memory, over the domain's own World: for tests, and for trying things out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from orion.manager.domain import outcomes
from orion.manager.domain.model import Event, Item, Placement, Rental, Step, Worker, World
from orion.manager.domain.reconcile import Task
from orion.manager.domain.states import ENDED, HOLDING, LIVE, OUT_OF_SERVICE, Health, Intent, PlacementState
from orion.manager.store.port import ADDRESS_REUSED, Notes, Registered, Registration


class InvariantBroken(Exception):
    """A step would break what the schema of the database holds."""


class MemoryLedger:
    """Implements `port.Ledger` and `port.Registry`. Ids, sessions and tokens are numbers: a replay makes the same.

    No call waits for anything in between, so each is a transaction.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = (world or World({}, {}, {})).copy()
        """What `load` shows; rentals that have ended stay, placements that are purged do not."""
        self.events: list[Event] = []
        self.last_heard: dict[str, float] = {}
        self.tokens: dict[str, str] = {}
        """The one valid token of each worker."""
        self._epochs = {(p.rental_id, p.epoch) for p in self.world.placements.values()}
        open_ = {i: p for i, p in self.world.placements.items() if p.state is not PlacementState.PURGED}
        self.world.placements = open_
        self._registrations = 0

    async def load(self) -> World:
        rentals, open_ = self.world.rentals, dict(self.world.placements)
        wanted = {p.rental_id for p in open_.values()}
        shown = {i: r for i, r in rentals.items() if r.state not in ENDED or i in wanted}
        return World(dict(self.world.workers), shown, open_)

    async def never_placed(self, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
        return frozenset((item.rental_id, item.epoch) for item in items) - self._epochs

    async def load_workers(self) -> dict[str, Worker]:
        return dict(self.world.workers)

    async def due(self, wall: float) -> list[Rental]:
        living = (r for r in self.world.rentals.values() if r.state not in ENDED)
        return [r for r in living if r.expires_at is not None and r.expires_at <= wall]

    async def apply(self, steps: Iterable[Step]) -> bool:
        before, events, epochs = self.world.copy(), len(self.events), set(self._epochs)
        try:
            return all(self._apply_one(step) for step in steps)
        except InvariantBroken:
            self.world, self._epochs = before, epochs
            del self.events[events:]
            raise

    async def succeed(self, task: Task, report: Mapping[str, Any], wall: float) -> None:
        step = outcomes.succeeded(await self.load(), task, report, wall)
        if step is not None:
            await self.apply([step])

    async def fail(self, task: Task, message: str, attempts: int) -> None:
        step = outcomes.failed(await self.load(), task, message, attempts)
        if step is not None:
            await self.apply([step])

    async def heard(self, notes: Notes) -> None:
        self.last_heard |= {worker_id: at for worker_id, at, _ in notes}

    async def known_at(self, address: str) -> list[Worker]:
        return [w for w in self.world.workers.values() if w.address == address]

    async def worker(self, worker_id: str) -> Worker | None:
        return self.world.workers.get(worker_id)

    async def register(self, claim: Registration, worker_id: str | None, new_token: bool) -> Registered:
        self._registrations += 1
        identity = worker_id or f"w-new{self._registrations:04d}"
        session_id = f"session-{self._registrations:04d}"
        facts: dict[str, Any] = {"address": claim.address, "hostname": claim.hostname, "host_keys": claim.host_keys}
        facts |= {"slots": claim.slots, "boot_id": claim.boot_id, "session_id": session_id, "verified_session": None}
        known = self.world.workers.get(identity)
        if worker_id is None:
            self.world.workers[identity] = Worker(id=identity, health=Health.JOINING, intent=Intent.ACTIVE, **facts)
        elif known is not None:
            self.world.workers[identity] = replace(known, **facts)
        token = f"token-{self._registrations:04d}-of-{identity}" if new_token else None
        if token:
            self.tokens[identity] = token
        reason = "a new worker called home" if worker_id is None else "it called home again"
        self.events.append(Event("worker.registered", identity, reason, worker_id=identity))
        return Registered(identity, session_id, token, self._forget_others_at(claim.address, identity))

    def _forget_others_at(self, address: str, identity: str) -> tuple[str, ...]:
        holding = {p.worker_id for p in self.world.placements.values()}
        others = (w for w in self.world.workers.values() if w.address == address and w.id not in {identity, *holding})
        gone = sorted(w.id for w in others if w.health in OUT_OF_SERVICE and w.intent is Intent.ACTIVE)
        for worker_id in gone:
            del self.world.workers[worker_id]
            self.events.append(Event("worker.removed", identity, ADDRESS_REUSED, worker_id=worker_id))
        return tuple(gone)

    async def placements_of(self, worker_id: str) -> tuple[list[Placement], bool]:
        worker = self.world.workers.get(worker_id)
        found = [p for p in self.world.placements.values() if p.worker_id == worker_id]
        return found, worker is not None and worker.health is Health.DOWN

    def _apply_one(self, step: Step) -> bool:
        if not self.world.apply(step):
            return False
        if step.placement:
            self._check(step.placement)
            self._epochs.add((step.placement.rental_id, step.placement.epoch))
        for write in step.writes:
            if write.kind == "placement" and write.change.get("state") is PlacementState.PURGED:
                del self.world.placements[write.id]
        self.events.extend(step.events)
        return True

    def _check(self, new: Placement) -> None:
        """No state is ever entered from outside of LIVE and of HOLDING, so a new row alone can break these."""
        others = [p for p in self.world.placements.values() if p.id != new.id]
        if any(p.rental_id == new.rental_id and p.state in LIVE for p in others):
            raise InvariantBroken(f"rental {new.rental_id} has two live placements")
        if any((p.worker_id, p.slot) == (new.worker_id, new.slot) and p.state in HOLDING for p in others):
            raise InvariantBroken(f"slot {new.slot} of worker {new.worker_id} is taken")
        if (new.rental_id, new.epoch) in self._epochs:
            raise InvariantBroken(f"rental {new.rental_id} had a placement of epoch {new.epoch} before")
