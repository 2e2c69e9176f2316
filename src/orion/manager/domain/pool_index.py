"""What the manager knows of its pool without asking the database: a consequence of commits, and of nothing else.

The store tells it, after each commit and in their order, the rows that a commit touched, as they are now
(store/pool_index.py; store/memory.py for the ledger in memory). So at every moment it is the database as of some
commit, never a mixture. It is filled at the start, and whatever it says follows from rows, not from what happened to
them. Three things rest on it: a heartbeat's answer, which workers need the reconciler (`restless`), and what people
count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from orion.manager.domain import migration, start_commands
from orion.manager.domain.model import CommandEnd, Item, Placement, Rental, Worker
from orion.manager.domain.ranking import Rank, Ranking
from orion.manager.domain.scheduler import Eligibility, is_full, rank, refusal
from orion.manager.domain.states import ENDED, HOLDING, LIVE, Health, Intent, PlacementState, RentalState


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedPlacement:
    """A placement that is not purged."""

    id: str
    rental_id: str
    epoch: int
    state: PlacementState
    keyed: bool
    """The rental's key is in place there."""
    blank: bool
    """No key was ever put in place: see reconcile._is_missing."""
    start_due: bool = False
    """Its start command is to be run there: see starting.due."""
    standby: bool = False
    held: int = 0
    """The planned move for which it stands still; 0: none."""
    start_ended: bool = False
    """How its start command ended is written down."""

    @staticmethod
    def of(placement: Placement, rental: Rental | None, worker: Worker | None = None) -> IndexedPlacement:
        p = placement
        return IndexedPlacement(
            id=p.id,
            rental_id=p.rental_id,
            epoch=p.epoch,
            state=p.state,
            keyed=rental is not None and p.public_key == rental.public_key,
            blank=not p.public_key,
            start_due=rental is not None and worker is not None and bool(start_commands.due(rental, p, worker)),
            standby=p.standby,
            held=p.held,
            start_ended=bool(p.start_end),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedWorker:
    """A worker."""

    token_hash: str
    health: Health
    intent: Intent
    slots: int
    session_id: str | None
    verified: bool
    """In its current session."""
    fault: str
    address: str
    """From which it registered."""

    @staticmethod
    def of(worker: Worker, token_hash: str) -> IndexedWorker:
        verified = worker.session_id is not None and worker.verified_session == worker.session_id
        w = worker
        return IndexedWorker(
            token_hash=token_hash,
            health=w.health,
            intent=w.intent,
            slots=w.slots,
            session_id=w.session_id,
            verified=verified,
            fault=w.fault,
            address=w.address,
        )

    def as_worker(self, worker_id: str) -> Worker:
        """As far as it is known: all that its health is judged by."""
        verified = self.session_id if self.verified else None
        return Worker(
            id=worker_id,
            hostname="",
            address="",
            host_keys=(),
            slots=self.slots,
            health=self.health,
            intent=self.intent,
            session_id=self.session_id,
            boot_id="",
            verified_session=verified,
            fault=self.fault,
        )

    @property
    def is_destination(self) -> bool:
        return self.health is Health.READY and self.intent is Intent.ACTIVE


BEING_MADE = {PlacementState.RESERVED, PlacementState.PREPARING}
NO_PLACEMENTS: tuple[IndexedPlacement, ...] = ()


@dataclass(frozen=True)
class Changes:
    """Rows that a commit touched, as it left them. Worker None: it was removed. State None: the rental has ended."""

    workers: Mapping[str, tuple[IndexedWorker | None, tuple[IndexedPlacement, ...]]]
    rentals: Mapping[str, RentalState | None]


Rule = tuple[str, Callable[[IndexedWorker | None, tuple[IndexedPlacement, ...]], bool]]

DIRTY: tuple[Rule, ...] = (
    ("it was removed, and what was placed on it is not settled", lambda w, held: w is None and bool(held)),
    ("it is down, and what it held is not lost yet", lambda w, held: _is_down(w) and any(_holds(h) for h in held)),
    (
        "something on it is on its way",
        lambda w, held: w is not None and not _is_down(w) and any(h.state is not PlacementState.RUNNING for h in held),
    ),
    (
        "another key is to be put in place",
        lambda w, held: w is not None and not _is_down(w) and any(not h.keyed and not h.blank for h in held),
    ),
    (
        "a start command is to be run",
        lambda w, held: w is not None and not _is_down(w) and any(h.start_due for h in held),
    ),
    (
        "it is to be reached",
        lambda w, _: w is not None and w.health is Health.JOINING and not w.verified and not w.fault,
    ),
    (
        "it is draining",
        lambda w, held: w is not None and w.intent is Intent.DRAINING,
    ),
    (
        "what runs on it is to be moved away",
        lambda w, held: w is not None and w.health is Health.QUARANTINED and any(h.state in LIVE for h in held),
    ),
    (
        "something on it stands still",
        lambda w, held: w is not None and not _is_down(w) and any(migration.is_quiesced(h) for h in held),
    ),
)
"""Why a worker needs the reconciler. Everything else about it is at rest, as long as its inventory agrees."""


class PoolIndex:
    def __init__(self) -> None:
        self.room = Ranking()
        """Workers that can take a rental."""
        self._workers: dict[str, IndexedWorker] = {}
        self._held: dict[str, tuple[IndexedPlacement, ...]] = {}
        self._rentals: dict[str, RentalState] = {}
        self._dirty: dict[str, None] = {}
        self._refusals: Counter[str] = Counter()
        self._by_health: dict[Health, dict[str, float]] = {health: {} for health in Health}
        self._by_state: dict[RentalState, dict[str, float]] = {s: {} for s in RentalState if s not in ENDED}
        self._unsettled: dict[str, float] = {}
        self._destinations = self._slots = self._slots_used = 0
        self._stale: dict[str, None] = {}

    # -- what was committed ------------------------------------------------------------------------------------------

    def apply(self, changes: Changes, now: float) -> None:
        """`now`: monotonic seconds; ages count from when a state was first told."""
        for worker_id, (known, held) in changes.workers.items():
            self._put(worker_id, known, held, now)
        for rental_id, state in changes.rentals.items():
            self._put_rental(rental_id, state, now)

    def _put(self, worker_id: str, known: IndexedWorker | None, held: tuple[IndexedPlacement, ...], now: float) -> None:
        before, had = self._workers.get(worker_id), self._held.get(worker_id, NO_PLACEMENTS)
        if before is not None:
            self._count(before, had, -1)
        if known is not None:
            self._workers[worker_id] = known
            self._count(known, held, 1)
        else:
            self._workers.pop(worker_id, None)
        if held:
            self._held[worker_id] = held
        else:
            self._held.pop(worker_id, None)
        self._age_worker(worker_id, before, known, now)
        self._age_held(before, had, known, held, now)
        if any(rule(known, held) for _, rule in DIRTY):
            self._dirty[worker_id] = None
        else:
            self._dirty.pop(worker_id, None)
        self.room.put(worker_id, _rank(worker_id, known, held))
        self._stale[worker_id] = None

    def _count(self, known: IndexedWorker, held: tuple[IndexedPlacement, ...], one: int) -> None:
        used = _used(held)
        self._refusals[refusal(_eligibility(known, used))] += one
        self._destinations += one * known.is_destination
        if known.health is Health.READY:
            self._slots += one * known.slots
            self._slots_used += one * min(used, known.slots)

    def _age_worker(
        self, worker_id: str, before: IndexedWorker | None, known: IndexedWorker | None, now: float
    ) -> None:
        if before is not None and (known is None or known.health is not before.health):
            del self._by_health[before.health][worker_id]
        if known is not None and (before is None or known.health is not before.health):
            self._by_health[known.health][worker_id] = now

    def _age_held(
        self,
        before: IndexedWorker | None,
        had: tuple[IndexedPlacement, ...],
        known: IndexedWorker | None,
        held: tuple[IndexedPlacement, ...],
        now: float,
    ) -> None:
        # With its worker's fault: when an operator resumes that, a failed clean-up has its time again.
        same_fault = (before.fault if before else "") == (known.fault if known else "")
        states = {h.id: (h.state, migration.is_quiesced(h)) for h in had if same_fault}
        since = {h.id: self._unsettled.pop(h.id, now) for h in had}
        for h in held:
            if h.state is not PlacementState.RUNNING or h.held:
                self._unsettled[h.id] = since[h.id] if states.get(h.id) == (h.state, migration.is_quiesced(h)) else now

    def _put_rental(self, rental_id: str, state: RentalState | None, now: float) -> None:
        before = self._rentals.get(rental_id)
        if before is state:
            return
        if before is not None:
            del self._by_state[before][rental_id]
            del self._rentals[rental_id]
        if state is not None:
            self._rentals[rental_id] = state
            self._by_state[state][rental_id] = now

    # -- one worker --------------------------------------------------------------------------------------------------

    def worker(self, worker_id: str) -> IndexedWorker | None:
        return self._workers.get(worker_id)

    def held(self, worker_id: str) -> tuple[IndexedPlacement, ...]:
        """What a worker has or may still have, its placements that are not purged."""
        return self._held.get(worker_id, NO_PLACEMENTS)

    def disagrees(self, worker_id: str, inventory: Iterable[Item]) -> bool:
        """Whether what a worker shows asks for a decision: all that is shown must be placed there, and believed."""
        known, held = self._workers.get(worker_id), self._held.get(worker_id, NO_PLACEMENTS)
        if known is None or known.health is Health.DOWN:
            return False
        placed = {(h.rental_id, h.epoch) for h in held}
        return (
            bool(known.fault)
            or any(h.blank and h.state is PlacementState.RUNNING for h in held)
            or any((item.rental_id, item.epoch) not in placed for item in inventory)
        )

    def has_new_ends(self, worker_id: str, ends: Iterable[CommandEnd]) -> bool:
        """Whether a worker says of a start command that it ended, and that is not written down."""
        told = {(end.rental_id, end.epoch) for end in ends}
        return bool(told) and any(
            (h.rental_id, h.epoch) in told and h.state is PlacementState.RUNNING and not (h.start_ended or h.start_due)
            for h in self.held(worker_id)
        )

    # -- the pool ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._workers)

    def ids(self) -> Iterator[str]:
        return iter(self._workers)

    def items(self) -> Iterator[tuple[str, IndexedWorker]]:
        return iter(self._workers.items())

    def take_changed(self) -> list[str]:
        """The workers that a commit touched since this was last asked."""
        changed, self._stale = list(self._stale), {}
        return changed

    def dirty_workers(self, number: int) -> list[str]:
        """The workers that need the reconciler, at most so many: those that were told least recently."""
        found = list(islice(self._dirty, number))
        if len(found) < len(self._dirty):
            for worker_id in found:
                self._dirty[worker_id] = self._dirty.pop(worker_id)
        return found

    @property
    def number_of_dirty_workers(self) -> int:
        return len(self._dirty)

    def refusals(self, without: Collection[str], exiting: Collection[str]) -> Counter[str]:
        """Why each worker beyond `without` can take nothing, counted; under "" those that could."""
        found = Counter(self._refusals)
        for worker_id in {*without, *exiting}:
            known = self._workers.get(worker_id)
            if known is not None:
                eligibility = _eligibility(known, _used(self.held(worker_id)))
                found[refusal(eligibility)] -= 1
                if worker_id not in without:
                    found[refusal(eligibility._replace(exiting=True))] += 1
        return +found

    def destinations(self, exiting: Iterable[str]) -> int:
        """How many workers are ready, active, and not among those that are leaving."""
        gone = (self._workers.get(worker_id) for worker_id in exiting)
        return self._destinations - sum(known is not None and known.is_destination for known in gone)

    def slots(self) -> tuple[int, int]:
        """Slots of all ready workers, and how many of them are free."""
        return self._slots, self._slots - self._slots_used

    def by_health(self) -> dict[str, int]:
        return {str(health): len(found) for health, found in self._by_health.items() if found}

    def number(self, health: Health) -> int:
        return len(self._by_health[health])

    # -- rentals and ages --------------------------------------------------------------------------------------------

    def by_state(self) -> dict[str, int]:
        """Living rentals by state."""
        return {str(state): len(found) for state, found in self._by_state.items() if found}

    def waiting(self) -> int:
        """Rentals that may ask for a place."""
        return len(self._by_state[RentalState.QUEUED]) + len(self._by_state[RentalState.MIGRATING])

    def wanted_places(self, looked_at: Iterable[str], exiting: Collection[str] = ()) -> int:
        """How many rentals may ask for a place when these workers are looked at: those that wait, will be lost or
        are to be moved away. `leaving`: the workers that are about to stop."""
        return self.waiting() + sum(
            h.blank
            or h.state in BEING_MADE
            or (h.state in LIVE and (worker_id in exiting or _is_to_be_emptied(self._workers.get(worker_id))))
            for worker_id in looked_at
            for h in self.held(worker_id)
        )

    def since(self, worker_id: str) -> float | None:
        """Since when it has been in its health."""
        known = self._workers.get(worker_id)
        return self._by_health[known.health].get(worker_id) if known else None

    def age_of(self, identity: str, now: float) -> float:
        """Seconds that a rental has been in its state, or a placement that does not run, or stands still."""
        since = self._unsettled.get(identity)
        if since is None and identity in self._rentals:
            since = self._by_state[self._rentals[identity]][identity]
        return 0.0 if since is None else now - since

    def longest_in(self, health: Health, beyond_s: float, now: float, number: int) -> list[str]:
        """Workers that have been in a health for longer than that, at most so many, the longest first."""
        return [w for w, since in islice(self._by_health[health].items(), number) if now - since > beyond_s]


def _is_to_be_emptied(known: IndexedWorker | None) -> bool:
    """What runs there will have to be somewhere else."""
    return known is None or known.health in {Health.DOWN, Health.QUARANTINED} or known.intent is Intent.DRAINING


def _is_down(known: IndexedWorker | None) -> bool:
    return known is not None and known.health is Health.DOWN


def _holds(held: IndexedPlacement) -> bool:
    return held.state in HOLDING


def _used(held: tuple[IndexedPlacement, ...]) -> int:
    return sum(h.state in HOLDING for h in held)


def _eligibility(known: IndexedWorker, used: int) -> Eligibility:
    return Eligibility(
        health=known.health,
        fault=bool(known.fault),
        intent=known.intent,
        exiting=False,
        full=is_full(used, known.slots),
    )


def _rank(worker_id: str, known: IndexedWorker | None, held: tuple[IndexedPlacement, ...]) -> Rank | None:
    if known is None or refusal(_eligibility(known, _used(held))):
        return None
    return rank(worker_id, _used(held), known.slots)
