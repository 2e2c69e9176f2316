"""Copies of a rental's home: what names them, which are kept, which are due, and what follows from one.

A copy counts only when it is complete. Copies are ordered by (epoch, number), so what an earlier placement left behind
never comes after what a later one had.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orion.manager.domain.model import Event, Placement, Rental, Step, Write, move_placement, move_rental
from orion.manager.domain.states import PlacementState, RentalState

NEWEST_KEPT = 3
EXPIRED_KEPT_S = 24 * 3600.0
"""An expired rental's last copy is kept for so long; a released one's goes at once."""
_WRITTEN = re.compile(r"([1-9][0-9]{0,15})-([1-9][0-9]{0,15})")


@dataclass(frozen=True, order=True)
class Generation:
    """Which copy: of which placement of the rental, and which of it."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"

    @staticmethod
    def parse(text: str) -> Generation | None:
        match = _WRITTEN.fullmatch(text)
        return Generation(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Copy:
    """One complete copy of a home."""

    generation: Generation
    at: float
    """UTC seconds at which it was begun, for the last time that the home was found to be like it."""
    bytes: int
    files: int
    """Files, directories and links."""
    skipped: tuple[str, ...] = ()
    """What the renter made unreadable even to itself, so that it is not in it; the first of them."""
    salvage: bool = False
    """What a worker that came back still had of an epoch that was lost: see `newest`."""


def kept(generations: Iterable[Generation]) -> set[Generation]:
    """Of the complete ones: the newest few, and the newest of the epoch before the latest."""
    ordered = sorted(generations, reverse=True)
    before = [generation for generation in ordered if generation.epoch < ordered[0].epoch]
    return {*ordered[:NEWEST_KEPT], *before[:1]}


def next_number(generations: Sequence[Generation], epoch: int) -> int:
    return 1 + max((generation.number for generation in generations if generation.epoch == epoch), default=0)


NEWEST = "newest"
EMPTY = "empty"
"""How a rental's home is to be filled, besides by a generation that was asked for."""
ACTOR = "copies"


def wanted(rental: Rental) -> str | None:
    """What its next placement begins with; None for one that was never active, which has nothing to lose."""
    return None if rental.activated_at is None else rental.restore_from or NEWEST


def accepted(rental: Rental, placement: Placement, copy: Copy) -> Step:
    """A complete copy counts, if its placement is still the one that runs. Told only when something is better now."""
    change = {"last_safe_copy_at": copy.at, "last_safe_copy_bytes": copy.bytes, "copy_problem": ""}
    event = _event("rental.copied", "its files are copied from now on", rental, placement.worker_id, copy)
    told = (event,) if rental.last_safe_copy_at is None or rental.copy_problem else ()
    return Step(_still_running(rental, placement, change), told)


def failed(rental: Rental, placement: Placement, problem: str) -> Step | None:
    """Its files could not be copied; None when that is known already."""
    if rental.copy_problem == problem:
        return None
    event = _event("rental.copy_failed", problem, rental, placement.worker_id)
    return Step(_still_running(rental, placement, {"copy_problem": problem}), (event,))


def ask_to_restore(rental: Rental, running: Placement | None, source: str, actor: str) -> Step:
    """Make it begin anew with `source`, a generation or EMPTY. What runs of it ends first, and is purged."""
    what = "without its files" if source == EMPTY else f"with copy {source}"
    if running is None:
        expect = {"state": rental.state, "epoch": rental.epoch}
        event = _event("rental.restore_asked", f"it is to begin {what}", rental, None, actor=actor)
        return Step((Write("rental", rental.id, expect, {"restore_from": source}),), (event,))
    reason = f"it is stopped, to begin again {what}"
    stopping = move_placement(running, rental.owner, PlacementState.STOPPING, actor, reason)
    return stopping + move_rental(rental, RentalState.MIGRATING, actor, reason, running.worker_id, restore_from=source)


def filled(rental: Rental, worker_id: str, report: Mapping[str, Any], wall: float) -> Event | None:
    """What its renter finds there, from the report of what filled its home; None where nothing was filled."""
    if "restored" not in report:
        return None
    restored = report["restored"]
    if not restored.get("generation"):
        return _event("rental.started_empty", restored["reason"], rental, worker_id)
    name = restored["generation"]
    if "at" not in restored:
        return _event("rental.files_restored", f"copy {name}", rental, worker_id, details={"generation": name})
    age_s = max(0.0, wall - restored["at"])
    reason = f"copy {name}, {age_s:.0f} s old, {restored['files']} files, {restored['bytes']} bytes"
    if restored["skipped"]:
        reason += f"; not in it: {', '.join(restored['skipped'][:3])}"
    return _event("rental.files_restored", reason, rental, worker_id, details={**restored, "age_s": round(age_s, 1)})


def _still_running(rental: Rental, placement: Placement, change: Mapping[str, Any]) -> tuple[Write, ...]:
    """Guards of what is only true while the placement that was copied is the one that runs."""
    return (
        Write("placement", placement.id, {"state": PlacementState.RUNNING, "epoch": placement.epoch}, {}),
        Write("rental", rental.id, {"state": RentalState.ACTIVE, "epoch": placement.epoch}, change),
    )


def _event(
    kind: str,
    reason: str,
    rental: Rental,
    worker_id: str | None,
    copy: Copy | None = None,
    details: Mapping[str, Any] | None = None,
    actor: str = ACTOR,
) -> Event:
    if copy is not None:
        details = {"generation": str(copy.generation), "bytes": copy.bytes, "files": copy.files}
    return Event(kind, actor, reason, rental.owner, rental.id, worker_id, rental.epoch, details or {})
