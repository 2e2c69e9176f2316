"""What to do next, from a snapshot: steps to commit and tasks to run. Pure; the same at start and on a hint.

The snapshot may be a part of the world (model.World says which); what is decided from it is what the whole world would
have decided about that part: tests/property/test_property_partial_world.py.

Safe order: a placement row is committed before anything is made for it on a worker, and it holds its slot until the
worker says, after looking, that nothing is left. Inventories must be read before the rest of the snapshot: what an
older inventory shows has its row in a newer snapshot, so a rental that was just made is never taken for an orphan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from orion.manager.domain import copies, moves, starting
from orion.manager.domain.model import (
    Draft,
    Event,
    Item,
    Placement,
    Rental,
    Step,
    Worker,
    World,
    Write,
    merge,
    move_placement,
    move_rental,
)
from orion.manager.domain.placement import Candidate, Chosen, Pool, Refused
from orion.manager.domain.states import (
    CREATE_DEADLINE_S,
    DELETE_DEADLINE_S,
    ENDED,
    HOLDING,
    LIVE,
    QUEUE_DEADLINE_S,
    RESTORE_DEADLINE_S,
    Health,
    Intent,
    PlacementState,
    RentalState,
)

ACTOR = "reconciler"
MAX_FAILURES = 5
"""A rental that was never active and could not be made so often is failed."""

REACHABLE = frozenset({Health.READY, Health.SUSPECT, Health.UNKNOWN, Health.QUARANTINED})
"""Workers on which a rental may be made or changed; a joining one is only cleaned."""

MAX_PLACED = 256
"""Rentals that get a place in one decision; the others in the next, so that none takes long."""

SALVAGE_WITHIN_S = 150.0
"""Of a worker's joining, which has JOIN_DEADLINE_S in all: what is not copied aside by then is given up. A try that is
under way then ends first (loops/salvaging.py), and then it is purged."""

HOLDS_STRANGERS = "it holds what the database has never placed"

ANSWERING = frozenset({Health.READY, Health.JOINING})
"""Workers that are to blame when a clean-up passes its deadline; a silent one is judged by its lease."""


class TaskKind(StrEnum):
    CREATE = "create"
    DELETE = "delete"
    REACH = "reach"
    SALVAGE = "salvage"
    """Copy aside what is left of a lost placement, before it is purged: see copies.wants_salvage."""
    SEED = "seed"
    FINISH = "finish"
    PARK = "park"
    THAW = "thaw"


@dataclass(frozen=True)
class Task:
    """Work on one worker. `placement_id` is None for reaching it and for what only its inventory knows."""

    kind: TaskKind
    worker_id: str
    session_id: str | None
    item: Item | None = None
    placement_id: str | None = None
    public_key: str = ""
    restore: str | None = None
    """What its home is filled with before its renter is let in: see copies.wanted."""
    start: str = ""
    start_mark: str = ""
    """The start command to run when its renter is let in, and the run that it is: see starting.due."""
    filled: str = ""
    """The copy that is in its home already, put there by a planned move."""
    source: moves.Source | None = None
    """What a planned move takes away: see domain/moves.py."""

    @property
    def placement_ids(self) -> tuple[str, ...]:
        """What its outcome is about."""
        both = self.placement_id, self.source and self.source.placement_id
        return tuple(identity for identity in both if identity)

    @property
    def key(self) -> tuple[str, str]:
        """Tasks with the same key never run at the same time: one worker, one rental."""
        return self.worker_id, self.item.rental_id if self.item else ""


@dataclass(frozen=True)
class Decision:
    steps: tuple[Step, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Facts:
    """What the snapshot does not hold. `ages`: seconds that a placement, a rental or a worker that joins (by id) has
    been in its state.

    `strangers`: what inventories show and the database has never placed anywhere, as (rental id, epoch). Nothing of
    ours can make one, for a placement is committed first: the database is older than the world, or it was lost.
    """

    inventories: Mapping[str, tuple[Item, ...]]
    leaving: frozenset[str]
    ages: Mapping[str, float]
    new_ids: Iterator[str]
    strangers: frozenset[tuple[str, int]] = frozenset()
    wall: float = 0.0
    """UTC seconds: only start commands are counted by it."""
    vacating: frozenset[str] = frozenset()
    """Workers that were told to stop, and wait for their rentals to be taken away. They are among `leaving`."""
    resting: frozenset[str] = frozenset()
    """Rentals whose planned move has failed lately."""


def decide(snapshot: World, facts: Facts) -> Decision:
    """The steps, in the order to commit them, and the tasks that the world after them asks for."""
    world = Draft(snapshot)
    steps: list[Step] = []

    def commit(step: Step | None) -> None:
        if step is not None and step.writes and world.apply(step):
            steps.append(step)

    for worker in list(world.workers.values()):
        commit(_keep_strangers(worker, facts))
    for placement in list(world.placements.values()):
        commit(_settle_placement(world, placement, facts))
    places = _Places(world, facts)
    for rental in _queue(world):
        commit(_settle_rental(world, rental, facts, places))
    for placement in sorted(world.placements.values(), key=lambda p: (p.worker_id not in facts.vacating, p.id)):
        commit(_settle_move(world, placement, facts, places))
    for placement in list(world.placements.values()):
        if placement.state is PlacementState.RESERVED:
            commit(_prepare(world, placement))
    for worker in list(world.workers.values()):
        commit(_drained(world, worker))
    held = (moves.Source(p.id, p.worker_id, p.epoch, p.held) for p in snapshot.placements.values() if p.held)
    thaws = (task for task in (thaw(world, source) for source in held) if task)
    return Decision(tuple(steps), (*_tasks(world, facts), *thaws))


def _settle_placement(world: World, placement: Placement, facts: Facts) -> Step | None:
    """One placement against its worker and its rental, most certain facts first."""
    worker = world.workers.get(placement.worker_id)
    rental = world.rentals.get(placement.rental_id)
    owner = rental.owner if rental else None
    if placement.state is PlacementState.STOPPED:
        return move_placement(placement, owner, PlacementState.PURGED, ACTOR, "nothing was made there")
    if worker is None and placement.state in {PlacementState.FAILED, PlacementState.LOST}:
        return move_placement(placement, owner, PlacementState.PURGED, ACTOR, "its worker was removed")
    if worker is None or worker.health is Health.DOWN:
        return _lose(worker, placement, rental, facts)
    restarted = starting.restarted(rental, placement, worker, facts.wall) if rental else None
    if restarted is not None:
        return restarted
    if placement.state in LIVE and (rental is None or rental.state is RentalState.RELEASING):
        to = PlacementState.STOPPED if placement.state is PlacementState.RESERVED else PlacementState.STOPPING
        return move_placement(placement, owner, to, ACTOR, "its rental is being released")
    within_s = RESTORE_DEADLINE_S if rental and copies.wanted(rental) else CREATE_DEADLINE_S
    if placement.state is PlacementState.PREPARING and _age(placement.id, facts) > within_s:
        return give_up(placement, rental, f"it was not made within {within_s:.0f} s")
    if _is_missing(placement, facts):
        return _miss(placement, rental)
    at_fault = worker.health in ANSWERING and _age(placement.id, facts) > DELETE_DEADLINE_S
    if placement.state is PlacementState.STOPPING and at_fault:
        failed = move_placement(placement, owner, PlacementState.FAILED, ACTOR, "its clean-up passed its deadline")
        return merge((failed, _blame(worker, placement)))
    if placement.state is PlacementState.FAILED and at_fault and not worker.fault:
        return _blame(worker, placement)
    if worker.health is Health.JOINING and _age(worker.id, facts) > SALVAGE_WITHIN_S:
        given_up = _give_up_salvage(placement, rental)
        if given_up is not None:
            return given_up
    if placement.state is PlacementState.LOST and not _shown(placement, facts):
        return move_placement(placement, owner, PlacementState.PURGED, ACTOR, "its worker came back without it")
    return None


def _lose(worker: Worker | None, placement: Placement, rental: Rental | None, facts: Facts) -> Step | None:
    if placement.state not in LIVE | {PlacementState.STOPPING, PlacementState.FAILED}:
        return None
    owner = rental.owner if rental else None
    nothing_to_salvage = placement.state not in starting.MAY_HAVE_RUN
    lost = move_placement(
        placement, owner, PlacementState.LOST, ACTOR, "its worker is down", salvaged=nothing_to_salvage
    )
    if worker is not None:
        # A worker that is not down any more may have been told to run it: then it is lost no more.
        lost = merge((Step((Write("worker", worker.id, {"health": Health.DOWN}, {}),)), lost))
    if rental is None or placement.state not in LIVE or placement.standby:
        return lost
    change, events = starting.after_a_loss(rental, placement, facts.wall)
    told = Step((), events)
    if rental.state is RentalState.ACTIVE:
        reason = f"worker {placement.worker_id} is down: moving to another one"
        moved = move_rental(rental, RentalState.MIGRATING, ACTOR, reason, placement.worker_id, **change)
        return merge((lost, moved, told))
    if rental.state is RentalState.PROVISIONING:
        reason = f"worker {placement.worker_id} went down while it was being made there"
        moved = move_rental(rental, RentalState.QUEUED, ACTOR, reason, placement.worker_id, **change)
        return merge((lost, moved, told))
    if rental.state is RentalState.MIGRATING and change:
        here = {"state": rental.state, "epoch": rental.epoch}
        return merge((lost, Step((Write("rental", rental.id, here, change),), events)))
    return lost


def _give_up_salvage(placement: Placement, rental: Rental | None) -> Step | None:
    """So that its worker is ready in time, whatever keeps its files from being copied aside."""
    if rental is None or not copies.wants_salvage(rental, placement):
        return None
    return copies.not_salvaged(rental, placement, f"it took longer than {SALVAGE_WITHIN_S:.0f} s")


def _is_missing(placement: Placement, facts: Facts) -> bool:
    """Only a restore leaves a running placement without a key: then it is there, or was moved or ended since."""
    return placement.state is PlacementState.RUNNING and not placement.public_key and not _shown(placement, facts)


def _miss(placement: Placement, rental: Rental | None) -> Step:
    reason = "its worker does not have it: it was moved or ended after the backup"
    lost = move_placement(placement, rental.owner if rental else None, PlacementState.LOST, ACTOR, reason)
    if rental is None or rental.state is not RentalState.ACTIVE:
        return lost
    return merge((lost, move_rental(rental, RentalState.MIGRATING, ACTOR, reason, placement.worker_id)))


def give_up(placement: Placement, rental: Rental | None, reason: str) -> Step:
    """Making it here failed: clean up here, try elsewhere."""
    failed = move_placement(placement, rental.owner if rental else None, PlacementState.FAILED, ACTOR, reason)
    if rental is None or rental.state not in {RentalState.PROVISIONING, RentalState.MIGRATING}:
        return failed
    queued = move_rental(
        rental,
        RentalState.QUEUED,
        ACTOR,
        f"worker {placement.worker_id}: {reason}",
        placement.worker_id,
        failures=rental.failures + 1,
    )
    return merge((failed, queued))


def _blame(worker: Worker, placement: Placement) -> Step:
    reason = f"rental {placement.rental_id} could not be cleaned up"
    event = Event("worker.cleanup_failed", ACTOR, reason, None, placement.rental_id, worker.id, placement.epoch)
    return _set_fault(worker, reason, event)


def _keep_strangers(worker: Worker, facts: Facts) -> Step | None:
    """What the database has never heard of may be all that is left of a rental: only an operator ends it.

    The worker is set aside for it, until it is given up (orion resume --give-up) or is not there any more.
    """
    if worker.health is Health.DOWN or worker.id not in facts.inventories:
        return None
    found = [i for i in facts.inventories[worker.id] if (i.rental_id, i.epoch) in facts.strangers]
    if found and not worker.fault:
        names = ", ".join(sorted(item.rental_id for item in found)[:5])
        fault = (
            f"{HOLDS_STRANGERS} ({names}): restore a backup that knows them, "
            f"or end them for good: orion resume --give-up {worker.id}"
        )
        return _set_fault(worker, fault, Event("worker.holds_unknown", ACTOR, fault, worker_id=worker.id))
    if not found and worker.fault.startswith(HOLDS_STRANGERS):
        gone = "what the database has never placed is not there any more"
        return _set_fault(worker, "", Event("worker.holds_nothing_unknown", ACTOR, gone, worker_id=worker.id))
    return None


def _set_fault(worker: Worker, fault: str, event: Event) -> Step:
    """With another fault, or none, it must be checked anew before it is ready."""
    expect = {"session_id": worker.session_id, "fault": worker.fault}
    return Step((Write("worker", worker.id, expect, {"fault": fault, "verified_session": None}),), (event,))


def _shown(placement: Placement, facts: Facts) -> bool:
    """Whether its worker still shows it, or has not shown anything yet."""
    inventory = facts.inventories.get(placement.worker_id)
    return inventory is None or any(
        (item.rental_id, item.epoch) == (placement.rental_id, placement.epoch) for item in inventory
    )


def _queue(world: World) -> list[Rental]:
    """Those that were active before first, then by age; one that does not fit blocks nobody."""
    return sorted(
        (r for r in world.rentals.values() if r.state not in ENDED | {RentalState.ACTIVE}),
        key=lambda r: (r.activated_at is None, r.created_at, r.id),
    )


def _settle_rental(world: Draft, rental: Rental, facts: Facts, places: _Places) -> Step | None:
    if rental.state is RentalState.RELEASING:
        return _finish_release(world, rental)
    if world.live_placement(rental.id) is not None or _is_being_stopped(world, rental):
        return None
    standby = world.standby_of(rental.id)
    if standby is not None:
        problem = moves.problem_of(standby, rental, world.workers.get(standby.worker_id), facts.leaving)
        return moves.end_standby(standby, rental.owner, problem) if problem else moves.promote(rental, standby)
    if rental.state is RentalState.PROVISIONING:
        return move_rental(rental, RentalState.QUEUED, ACTOR, "its place was lost")
    if rental.activated_at is None and rental.failures >= MAX_FAILURES:
        reason = f"it could not be made {rental.failures} times; last: {rental.explanation}"
        return move_rental(rental, RentalState.FAILED, ACTOR, reason)
    if rental.activated_at is None and _age(rental.id, facts) > QUEUE_DEADLINE_S:
        return move_rental(rental, RentalState.FAILED, ACTOR, f"no worker was free within {QUEUE_DEADLINE_S:.0f} s")
    at_work = _may_be_at_work(world, rental, facts)
    if at_work is not None:
        return _wait(rental, f"waiting until worker {at_work.worker_id} has ended what it may have begun of it")
    return places.place(rental)


def _is_being_stopped(world: Draft, rental: Rental) -> bool:
    """It is to begin again from a copy, and what runs of it has not been seen to have ended, or to stand still."""
    ending = {PlacementState.STOPPING, PlacementState.FAILED}
    return rental.state is RentalState.MIGRATING and any(
        p.epoch == rental.epoch and p.state in ending and not p.held for p in world.placements_of(rental.id)
    )


def _may_be_at_work(world: Draft, rental: Rental, facts: Facts) -> Placement | None:
    """Where it was given up, and its start command may be running: how the last try there ended may be unknown.

    Nobody else is led there, so a rental without a command goes on elsewhere at once. A clean-up that passes its
    deadline holds up its worker, and the rental no longer.
    """
    if not rental.start or rental.start_problem:
        return None
    given_up = (p for p in world.placements_of(rental.id) if p.state is PlacementState.FAILED)
    own = (p for p in given_up if not p.standby and not p.held)
    return next((p for p in own if _age(p.id, facts) <= DELETE_DEADLINE_S), None)


def _settle_move(world: Draft, placement: Placement, facts: Facts, places: _Places) -> Step | None:
    """The next step of a planned move, the first one included: see domain/moves.py."""
    worker, rental = world.workers.get(placement.worker_id), world.rentals.get(placement.rental_id)
    if placement.standby or worker is None or rental is None or not moves.can_move(rental, placement):
        return None
    standby = world.standby_of(rental.id)
    why = moves.must_leave(worker, facts.vacating)
    if placement.held and _age(placement.id, facts) > moves.HELD_DEADLINE_S:
        return moves.abandon(rental, placement, standby, f"it stood still for {moves.HELD_DEADLINE_S:.0f} s")
    if standby is not None:
        problem = moves.problem_of(standby, rental, world.workers.get(standby.worker_id), facts.leaving)
        if problem:
            return moves.abandon(rental, placement, standby, problem)
        if standby.state is PlacementState.PREPARING and standby.filled and not placement.held:
            return moves.hold(rental, placement, standby, f"for its move to worker {standby.worker_id}")
        return None
    if placement.held:
        parks = worker.id in facts.vacating
        return None if parks else moves.abandon(rental, placement, None, "where it was to go is not ready any more")
    if not why or rental.id in facts.resting:
        return None
    return places.move(rental, placement, why, parks=worker.id in facts.vacating)


def _finish_release(world: Draft, rental: Rental) -> Step | None:
    """Done when no placement of it can run any more; what a dead worker keeps is purged when it returns."""
    left = [p for p in world.placements_of(rental.id) if p.state is not PlacementState.PURGED]
    if any(p.state in HOLDING for p in left):
        return None
    to = RentalState.EXPIRED if rental.end == "expired" else RentalState.RELEASED
    reason = "nothing of it is left"
    if left:
        away = ", ".join(sorted(p.worker_id for p in left))
        reason = f"it runs nowhere; what it left on {away} is purged when that returns"
    return move_rental(rental, to, ACTOR, reason)


class _Places:
    """Where the rentals of one decision go, one after the other."""

    def __init__(self, world: Draft, facts: Facts) -> None:
        self._world = world
        self._new_ids = facts.new_ids
        self._left = MAX_PLACED
        self._moves_left = moves.MOST_AT_ONCE - moves.under_way(world)
        known = (w for w in world.workers.values() if world.is_whole(w.id) or w.id in world.taken)
        candidates = (Candidate(w, world.used_on(w.id), False, w.id in facts.leaving) for w in known)
        self._pool = Pool(candidates, world.elsewhere)

    def place(self, rental: Rental) -> Step | None:
        if not self._left:
            return None
        failed = {p.worker_id for p in self._world.placements_of(rental.id) if p.state is PlacementState.FAILED}
        choice = self._pool.choose(failed)
        if isinstance(choice, Chosen):
            self._left -= 1
            self._pool.take(choice)
            return _reserve(self._world.workers[choice.worker_id], rental, choice.slot, next(self._new_ids))
        return _wait(rental, choice.explanation) if isinstance(choice, Refused) else None

    def move(self, rental: Rental, placement: Placement, why: str, parks: bool) -> Step | None:
        """To another worker, if one can take it. `parks`: else it is to wait, with all its files."""
        if self._moves_left <= 0:
            return None
        failed = {p.worker_id for p in self._world.placements_of(rental.id) if p.state is PlacementState.FAILED}
        choice = self._pool.choose(failed, placement.worker_id)
        if isinstance(choice, Chosen):
            self._moves_left -= 1
            self._pool.take(choice)
            target = self._world.workers[choice.worker_id]
            return moves.begin(rental, placement, target, choice.slot, next(self._new_ids), ACTOR, why)
        if isinstance(choice, Refused) and parks:
            self._moves_left -= 1
            return moves.hold(rental, placement, None, f"{why}, and nothing can take it")
        return None

    def asked(self, rental: Rental, placement: Placement, actor: str) -> Step:
        """The same, because somebody asked for it. Raises moves.NotMoved."""
        if self._moves_left <= moves.MOST_AT_ONCE - moves.MOST_ASKED_FOR:
            raise moves.NotMoved("too_many_moves", "others are being moved just now: try again in a minute")
        choice = self._pool.choose((), placement.worker_id)
        if isinstance(choice, Chosen):
            target, new_id = self._world.workers[choice.worker_id], next(self._new_ids)
            return moves.begin(rental, placement, target, choice.slot, new_id, actor, "asked for")
        why = choice.counted if choice else "the pool is changing: try again"
        raise moves.NotMoved("nowhere_to_go", f"no other worker can take it, so it goes on where it is: {why}")


def ask_to_move(world: World, rental_id: str, actor: str, facts: Facts) -> Step | None:
    """Begin a planned move that somebody asked for; None when it is under way. Raises moves.NotMoved."""
    draft = Draft(world)
    rental, placement = draft.rentals.get(rental_id), draft.live_placement(rental_id)
    if draft.standby_of(rental_id) is not None:
        return None
    if rental is None or placement is None or not moves.can_move(rental, placement):
        state = f"it is {rental.state}: {rental.explanation}" if rental else "it has ended"
        raise moves.NotMoved("not_active", state)
    worker = draft.workers.get(placement.worker_id)
    if worker is None or worker.health not in moves.LEAVABLE:
        raise moves.NotMoved("worker_not_ready", "its worker does not answer just now: nothing can be copied from it")
    return _Places(draft, facts).asked(rental, placement, actor)


def _reserve(worker: Worker, rental: Rental, slot: int, placement_id: str) -> Step:
    placement = Placement(
        placement_id,
        rental.id,
        worker.id,
        slot,
        rental.next_epoch,
        PlacementState.RESERVED,
    )
    as_chosen = {"health": worker.health, "intent": worker.intent, "slots": worker.slots}
    still_fit = Write("worker", worker.id, as_chosen, {})
    reserved = Event(
        "placement.reserved",
        ACTOR,
        f"slot {slot}",
        rental.owner,
        rental.id,
        worker.id,
        placement.epoch,
    )
    if rental.state is RentalState.MIGRATING:
        expect = {"state": rental.state, "epoch": rental.epoch}
        raised = Write("rental", rental.id, expect, {"epoch": placement.epoch})
        return Step((still_fit, raised), (reserved,), placement)
    reason = f"being made on worker {worker.id}"
    placed = move_rental(rental, RentalState.PROVISIONING, ACTOR, reason, worker.id, epoch=placement.epoch)
    return merge((placed, Step((still_fit,), (reserved,), placement)))


def _wait(rental: Rental, explanation: str) -> Step | None:
    if rental.state is RentalState.MIGRATING:
        return move_rental(rental, RentalState.QUEUED, ACTOR, explanation)
    if rental.explanation == explanation:
        return None
    expect = {"state": rental.state, "epoch": rental.epoch}
    return Step((Write("rental", rental.id, expect, {"explanation": explanation}),))


def _prepare(world: World, placement: Placement) -> Step | None:
    rental = world.rentals.get(placement.rental_id)
    if rental is None:
        return None
    return move_placement(placement, rental.owner, PlacementState.PREPARING, ACTOR, "making its account")


def _drained(world: Draft, worker: Worker) -> Step | None:
    if worker.intent is not Intent.DRAINING or not world.is_whole(worker.id) or world.used_on(worker.id):
        return None
    event = Event("worker.drained", ACTOR, "it holds no rental any more", worker_id=worker.id)
    return Step((Write("worker", worker.id, {"intent": Intent.DRAINING}, {"intent": Intent.DRAINED}),), (event,))


def _age(identity: str, facts: Facts) -> float:
    return facts.ages.get(identity, 0.0)


def _tasks(world: Draft, facts: Facts) -> Iterator[Task]:
    for placement in world.placements.values():
        task = _task_of(world, placement, facts)
        if task is not None:
            yield task
    for worker in world.workers.values():
        yield from _tasks_of_worker(world, worker, facts)


def _task_of(world: World, placement: Placement, facts: Facts) -> Task | None:
    worker = world.workers.get(placement.worker_id)
    rental = world.rentals.get(placement.rental_id)
    if worker is None or worker.health is Health.DOWN or rental is None:
        return None
    item = Item(rental.id, rental.username, rental.uid, placement.epoch)
    start_mark = starting.due(rental, placement, worker)
    wants_key = placement.state is PlacementState.PREPARING or (
        placement.state is PlacementState.RUNNING and (placement.public_key != rental.public_key or bool(start_mark))
    )
    if placement.standby or placement.held:
        task = _task_of_move(world, worker, rental, placement, item, facts)
        if task is not None or placement.state in LIVE:
            return task
    unseen = not placement.public_key and facts.inventories.get(worker.id) is None
    if placement.state is PlacementState.RUNNING and unseen:
        return None  # not made anew on a worker that may have lost or purged it: see _is_missing
    if wants_key and worker.health in REACHABLE:
        restore = copies.wanted(rental) if placement.state is PlacementState.PREPARING else None
        filled = placement.filled if restore == copies.NEWEST else ""
        start = rental.start if start_mark else ""
        key, fill = rental.public_key, (restore, start, start_mark, filled)
        return Task(TaskKind.CREATE, worker.id, worker.session_id, item, placement.id, key, *fill)
    if not placement.standby and copies.wants_salvage(rental, placement):
        return Task(TaskKind.SALVAGE, worker.id, worker.session_id, item, placement.id)
    if placement.state in {PlacementState.STOPPING, PlacementState.FAILED, PlacementState.LOST}:
        return Task(TaskKind.DELETE, worker.id, worker.session_id, item, placement.id)
    return None


def _task_of_move(
    world: World, worker: Worker, rental: Rental, placement: Placement, item: Item, facts: Facts
) -> Task | None:
    if placement.standby:
        placed = world.live_placement(rental.id)
        if placement.state is not PlacementState.PREPARING or placed is None or not moves.can_move(rental, placed):
            return None
        if placed.held and placed.held != placement.epoch:
            return None
        kind = TaskKind.FINISH if placed.held else TaskKind.SEED
        if not placed.held and placement.filled:
            return None
        source = moves.Source(placed.id, placed.worker_id, placed.epoch, placed.held)
        key = rental.public_key
        return Task(kind, worker.id, worker.session_id, item, placement.id, key, source=source)
    stands_alone = placement.state is PlacementState.RUNNING and world.standby_of(rental.id) is None
    if stands_alone and worker.id in facts.vacating and moves.can_move(rental, placement):
        source = moves.Source(placement.id, worker.id, placement.epoch, placement.held)
        return Task(TaskKind.PARK, worker.id, worker.session_id, item, placement.id, source=source)
    return None


def thaw(world: World, source: moves.Source) -> Task | None:
    """What has just been let go on need not wait for its worker's next heartbeat, which would thaw it too."""
    placement, worker = world.placements.get(source.placement_id), world.workers.get(source.worker_id)
    rental = world.rentals.get(placement.rental_id) if placement else None
    if placement is None or worker is None or rental is None:
        return None
    if placement.held or placement.state is not PlacementState.RUNNING:
        return None
    item = Item(rental.id, rental.username, rental.uid, placement.epoch)
    return Task(TaskKind.THAW, worker.id, worker.session_id, item, placement.id, source=source)


def _tasks_of_worker(world: Draft, worker: Worker, facts: Facts) -> Iterator[Task]:
    """Purge what only the inventory knows; reach a joining worker once nothing stale is left on it."""
    inventory = facts.inventories.get(worker.id)
    if worker.health is Health.DOWN or inventory is None or not world.is_whole(worker.id):
        return
    placed = world.placements_on(worker.id)
    known = {(p.rental_id, p.epoch) for p in placed}
    orphans = [item for item in inventory if (item.rental_id, item.epoch) not in known]
    for item in orphans:
        if (item.rental_id, item.epoch) in facts.strangers:
            continue
        yield Task(TaskKind.DELETE, worker.id, worker.session_id, item)
    stale = any(p.state is PlacementState.LOST for p in placed)
    unverified = worker.verified_session != worker.session_id
    if worker.health is Health.JOINING and unverified and not orphans and not stale and not worker.fault:
        yield Task(TaskKind.REACH, worker.id, worker.session_id)
