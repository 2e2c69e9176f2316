"""The state store and the registry in memory, over the domain's World: for tests and experiments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from orion.manager.domain.model import Item, Placement, Rental, Worker
from orion.manager.domain.pool_index import Changes, IndexedPlacement, IndexedWorker
from orion.manager.domain.states import (
    ENDED,
    HOLDING,
    LIVE,
    OUT_OF_SERVICE,
    SILENT,
    Health,
    Intent,
    PlacementState,
    RentalState,
)
from orion.manager.domain.steps import Event, Step
from orion.manager.domain.tasks import Follow, TaskEnded
from orion.manager.domain.world import World
from orion.manager.store.port import (
    ADDRESS_REUSED,
    DUE_AT_ONCE,
    QUEUED_AT_ONCE,
    REGISTERED_AGAIN,
    Notes,
    Registered,
    Registration,
)


class InvariantBroken(Exception):
    """A step would violate a constraint that the database has as well."""


class MemoryStateStore:
    """Implements `port.StateStore` and `port.Registry`.

    Each call is a transaction, because none of them awaits anything. Ids, sessions and tokens are made from a counter,
    so that a replay makes the same ones.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = (world or World(workers={}, rentals={}, placements={})).copy()
        """The rows: those of ended rentals stay, those of purged placements are removed."""
        self.events: list[Event] = []
        self.last_heard: dict[str, float] = {}
        self.tokens: dict[str, str] = {}
        """The one valid token of each worker."""
        placements = self.world.placements
        self._epochs = {(p.rental_id, p.epoch) for p in placements.values()}
        self.world.placements = {i: p for i, p in placements.items() if p.state is not PlacementState.PURGED}
        self._registrations = 0
        self._follower: Callable[[Changes], None] | None = None

    async def follow(self, follower: Callable[[Changes], None]) -> None:
        self._follower = follower
        on = (p.worker_id for p in self.world.placements.values())
        self.publish({*self.world.workers, *on}, self.world.rentals)

    def publish(self, worker_ids: Iterable[str] = (), rental_ids: Iterable[str] = ()) -> None:
        """Call the follower with these rows. Code that changes `world` without a step calls this as well."""
        if self._follower is not None:
            workers = {w: self._indexed(w) for w in sorted(worker_ids)}  # sorted, for equal replays
            self._follower(Changes(workers, {r: self._state(r) for r in sorted(rental_ids)}))

    def _indexed(self, worker_id: str) -> tuple[IndexedWorker | None, tuple[IndexedPlacement, ...]]:
        worker, rentals = self.world.workers.get(worker_id), self.world.rentals
        here = (p for p in self.world.placements.values() if p.worker_id == worker_id)
        placed = tuple(IndexedPlacement.of(p, rentals.get(p.rental_id), worker) for p in here)
        return IndexedWorker.of(worker, "") if worker else None, placed

    def _state(self, rental_id: str) -> RentalState | None:
        rental = self.world.rentals.get(rental_id)
        return rental.state if rental and rental.state not in ENDED else None

    async def load(self) -> World:
        world, wanted = self.world, {p.rental_id for p in self.world.placements.values()}
        shown = {i: r for i, r in world.rentals.items() if r.state not in ENDED or i in wanted}
        return World(workers=dict(world.workers), rentals=shown, placements=dict(world.placements))

    async def never_placed(self, items: Iterable[Item]) -> frozenset[tuple[str, int]]:
        return frozenset((item.rental_id, item.epoch) for item in items) - self._epochs

    async def load_part(self, whole: Collection[str], candidates: Collection[str]) -> World:
        world = self.world
        queue = sorted(
            (r for r in world.rentals.values() if r.state is RentalState.QUEUED),
            key=lambda r: (r.activated_at is None, r.created_at, r.id),
        )
        at_rest = ENDED | {RentalState.ACTIVE, RentalState.QUEUED}
        active = {r.id: r for r in world.rentals.values() if r.state not in at_rest}
        active |= {r.id: r for r in queue[:QUEUED_AT_ONCE]}
        migrating = sorted(p.rental_id for p in world.placements.values() if p.is_target and p.state in LIVE)
        active |= {i: world.rentals[i] for i in migrating}
        found = {i: p for i, p in world.placements.items() if p.worker_id in whole or p.rental_id in active}
        of_found = {p.rental_id for p in found.values()}
        known = {p.worker_id for p in found.values()} | {*whole, *candidates}
        used = world.used_slots()
        return World(
            workers=await self.workers(known),
            rentals=active | {i: world.rentals[i] for i in sorted(of_found - active.keys())},
            placements=found,
            whole=frozenset(whole),
            taken={w: frozenset(used.get(w, ())) for w in set(candidates) - set(whole)},
        )

    async def workers(self, ids: Iterable[str]) -> dict[str, Worker]:
        return {w: self.world.workers[w] for w in sorted(ids) if w in self.world.workers}

    async def due(self, wall: float) -> list[Rental]:
        return [r for r in self._living() if r.expires_at is not None and r.expires_at <= wall][:DUE_AT_ONCE]

    async def without_expiry(self) -> list[Rental]:
        return [r for r in self._living() if r.activated_at is not None and r.expires_at is None][:DUE_AT_ONCE]

    def _living(self) -> Iterator[Rental]:
        return (r for r in self.world.rentals.values() if r.state not in ENDED | {RentalState.RELEASING})

    async def apply(self, steps: Iterable[Step]) -> bool:
        with self._transaction():
            return all(self._apply_one(step) for step in steps)

    async def apply_each(self, steps: Iterable[Step]) -> list[bool]:
        with self._transaction():
            return [self._apply_one(step) for step in steps]

    async def finish(self, ended: Sequence[TaskEnded], follow: Follow) -> None:
        with self._transaction():
            for one in ended:
                if step := follow(self.world, one):
                    self._apply_one(step)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        before, events, epochs = self.world.copy(), len(self.events), set(self._epochs)
        self._touched: tuple[set[str], set[str]] = set(), set()
        try:
            yield
        except InvariantBroken:
            self.world, self._epochs = before, epochs
            del self.events[events:]
            raise
        self.publish(*self._touched)

    async def forget(self, worker_ids: Collection[str]) -> tuple[str, ...]:
        world = self.world
        living = {one.id for one in world.rentals.values() if one.state not in ENDED}
        needed = {
            p.worker_id
            for p in world.placements.values()
            if p.state is not PlacementState.PURGED and not p.files_recovered and p.rental_id in living
        }
        down = (world.workers[one] for one in sorted(worker_ids) if one in world.workers and one not in needed)
        gone = tuple(w.id for w in down if w.health is Health.DOWN and w.intent is Intent.ACTIVE)
        for worker_id in gone:
            del world.workers[worker_id]
        self.publish(gone)
        return gone

    async def record_heartbeats(self, notes: Notes) -> None:
        self.last_heard |= {worker_id: at for worker_id, at, _ in notes}

    async def known_at(self, address: str) -> list[Worker]:
        return [w for w in self.world.workers.values() if w.address == address]

    async def worker(self, worker_id: str) -> Worker | None:
        return self.world.workers.get(worker_id)

    async def register(self, claim: Registration, worker_id: str | None, new_token: bool) -> Registered:
        self._registrations += 1
        identity = worker_id or f"w-new{self._registrations:04d}"
        session_id = f"session-{self._registrations:04d}"
        observations = {name: value for name, value in vars(claim).items() if name != "labels"}
        observations |= {"session_id": session_id, "verified_session": None}
        workers = self.world.workers
        if worker_id is None:
            workers[identity] = Worker(id=identity, health=Health.JOINING, intent=Intent.ACTIVE, **observations)
        elif identity in workers:
            workers[identity] = replace(workers[identity], **observations)
        token = f"token-{self._registrations:04d}-of-{identity}" if new_token else None
        if token:
            self.tokens[identity] = token
        reason = "a new worker called home" if worker_id is None else "it called home again"
        self.events.append(Event(kind="worker.registered", actor=identity, reason=reason, worker_id=identity))
        gone = self._remove_replaced(claim, identity)
        self.publish((identity, *gone))
        return Registered(worker_id=identity, session_id=session_id, token=token, replaced=gone)

    def _remove_replaced(self, claim: Registration, identity: str) -> tuple[str, ...]:
        """See `port.Registry.register`."""
        kept, gone = {identity} | {p.worker_id for p in self.world.placements.values()}, []
        for other in [self.world.workers[each] for each in sorted(self.world.workers.keys() - kept)]:
            same_address = other.address == claim.address
            same_agent = (other.host_keys, other.boot_id) == (claim.host_keys, claim.boot_id)
            same_agent = same_agent and (same_address or other.hostname == claim.hostname)
            again, reused = same_agent and other.health in SILENT, same_address and other.health in OUT_OF_SERVICE
            if (again or reused) and other.intent is Intent.ACTIVE:
                gone.append(other.id)
                del self.world.workers[other.id]
                reason = REGISTERED_AGAIN if again else ADDRESS_REUSED
                self.events.append(Event(kind="worker.removed", actor=identity, reason=reason, worker_id=other.id))
        return tuple(gone)

    def _apply_one(self, step: Step) -> bool:
        if not self.world.apply(step):
            return False
        worker_ids, rental_ids = self._touched
        for write in step.writes:
            if write.kind == "rental":
                rental_ids.add(write.id)
            else:
                worker_ids.add(self.world.placements[write.id].worker_id if write.kind == "placement" else write.id)
        if step.placement:
            worker_ids.add(step.placement.worker_id)
            self._check(step.placement)
            self._epochs.add((step.placement.rental_id, step.placement.epoch))
        for write in step.writes:
            if write.kind == "placement" and write.change.get("state") is PlacementState.PURGED:
                del self.world.placements[write.id]
        self.events.extend(step.events)
        return True

    def _check(self, new: Placement) -> None:
        """Raise InvariantBroken if a new row violates a constraint.

        Only a new row can do so, because no transition of a placement enters LIVE or HOLDING from outside.
        """
        others = [p for p in self.world.placements.values() if p.id != new.id]
        alike = [p for p in others if p.rental_id == new.rental_id and p.state in LIVE and p.is_target == new.is_target]
        if alike:
            raise InvariantBroken(f"rental {new.rental_id} has two live placements, or two target placements")
        if any((p.worker_id, p.slot) == (new.worker_id, new.slot) and p.state in HOLDING for p in others):
            raise InvariantBroken(f"slot {new.slot} of worker {new.worker_id} is taken")
        if (new.rental_id, new.epoch) in self._epochs:
            raise InvariantBroken(f"rental {new.rental_id} had a placement of epoch {new.epoch} before")
