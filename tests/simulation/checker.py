"""Checks the invariants of the platform after each step, and at the end of a simulation.

Checked after each committed step:
* a step moves rows only along their tables, and carries the event of each move;
* a rental has at most one placement in LIVE and one target placement, a slot at most one placement in HOLDING; a slot
  is one of its worker's; the epoch of a rental only rises and equals that of its live placement;
* an active rental runs; an ended rental has no placement in HOLDING; a rental that was active never fails;
* a rental that was answered with success ends only because its client asked or its time is over. Jumps of the wall
  clock since its expiry was set do not end it earlier; only jumps count that happened in this life of the manager and
  within the time that the clock takes to be trusted again;
* no state lasts beyond its deadline. Not counted: time without a manager (a restarted one counts again from zero) or
  with a slow disk, workers under a brake, clean-ups on workers that do not answer, and those that wait for an operator
  (a resumed worker gets the whole time again);
* a worker is ready only when every lost placement on it is purged;
* in a schedule where only the proxy and the manager are away, no worker is declared down and no rental moves.

Checked when a rental is activated: its files are not older than the last accepted snapshot, nor than what was written
before the cutover of a planned migration; they are no recovered snapshot of an epoch before the last activated one,
unless that has all that was there then; and its home is not empty while its only files are on a worker that was lost
less than AWAITS_FILES_S ago and may come back.
Checked at a cutover: the rental does not run at its source.
Checked when a snapshot is chosen for a takeover: no other known snapshot has all of it and more.
Checked when a home is purged: it is not that of a lost placement of a living rental that was neither recovered nor
given up.
Checked when a start command runs: its rental has not lost three workers within ten minutes before it was placed there;
and at the end: the command of each running rental has run since its container was started.

Checked whenever a worker obeys a reply, an account is unlocked or a placement becomes running: no rental runs on two
workers. A rental runs where its account is unlocked at an epoch whose placement was running at some time (renters are
sent nowhere else) or at which its start command was run, the container is up and not paused, and the worker has a
lease by its own clock, which the model of the worker enforces. Not checked: a container in the moment in which it wakes
from a pause (`wake_budget`), and accounts that were unlocked where no renter was sent and nothing was run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from orion.manager.domain.expiry import SETTLE_S
from orion.manager.domain.migration import phase_of
from orion.manager.domain.model import Placement, Rental
from orion.manager.domain.reconcile import ANSWERING
from orion.manager.domain.snapshots import Snapshot, SnapshotId, waiting_recovered_snapshot
from orion.manager.domain.states import (
    HELD_DEADLINE_S,
    MIGRATION_TABLE,
    TABLES,
    Health,
    MigrationPhase,
    PlacementState,
    RentalState,
)
from orion.manager.domain.steps import Step, Write

if TYPE_CHECKING:
    from simulation.agents import SimulatedContainer
    from simulation.world import Simulation

# Defined again, so that a mistake in the domain's own sets is noticed.
LIVE = frozenset({"reserved", "preparing", "running"})
HOLDING = LIVE | {"stopping", "stopped", "failed"}
ENDED = frozenset({"released", "expired", "failed"})
CLEANED_UP = frozenset({"stopping", "stopped", "failed"})

MOST_LOSSES, LOSSES_WITHIN_S = 3, 600.0
OVERDUE_AFTER_S = 30.0
"""Seconds beyond a deadline that are allowed: some rounds, and the tasks and commits that they wait for."""

_EVENTS: dict[str, dict[str, str]] = {
    "rental": {
        "queued": "rental.queued",
        "provisioning": "rental.placed",
        "active": "rental.activated",
        "migrating": "rental.migration_started",
        "releasing": "rental.release_started",
        "released": "rental.released",
        "expired": "rental.expired",
        "failed": "rental.failed",
    },
    "placement": {state: f"placement.{state}" for state in PlacementState},
    "worker": {health: f"worker.became_{health}" for health in Health},
}
_IDS = {"rental": "rental_id", "worker": "worker_id"}


class Checker:
    """Follows a simulation, and lets it fail when an invariant is broken."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._may_run_at: set[tuple[str, int]] = set()
        self._was_active: set[str] = set()
        self._written: dict[str, tuple[int, float]] = {}
        """Of each rental after a planned migration: the epoch that ended, and when the renter wrote last in it."""
        self._ages: dict[tuple[str, str], tuple[tuple[str, bool], float]] = {}
        """How long each row has been in its state, and whether it waited for an operator meanwhile."""
        self.acknowledged: set[str] = set()
        self.release_asked: set[str] = set()
        self.origins: dict[tuple[str, int], str] = {}
        """The snapshot that the home of each rental was filled with, by rental and epoch."""
        self._lost_at: dict[tuple[str, int], float] = {}
        """When the placement of each rental and epoch was lost."""
        self._losses: dict[str, list[float]] = {}
        """When each rental lost workers on which its start command may have run, by the wall clock."""
        self._phases: dict[str, MigrationPhase] = {}
        """The phase of the planned migration of each rental."""
        self._start_stopped_at: dict[str, int] = {}
        """The epoch at which the start command of a rental had lost too many workers."""
        self.jumps: list[tuple[float, float]] = []
        """When the wall clock jumped, and by how much."""
        self._expiry_set_at: dict[str, float] = {}
        """When the expiry of each rental was last set, in virtual time."""

    # -- after each step -----------------------------------------------------------------------------------

    def committed(self, step: Step, before: dict[tuple[str, str], Any]) -> None:
        states = {key: _state(row) for key, row in before.items()}
        for write in step.writes:
            to = write.change.get("health" if write.kind == "worker" else "state")
            if to is not None and to != states[write.kind, write.id]:
                self._transition(step, write, before[write.kind, write.id], states[write.kind, write.id], to)
                states[write.kind, write.id] = to
        self._expiry_set_at |= {w.id: self._sim.loop.now for w in step.writes if "expires_at" in w.change}
        touched = {w.id for w in step.writes if w.kind == "rental"}
        touched |= {before["placement", w.id].rental_id for w in step.writes if w.kind == "placement"}
        touched |= {step.placement.rental_id} if step.placement else set()
        for rental_id in touched:
            self._check_rental(rental_id, before.get(("rental", rental_id)))
            self._check_phase(rental_id)
        if step.placement:
            self._check_new(step.placement)
        self.check_live_copies()

    def _check_phase(self, rental_id: str) -> None:
        world = self._sim.state_store.world
        rental, target = world.rentals[rental_id], world.target_of(rental_id)
        sources = [p for p in world.placements_of(rental_id) if not p.is_target]
        phases = {phase_of(rental, source, target) for source in sources} - {MigrationPhase.NONE}
        before, after = self._phases.get(rental_id, MigrationPhase.NONE), max(phases, default=MigrationPhase.NONE)
        if len(phases) > 1 or (after is not before and after not in MIGRATION_TABLE[before].exits):
            found = f"the migration of {rental_id} went from {before} to {sorted(phases)}"
            self._sim.fail("every transition is in its table", found)
        self._phases[rental_id] = after

    def _transition(self, step: Step, write: Write, row: Any, source: str, to: str) -> None:
        sim = self._sim
        sim.say("store", f"{write.kind} {write.id} {source} -> {to}: {_reason(step, write.kind, to)}")
        if to not in TABLES[write.kind][source].exits:
            sim.fail("every transition is in its table", f"{write.kind} {write.id} went from {source} to {to}")
        kind, identity = _EVENTS[write.kind][to], getattr(row, "rental_id", row.id)
        events = [e for e in step.events if e.kind == kind]
        if not any(identity == getattr(e, _IDS.get(write.kind, "rental_id")) for e in events):
            sim.fail("every transition has its event", f"{write.kind} {write.id} went to {to} without {kind}")
        if write.kind == "placement" and to == PlacementState.RUNNING:
            self._may_run_at.add((row.rental_id, row.epoch))
        may_hold_files = source in {"preparing", "running"} and not getattr(row, "standby", False)
        if write.kind == "placement" and to == PlacementState.LOST and may_hold_files:
            self._lost(row)
        if (
            write.kind == "placement"
            and to == PlacementState.STOPPING
            and row.quiesced_for
            and write.change.get("state")
        ):
            self._cut_over(step, row)
        if write.kind == "rental":
            self._rental_transition(step, row, to, write)
        if to == Health.READY:
            stale = [
                p for p in sim.state_store.world.placements.values() if p.worker_id == write.id and p.state == "lost"
            ]
            if stale:
                sim.fail("a ready worker holds nothing stale", f"{write.id}: {stale}")
        if sim.schedule.only_outages and to in {Health.DOWN, RentalState.MIGRATING}:
            sim.fail("no stampede", f"proxy and manager alone were away, and {write.kind} {write.id} became {to}")

    def _cut_over(self, step: Step, row: Placement) -> None:
        """Check a cutover: a quiesced placement that ends because its rental migrates, and is not released."""
        if not any(w.kind == "rental" and w.change.get("state") == RentalState.MIGRATING for w in step.writes):
            return
        sim = self._sim
        for container in sim.containers:
            if sim.worker_id_of(container) == row.worker_id and row.rental_id in container.homes:
                if (row.rental_id, row.epoch) in container.running():
                    sim.fail(
                        "nothing is lost in a planned migration", f"{row.rental_id} still runs on {container.name}"
                    )
                self._written[row.rental_id] = row.epoch, container.homes[row.rental_id]

    def _rental_transition(self, step: Step, rental: Rental, to: str, write: Write) -> None:
        if to == RentalState.ACTIVE:
            self._was_active.add(rental.id)
        if to == RentalState.FAILED and rental.id in self._was_active:
            self._sim.fail("no rental is lost", f"{rental.id} was active and failed")
        if to != RentalState.RELEASING:
            return
        if write.change["end"] == "released" and rental.id not in self.release_asked:
            self._sim.fail("no rental is lost", f"{rental.id} is released, and nobody asked")
        if write.change["end"] == "expired":
            self._check_expiry(rental)

    def _check_expiry(self, rental: Rental) -> None:
        """Check an expiry: one that was decided before a jump may be committed after it, others must wait."""
        sim, expires_at = self._sim, rental.expires_at or float("inf")
        _, last_s = self.jumps[-1] if self.jumps else (0.0, 0.0)
        if expires_at > sim.wall() - min(0.0, last_s) + 1.0:
            sim.fail("no rental is lost", f"{rental.id} expires before its time")
        untrusted_since = max(sim.manager.started_at if sim.manager else sim.loop.now, sim.loop.now - SETTLE_S * 0.95)
        since = max(untrusted_since, self._expiry_set_at[rental.id])
        if expires_at > sim.wall() - sum(by_s for at, by_s in self.jumps if at > since) + 1.0:
            sim.fail("a clock that jumped expires no rental", f"{rental.id} expires")

    def _check_rental(self, rental_id: str, before: Rental | None) -> None:
        world = self._sim.state_store.world
        rental = world.rentals[rental_id]
        own = [p for p in world.placements.values() if p.rental_id == rental_id]
        live = [p for p in own if p.state in LIVE and not p.is_target]
        if len([p for p in own if p.state in LIVE and p.is_target]) > 1:
            self._sim.fail("never two target placements", f"{rental_id}: {own}")
        if len(live) > 1:
            self._sim.fail("never two live placements", f"{rental_id}: {[p.id for p in live]}")
        if before is not None and rental.epoch < before.epoch:
            self._sim.fail("an epoch only rises", f"{rental_id}: {before.epoch} -> {rental.epoch}")
        if live and live[0].epoch != rental.epoch:
            self._sim.fail("a live placement has the epoch of its rental", f"{rental_id}: {live[0]}")
        if rental.state is RentalState.ACTIVE and [p.state for p in live] != [PlacementState.RUNNING]:
            self._sim.fail("an active rental runs", f"{rental_id}: {own}")
        if rental.state in ENDED and any(p.state in HOLDING for p in own):
            self._sim.fail("an ended rental holds nothing", f"{rental_id}: {own}")

    def _check_new(self, placement: Placement) -> None:
        world = self._sim.state_store.world
        worker = world.workers.get(placement.worker_id)
        held = [p for p in world.placements.values() if p.worker_id == placement.worker_id and p.state in HOLDING]
        if worker is None or placement.slot >= worker.slots or len({p.slot for p in held}) != len(held):
            self._sim.fail("no capacity is exceeded", f"{placement} on {worker}: {held}")
        if worker is not None and worker.health is not Health.READY:
            self._sim.fail("only a ready worker gets rentals", f"{placement} on {worker}")

    def activated(self, rental_id: str, epoch: int, home: float) -> None:
        """Fail if a renter finds files at the current epoch that are older than the last snapshot."""
        rental = self._sim.state_store.world.rentals.get(rental_id)
        if rental is None or rental.epoch != epoch:
            return
        if rental.last_snapshot_at is None:
            if not home and 0 < rental.activated_epoch < epoch:
                self._begins_empty(rental, epoch)
            return
        before, written = self._written.get(rental_id, (epoch, 0.0))
        if before < epoch and home < written:
            story = f"{rental_id} at epoch {epoch} has its files of {home:.1f}, and wrote until {written:.1f}"
            self._sim.fail("nothing is lost in a planned migration", story)
        if home < rental.last_snapshot_at:
            story = f"{rental_id} at epoch {epoch} has its files of {home:.1f}, not of {rental.last_snapshot_at:.1f}"
            self._sim.fail("files are as old as the last snapshot", story)

    def _begins_empty(self, rental: Rental, epoch: int) -> None:
        sim, world, before = self._sim, self._sim.state_store.world, rental.activated_epoch
        own = [p for p in world.placements.values() if (p.rental_id, p.epoch) == (rental.id, before)]
        may_come_back = any(p.state is PlacementState.LOST and p.worker_id in world.workers for p in own)
        waited_s = sim.loop.now - self._lost_at.get((rental.id, before), float("-inf"))
        if may_come_back and not own[0].files_recovered and waited_s < sim.awaits_files_s * 0.97:
            story = f"{rental.id} at epoch {epoch}, {waited_s:.0f} s after its worker of epoch {before} was lost"
            sim.fail("a rental without a snapshot waits for its worker", story)

    def _lost(self, placement: Placement) -> None:
        self._lost_at[placement.rental_id, placement.epoch] = self._sim.loop.now
        at = self._losses.setdefault(placement.rental_id, [])
        at.append(self._sim.wall())
        if len([loss for loss in at if abs(at[-1] - loss) < LOSSES_WITHIN_S]) >= MOST_LOSSES:
            self._start_stopped_at.setdefault(placement.rental_id, placement.epoch)

    def started(self, rental_id: str, epoch: int) -> None:
        """Fail if a start command that keeps losing its workers is run on another one."""
        self._may_run_at.add((rental_id, epoch))
        if epoch > self._start_stopped_at.get(rental_id, epoch):
            self._sim.fail("a start command that costs workers is stopped", f"{rental_id} runs it at epoch {epoch}")

    def purged(self, container: SimulatedContainer, rental_id: str, epoch: int) -> None:
        """Fail if a lost home is purged before it was recovered or given up."""
        world = self._sim.state_store.world
        rental = world.rentals.get(rental_id)
        record = container.records.get(rental_id)
        if rental is None or record is None or record.epoch != epoch:
            return
        if rental.state in ENDED | {RentalState.RELEASING}:
            return
        own = [p for p in world.placements.values() if (p.rental_id, p.epoch) == (rental_id, epoch)]
        if any(p.state is PlacementState.LOST and not p.files_recovered and not p.is_target for p in own):
            self._sim.fail("a lost home is recovered before it is purged", f"{rental_id} of epoch {epoch}")

    def filled(self, rental_id: str, snapshot: Snapshot) -> None:
        """Fail if a home is filled without a request with a recovered snapshot that lacks files of a later epoch."""
        rental = self._sim.state_store.world.rentals.get(rental_id)
        if rental is None or str(snapshot.id) == rental.began_with:
            return
        began_with = SnapshotId.parse(rental.began_with)
        has_all = began_with is None or self._has_all_of(rental_id, snapshot.id, began_with)
        if snapshot.recovered and snapshot.id.epoch < rental.activated_epoch and not has_all:
            story = f"{rental_id}, which was activated at epoch {rental.activated_epoch}, begins with {snapshot.id}"
            self._sim.fail("a recovered snapshot is restored on request", story)

    def chosen(self, rental_id: str, known: Iterable[Snapshot], snapshot: Snapshot | None) -> None:
        """Fail if a rental is to begin with less than a known snapshot has, unless its owner is shown that one.

        The origin of a recovered snapshot is unknown if its worker died during the activation.
        """
        rental, known = self._sim.state_store.world.rentals[rental_id], list(known)
        origins = {origin.epoch for origin in rental.lineage}
        for other in known:
            may_be_shown = other.recovered and other.id.epoch not in origins
            shown = waiting_recovered_snapshot(known, rental, other.at) if may_be_shown else None
            if shown is not None and shown.id >= other.id:
                continue
            if snapshot is None or self._has_all_of(rental_id, other.id, snapshot.id):
                story = f"{rental_id} begins with {snapshot and snapshot.id}, though there is {other.id}"
                self._sim.fail("the newest safe state wins", story)

    def _has_all_of(self, rental_id: str, later: SnapshotId, earlier: SnapshotId) -> bool:
        """Return whether `later` is of the same home as `earlier` or of one that was filled with it, and is newer."""
        while later.epoch > earlier.epoch and (rental_id, later.epoch) in self._may_run_at:
            before = SnapshotId.parse(self.origins.get((rental_id, later.epoch), ""))
            if before is None or before == earlier:
                return before is not None
            later = before
        return later.epoch == earlier.epoch and later.number > earlier.number

    def check_live_copies(self) -> None:
        """Fail if a rental runs on two workers."""
        where: dict[str, tuple[SimulatedContainer, int]] = {}
        for container in self._sim.containers:
            if not container.unlocked:
                continue
            for rental_id, epoch in container.running():
                if (rental_id, epoch) not in self._may_run_at:
                    continue
                if rental_id in where:
                    (other, its_epoch) = where[rental_id]
                    story = f"{rental_id}: epoch {its_epoch} on {other.name} and epoch {epoch} on {container.name}"
                    self._sim.fail("never two live copies", story)
                where[rental_id] = container, epoch

    # -- as time passes ------------------------------------------------------------------------------------

    def tick(self, passed_s: float) -> None:
        """Fail if a state has lasted beyond its deadline."""
        manager = self._sim.manager
        if manager is None:
            self._ages.clear()
            return
        world = self._sim.state_store.world
        rows = [("worker", w.id, w.health, w) for w in world.workers.values()]
        rows += [("rental", r.id, r.state, r) for r in world.rentals.values()]
        rows += [("placement", p.id, p.state, p) for p in world.placements.values()]
        before, self._ages = self._ages, {}
        rows += [
            ("hold", p.id, p.state, p) for p in world.placements.values() if p.quiesced_for and p.state == "running"
        ]
        for kind, identity, state, row in rows:
            deadline_s = HELD_DEADLINE_S if kind == "hold" else TABLES[kind][state].deadline_s
            if deadline_s is None:
                continue
            episode = state, self._waits_for_an_operator(kind, row)
            was, age_s = before.get((kind, identity), (("", False), 0.0))
            age_s = 0.0 if was != episode else age_s + (0.0 if self._excused(kind, row) else passed_s)
            self._ages[kind, identity] = episode, age_s
            if age_s > deadline_s + OVERDUE_AFTER_S:
                self._sim.fail("no state lasts beyond its deadline", f"{kind} {identity} is {state} for {age_s:.0f} s")

    def forget_ages(self) -> None:
        """Forget how long states have lasted: a restarted manager counts again from zero."""
        self._ages.clear()

    def _excused(self, kind: str, row: Any) -> bool:
        sim, world = self._sim, self._sim.state_store.world
        if sim.disk_is_slow:
            return True
        if kind == "worker":
            return bool(sim.manager and sim.manager.health.brake.on)
        if kind == "rental":
            held = any(p.rental_id == row.id and p.state in HOLDING for p in world.placements.values())
            return row.state is RentalState.RELEASING and held
        worker = world.workers.get(row.worker_id)
        if row.state in CLEANED_UP:
            return worker is None or worker.health not in ANSWERING or bool(worker.fault)
        return False

    def _waits_for_an_operator(self, kind: str, row: Any) -> bool:
        worker = self._sim.state_store.world.workers.get(row.worker_id) if kind == "placement" else None
        return worker is not None and row.state in CLEANED_UP and bool(worker.fault)

    # -- at the end ----------------------------------------------------------------------------------------

    def unsettled(self) -> str:
        """Return why the world has not converged though no fault happens any more; empty if it has."""
        sim, world = self._sim, self._sim.state_store.world
        if sim.manager is None:
            return "the manager is away"
        if sim.waiting_clients:
            return f"{sim.waiting_clients} clients wait for an answer"
        missing = [rental_id for rental_id in self.acknowledged if rental_id not in world.rentals]
        if missing:
            return f"lost: {missing}"
        return self._workers_unsettled() or self._rentals_unsettled() or self._disks_unsettled()

    def _workers_unsettled(self) -> str:
        world, alive = self._sim.state_store.world, set()
        for container in self._sim.containers:
            if container.up:
                worker_id = self._sim.worker_id_of(container)
                alive.add(worker_id)
                health = world.workers[worker_id].health if worker_id in world.workers else "unknown to the manager"
                if health != Health.READY:
                    return f"{container.name} ({worker_id}) is {health}"
        for worker in world.workers.values():
            if worker.id not in alive and worker.health is not Health.DOWN:
                return f"{worker.id}, which is gone, is {worker.health}"
        return ""

    def _rentals_unsettled(self) -> str:
        world = self._sim.state_store.world
        ready = [w for w in world.workers.values() if w.health is Health.READY]
        used = world.used_slots()
        full = all(len(used[w.id]) >= w.slots for w in ready)
        for rental in world.rentals.values():
            resting = {*ENDED, RentalState.ACTIVE, *([RentalState.QUEUED] if full else [])}
            if rental.state not in resting:
                return f"{rental.id} is {rental.state}: {rental.explanation}"
        for placement in world.placements.values():
            if placement.quiesced_for and placement.state is PlacementState.RUNNING:
                return f"placement {placement.id} of {placement.rental_id} is quiesced"
            lost = placement.state is PlacementState.LOST
            gone = world.workers.get(placement.worker_id)
            if placement.state is not PlacementState.RUNNING and not (lost and gone and gone.health is Health.DOWN):
                return f"placement {placement.id} of {placement.rental_id} is {placement.state}"
        return ""

    def _disks_unsettled(self) -> str:
        running = {
            (p.worker_id, p.rental_id, p.epoch)
            for p in self._sim.state_store.world.placements.values()
            if p.state is PlacementState.RUNNING
        }
        found = set()
        for container in self._sim.containers:
            for item in container.inventory() if container.up else ():
                found.add((self._sim.worker_id_of(container), item["rental_id"], item["epoch"]))
                if item["state"] != "running":
                    return f"{item['rental_id']} on {container.name} is {item['state']}"
                if self._has_not_started(container, item["rental_id"], item["epoch"]):
                    return f"{item['rental_id']} on {container.name} has not run its start command"
        if found != running:
            return f"on the workers {sorted(found)}, in the state store {sorted(running)}"
        return ""

    def _has_not_started(self, container: SimulatedContainer, rental_id: str, epoch: int) -> bool:
        rental = self._sim.state_store.world.rentals.get(rental_id)
        if rental is None or not rental.start or rental.start_problem:
            return False
        return (rental_id, epoch, f"{rental.start_run}@{container.boot_id}") not in container.started


def _state(row: Any) -> str:
    return str(row.health if hasattr(row, "health") else row.state)


def _reason(step: Step, kind: str, to: str) -> str:
    return next((e.reason for e in step.events if e.kind == _EVENTS[kind][to]), "")
