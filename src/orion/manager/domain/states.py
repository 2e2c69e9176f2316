"""The three state machines as tables. What is absent from a table raises; nobody assigns a state elsewhere.

A state without a deadline is restful: it may last. Every other one has an owner that works on it, a deadline in
seconds, and an exit for when the deadline passes.
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


LIVE = frozenset({PlacementState.RESERVED, PlacementState.PREPARING, PlacementState.RUNNING})
"""A rental has at most one placement in these states."""
HOLDING = LIVE | {PlacementState.STOPPING, PlacementState.STOPPED, PlacementState.FAILED}
"""These take a slot of their worker, until purged or until the worker is down."""
OUT_OF_SERVICE = frozenset({Health.JOINING, Health.DOWN})
"""A worker that nobody counts on: not yet checked, or dead."""
SILENT = OUT_OF_SERVICE | {Health.SUSPECT}
"""A worker that need not be there any more."""
ENDED = frozenset({RentalState.RELEASED, RentalState.EXPIRED, RentalState.FAILED})

CREATE_DEADLINE_S = 60.0
RESTORE_DEADLINE_S = 600.0
"""For one that was active before: its files are put there first."""
DELETE_DEADLINE_S = 120.0
JOIN_DEADLINE_S = 300.0
QUEUE_DEADLINE_S = 24 * 3600.0
PROVISIONING_DEADLINE_S = RESTORE_DEADLINE_S + DELETE_DEADLINE_S


@dataclass(frozen=True)
class Row:
    """One state: where it may go, whose work it is, how long it may last, and how it ends if it lasts longer."""

    exits: frozenset[str]
    owner: str
    deadline_s: float | None = None
    overdue: str = ""


def _row(exits: Iterable[str], owner: str, deadline_s: float | None = None, overdue: str = "") -> Row:
    return Row(frozenset(exits), owner, deadline_s, overdue)


H, P, R = Health, PlacementState, RentalState

HEALTH_TABLE: Mapping[str, Row] = {
    H.JOINING: _row({H.READY, H.SUSPECT, H.DOWN, H.QUARANTINED}, "health", JOIN_DEADLINE_S, "quarantined"),
    H.READY: _row({H.SUSPECT, H.DOWN, H.UNKNOWN, H.JOINING}, "health"),
    H.SUSPECT: _row({H.READY, H.DOWN, H.JOINING}, "health", 300.0, "ready, joining or down by its lease"),
    H.UNKNOWN: _row({H.READY, H.JOINING, H.DOWN}, "health", 600.0, "ready, joining or down by its doubled lease"),
    H.DOWN: _row({H.JOINING}, "operator"),
    H.QUARANTINED: _row({H.JOINING, H.DOWN}, "operator"),
}

PLACEMENT_TABLE: Mapping[str, Row] = {
    P.RESERVED: _row({P.PREPARING, P.STOPPED, P.LOST}, "reconciler", 60.0, "prepared or stopped by the next round"),
    P.PREPARING: _row({P.RUNNING, P.FAILED, P.STOPPING, P.LOST}, "reconciler", RESTORE_DEADLINE_S, "failed"),
    P.RUNNING: _row({P.STOPPING, P.LOST}, "renter"),
    P.STOPPING: _row({P.STOPPED, P.FAILED, P.LOST}, "reconciler", DELETE_DEADLINE_S, "failed"),
    P.STOPPED: _row({P.PURGED}, "reconciler", DELETE_DEADLINE_S, "its worker is quarantined"),
    P.FAILED: _row({P.PURGED, P.LOST}, "reconciler", DELETE_DEADLINE_S, "its worker is quarantined"),
    P.LOST: _row({P.PURGED}, "reconciler"),
    P.PURGED: _row((), "nobody"),
}

_ENDING = {R.RELEASING}
RENTAL_TABLE: Mapping[str, Row] = {
    R.QUEUED: _row({R.PROVISIONING, R.FAILED} | _ENDING, "reconciler", QUEUE_DEADLINE_S, "failed, if never active"),
    R.PROVISIONING: _row({R.ACTIVE, R.QUEUED} | _ENDING, "reconciler", PROVISIONING_DEADLINE_S, "queued"),
    R.ACTIVE: _row({R.MIGRATING} | _ENDING, "renter"),
    R.MIGRATING: _row({R.ACTIVE, R.QUEUED} | _ENDING, "reconciler", PROVISIONING_DEADLINE_S, "queued"),
    R.RELEASING: _row({R.RELEASED, R.EXPIRED}, "reconciler", DELETE_DEADLINE_S, "orion remove of its worker"),
    R.RELEASED: _row((), "nobody"),
    R.EXPIRED: _row((), "nobody"),
    R.FAILED: _row((), "nobody"),
}

TABLES: Mapping[str, Mapping[str, Row]] = {
    "worker": HEALTH_TABLE,
    "placement": PLACEMENT_TABLE,
    "rental": RENTAL_TABLE,
}


class ForbiddenTransition(Exception):
    """A state machine was asked for a step that its table does not have."""


def check_transition(kind: str, identity: str, source: str, target: str) -> None:
    """Raise ForbiddenTransition unless the table of `kind` (worker, placement, rental) has this step."""
    if target not in TABLES[kind][source].exits:
        raise ForbiddenTransition(f"{kind} {identity} cannot go from {source} to {target}")
