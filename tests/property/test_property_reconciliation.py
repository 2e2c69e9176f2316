"""Random histories of rentals, workers and tasks: no invariant breaks, and a quiet world with room converges.

The machine plays everybody around the reconciler on one World: renters, the health loop, workers and their
inventories, tasks that end well or badly or when nobody wants them any more, and a reconciler whose decision is
committed later than it was made.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.builders import host_key, new_rental, new_worker, new_world

from orion.manager.domain.expiry import release, renew
from orion.manager.domain.model import Item, Placement, Rental, Worker
from orion.manager.domain.observations import Observations
from orion.manager.domain.outcomes import failed, succeeded
from orion.manager.domain.reconcile import Decision, decide
from orion.manager.domain.states import (
    ENDED,
    HOLDING,
    LIVE,
    TABLES,
    Health,
    Intent,
    PlacementState,
    RentalState,
)
from orion.manager.domain.steps import Step, move_worker
from orion.manager.domain.tasks import Task, TaskEnded, TaskKind
from orion.manager.domain.world import World

INVARIANTS = (
    "a_rental_has_at_most_one_live_placement_and_one_standby",
    "no_two_placements_share_a_slot",
    "the_epoch_of_a_rental_is_that_of_its_newest_placement",
    "an_active_rental_runs",
    "what_has_ended_runs_nowhere",
    "what_was_once_active_never_fails",
)
MOST_WORKERS, MOST_RENTALS = 4, 6
ONE_RECONCILER = {"a_round", "everything_goes_well_for_a_while", "rounds_without_news_come_to_rest"}
"""Rules that do not run between a decision and its commit."""
SEEDS, STEPS = 20, 300
CHOICE = st.integers(0, 1000)


class PoolHistory(RuleBasedStateMachine):
    @initialize(slots=st.lists(st.integers(1, 2), min_size=0, max_size=3))
    def a_pool(self, slots: list[int]) -> None:
        self.world = new_world()
        self.now = 0.0
        self.quiet = False
        self.since: dict[tuple[str, str], float] = {}
        self.numbers = count(1)
        self.inventories: dict[str, tuple[Item, ...]] = {}
        self.disks: dict[str, set[Item]] = {}
        self.exiting: set[str] = set()
        self.attempts: Counter[Task] = Counter()
        self.running: list[Task] = []
        self.pending: tuple[Decision, World] | None = None
        self.epochs: dict[str, int] = {}
        self.was_active: set[str] = set()
        for number in slots:
            self._join(number)

    # -- everybody around the reconciler ------------------------------------------------------------------------

    @rule()
    def a_rental_is_asked_for(self) -> None:
        living = [r for r in self.world.rentals.values() if r.state not in ENDED]
        if len(living) < MOST_RENTALS:
            number = next(self.numbers)
            self.world.rentals[f"rental{number:04d}"] = new_rental(number, created_at=self.now)

    @rule(at=CHOICE, end=st.sampled_from(["released", "expired"]))
    def a_rental_is_released(self, at: int, end: str) -> None:
        living = [r for r in self.world.rentals.values() if r.state not in ENDED | {RentalState.RELEASING}]
        if living:
            self._apply(release(living[at % len(living)], end, "alice", "asked for"))

    @rule(at=CHOICE)
    def a_rental_gets_a_new_key(self, at: int) -> None:
        living = [r for r in self.world.rentals.values() if r.state not in ENDED | {RentalState.RELEASING}]
        if living:
            rental = living[at % len(living)]
            self.world.rentals[rental.id] = replace(rental, public_key=host_key(next(self.numbers)))

    @rule(at=CHOICE)
    def a_rental_is_renewed(self, at: int) -> None:
        living = [r for r in self.world.rentals.values() if r.state not in ENDED | {RentalState.RELEASING}]
        if living:
            self._apply(renew(living[at % len(living)], 60, "alice", self.now))

    @rule(slots=st.integers(1, 2))
    def a_worker_joins(self, slots: int) -> None:
        if len(self.world.workers) < MOST_WORKERS:
            self._join(slots)

    @rule(at=CHOICE, to=st.sampled_from(Health))
    def a_worker_is_judged(self, at: int, to: Health) -> None:
        """Judge a worker by any verdict that the table and the observations allow."""
        worker = self._worker(at)
        if worker is None or to not in TABLES["worker"][worker.health].exits:
            return
        verified = worker.verified_session == worker.session_id and not worker.fault
        if (to is Health.READY and not verified) or (to is Health.QUARANTINED and not worker.fault):
            return
        if to is Health.JOINING and (verified or worker.fault or worker.id not in self.inventories):
            return
        if to is Health.DOWN:
            self.inventories.pop(worker.id, None)
        self._apply(move_worker(worker, to, "judged"))

    @rule(at=CHOICE)
    def a_worker_dies(self, at: int) -> None:
        worker = self._worker(at)
        if worker is not None and worker.health is not Health.DOWN:
            self.inventories.pop(worker.id, None)
            for to in (Health.SUSPECT, Health.DOWN):
                if to in TABLES["worker"][self.world.workers[worker.id].health].exits:
                    self._apply(move_worker(self.world.workers[worker.id], to, "silence"))

    @rule(at=CHOICE)
    def a_worker_calls_home_again(self, at: int) -> None:
        worker = self._worker(at)
        if worker is not None:
            session = f"session-{next(self.numbers)}"
            self.world.workers[worker.id] = replace(worker, session_id=session, verified_session=None)
            self.inventories[worker.id] = tuple(self.disks[worker.id])
            self.exiting.discard(worker.id)

    @rule(at=CHOICE)
    def a_worker_sends_a_heartbeat(self, at: int) -> None:
        worker = self._worker(at)
        if worker is not None and worker.health is not Health.DOWN:
            self.inventories[worker.id] = tuple(self.disks[worker.id])

    @rule(at=CHOICE, intent=st.sampled_from([Intent.ACTIVE, Intent.DRAINING]))
    def an_operator_drains_or_resumes_a_worker(self, at: int, intent: Intent) -> None:
        worker = self._worker(at)
        if worker is not None:
            cleared = {"fault": "", "verified_session": None} if intent is Intent.ACTIVE else {}
            self.world.workers[worker.id] = replace(worker, intent=intent, **cleared)

    @rule(at=CHOICE)
    def a_worker_is_found_at_fault(self, at: int) -> None:
        worker = self._worker(at)
        if worker is not None:
            self.world.workers[worker.id] = replace(worker, fault="it broke", verified_session=None)

    @rule(at=CHOICE)
    def a_worker_says_goodbye(self, at: int) -> None:
        worker = self._worker(at)
        if worker is not None:
            self.exiting.add(worker.id)

    @rule(at=CHOICE)
    def an_operator_removes_a_worker(self, at: int) -> None:
        worker = self._worker(at)
        if worker and (worker.health is Health.DOWN or not self.world.used_slots()[worker.id]):
            del self.world.workers[worker.id]
            self.inventories.pop(worker.id, None)

    @rule(seconds=st.sampled_from([1.0, 20.0, 70.0, 130.0, 90_000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- the reconciler -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.pending is None)
    @rule()
    def a_round(self) -> None:
        decision = self._decide(self.world)
        self._commit(decision, self.world.copy())
        self.running += [task for task in decision.tasks if task.key not in {other.key for other in self.running}]

    @precondition(lambda self: self.pending is None)
    @rule()
    def everything_goes_well_for_a_while(self) -> None:
        for _ in range(4):
            self._one_good_round()

    @precondition(lambda self: self.pending is None)
    @rule()
    def rounds_without_news_come_to_rest(self) -> None:
        decision = self._decide(self.world)
        for _ in range(6):
            self._commit(decision, self.world.copy())
            decision = self._decide(self.world)
        assert decision.steps == ()
        down = {w.id for w in self.world.workers.values() if w.health is Health.DOWN}
        for rental in self.world.rentals.values():
            held_on = {p.worker_id for p in self._placements_of(rental) if p.state in HOLDING}
            if rental.state is RentalState.RELEASING:
                assert held_on - down, "a release waits for nothing but a clean-up on a worker that is there"
            if rental.state is RentalState.MIGRATING:
                assert self.world.live_placement(rental.id), "a rental without a free slot is queued"

    @rule()
    def a_decision_is_made(self) -> None:
        self.pending = self._decide(self.world), self.world.copy()

    @precondition(lambda self: self.pending is not None)
    @rule()
    def it_is_committed_later(self) -> None:
        decision, seen = self.pending
        self.pending = None
        self._commit(decision, seen)

    @precondition(lambda self: self.running)
    @rule(at=CHOICE, well=st.booleans())
    def a_task_ends(self, at: int, well: bool) -> None:
        self._end(self.running.pop(at % len(self.running)), well)

    @rule()
    def the_manager_restarts(self) -> None:
        self.running.clear()
        self.pending = None
        self.since.clear()
        self.attempts.clear()
        self.exiting.clear()
        self.inventories.clear()

    # -- invariants -------------------------------------------------------------------------------------------------

    @invariant()
    def a_rental_has_at_most_one_live_placement_and_one_standby(self) -> None:
        live = Counter((p.rental_id, p.is_target) for p in self.world.placements.values() if p.state in LIVE)
        assert all(number == 1 for number in live.values())

    @invariant()
    def no_two_placements_share_a_slot(self) -> None:
        placed = Counter((p.worker_id, p.slot) for p in self.world.placements.values() if p.state in HOLDING)
        assert all(number == 1 for number in placed.values())

    @invariant()
    def the_epoch_of_a_rental_is_that_of_its_newest_placement(self) -> None:
        for placement in self.world.placements.values():
            rental = self.world.rentals[placement.rental_id]
            assert placement.epoch < rental.next_epoch
            if placement.state in LIVE and placement.is_target:
                assert placement.epoch > rental.epoch, "the rental was never activated"
            elif placement.state in LIVE:
                assert placement.epoch == rental.epoch

    @invariant()
    def an_active_rental_runs(self) -> None:
        for rental in self.world.rentals.values():
            if rental.state is RentalState.ACTIVE:
                assert self.world.live_placement(rental.id).state is PlacementState.RUNNING
                assert rental.expires_at is not None

    @invariant()
    def what_has_ended_runs_nowhere(self) -> None:
        for rental in self.world.rentals.values():
            left = {p.state for p in self._placements_of(rental)}
            if rental.state in {RentalState.RELEASED, RentalState.EXPIRED}:
                assert left <= {PlacementState.LOST, PlacementState.PURGED}
            if rental.state is RentalState.FAILED:
                assert not left & LIVE

    @invariant()
    def what_was_once_active_never_fails(self) -> None:
        self.was_active |= {r.id for r in self.world.rentals.values() if r.state is RentalState.ACTIVE}
        assert all(self.world.rentals[identity].state is not RentalState.FAILED for identity in self.was_active)

    # -- in the end ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let all workers return and all tasks succeed, with room: within a few rounds every promise is kept."""
        if not hasattr(self, "world"):
            return
        self.running.clear()
        self.pending = None
        self.quiet = True
        for worker in list(self.world.workers.values()):
            self._heal(worker)
        for _ in range(MOST_RENTALS):
            self._join(1)
        for _ in range(12):
            self._one_good_round()
        self._is_settled()

    def _is_settled(self) -> None:
        decision = self._decide(self.world)
        assert decision == Decision((), ()), decision
        for rental in self.world.rentals.values():
            assert rental.state in ENDED | {RentalState.ACTIVE}, rental
        for placement in self.world.placements.values():
            wanted = self.world.rentals[placement.rental_id].state is RentalState.ACTIVE
            alright = {PlacementState.RUNNING, PlacementState.PURGED} if wanted else {PlacementState.PURGED}
            assert placement.state in alright, placement
        running = {
            (p.worker_id, p.rental_id, p.epoch)
            for p in self.world.placements.values()
            if p.state is PlacementState.RUNNING
        }
        on_disk = {(w, item.rental_id, item.epoch) for w in self.world.workers for item in self.disks[w]}
        assert on_disk == running
        assert all(w.health is Health.READY for w in self.world.workers.values())

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def _one_good_round(self) -> None:
        self.a_round()
        for task in self.running:
            self._end(task, well=True)
        self.running.clear()
        for worker in list(self.world.workers.values()):
            self._judge_by_the_rules(worker)

    def _worker(self, at: int) -> Worker | None:
        workers = list(self.world.workers.values())
        return workers[at % len(workers)] if workers else None

    def _placements_of(self, rental: Rental) -> list[Placement]:
        return [p for p in self.world.placements.values() if p.rental_id == rental.id]

    def _join(self, slots: int) -> None:
        number = next(self.numbers)
        worker = new_worker(number, slots=slots, health=Health.JOINING, verified_session=None)
        self.world.workers[worker.id] = worker
        self.disks[worker.id] = set()
        self.inventories[worker.id] = ()

    def _heal(self, worker: Worker) -> None:
        session = f"session-{next(self.numbers)}"
        healed = {"fault": "", "intent": Intent.ACTIVE, "session_id": session, "verified_session": None}
        self.world.workers[worker.id] = replace(worker, **healed)
        self.inventories[worker.id] = tuple(self.disks[worker.id])
        self.exiting.discard(worker.id)

    def _judge_by_the_rules(self, worker: Worker) -> None:
        verified = worker.verified_session == worker.session_id
        here = worker.id in self.inventories
        if here and worker.health is not Health.JOINING and not verified and not worker.fault:
            self._apply(move_worker(worker, Health.JOINING, "it registered"))
        elif here and Health.READY in TABLES["worker"][worker.health].exits and verified and not worker.fault:
            self._apply(move_worker(worker, Health.READY, "it is fine"))
        elif worker.fault and self.quiet:
            self._heal(worker)
        if worker.health is not Health.DOWN:
            self.inventories[worker.id] = tuple(self.disks[worker.id])

    def _decide(self, world: World) -> Decision:
        states = {(p.id, str(p.state)) for p in world.placements.values()}
        states |= {(r.id, str(r.state)) for r in world.rentals.values()}
        self.since = {key: self.since.get(key, self.now) for key in states}
        ages = {identity: self.now - since for (identity, _), since in self.since.items()}
        new_ids = (f"p-{number:06d}" for number in self.numbers)
        before = world.copy()
        decision = decide(
            world,
            Observations(
                inventories=dict(self.inventories), exiting=frozenset(self.exiting), ages=ages, new_ids=new_ids
            ),
        )
        assert world == before, "deciding changes nothing"
        keys = Counter(task.key for task in decision.tasks if task.kind is TaskKind.CREATE)
        assert all(number == 1 for number in keys.values())
        return decision

    def _commit(self, decision: Decision, seen: World) -> None:
        for step in decision.steps:
            used = self.world.used_slots()
            if not self._apply(step):
                return  # as in the store: later steps build on it
            if step.placement:
                self._chosen_well(step, used, seen)

    def _chosen_well(self, step: Step, used: dict[str, set[int]], seen: World) -> None:
        placement = step.placement
        worker = seen.workers[placement.worker_id]
        assert worker.health is Health.READY
        assert worker.intent is Intent.ACTIVE
        assert placement.slot not in used.get(worker.id, set())
        assert len(used.get(worker.id, set())) < worker.slots
        assert placement.epoch > self.epochs.get(placement.rental_id, 0), "an epoch is used once and only rises"
        self.epochs[placement.rental_id] = placement.epoch

    def _apply(self, step: Step) -> bool:
        before = self.world.copy()
        if not self.world.apply(step):
            assert self.world == before, "a dropped step changes nothing"
            return False
        for write in step.writes:
            state = "health" if write.kind == "worker" else "state"
            if state in write.change:
                row = {"worker": before.workers, "rental": before.rentals, "placement": before.placements}[write.kind]
                assert row[write.id].id == write.id
                self._has_an_event(step, write.kind, write.id, str(write.change[state]))
        if step.placement:
            assert any(e.kind == "placement.reserved" and e.epoch == step.placement.epoch for e in step.events)
        return True

    def _has_an_event(self, step: Step, kind: str, identity: str, to: str) -> None:
        if kind == "placement":
            placement = self.world.placements[identity]
            found = [e for e in step.events if (e.rental_id, e.epoch) == (placement.rental_id, placement.epoch)]
            assert any(e.kind == f"placement.{to}" for e in found)
        else:
            found = [e for e in step.events if identity == (e.worker_id if kind == "worker" else e.rental_id)]
            assert any(e.kind.startswith(f"{kind}.") for e in found)
        assert all(e.actor and e.reason for e in found)

    def _end(self, task: Task, well: bool) -> None:
        worker = self.world.workers.get(task.worker_id)
        well = well and worker is not None
        made = task.kind in {TaskKind.CREATE, TaskKind.PRECOPY, TaskKind.FINAL_SYNC}
        removed = task.kind in {TaskKind.DELETE, TaskKind.RECOVER}  # a recovered placement is purged next
        if well and task.item and (made or removed):
            kept = {item for item in self.disks[task.worker_id] if item.rental_id != task.item.rental_id}
            self.disks[task.worker_id] = kept | ({task.item} if made else set())
        if well and task.kind is TaskKind.DELETE and task.worker_id in self.inventories:
            shown = self.inventories[task.worker_id]
            cleaned = (task.item.rental_id, task.item.epoch)
            self.inventories[task.worker_id] = tuple(i for i in shown if (i.rental_id, i.epoch) != cleaned)
        self.attempts[task] += 1
        step = (
            succeeded(
                self.world, TaskEnded(task=task, ok=True, wall=self.now, counts_from=self.now, report={"left": []})
            )
            if well
            else failed(self.world, task, "it broke", self.attempts[task])
        )
        if step is not None:
            self._apply(step)


PoolHistory.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)
TestShortHistories = PoolHistory.TestCase
"""Short histories that Hypothesis chooses; it reduces one that breaks a promise to the shortest."""

RATES = {
    "a_round": 30,
    "a_task_ends": 30,
    "a_rental_is_asked_for": 6,
    "a_rental_is_released": 3,
    "a_rental_gets_a_new_key": 1,
    "a_worker_joins": 3,
    "a_worker_is_judged": 10,
    "a_worker_dies": 2,
    "a_worker_calls_home_again": 3,
    "a_worker_sends_a_heartbeat": 3,
    "an_operator_drains_or_resumes_a_worker": 2,
    "a_worker_is_found_at_fault": 1,
    "a_worker_says_goodbye": 1,
    "an_operator_removes_a_worker": 1,
    "time_passes": 4,
    "everything_goes_well_for_a_while": 2,
    "rounds_without_news_come_to_rest": 4,
    "a_decision_is_made": 4,
    "it_is_committed_later": 4,
    "the_manager_restarts": 1,
}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_long_and_busy_history_breaks_no_invariant_and_converges(seed: int) -> None:
    """All rules run as often as on a busy platform, which short histories seldom reach."""
    random = Random(seed)  # noqa: S311  a history to play again, no secret
    platform = PoolHistory()
    platform.a_pool([1, 2])
    luck = random.choice([0.3, 0.6, 0.9])
    for _ in range(STEPS):
        _play(platform, random, luck, random.choices(list(RATES), list(RATES.values()))[0])
        for name in INVARIANTS:
            getattr(platform, name)()
    platform.teardown()


def _play(platform: PoolHistory, random: Random, luck: float, name: str) -> None:
    needed = {"a_task_ends": platform.running, "it_is_committed_later": platform.pending}
    if not needed.get(name, True) or (platform.pending and name in ONE_RECONCILER):
        return
    at = random.randrange(1000)
    arguments: dict[str, dict[str, object]] = {
        "a_task_ends": {"at": at, "well": random.random() < luck},
        "a_rental_is_released": {"at": at, "end": random.choice(["released", "expired"])},
        "a_worker_joins": {"slots": random.choice([1, 1, 2])},
        "a_worker_is_judged": {"at": at, "to": random.choice(list(Health))},
        "an_operator_drains_or_resumes_a_worker": {"at": at, "intent": random.choice([Intent.ACTIVE, Intent.DRAINING])},
        "time_passes": {"seconds": random.choice([1.0, 1.0, 20.0, 70.0, 130.0])},
    }
    if name.startswith(("a_worker", "an_operator", "a_rental_gets")):
        arguments.setdefault(name, {"at": at})
    getattr(platform, name)(**arguments.get(name, {}))
