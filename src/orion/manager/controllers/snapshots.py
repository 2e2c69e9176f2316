"""The snapshot controller: takes snapshots of active rentals in turn, and removes those of rentals that have ended."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import structlog

from orion.manager.controllers.loop import Loop
from orion.manager.domain import snapshots
from orion.manager.domain.fair_share import Claim
from orion.manager.domain.pacing import LONGEST_PAUSE_S, Pace
from orion.manager.domain.snapshot_plan import SnapshotPlan
from orion.manager.domain.snapshots import SnapshotId
from orion.manager.domain.steps import Event
from orion.manager.queues import FairQueue
from orion.manager.snapshots import port
from orion.manager.snapshots.disk import Disk
from orion.manager.snapshots.port import Home, SnapshotError, SnapshotService
from orion.manager.ssh.port import Host
from orion.manager.store.snapshots import Running, SnapshotCatalog

log = structlog.get_logger()

JITTER = 0.1
"""Share of the interval by which each turn varies, so that rentals made together do not stay in step."""
SPREAD = 0.5
"""The same share for migrated rentals, which arrive together with those of their worker, and have a snapshot."""
EPOCH_REMEMBERED_S = 3600.0
"""Seconds for which the epoch is remembered of a rental that does not run any more."""
FIRST_TRIES = 3
"""Failures of a rental's first snapshot in succession before its problem is reported."""
ROUNDS = 20
"""Rounds in an interval."""
LISTING_SHARE = 0.05
"""Share of the time that may be spent listing running rentals, however large the pool is."""
SWEEP_S = 60.0
FULL_DISK = 0.8
"""Used share of the disk at which no snapshot is taken: the rest is for the database and for takeovers."""
FULL = f"the manager's disk is {FULL_DISK:.0%} full or more, of bytes or of inodes: make room on it"
REPORTED_AT_ONCE = frozenset((port.OVER_LIMIT, "unreadable_home", "disk_full"))
"""Codes of problems of the home or of this machine. Other problems may end with their worker."""
PAUSE_PROBLEMS = frozenset((port.PAUSE_TOO_LONG, port.PAUSE_TOO_SHORT))
"""Codes for too many changes at a time. The answer is a longer interval, unless the longest pause was allowed."""
IGNORED = frozenset(("superseded", "stale_epoch", "unknown_rental", "purged", "busy"))
"""Codes for a rental that is being migrated or ended, or whose files on a former worker are being recovered."""
OLD_AFTER = 3.0
"""Usual intervals after which the age of the last snapshot is explained."""


def disk_share(directory: Path) -> float:
    """Return the used share of the directory's disk, of its bytes or of its inodes, whichever is more: from 0 to 1."""
    return Disk.of(directory).scarcest[0]


@dataclass(kw_only=True, eq=False)
class SnapshotController:
    catalog: SnapshotCatalog
    snapshot_service: SnapshotService
    plan: SnapshotPlan
    disk_share: Callable[[], float]
    """Returns the used share of the disk of the snapshots, from 0 to 1; it may raise OSError."""
    monotonic: Callable[[], float]
    wall: Callable[[], float]
    random: Random = field(default_factory=Random)

    def __post_init__(self) -> None:
        self._next_at: dict[str, float] = {}
        self._epochs: dict[str, tuple[int, float]] = {}
        """The epoch of each running rental, and the monotonic second when it was seen last."""
        self._failures: dict[str, int] = {}
        self._without_snapshot: set[str] = set()
        """Rentals whose first snapshot has failed."""
        self._used: set[str] = set()
        """Rentals in which a session has ended since they were activated on their worker."""
        self._paces: dict[str, Pace] = {}
        self._again: set[str] = set()
        """Rentals whose snapshot is under way, and that need another one right after it."""
        self._owners: dict[str, str] = {}
        self._wasteful: set[str] = set()
        """Rentals whose last snapshot failed and took its place in the queue for long: see fair_share.Claim."""
        self._shares = FairQueue(self.plan.at_once)
        self._running: dict[str, asyncio.Task[str]] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self._swept_at = float("-inf")
        self._lists_at = float("-inf")
        self.paused = ""
        """The reason why no snapshots are taken at present; empty if they are."""
        self.loop = Loop("copies", self.plan.interval_s / ROUNDS, self.round)

    async def round(self) -> None:
        """Take the snapshots that are due, as far as there are places for them."""
        now = self.monotonic()
        self._check_disk()
        if now >= self._swept_at + SWEEP_S and self._sweeping is None:
            self._swept_at = now
            self._sweeping = asyncio.create_task(self._sweep())
        if self.paused:
            return
        if now >= self._lists_at:
            await self._list_running(now)
        due = [(at, rental_id) for rental_id, at in self._next_at.items() if at <= now]
        heapq.heapify(due)
        while due and self._shares.free:
            rental_id = heapq.heappop(due)[1]
            if rental_id in self._running:
                continue
            claim = self._claim(rental_id)
            if self._shares.take(claim):
                self._start(rental_id, self._take(rental_id, None, any_pause=False), claim)

    def on_events(self, committed: Sequence[Event]) -> None:
        """Make a snapshot due at once for rentals with files that no snapshot has.

        These are rentals that were just activated for the first time or started empty, and those whose first session
        has ended.
        """
        for event in committed:
            if event.rental_id and self._has_new_files(event, event.rental_id):
                self._again |= {event.rental_id} & self._running.keys()
                self._next_at[event.rental_id] = self.monotonic()
                self.loop.hint()

    def _has_new_files(self, event: Event, rental_id: str) -> bool:
        if event.kind == "rental.session_closed" and rental_id not in self._used:
            self._used.add(rental_id)
            return True
        is_new = event.kind == "rental.activated" and rental_id not in self._epochs
        return is_new or event.kind == "rental.started_empty"

    async def _list_running(self, now: float) -> None:
        running = await self.catalog.running()
        found = {rental_id: epoch for rental_id, (epoch, _) in running.items()}
        self._owners = {rental_id: owner for rental_id, (_, owner) in running.items()}
        for rental_id in self._running.keys() - found.keys():
            self._running[rental_id].cancel()
        for rental_id in sorted(found.keys() - self._next_at.keys()):
            self._next_at[rental_id] = now + self.plan.interval_s * self._first_share(rental_id, found[rental_id])
        self._next_at = {rental_id: at for rental_id, at in self._next_at.items() if rental_id in found}
        self._epochs |= {rental_id: (epoch, now) for rental_id, epoch in found.items()}
        self._epochs = {r: last for r, last in self._epochs.items() if now - last[1] < EPOCH_REMEMBERED_S}
        self._failures = {rental_id: n for rental_id, n in self._failures.items() if rental_id in found}
        self._paces = {rental_id: pace for rental_id, pace in self._paces.items() if rental_id in found}
        for rental_ids in (self._without_snapshot, self._wasteful, self._used):
            rental_ids.intersection_update(found)
        ended = self.monotonic()
        self._lists_at = ended + (ended - now) * (1 / LISTING_SHARE - 1)

    def _first_share(self, rental_id: str, epoch: int) -> float:
        """Return the share of the interval until the first snapshot on its worker.

        A rental that was just taken over waits longer, and leaves the processors to rentals that are to be restored.
        """
        is_newly_placed = rental_id in self._epochs and self._epochs[rental_id][0] < epoch
        return self.random.uniform(1.0 - SPREAD, 1.0) if is_newly_placed else self.random.uniform(0.0, JITTER)

    def explain_age(self, rental_id: str, taken_at: float) -> str:
        """Return why an active rental's last snapshot, begun at `taken_at` (Unix seconds), is old; '' if it is not."""
        pace = self._paces.get(rental_id)
        usual_s = max(self.plan.interval_s, pace.wait_s if pace else 0.0)
        if self.wall() - taken_at <= OLD_AFTER * usual_s:
            return ""
        if self.paused:
            return f"no snapshots are taken at present: {self.paused}"
        if rental_id not in self._next_at:
            return "its worker sends no heartbeats, or it is being migrated: no snapshot can be taken at present"
        if rental_id in self._failures:
            return "the last snapshot has failed, and is tried again"
        return "a snapshot is under way" if rental_id in self._running else "snapshots of other rentals come first"

    async def take_now(self, rental_id: str, spare: SnapshotId | None) -> str:
        """Take a snapshot now, without removing `spare` for it; return why that failed, empty if it succeeded."""
        while rental_id in self._running:
            await asyncio.wait([self._running[rental_id]])
        return await asyncio.shield(self._start(rental_id, self._take_in_place(rental_id, spare)))

    async def stop(self) -> None:
        running: list[asyncio.Task[Any]] = [*self._running.values(), *filter(None, [self._sweeping])]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self, rental_id: str, taking: Coroutine[Any, Any, str], claim: Claim | None = None) -> asyncio.Task[str]:
        """Begin a snapshot of a rental of which none is under way. `claim`: the place that the snapshot has already."""
        task = self._running[rental_id] = asyncio.create_task(taking)
        task.add_done_callback(lambda _: self._done(rental_id, claim))
        return task

    def _done(self, rental_id: str, claim: Claim | None) -> None:
        if claim:
            self._shares.give_back(claim)
        del self._running[rental_id]
        pause_s = 0.0 if rental_id in self._again else self._pause_s(rental_id)
        self._again.discard(rental_id)
        if rental_id in self._next_at:
            self._next_at[rental_id] = self.monotonic() + pause_s
        self.loop.hint()

    def _pause_s(self, rental_id: str) -> float:
        """Return the seconds until the next snapshot: fewer at first if the first one has failed."""
        share = self.random.uniform(1.0 - JITTER, 1.0)
        if rental_id in self._without_snapshot:
            share *= min(1.0, JITTER * 2.0 ** max(0, self._failures.get(rental_id, 0) - 1))
        pace = self._paces.get(rental_id)
        return pace.wait_s if pace and pace.wait_s > self.plan.interval_s else self.plan.interval_s * share

    def _claim(self, rental_id: str) -> Claim:
        return Claim(self._owners.get(rental_id, ""), rental_id in self._wasteful)

    async def _take_in_place(self, rental_id: str, spare: SnapshotId | None) -> str:
        async with self._shares.place(self._claim(rental_id)):
            return await self._take(rental_id, spare, any_pause=True)

    async def _take(self, rental_id: str, spare: SnapshotId | None, *, any_pause: bool) -> str:
        """Take a snapshot and return why that failed; empty if it succeeded.

        `any_pause`: the rental may be paused as long as the plan allows, because a caller waits for the snapshot.
        """
        found = await self.catalog.one(rental_id)
        if found is None:
            self._next_at.pop(rental_id, None)  # due soon after it is found to run again
            return "it does not run on a worker that can be reached"
        rental, placement, worker = found
        host = Host.of(worker)
        home = Home(rental_id=rental.id, uid=rental.uid, epoch=placement.epoch, host=host, owner=rental.owner)
        limits, pace = self.plan.limits, self._paces.setdefault(rental_id, self.plan.pace())
        if not any_pause:
            limits = replace(limits, pause_s=pace.allowed_s(self.monotonic()))
        try:
            taken = await self.snapshot_service.take(home, limits, protected=spare)
            warning = snapshots.nearly_full(taken.snapshot, limits.max_bytes, limits.max_files)
            is_changed = pace.copied(self.monotonic(), taken.pause_s)
            step = snapshots.accepted(rental, placement, taken.snapshot, warning, _slower(pace))
            if is_changed:
                step += snapshots.interval_changed(rental, placement, taken.pause_s, pace.interval_s)
            accepted = await self.catalog.accept(step, rental.id, taken.kept)
            self._failures.pop(rental.id, None)
            self._wasteful.discard(rental.id)
            self._without_snapshot.discard(rental.id)
        except SnapshotError as error:
            await self._note_failure(found, error, pace, limits.pause_s)
            return str(error)
        except Exception:
            log.exception("snapshot failed", rental_id=rental.id)
            return "the manager failed: its log says why"
        return "" if accepted else "it was stopped or migrated meanwhile"

    async def _note_failure(self, found: Running, error: SnapshotError, pace: Pace, allowed_s: float) -> None:
        """Choose a longer interval or report the problem. `allowed_s`: the pause in seconds that was allowed."""
        rental_id = found.rental.id
        if error.code in port.NO_PROGRESS_CODES:
            self._wasteful.add(rental_id)
        paused_s = allowed_s if error.code == port.PAUSE_TOO_SHORT else 0.0
        if error.code in PAUSE_PROBLEMS and pace.too_long(self.monotonic(), paused_s):
            await self.catalog.record(snapshots.slowed(found.rental, found.placement, str(error), _slower(pace)))
        if allowed_s >= LONGEST_PAUSE_S or error.code not in PAUSE_PROBLEMS:
            await self._report(found, error)

    async def _report(self, found: Running, error: SnapshotError) -> None:
        """Report a problem that concerns the renter, and that stays."""
        rental = found.rental
        if rental.last_snapshot_at is None:
            self._without_snapshot.add(rental.id)
        if error.code in IGNORED:
            return
        failures = self._failures[rental.id] = self._failures.get(rental.id, 0) + 1
        log.warning("snapshot failed", rental_id=rental.id, code=error.code, message=str(error), failures=failures)
        if error.code in REPORTED_AT_ONCE or failures > (FIRST_TRIES if rental.id in self._without_snapshot else 1):
            step = snapshots.failed(rental, found.placement, str(error), error.code == port.OVER_LIMIT)
            if step:
                await self.catalog.record(step)

    async def _sweep(self) -> None:
        """Remove snapshots of ended rentals, sooner where their owner needs the room for others."""
        try:
            kept, short_of_room = await self.snapshot_service.rentals(), await self.snapshot_service.short_of_room()
            for rental_id, uid in await self.catalog.removable(kept, self.wall(), short_of_room):
                await self.snapshot_service.remove(rental_id, uid)
                await self.catalog.forget(rental_id)
        except SnapshotError as error:
            log.warning("old snapshots not removed", code=error.code, message=str(error))
        except Exception:
            log.exception("old snapshots not removed")
        finally:
            self._sweeping = None

    def _check_disk(self) -> None:
        before = self.paused
        try:
            self.paused = FULL if self.disk_share() >= FULL_DISK else ""
        except OSError as error:
            self.paused = f"the disk of the snapshots cannot be read: {error.strerror}"
        if self.paused != before:
            log.warning("snapshots paused" if self.paused else "snapshots resumed", reason=self.paused)


def _slower(pace: Pace) -> str:
    return snapshots.slower_warning(pace.interval_s, pace.usual_s) if pace.is_slower else ""
