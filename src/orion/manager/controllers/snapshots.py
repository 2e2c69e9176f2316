"""The copies loop: homes of active rentals are copied in turn, and what nobody can ask for any more is removed.

Nothing is kept here but when each is next; killing the manager at any instant loses that, and no copy.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
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
from orion.manager.snapshots.disk import Disk
from orion.manager.snapshots.port import (
    NO_PROGRESS_CODES,
    OVER_LIMIT,
    PAUSE_TOO_LONG,
    PAUSE_TOO_SHORT,
    Home,
    SnapshotError,
    SnapshotService,
)
from orion.manager.ssh.port import Host
from orion.manager.store.snapshots import Running, SnapshotCatalog

log = structlog.get_logger()

JITTER = 0.1
"""Of the interval, so that rentals made together are not copied together for ever."""
SPREAD = 0.5
"""The same for those that were moved: a worker's rentals move together, and have the files of their last copies."""
KNOWN_S = 3600.0
"""For so long it is remembered in which epoch a rental was that cannot be copied any more."""
FIRST_TRIES = 3
"""To copy a rental for the first time, one soon after the other, before its problem is said."""
ROUNDS = 20
"""In an interval."""
LOOKING_SHARE = 0.05
"""Of the time may be spent looking for what can be copied, however large the pool is."""
SWEEP_S = 60.0
FULL_DISK = 0.8
"""From here on no copy is begun: the rest of the disk is for the database, and for takeovers."""
FULL = f"the manager's disk is {FULL_DISK:.0%} full or more, of bytes or of inodes: make room on it"
SAID_AT_ONCE = frozenset((OVER_LIMIT, "unreadable_home", "disk_full"))
"""Problems of the home or of this machine. Others may be a worker that is just dying: they are said when they stay."""
OF_THE_PAUSE = frozenset((PAUSE_TOO_LONG, PAUSE_TOO_SHORT))
"""Too much changes at once; that is told as another interval, unless the longest pause was allowed."""
OF_NO_ACCOUNT = frozenset(("superseded", "stale_epoch", "unknown_rental", "purged", "busy"))
"""It is being moved or ended, or what another worker still has of it is being copied aside."""


OLD_AFTER = 3.0
"""Usual intervals between copies, after which the age of the last one is explained."""


def disk_share(directory: Path) -> float:
    """Return how much of its disk is used, of its bytes or of its inodes, whichever is more: from 0 to 1."""
    return Disk.of(directory).scarcest[0]


def _rarely(pace: Pace) -> str:
    return snapshots.slower_warning(pace.interval_s, pace.usual_s) if pace.is_slower else ""


class SnapshotController:
    def __init__(
        self,
        *,
        catalog: SnapshotCatalog,
        snapshot_service: SnapshotService,
        plan: SnapshotPlan,
        disk_share: Callable[[], float],
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        random: Random | None = None,
    ) -> None:
        """`disk_share`: how much of the disk that the copies are on is used, from 0 to 1; raises OSError."""
        self._book = catalog
        self._vault = snapshot_service
        self._plan = plan
        self._disk_share = disk_share
        self._monotonic = monotonic
        self._wall = wall
        self._random = random or Random()  # noqa: S311 - nothing secret
        self._next_at: dict[str, float] = {}
        self._epochs: dict[str, tuple[int, float]] = {}
        """Of each rental that could be copied: in which epoch, and when that was last seen."""
        self._failures: dict[str, int] = {}
        self._uncopied: set[str] = set()
        """Rentals whose first copy has failed."""
        self._visited: set[str] = set()
        """Rentals in which a session has ended where they are now."""
        self._paces: dict[str, Pace] = {}
        self._again: set[str] = set()
        """Rentals whose copy is under way, and that are to be copied again at once."""
        self._owners: dict[str, str] = {}
        self._held_up: set[str] = set()
        """Rentals whose last copy has held its place in vain."""
        self._shares = FairQueue(plan.at_once)
        self._running: dict[str, asyncio.Task[str]] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self._swept_at = float("-inf")
        self._looks_at = float("-inf")
        self.paused = ""
        """Why no copies are made at present."""
        self.loop = Loop("copies", plan.interval_s / ROUNDS, self.round)

    async def round(self) -> None:
        now = self._monotonic()
        self._look_at_disk()
        if now >= self._swept_at + SWEEP_S and self._sweeping is None:
            self._swept_at = now
            self._sweeping = asyncio.create_task(self._sweep())
        if self.paused:
            return
        if now >= self._looks_at:
            await self._look_who_runs(now)
        due = [
            (at, rental_id) for rental_id, at in self._next_at.items() if at <= now and rental_id not in self._running
        ]
        heapq.heapify(due)
        while due and self._shares.free:
            rental_id = heapq.heappop(due)[1]
            claim = self._claim(rental_id)
            if self._shares.take(claim):
                self._start(rental_id, self._copy(rental_id, None, False), claim)

    def hear(self, committed: Sequence[Event]) -> None:
        """Copy at once what has just been let in with files that no copy has, and again after its first session."""
        for event in committed:
            if event.rental_id and self._has_files_of_its_own(event, event.rental_id):
                self._again |= {event.rental_id} & self._running.keys()
                self._next_at[event.rental_id] = self._monotonic()
                self.loop.hint()

    def _has_files_of_its_own(self, event: Event, rental_id: str) -> bool:
        if event.kind == "rental.session_closed" and rental_id not in self._visited:
            self._visited.add(rental_id)
            return True
        is_new = event.kind == "rental.activated" and rental_id not in self._epochs
        return is_new or event.kind == "rental.started_empty"

    async def _look_who_runs(self, now: float) -> None:
        running = await self._book.running()
        found = {rental_id: epoch for rental_id, (epoch, _) in running.items()}
        self._owners = {rental_id: owner for rental_id, (_, owner) in running.items()}
        for rental_id in self._running.keys() - found.keys():
            self._running[rental_id].cancel()
        for rental_id in sorted(found.keys() - self._next_at.keys()):
            self._next_at[rental_id] = now + self._plan.interval_s * self._first_share(rental_id, found[rental_id])
        self._next_at = {rental_id: at for rental_id, at in self._next_at.items() if rental_id in found}
        self._epochs |= {rental_id: (epoch, now) for rental_id, epoch in found.items()}
        self._epochs = {rental_id: last for rental_id, last in self._epochs.items() if now - last[1] < KNOWN_S}
        self._failures = {rental_id: n for rental_id, n in self._failures.items() if rental_id in found}
        self._uncopied &= found.keys()
        self._held_up &= found.keys()
        self._paces = {rental_id: pace for rental_id, pace in self._paces.items() if rental_id in found}
        self._visited &= found.keys()
        ended = self._monotonic()
        self._looks_at = ended + (ended - now) * (1 / LOOKING_SHARE - 1)

    def _first_share(self, rental_id: str, epoch: int) -> float:
        """Of the interval, until its first copy where it is now.

        To copy at once what was just moved would take the processors from what is still to be restored.
        """
        known = self._epochs.get(rental_id)
        was_moved = known is not None and known[0] < epoch
        return self._random.uniform(1.0 - SPREAD, 1.0) if was_moved else self._random.uniform(0.0, JITTER)

    def why_old(self, rental_id: str, copied_at: float) -> str:
        """Return why an active rental's copy that was begun at `copied_at` (Unix seconds) is old; empty: it is not."""
        pace = self._paces.get(rental_id)
        usual_s = max(self._plan.interval_s, pace.wait_s if pace else 0.0)
        if self._wall() - copied_at <= OLD_AFTER * usual_s:
            return ""
        if self.paused:
            return f"no files are copied at present: {self.paused}"
        if rental_id not in self._next_at:
            return "its worker is not heard from, or it is being moved: its files cannot be copied at present"
        if rental_id in self._failures:
            return "the last copy has failed, and is tried again"
        return "a copy is under way" if rental_id in self._running else "the copies of others come first"

    async def copy_now(self, rental_id: str, spare: SnapshotId | None) -> str:
        """Copy it at once, and keep `spare`; why that was not done, empty when it was."""
        while rental_id in self._running:
            await asyncio.wait([self._running[rental_id]])
        return await asyncio.shield(self._start(rental_id, self._copy_in_turn(rental_id, spare)))

    async def stop(self) -> None:
        running = [*self._running.values(), *([self._sweeping] if self._sweeping else [])]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(
        self, rental_id: str, copying: Coroutine[Any, Any, str], claim: Claim | None = None
    ) -> asyncio.Task[str]:
        """Begin a copy of a rental of which none is under way. `claim`: the place that it has already."""
        task = self._running[rental_id] = asyncio.create_task(copying)
        task.add_done_callback(lambda _: self._done(rental_id, claim))
        return task

    def _done(self, rental_id: str, claim: Claim | None) -> None:
        if claim:
            self._shares.give_back(claim)
        del self._running[rental_id]
        pause_s = 0.0 if rental_id in self._again else self._pause_s(rental_id)
        self._again.discard(rental_id)
        if rental_id in self._next_at:
            self._next_at[rental_id] = self._monotonic() + pause_s
        self.loop.hint()

    def _pause_s(self, rental_id: str) -> float:
        """Return the seconds until it is copied again: fewer at first where its first copy has failed."""
        share = self._random.uniform(1.0 - JITTER, 1.0)
        if rental_id in self._uncopied:
            share *= min(1.0, JITTER * 2.0 ** max(0, self._failures.get(rental_id, 0) - 1))
        pace = self._paces.get(rental_id)
        return pace.wait_s if pace and pace.wait_s > self._plan.interval_s else self._plan.interval_s * share

    def _claim(self, rental_id: str) -> Claim:
        return Claim(self._owners.get(rental_id, ""), rental_id in self._held_up)

    async def _copy_in_turn(self, rental_id: str, spare: SnapshotId | None) -> str:
        async with self._shares.place(self._claim(rental_id)):
            return await self._copy(rental_id, spare, True)

    async def _copy(self, rental_id: str, spare: SnapshotId | None, asked: bool) -> str:
        """Return why no copy was made; empty when one was. `asked`: somebody waits for it, so any pause is allowed."""
        found = await self._book.one(rental_id)
        if found is None:
            self._next_at.pop(rental_id, None)  # due soon after it is found to run again
            return "it does not run on a worker that can be asked"
        rental, placement, worker = found
        home = Home(
            rental.id, rental.uid, placement.epoch, Host(worker.id, worker.address, worker.host_keys), rental.owner
        )
        limits, pace = self._plan.limits, self._paces.setdefault(rental_id, self._plan.pace())
        if not asked:
            limits = replace(limits, pause_s=pace.allowed_s(self._monotonic()))
        try:
            copied = await self._vault.copy(home, limits, protected=spare)
            warning = snapshots.nearly_full(copied.copy, limits.max_bytes, limits.max_files)
            is_changed = pace.copied(self._monotonic(), copied.pause_s)
            step = snapshots.accepted(rental, placement, copied.copy, warning, _rarely(pace))
            if is_changed:
                step += snapshots.interval_changed(rental, placement, copied.pause_s, pace.interval_s)
            accepted = await self._book.accept(step, rental.id, copied.kept)
            self._failures.pop(rental.id, None)
            self._held_up.discard(rental.id)
            self._uncopied.discard(rental.id)
        except SnapshotError as error:
            if error.code in NO_PROGRESS_CODES:
                self._held_up.add(rental.id)
            if error.code in OF_THE_PAUSE:
                stood_s = limits.pause_s if error.code == PAUSE_TOO_SHORT else 0.0
                if pace.too_long(self._monotonic(), stood_s):
                    step = snapshots.slowed(rental, placement, str(error), _rarely(pace))
                    await self._book.record(step)
            if limits.pause_s >= LONGEST_PAUSE_S or error.code not in OF_THE_PAUSE:
                await self._complain(found, error)
            return str(error)
        except Exception:
            log.exception("a copy failed", rental_id=rental.id)
            return "the manager failed: its log says why"
        return "" if accepted else "it was stopped or moved meanwhile"

    async def _complain(self, found: Running, error: SnapshotError) -> None:
        rental = found.rental
        if rental.last_safe_copy_at is None:
            self._uncopied.add(rental.id)
        if error.code in OF_NO_ACCOUNT:
            return
        failures = self._failures[rental.id] = self._failures.get(rental.id, 0) + 1
        log.warning("not copied", rental_id=rental.id, code=error.code, message=str(error), failures=failures)
        if error.code in SAID_AT_ONCE or failures > (FIRST_TRIES if rental.id in self._uncopied else 1):
            step = snapshots.failed(rental, found.placement, str(error), error.code == OVER_LIMIT)
            if step:
                await self._book.record(step)

    async def _sweep(self) -> None:
        """Remove the copies of what has ended, sooner where their owner is short of room for others."""
        try:
            kept, short_of_room = await self._vault.rentals(), await self._vault.short_of_room()
            for rental_id, uid in await self._book.removable(kept, self._wall(), short_of_room):
                await self._vault.remove(rental_id, uid)
                await self._book.forget(rental_id)
        except SnapshotError as error:
            log.warning("old copies cannot be removed", code=error.code, message=str(error))
        except Exception:
            log.exception("old copies cannot be removed")
        finally:
            self._sweeping = None

    def _look_at_disk(self) -> None:
        before = self.paused
        try:
            full = self._disk_share() >= FULL_DISK
        except OSError as error:
            self.paused = f"the disk of the copies cannot be looked at: {error.strerror}"
        else:
            self.paused = FULL if full else ""
        if self.paused != before:
            log.warning("copies", paused=self.paused or "no more")
