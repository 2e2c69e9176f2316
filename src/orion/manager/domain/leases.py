"""The leases of workers: the heartbeat's route renews them, the health controller judges and revokes them.

Times are monotonic seconds of the manager, given by the caller. Leases are in the manager's memory; sessions are in the
database too, so a restarted manager knows them. The words on the wire are `leaving` for exiting and `vacating` for
evacuating.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from orion.manager.domain.model import CommandEnd, Item


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    session_id: str
    received_at: float | None = None
    """The time of the last heartbeat or registration; None: none came since this manager started."""
    seq: int = -1
    inventory: tuple[Item, ...] | None = None
    exiting_at: float | None = None
    """The time of the worker's last heartbeat, in which it says that it stops now."""
    evacuating_at: float | None = None
    """The time at which the worker first said that it is to stop, and waits until it is empty."""
    announced: bool = False
    """Whether the session before ended with a last heartbeat, so that this one is an intended restart."""
    lease_s: float = 0.0
    """The longest lease in seconds that the worker may have: that of earlier clocks after the manager was restarted."""
    gone: bool = False
    """Whether an operator said, after the last heartbeat, that the container is not there any more."""
    displaced_by: str = ""
    """The worker that has registered from the same address since the last heartbeat; empty: none has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    session_id: str
    seq: int
    inventory: tuple[Item, ...] = ()
    exiting: bool = False
    lease_s: float = 0.0
    evacuating: bool = False
    start_ends: tuple[CommandEnd, ...] = ()


class Leases:
    def __init__(self, lease_s: float) -> None:
        """`lease_s`: the seconds of the lease that replies grant now."""
        self._granted_s = lease_s
        self._leases: dict[str, Lease] = {}
        self._exiting: set[str] = set()
        self._evacuating: dict[str, float] = {}
        self._losses: dict[str, tuple[float, ...]] = {}
        self._start_ends: dict[str, tuple[CommandEnd, ...]] = {}
        self._notes: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self.renewed = self.stale = 0
        """The numbers of heartbeats so far: those that renewed a lease, and those that were refused."""
        self.heard_at: float | None = None
        """The time of the last heartbeat or registration of any worker."""

    def restore(self, sessions: Mapping[str, str], granted_s: float) -> None:
        """Take over the sessions of the database (worker id -> session id); none has sent a heartbeat yet.

        `granted_s`: the longest lease that an earlier manager may have granted. Every worker is assumed to have that
        until its heartbeat says which it has, so shorter clocks never end a lease by which a worker still runs.
        """
        self._granted_s = max(self._granted_s, granted_s)
        for worker_id, session_id in sessions.items():
            self._leases.setdefault(worker_id, Lease(session_id=session_id, lease_s=self._granted_s))

    def open(self, worker_id: str, session_id: str, now: float, inventory: Iterable[Item]) -> None:
        """Note a registration, whose session replaces the one before."""
        before, items = self._leases.get(worker_id), tuple(inventory)
        announced, granted_s = before is not None and before.exiting_at is not None, self._granted_s
        self._forget(worker_id)
        self._leases[worker_id] = Lease(
            session_id=session_id, received_at=now, inventory=items, announced=announced, lease_s=granted_s
        )
        self.heard_at = now

    def renew(self, worker_id: str, beat: Heartbeat, now: float) -> bool:
        """Renew a lease by a heartbeat; return False if its session is not the current one or its `seq` is old."""
        lease = self._leases.get(worker_id)
        if lease is None or lease.session_id != beat.session_id or beat.seq <= lease.seq:
            self.stale += 1
            return False
        self.renewed += 1
        exiting_at = (lease.exiting_at or now) if beat.exiting else None
        lease_s = min(beat.lease_s, self._granted_s)  # a worker cannot have more than was ever granted
        # An equal inventory is not replaced, so that those of a large pool are in memory once.
        inventory = lease.inventory if lease.inventory == beat.inventory else beat.inventory
        evacuating_at = (lease.evacuating_at or now) if beat.evacuating or beat.exiting else None
        self._leases[worker_id] = Lease(
            session_id=lease.session_id,
            received_at=now,
            seq=beat.seq,
            inventory=inventory,
            exiting_at=exiting_at,
            evacuating_at=evacuating_at,
            announced=lease.announced,
            lease_s=lease_s,
        )
        self._forget_indexes(worker_id)
        if exiting_at is not None:
            self._exiting.add(worker_id)
        if evacuating_at is not None and beat.evacuating:
            self._evacuating[worker_id] = evacuating_at
        if beat.start_ends:
            self._start_ends[worker_id] = beat.start_ends
        self.heard_at = now
        return True

    def note(self, worker_id: str, wall: float, load: Mapping[str, Any]) -> None:
        """Note the time of a heartbeat (UTC seconds) and the load, which the store gets in batches."""
        self._notes[worker_id] = (wall, load)

    def noted(self, worker_id: str) -> tuple[float, Mapping[str, Any]] | None:
        """Return the note of a worker that the store does not have yet."""
        return self._notes.get(worker_id)

    def take_notes(self, number: int) -> list[tuple[str, float, Mapping[str, Any]]]:
        """Pop up to `number` notes, oldest heartbeat first."""
        first = list(islice(self._notes, number))
        return [(worker_id, *self._notes.pop(worker_id)) for worker_id in first]

    def revoke(self, worker_id: str, seen: Lease | None) -> bool:
        """End a session before the verdict `down` is committed; return False if its lease was renewed since `seen`.

        The route of heartbeats answers 409 from then on, so no reply can renew a lease after the verdict.
        """
        if self._leases.get(worker_id) != seen:
            return False
        self._forget(worker_id)
        return True

    def declare_gone(self, worker_id: str) -> None:
        """Note an operator's word that the container is not there any more; the next heartbeat voids it."""
        lease = self._leases.get(worker_id)
        if lease is not None:
            self._leases[worker_id] = replace(lease, gone=True)

    def displace(self, worker_ids: Iterable[str], by: str) -> None:
        """Note that the worker `by` has the address of these now; a later heartbeat of one of them voids its note."""
        for worker_id in worker_ids:
            lease = self._leases.get(worker_id)
            if lease is not None and worker_id != by:
                self._leases[worker_id] = replace(lease, displaced_by=by)

    def displaced_by(self, worker_id: str) -> str:
        """Return the worker that has this one's address now; empty if none has."""
        lease = self._leases.get(worker_id)
        return lease.displaced_by if lease else ""

    def end(self, worker_id: str) -> None:
        """Forget a worker that was removed."""
        self._forget(worker_id)
        self._losses.pop(worker_id, None)
        self._notes.pop(worker_id, None)

    def _forget(self, worker_id: str) -> None:
        self._leases.pop(worker_id, None)
        self._forget_indexes(worker_id)

    def _forget_indexes(self, worker_id: str) -> None:
        self._exiting.discard(worker_id)
        self._evacuating.pop(worker_id, None)
        self._start_ends.pop(worker_id, None)

    def get(self, worker_id: str) -> Lease | None:
        return self._leases.get(worker_id)

    def cleaned(self, worker_id: str, rental_id: str, epoch: int) -> None:
        """Remove a rental from the inventory: the manager has purged it since the inventory was sent."""
        lease = self._leases.get(worker_id)
        if lease and lease.inventory is not None:
            kept = tuple(i for i in lease.inventory if (i.rental_id, i.epoch) != (rental_id, epoch))
            self._leases[worker_id] = replace(lease, inventory=kept)

    def exiting(self) -> frozenset[str]:
        """Return the workers that are to stop: those that evacuate, and those that sent their last heartbeat."""
        return frozenset(self._exiting | self._evacuating.keys()) if self._evacuating else frozenset(self._exiting)

    def evacuating(self, before: float) -> frozenset[str]:
        """Return the workers that evacuate, and did so at the time `before` already."""
        return frozenset(worker_id for worker_id, at in self._evacuating.items() if at <= before)

    def inventories(self, worker_ids: Iterable[str]) -> dict[str, tuple[Item, ...]]:
        """Return the last inventories by worker. They must be read before the rows: see reconcile.py."""
        known = ((worker_id, self._leases.get(worker_id)) for worker_id in worker_ids)
        return {w: lease.inventory for w, lease in known if lease is not None and lease.inventory is not None}

    def start_ends(self, worker_id: str) -> tuple[CommandEnd, ...]:
        """Return the ends of start commands that the worker's last heartbeat reports."""
        return self._start_ends.get(worker_id, ())

    def lost_ready(self, worker_id: str, now: float, window_s: float) -> int:
        """Count a loss of `ready`, unless it was announced; return the number of losses within the window."""
        lease = self._leases.get(worker_id)
        recent = self._losses.get(worker_id, ())
        if lease is not None and lease.announced:
            self._leases[worker_id] = replace(lease, announced=False)
        else:
            recent = (*recent, now)
        self._losses[worker_id] = tuple(at for at in recent if now - at <= window_s)
        return len(self._losses[worker_id])

    def losses(self, worker_id: str, now: float, window_s: float) -> int:
        return sum(now - at <= window_s for at in self._losses.get(worker_id, ()))

    def forgive(self, worker_id: str) -> None:
        self._losses.pop(worker_id, None)
