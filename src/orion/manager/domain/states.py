"""The state machines as tables. A step that is not in its table raises, and states are assigned nowhere else.

The states of workers, placements and rentals are columns; the phase of a planned migration is derived from the rows.

A state without a deadline may last. Every other state has an owner that works on it, a deadline in seconds, and an
exit that is taken when the deadline has passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    UNKNOWN = "unknown"
    DOWN = "down"
    QUARANTINED = "quarantined"


class Intent(StrEnum):
    ACTIVE = "active"
    DRAINING = "draining"
    DRAINED = "drained"


class PlacementState(StrEnum):
    RESERVED = "reserved"
    PREPARING = "preparing"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"
    PURGED = "purged"


class RentalState(StrEnum):
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    ACTIVE = "active"
    MIGRATING = "migrating"
    RELEASING = "releasing"
    RELEASED = "released"
    EXPIRED = "expired"
    FAILED = "failed"


class MigrationPhase(StrEnum):
    """The phase of a planned migration. It is in no column: migration.phase_of derives it."""

    NONE = "none"
    """No planned migration is under way."""
    RESERVED = "reserved"
    """The target has a slot; nothing was made there yet."""
    PRECOPY = "precopy"
    """The files are copied to the target while the source runs."""
    QUIESCE = "quiesce"
    """The target has the files of the precopy, and the source is about to be quiesced."""
    FINAL_SYNC = "final sync"
    """The source is quiesced, and what changed since the precopy is copied to the target."""
    PARK = "park"
    """The source is quiesced without a target, and its files are copied: then the rental waits in the queue."""
    CUTOVER = "cutover"
    """The rental has left the source, which is being purged, and goes on with all its files elsewhere."""
    STALE = "stale"
    """The source is quiesced under the number of another target than the one that exists. No step leads here."""


LIVE = frozenset({PlacementState.RESERVED, PlacementState.PREPARING, PlacementState.RUNNING})
"""The states of placements of which a rental has one at most, besides the target of a planned migration."""
HOLDING = LIVE | {PlacementState.STOPPING, PlacementState.STOPPED, PlacementState.FAILED}
"""The states of placements that take a slot of their worker."""
OUT_OF_SERVICE = frozenset({Health.JOINING, Health.DOWN})
"""The health of workers that are not verified yet, or dead."""
SILENT = OUT_OF_SERVICE | {Health.SUSPECT}
"""The health of workers that may be gone."""
ENDED = frozenset({RentalState.RELEASED, RentalState.EXPIRED, RentalState.FAILED})
QUIESCED = frozenset({MigrationPhase.FINAL_SYNC, MigrationPhase.PARK, MigrationPhase.STALE})
"""The phases of a planned migration in which the source is quiesced."""

CREATE_DEADLINE_S = 60.0
RESTORE_DEADLINE_S = 600.0
"""Seconds to make a rental that was active before: a snapshot is restored first."""
DELETE_DEADLINE_S = 120.0
JOIN_DEADLINE_S = 300.0
QUEUE_DEADLINE_S = 24 * 3600.0
PROVISIONING_DEADLINE_S = RESTORE_DEADLINE_S + DELETE_DEADLINE_S
HELD_DEADLINE_S = 300.0
"""Seconds for which a source may be quiesced: more than the final sync of the largest home takes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One state: its exits, its owner, its deadline in seconds, and what happens when that has passed."""

    exits: frozenset[str]
    owner: str
    deadline_s: float | None
    overdue: str


def _row(exits: Iterable[str], owner: str, deadline_s: float | None = None, overdue: str = "") -> Row:
    return Row(exits=frozenset(exits), owner=owner, deadline_s=deadline_s, overdue=overdue)


H, P, R = Health, PlacementState, RentalState

HEALTH_TABLE: Mapping[str, Row] = {
    H.JOINING: _row({H.READY, H.SUSPECT, H.DOWN, H.QUARANTINED}, "health", JOIN_DEADLINE_S, "quarantined"),
    H.READY: _row({H.SUSPECT, H.DOWN, H.UNKNOWN, H.JOINING}, "health"),
    H.SUSPECT: _row({H.READY, H.DOWN, H.JOINING}, "health", 300.0, "ready, joining or down"),
    H.UNKNOWN: _row({H.READY, H.JOINING, H.DOWN}, "health", 600.0, "ready, joining or down"),
    H.DOWN: _row({H.JOINING}, "operator"),
    H.QUARANTINED: _row({H.JOINING, H.DOWN}, "operator"),
}

PLACEMENT_TABLE: Mapping[str, Row] = {
    P.RESERVED: _row({P.PREPARING, P.STOPPED, P.LOST}, "reconciler", 60.0, "prepared or stopped"),
    P.PREPARING: _row({P.RUNNING, P.FAILED, P.STOPPING, P.LOST}, "reconciler", RESTORE_DEADLINE_S, "failed"),
    P.RUNNING: _row({P.STOPPING, P.LOST}, "renter"),
    P.STOPPING: _row({P.STOPPED, P.FAILED, P.LOST}, "reconciler", DELETE_DEADLINE_S, "failed"),
    P.STOPPED: _row({P.PURGED}, "reconciler", DELETE_DEADLINE_S, "its worker is quarantined"),
    # Its worker may die before the clean-up, and the release of the rental must not wait for that worker: hence LOST.
    P.FAILED: _row({P.PURGED, P.LOST}, "reconciler", DELETE_DEADLINE_S, "its worker is quarantined"),
    P.LOST: _row({P.PURGED}, "reconciler"),
    P.PURGED: _row((), "none"),
}

RENTAL_TABLE: Mapping[str, Row] = {
    R.QUEUED: _row({R.PROVISIONING, R.FAILED, R.RELEASING}, "reconciler", QUEUE_DEADLINE_S, "failed, if never active"),
    R.PROVISIONING: _row({R.ACTIVE, R.QUEUED, R.RELEASING}, "reconciler", PROVISIONING_DEADLINE_S, "queued"),
    R.ACTIVE: _row({R.MIGRATING, R.RELEASING}, "renter"),
    R.MIGRATING: _row({R.ACTIVE, R.QUEUED, R.RELEASING}, "reconciler", PROVISIONING_DEADLINE_S, "queued"),
    R.RELEASING: _row({R.RELEASED, R.EXPIRED}, "reconciler", DELETE_DEADLINE_S, "orion remove of its worker"),
    R.RELEASED: _row((), "none"),
    R.EXPIRED: _row((), "none"),
    R.FAILED: _row((), "none"),
}

M = MigrationPhase
MIGRATION_TABLE: Mapping[MigrationPhase, Row] = {
    M.NONE: _row({M.RESERVED, M.PARK}, "renter"),
    M.RESERVED: _row({M.PRECOPY, M.NONE}, "reconciler", 60.0, "precopy"),
    M.PRECOPY: _row({M.QUIESCE, M.NONE}, "reconciler", RESTORE_DEADLINE_S, "none: it runs on"),
    M.QUIESCE: _row({M.FINAL_SYNC, M.NONE}, "reconciler", RESTORE_DEADLINE_S, "none: it runs on"),
    # Without its target the source is parked if its worker is about to end, and goes on otherwise.
    M.FINAL_SYNC: _row({M.CUTOVER, M.PARK, M.NONE}, "reconciler", HELD_DEADLINE_S, "none: it runs on"),
    M.PARK: _row({M.CUTOVER, M.NONE}, "reconciler", HELD_DEADLINE_S, "none: it runs on"),
    M.CUTOVER: _row({M.NONE}, "reconciler", PROVISIONING_DEADLINE_S, "none: it is queued"),
    M.STALE: _row({M.PARK, M.NONE}, "reconciler", HELD_DEADLINE_S, "none: it runs on"),
}

TABLES: Mapping[str, Mapping[str, Row]] = {"worker": HEALTH_TABLE, "placement": PLACEMENT_TABLE, "rental": RENTAL_TABLE}
"""The machines whose states are columns, by the kind of row."""


class ForbiddenTransition(Exception):
    """A step is not in the table of its state machine."""


def check_transition(kind: str, identity: str, source: str, target: str) -> None:
    """Raise ForbiddenTransition unless the table of `kind` (worker, placement, rental) has this transition."""
    if target not in TABLES[kind][source].exits:
        raise ForbiddenTransition(f"{kind} {identity} cannot go from {source} to {target}")


def check_phase(rental_id: str, source: MigrationPhase, target: MigrationPhase) -> None:
    """Raise ForbiddenTransition unless a planned migration may go from one phase to the other."""
    if target not in MIGRATION_TABLE[source].exits:
        raise ForbiddenTransition(f"the migration of rental {rental_id} cannot go from {source} to {target}")
