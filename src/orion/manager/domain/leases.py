"""Who is alive: the table of sessions that the heartbeat route renews and the health loop judges and revokes.

Times are monotonic seconds of the manager, given by the caller. It lives in the memory of the one active manager;
the sessions themselves are in the database, so a restarted manager knows them but has heard from nobody.
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
    """When the last heartbeat or registration came in; None: not since this manager started."""
    seq: int = -1
    inventory: tuple[Item, ...] | None = None
    exiting_at: float | None = None
    """When the worker said goodbye."""
    evacuating_at: float | None = None
    """When the worker first said that it was told to stop, and waits for its rentals to be taken away."""
    announced: bool = False
    """The session before ended with a goodbye: this one is a restart that was meant."""
    lease_s: float = 0.0
    """The lease that it may still believe in: of other clocks, when the manager was restarted with new ones."""
    gone: bool = False
    """An operator said, after it was last heard, that its container is not there any more."""
    displaced_by: str = ""
    """The worker that has registered from its address since it was last heard; empty: none has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """A heartbeat as it came in."""

    session_id: str
    seq: int
    inventory: tuple[Item, ...] = ()
    exiting: bool = False
    lease_s: float = 0.0
    evacuating: bool = False
    start_ends: tuple[CommandEnd, ...] = ()


class Leases:
    def __init__(self, lease_s: float) -> None:
        """`lease_s`: the lease that replies give now."""
        self._granted_s = lease_s
        self._leases: dict[str, Lease] = {}
        self._exiting: set[str] = set()
        self._evacuating: dict[str, float] = {}
        self._losses: dict[str, tuple[float, ...]] = {}
        self._start_ends: dict[str, tuple[CommandEnd, ...]] = {}
        self._notes: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self.renewed = self.stale = 0
        """Heartbeats so far: those that renewed a lease, and those that were told to register."""
        self.heard_at: float | None = None
        """When any worker was last heard."""

    def restore(self, sessions: Mapping[str, str], granted_s: float) -> None:
        """Take the sessions of the database (worker id -> session id) as known but silent.

        `granted_s`: the longest lease that a former manager's replies may have given. It is assumed of every worker
        until that tells which lease it has, so shorter clocks take nothing from a worker that still runs by the old.
        """
        self._granted_s = max(self._granted_s, granted_s)
        for worker_id, session_id in sessions.items():
            self._leases.setdefault(worker_id, Lease(session_id=session_id, lease_s=self._granted_s))

    def open(self, worker_id: str, session_id: str, now: float, inventory: Iterable[Item]) -> None:
        """A registration: a new session replaces the one before."""
        before = self._leases.get(worker_id)
        announced = before is not None and before.exiting_at is not None
        self._forget(worker_id)
        self._leases[worker_id] = Lease(
            session_id=session_id,
            received_at=now,
            inventory=tuple(inventory),
            announced=announced,
            lease_s=self._granted_s,
        )
        self.heard_at = now

    def renew(self, worker_id: str, beat: Heartbeat, now: float) -> bool:
        """A heartbeat. False (nothing renewed) for a session that is not current, and for an old `seq`."""
        lease = self._leases.get(worker_id)
        if lease is None or lease.session_id != beat.session_id or beat.seq <= lease.seq:
            self.stale += 1
            return False
        self.renewed += 1
        exiting_at = (lease.exiting_at or now) if beat.exiting else None
        lease_s = min(beat.lease_s, self._granted_s)  # its word counts for no more than was ever given
        # What has not changed is kept, so that a large pool's inventories are in memory once.
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
        self._note_evacuating(worker_id, evacuating_at if beat.evacuating else None)
        self._note_ends(worker_id, beat.start_ends)
        if exiting_at is not None:
            self._exiting.add(worker_id)
        elif self._exiting:
            self._exiting.discard(worker_id)
        self.heard_at = now
        return True

    def _note_evacuating(self, worker_id: str, at: float | None) -> None:
        if at is not None:
            self._evacuating[worker_id] = at
        elif self._evacuating:
            self._evacuating.pop(worker_id, None)

    def _note_ends(self, worker_id: str, ends: tuple[CommandEnd, ...]) -> None:
        if ends:
            self._start_ends[worker_id] = ends
        elif self._start_ends:
            self._start_ends.pop(worker_id, None)

    def note(self, worker_id: str, wall: float, load: Mapping[str, Any]) -> None:
        """Remember when it was heard (UTC seconds) and its load, for people; written down in batches."""
        self._notes[worker_id] = (wall, load)

    def noted(self, worker_id: str) -> tuple[float, Mapping[str, Any]] | None:
        """What is not written down yet: when it was heard (UTC seconds), and its load."""
        return self._notes.get(worker_id)

    def take_notes(self, number: int) -> list[tuple[str, float, Mapping[str, Any]]]:
        """At most so many, those of who was not heard for longest; the rest waits, each with its latest."""
        first = list(islice(self._notes, number))
        return [(worker_id, *self._notes.pop(worker_id)) for worker_id in first]

    def revoke(self, worker_id: str, seen: Lease | None) -> bool:
        """End the session before a verdict of death is committed; False when it was renewed since it was seen.

        From here on the heartbeat route answers 409, so no reply can renew a lease after the verdict.
        """
        if self._leases.get(worker_id) != seen:
            return False
        self._forget(worker_id)
        return True

    def declare_gone(self, worker_id: str) -> None:
        """Note an operator's word that its container is not there any more. Whatever is heard of it voids that."""
        lease = self._leases.get(worker_id)
        if lease is not None:
            self._leases[worker_id] = replace(lease, gone=True)

    def displace(self, worker_ids: Iterable[str], by: str) -> None:
        """Note that another worker has their address now. Whatever is heard of one of them voids that."""
        for worker_id in worker_ids:
            lease = self._leases.get(worker_id)
            if lease is not None and worker_id != by:
                self._leases[worker_id] = replace(lease, displaced_by=by)

    def displaced_by(self, worker_id: str) -> str:
        """Return the worker that has its address now; empty where none has."""
        lease = self._leases.get(worker_id)
        return lease.displaced_by if lease is not None else ""

    def end(self, worker_id: str) -> None:
        """Forget a worker that was removed."""
        self._forget(worker_id)
        self._losses.pop(worker_id, None)
        self._notes.pop(worker_id, None)

    def _forget(self, worker_id: str) -> None:
        self._leases.pop(worker_id, None)
        self._exiting.discard(worker_id)
        self._evacuating.pop(worker_id, None)
        self._start_ends.pop(worker_id, None)

    def get(self, worker_id: str) -> Lease | None:
        return self._leases.get(worker_id)

    def cleaned(self, worker_id: str, rental_id: str, epoch: int) -> None:
        """The manager purged this itself, after the inventory was sent: do not find it there again."""
        lease = self._leases.get(worker_id)
        if lease and lease.inventory is not None:
            kept = tuple(i for i in lease.inventory if (i.rental_id, i.epoch) != (rental_id, epoch))
            self._leases[worker_id] = replace(lease, inventory=kept)

    def exiting(self) -> frozenset[str]:
        """The workers that said goodbye, or are about to."""
        return frozenset(self._exiting | self._evacuating.keys()) if self._evacuating else frozenset(self._exiting)

    def evacuating(self, before: float) -> frozenset[str]:
        """Those that said before then that they wait for their rentals to be taken away, and still do."""
        return frozenset(worker_id for worker_id, at in self._evacuating.items() if at <= before)

    def inventories(self, worker_ids: Iterable[str]) -> dict[str, tuple[Item, ...]]:
        """What each of these workers said it holds. Read this before the snapshot: see reconcile.decide."""
        known = ((worker_id, self._leases.get(worker_id)) for worker_id in worker_ids)
        return {w: lease.inventory for w, lease in known if lease is not None and lease.inventory is not None}

    def start_ends(self, worker_id: str) -> tuple[CommandEnd, ...]:
        """Return which start commands do not run there any more, as its last heartbeat says."""
        return self._start_ends.get(worker_id, ())

    def lost_ready(self, worker_id: str, now: float, window_s: float) -> int:
        """Count one more loss of `ready`, unless it was announced; returns how many there were within the window."""
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
