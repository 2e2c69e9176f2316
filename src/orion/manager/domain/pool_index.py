"""The pool index: an index in memory of the workers, placements and rentals, as of the last commit.

The store fills the index at the start, and applies to it the rows that each commit touched, in the order of commits
(store/pool_index.py, store/memory.py). So the index always shows the database as of one commit. Heartbeats are answered
from it; it also has the workers that need the reconciler (`dirty_workers`), and the figures of metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from orion.manager.domain import migration, start_commands
from orion.manager.domain.model import CommandEnd, Item, Placement, Rental, Worker
from orion.manager.domain.ranking import Ranking
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
    """Whether the rental's keys are in place there."""
    blank: bool
    """Whether no keys were ever put in place: see reconcile._missing."""
    start_due: bool = False
    """Whether the start command is to be run there: see start_commands.due."""
    is_target: bool = False
    quiesced_for: int = 0
    start_ended: bool = False
    """Whether the end of the start command is recorded."""

    @staticmethod
    def of(p: Placement, rental: Rental | None, worker: Worker | None = None) -> IndexedPlacement:
        return IndexedPlacement(
            id=p.id,
            rental_id=p.rental_id,
            epoch=p.epoch,
            state=p.state,
            keyed=rental is not None and p.public_key == rental.public_key,
            blank=not p.public_key,
            start_due=rental is not None and worker is not None and bool(start_commands.due(rental, p, worker)),
            is_target=p.is_target,
            quiesced_for=p.quiesced_for,
            start_ended=bool(p.start_end),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedWorker:
    """A worker, without the fields that only people read."""

    token_hash: str
    health: Health
    intent: Intent
    slots: int
    session_id: str | None
    verified: bool
    """Whether the manager verified the worker in its current session."""
    fault: str
    address: str

    @staticmethod
    def of(w: Worker, token_hash: str) -> IndexedWorker:
        return IndexedWorker(
            token_hash=token_hash,
            health=w.health,
            intent=w.intent,
            slots=w.slots,
            session_id=w.session_id,
            verified=w.verified,
            fault=w.fault,
            address=w.address,
        )

    def as_worker(self, worker_id: str) -> Worker:
        """Return a record with the fields by which its health is judged; the others are empty."""
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
            verified_session=self.session_id if self.verified else None,
            fault=self.fault,
        )

    @property
    def is_destination(self) -> bool:
        return self.health is Health.READY and self.intent is Intent.ACTIVE


T = TypeVar("T")
S = TypeVar("S", Health, RentalState)
BEING_MADE = {PlacementState.RESERVED, PlacementState.PREPARING}
Placements = tuple[IndexedPlacement, ...]
NO_PLACEMENTS: Placements = ()


@dataclass(frozen=True)
class Changes:
    """The rows that a commit touched, as it left them. None: the worker was removed, or the rental has ended."""

    workers: Mapping[str, tuple[IndexedWorker | None, Placements]]
    rentals: Mapping[str, RentalState | None]


Rule = Callable[[IndexedWorker | None, Placements], bool]
DIRTY: tuple[Rule, ...] = (
    # It was removed, and its placements are not settled.
    lambda w, placed: w is None and bool(placed),
    # It is down, and what it held is not lost yet.
    lambda w, placed: w is not None and w.health is Health.DOWN and any(p.state in HOLDING for p in placed),
    # Something on it is being made or ended.
    lambda w, placed: _is_up(w) and any(p.state is not PlacementState.RUNNING for p in placed),
    # Another key is to be put in place.
    lambda w, placed: _is_up(w) and any(not p.keyed and not p.blank for p in placed),
    # A start command is to be run.
    lambda w, placed: _is_up(w) and any(p.start_due for p in placed),
    # It is to be reached.
    lambda w, _: w is not None and w.health is Health.JOINING and not w.verified and not w.fault,
    # It is draining.
    lambda w, _: w is not None and w.intent is Intent.DRAINING,
    # Its rentals are to migrate away.
    lambda w, placed: w is not None and w.health is Health.QUARANTINED and any(p.state in LIVE for p in placed),
    # Something on it is quiesced.
    lambda w, placed: _is_up(w) and any(migration.is_quiesced(p) for p in placed),
)
"""The rules that say whether a worker needs the reconciler. Any other worker is at rest if its inventory agrees."""


class PoolIndex:
    def __init__(self) -> None:
        self.room = Ranking()
        """The ranks of the workers that can take a rental."""
        self._workers: dict[str, IndexedWorker] = {}
        self._placed: dict[str, Placements] = {}
        self._rentals: dict[str, RentalState] = {}
        self._dirty: dict[str, bool] = {}
        self._refusals: Counter[str] = Counter()
        self._by_health: dict[Health, dict[str, float]] = {health: {} for health in Health}
        self._by_state: dict[RentalState, dict[str, float]] = {s: {} for s in RentalState if s not in ENDED}
        self._unsettled: dict[str, float] = {}
        self._destinations = self._slots = self._slots_used = 0
        self._changed: dict[str, None] = {}

    def apply(self, changes: Changes, now: float) -> None:
        """Apply the rows of a commit. `now`: monotonic seconds, from which the ages of new states are counted."""
        for worker_id, (known, placed) in changes.workers.items():
            self._put(worker_id, known, placed, now)
        for rental_id, state in changes.rentals.items():
            before = self._rentals.get(rental_id)
            _set(self._rentals, rental_id, state)
            _age(self._by_state, rental_id, before, state, now)

    def _put(self, worker_id: str, known: IndexedWorker | None, placed: Placements, now: float) -> None:
        before, placed_before = self._workers.get(worker_id), self.placements_on(worker_id)
        if before is not None:
            self._count(before, placed_before, -1)
        if known is not None:
            self._count(known, placed, 1)
        _set(self._workers, worker_id, known)
        _set(self._placed, worker_id, placed or None)
        _age(self._by_health, worker_id, before.health if before else None, known.health if known else None, now)
        self._age_placements(before, placed_before, known, placed, now)
        _set(self._dirty, worker_id, any(rule(known, placed) for rule in DIRTY) or None)
        used = _used(placed)
        fits = known is not None and not refusal(_eligibility(known, used))
        self.room.put(worker_id, rank(worker_id, used, known.slots) if known and fits else None)
        self._changed[worker_id] = None

    def _count(self, known: IndexedWorker, placed: Placements, one: int) -> None:
        """Add `one` (1 or -1) to the figures of the pool for a worker."""
        used = _used(placed)
        self._refusals[refusal(_eligibility(known, used))] += one
        self._destinations += one * known.is_destination
        if known.health is Health.READY:
            self._slots += one * known.slots
            self._slots_used += one * min(used, known.slots)

    def _age_placements(
        self,
        before: IndexedWorker | None,
        placed_before: Placements,
        known: IndexedWorker | None,
        placed: Placements,
        now: float,
    ) -> None:
        # An age starts again with another fault of the worker: after `orion resume` a clean-up has its deadline again.
        same_fault = (before.fault if before else "") == (known.fault if known else "")
        states = {p.id: (p.state, migration.is_quiesced(p)) for p in placed_before if same_fault}
        since = {p.id: self._unsettled.pop(p.id, now) for p in placed_before}
        for p in placed:
            if p.state is not PlacementState.RUNNING or p.quiesced_for:
                self._unsettled[p.id] = since[p.id] if states.get(p.id) == (p.state, migration.is_quiesced(p)) else now

    def worker(self, worker_id: str) -> IndexedWorker | None:
        return self._workers.get(worker_id)

    def placements_on(self, worker_id: str) -> Placements:
        """Return the placements of a worker that are not purged."""
        return self._placed.get(worker_id, NO_PLACEMENTS)

    def disagrees(self, worker_id: str, inventory: Iterable[Item]) -> bool:
        """Return whether an inventory has an unplaced rental, or is needed for a fault or a placement without keys."""
        known, placed = self._workers.get(worker_id), self.placements_on(worker_id)
        if known is None or known.health is Health.DOWN:
            return False
        known_ids = {(p.rental_id, p.epoch) for p in placed}
        return (
            bool(known.fault)
            or any(p.blank and p.state is PlacementState.RUNNING for p in placed)
            or any((item.rental_id, item.epoch) not in known_ids for item in inventory)
        )

    def has_new_ends(self, worker_id: str, ends: Iterable[CommandEnd]) -> bool:
        """Return whether a worker reports an end of a start command that is not recorded."""
        ended = {(end.rental_id, end.epoch) for end in ends}
        return bool(ended) and any(
            (p.rental_id, p.epoch) in ended and p.state is PlacementState.RUNNING and not (p.start_ended or p.start_due)
            for p in self.placements_on(worker_id)
        )

    def __len__(self) -> int:
        return len(self._workers)

    def ids(self) -> Iterator[str]:
        return iter(self._workers)

    def items(self) -> Iterator[tuple[str, IndexedWorker]]:
        return iter(self._workers.items())

    def take_changed(self) -> list[str]:
        """Return the workers that commits touched since the last call."""
        changed, self._changed = list(self._changed), {}
        return changed

    def dirty_workers(self, number: int) -> list[str]:
        """Return up to `number` workers that need the reconciler, those first that were returned least recently."""
        found = list(islice(self._dirty, number))
        if len(found) < len(self._dirty):
            for worker_id in found:
                self._dirty[worker_id] = self._dirty.pop(worker_id)
        return found

    @property
    def number_of_dirty_workers(self) -> int:
        return len(self._dirty)

    def refusals(self, without: Collection[str], exiting: Collection[str]) -> Counter[str]:
        """Return the number of workers that each filter refuses, those in `without` left out; "": not refused."""
        found = Counter(self._refusals)
        for worker_id in {*without, *exiting}:
            known = self._workers.get(worker_id)
            if known is not None:
                eligibility = _eligibility(known, _used(self.placements_on(worker_id)))
                found[refusal(eligibility)] -= 1
                if worker_id not in without:
                    found[refusal(eligibility._replace(exiting=True))] += 1
        return +found

    def destinations(self, exiting: Iterable[str]) -> int:
        """Return the number of workers that are ready, active and not in `exiting`."""
        gone = (self._workers.get(worker_id) for worker_id in exiting)
        return self._destinations - sum(known is not None and known.is_destination for known in gone)

    def slots(self) -> tuple[int, int]:
        """Return the number of slots of all ready workers, and the number of free ones among them."""
        return self._slots, self._slots - self._slots_used

    def by_health(self) -> dict[str, int]:
        return {str(health): len(found) for health, found in self._by_health.items() if found}

    def number(self, health: Health) -> int:
        return len(self._by_health[health])

    def by_state(self) -> dict[str, int]:
        """Return the number of rentals in each state that is not an end."""
        return {str(state): len(found) for state, found in self._by_state.items() if found}

    def waiting(self) -> int:
        """Return the number of rentals that may need a slot now."""
        return len(self._by_state[RentalState.QUEUED]) + len(self._by_state[RentalState.MIGRATING])

    def wanted_places(self, worker_ids: Iterable[str], exiting: Collection[str] = ()) -> int:
        """Return the number of slots that a decision about these workers may need.

        They are for rentals that wait, will be lost or are to migrate away. `exiting`: the workers that are to stop.
        """
        return self.waiting() + sum(
            p.blank
            or p.state in BEING_MADE
            or (p.state in LIVE and (worker_id in exiting or _is_to_be_emptied(self._workers.get(worker_id))))
            for worker_id in worker_ids
            for p in self.placements_on(worker_id)
        )

    def since(self, worker_id: str) -> float | None:
        """Return the monotonic seconds since which a worker has been in its health; None: it is unknown."""
        known = self._workers.get(worker_id)
        return self._by_health[known.health].get(worker_id) if known else None

    def age_of(self, identity: str, now: float) -> float:
        """Return the seconds that a rental, or a placement that does not run or is quiesced, has been in its state."""
        since = self._unsettled.get(identity)
        if since is None and identity in self._rentals:
            since = self._by_state[self._rentals[identity]][identity]
        return 0.0 if since is None else now - since

    def longest_in(self, health: Health, beyond_s: float, now: float, number: int) -> list[str]:
        """Return up to `number` workers that have been in a health for longer than `beyond_s`, the longest first."""
        return [w for w, since in islice(self._by_health[health].items(), number) if now - since > beyond_s]


def _is_to_be_emptied(known: IndexedWorker | None) -> bool:
    """Return whether the rentals on a worker have to go elsewhere."""
    return known is None or known.health in {Health.DOWN, Health.QUARANTINED} or known.intent is Intent.DRAINING


def _set(table: dict[str, T], key: str, value: T | None) -> None:
    """Set the value of a key; None removes the key."""
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def _age(by_state: dict[S, dict[str, float]], key: str, before: S | None, state: S | None, now: float) -> None:
    """Move a key to the table of its new state, with the time of the change; a key without a state is in no table."""
    if before is not None and before is not state:
        del by_state[before][key]
    if state is not None and before is not state:
        by_state[state][key] = now


def _is_up(known: IndexedWorker | None) -> bool:
    return known is not None and known.health is not Health.DOWN


def _used(placed: Placements) -> int:
    return sum(p.state in HOLDING for p in placed)


def _eligibility(w: IndexedWorker, used: int) -> Eligibility:
    return Eligibility(health=w.health, fault=bool(w.fault), intent=w.intent, full=is_full(used, w.slots))
