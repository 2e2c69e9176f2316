"""Copies of a rental's home: what names them, which are kept, which are due, and what follows from one.

A copy counts only when it is complete. Copies are ordered by (epoch, number), so what an earlier placement left behind
never comes after what a later one had.

Salvage is what a worker that was down, and is back, still has of an epoch that was lost meanwhile: its home is copied
aside before it is purged there. It has what was written after the last copy of its epoch, and may lack what was written
at a later one. A rental begins with it by itself only where nothing that is known of a later epoch is given up by that:
where its renter was let in at no later one, or where there is no copy of the later ones and they began with an earlier
state of that very home. Every other salvage waits until somebody asks for it (`waiting_salvage`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orion.manager.domain.model import Origin, Placement, Rental
from orion.manager.domain.states import ENDED, PlacementState, RentalState
from orion.manager.domain.steps import Event, Step, Write, move_placement, move_rental

NEWEST_KEPT = 3
RECOVERED_KEPT = 2
EXPIRED_KEPT_S = 24 * 3600.0
"""An expired rental's last copy is kept for so long; a released one's goes at once."""
RECOVERED_SHOWN_S = 7 * 24 * 3600.0
"""A salvage that waits for its owner is shown for so long; it is kept and listed for longer."""
NEARLY_FULL_WARNING = "its home holds "
"""How the warning begins that a home is nearly full."""
SLOWER = "so much of its home changes at once that it is copied "
"""How the warning begins that a home is copied less often than usual."""
NEARLY_FULL = 0.8
"""The share of what a home may hold from which on its renter is warned."""
BLOCK_BYTES = 4096
"""The least that an entry of a home counts for: a directory takes a block of most disks, and a copy of it one more."""
MAX_ORIGINS = 32
"""Epochs of a rental whose origins are kept. A salvage of an earlier epoch waits to be asked for."""
NAMES_SHOWN = 3
"""Names of files that a copy lacks, in a sentence about it; its details have those that are known."""
_ID = re.compile(r"([1-9][0-9]{0,15})-([1-9][0-9]{0,15})")


@dataclass(frozen=True, order=True)
class SnapshotId:
    """Which copy: of which placement of the rental, and which of it."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"

    @staticmethod
    def parse(text: str) -> SnapshotId | None:
        match = _ID.fullmatch(text)
        return SnapshotId(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One complete copy of a home."""

    generation: SnapshotId
    at: float
    """UTC seconds at which it was begun, for the last time that the home was found to be like it."""
    bytes: int
    """Sum of what its entries count for (`counted`). A file with several names counts once."""
    files: int
    """Entries of every kind: files, directories, links, FIFOs, sockets; each name counts."""
    skipped: tuple[str, ...] = ()
    """The first names of what could not be carried whole: it is missing, or lacks attributes or its mode."""
    salvage: bool = False
    """What a worker that came back still had of an epoch that was lost: see `newest`."""


def kept(complete: Iterable[Snapshot]) -> set[SnapshotId]:
    """Of the complete ones: the newest few, and the newest of the epoch before the latest; and the newest salvages."""
    all_ = sorted(complete, key=lambda copy: copy.generation, reverse=True)
    ordered = [copy.generation for copy in all_ if not copy.salvage]
    salvages = [copy.generation for copy in all_ if copy.salvage]
    before = [generation for generation in ordered if generation.epoch < ordered[0].epoch]
    return {*ordered[:NEWEST_KEPT], *before[:1], *salvages[:RECOVERED_KEPT]}


def counted(blocks: int, size: int) -> int:
    """Return the bytes for which an entry of any kind counts. `blocks`: of 512 bytes; `size`: with holes.

    The worker counts in the same way (`size_of` of orion_worker/snapshots/scan.py). BLOCK_BYTES make the two agree
    where one file system keeps a directory or a link in its inode and the other does not.
    """
    return max(512 * blocks, size, BLOCK_BYTES)


def may_stay(complete: Iterable[Snapshot], spare: SnapshotId | None) -> list[set[SnapshotId]]:
    """Return which of the complete copies stay, if there is room for them: first all that are usually kept and `spare`,
    then each time one fewer, the oldest. The latest copy stays in any case, and so do `spare` and salvages.
    """
    all_ = list(complete)
    regular = [copy.generation for copy in all_ if not copy.salvage]
    staying = kept(all_) | {copy.generation for copy in all_ if copy.generation == spare}
    by_choice = sorted(staying.intersection(regular) - {spare, max(regular, default=None)})
    return [staying - set(by_choice[:number]) for number in range(len(by_choice) + 1)]


def newest(complete: Iterable[Snapshot], rental: Rental) -> Snapshot | None:
    """Return what a rental begins with again by itself: the latest copy since its renter was last let in; else the
    latest state that grew out of what it began with then; where nobody knows that, the latest copy."""
    ordered = sorted(complete, key=lambda copy: copy.generation)
    since = [copy for copy in ordered if copy.generation.epoch >= rental.let_in_epoch]
    began_with = _grown_from_origin(ordered, rental)
    copies = [copy for copy in ordered if not copy.salvage]
    return next((each[-1] for each in (since, began_with, copies) if each), None)


def _grown_from_origin(ordered: Sequence[Snapshot], rental: Rental) -> list[Snapshot]:
    """Return the kept copies from what the rental began with to the latest state that has all of it.

    A later copy of the same home has all of an earlier one, and so has a copy of a home that was filled with it. Where
    both are there, each lacks something of the other: the same home counts, for the other one may be unchanged. Who
    asked for an older copy has given up what was later in that home.
    """
    chain = [copy for copy in ordered if str(copy.generation) == rental.began_with]
    origin = _origin(rental, rental.let_in_epoch)
    if origin is None:
        return chain
    latest, asked = SnapshotId.parse(rental.began_with), origin.asked
    while grown := _successors(latest, asked, ordered, rental):
        chain.append(grown[-1])
        latest, asked = grown[-1].generation, False
    return chain


def _successors(latest: SnapshotId | None, asked: bool, ordered: Sequence[Snapshot], rental: Rental) -> list[Snapshot]:
    """Return the later copies that have all of the copy `latest`, oldest first. `latest` None: the home was empty.

    `asked`: somebody went back to it, and has given up what was later in the same home.
    """
    name = str(latest) if latest else ""
    later = [copy for copy in ordered if latest is None or copy.generation > latest]
    same_home = [c for c in later if latest and not asked and c.generation.epoch == latest.epoch]
    filled_with_it = [c for c in later if Origin(c.generation.epoch, name, asked) in rental.lineage]
    if latest is None and not asked:  # anything is more than nothing
        filled_with_it += [copy for copy in later if _origin(rental, copy.generation.epoch) is None]
        filled_with_it.sort(key=lambda copy: copy.generation)
    return same_home or filled_with_it


def waiting_recovered_snapshot(complete: Iterable[Snapshot], rental: Rental, wall: float) -> Snapshot | None:
    """Return the newest salvage that is no part of what the rental has, or is about to begin with; None: there is none.

    `wall`: UTC seconds. Without a time each would be shown for as long as the rental lives.
    """
    if rental.state in ENDED | {RentalState.RELEASING}:
        return None
    all_ = list(complete)
    runs = rental.state is RentalState.ACTIVE
    again = newest(all_, rental)
    begins = rental.restore_from or (str(again.generation) if again else "")
    has = _ancestors(rental, rental.began_with if runs else begins)
    shown = [copy for copy in all_ if copy.salvage and wall - copy.at < RECOVERED_SHOWN_S]
    shown = [copy for copy in shown if not (runs and copy.generation.epoch >= rental.let_in_epoch)]
    waiting = [c for c in shown if c.generation.number > has.get(c.generation.epoch, 0)]
    return max(waiting, key=lambda copy: copy.generation, default=None)


def _ancestors(rental: Rental, name: str) -> dict[int, int]:
    """Return the copies that a copy has grown out of, itself included: the latest number of each epoch."""
    found: dict[int, int] = {}
    generation = SnapshotId.parse(name)
    while generation and generation.epoch not in found:
        found[generation.epoch] = generation.number
        origin = _origin(rental, generation.epoch)
        generation = SnapshotId.parse(origin.generation) if origin else None
    return found


def _origin(rental: Rental, epoch: int) -> Origin | None:
    return next((origin for origin in rental.lineage if origin.epoch == epoch), None)


def activated(rental: Rental, epoch: int, generation: str) -> dict[str, Any]:
    """Return what changes in a rental whose renter is let in at `epoch`, with that copy in the home; empty: with none.

    What was asked for stays asked for while there is no copy of the epoch that began with it.
    """
    before = _origin(rental, rental.let_in_epoch)
    same = before is not None and before.asked and before.generation == generation
    origin = Origin(epoch, generation, rental.restore_from is not None or same)
    others = [each for each in rental.lineage if each.epoch != epoch]
    return {"let_in_epoch": epoch, "began_with": generation, "lineage": (*others, origin)[-MAX_ORIGINS:]}


def base_of(complete: Iterable[Snapshot], epoch: int, salvage: bool) -> Snapshot | None:
    """The copy that a new one of this epoch is compared with: the latest that it may be like."""
    before = [c for c in complete if c.generation.epoch <= epoch and (salvage or not c.salvage)]
    return max(before, key=lambda copy: copy.generation, default=None)


def next_number(generations: Sequence[SnapshotId], epoch: int) -> int:
    return 1 + max((generation.number for generation in generations if generation.epoch == epoch), default=0)


NEWEST = "newest"
EMPTY = "empty"
"""How a rental's home is to be filled, besides by a generation that was asked for."""
ACTOR = "copies"


def wanted(rental: Rental) -> str | None:
    """What its next placement begins with; None for one whose renter was never let in, which has nothing to lose."""
    return (rental.restore_from or NEWEST) if was_activated(rental) else None


def was_activated(rental: Rental) -> bool:
    """Whether its renter was let in anywhere, as far as the manager was told: by the end of the task, or by a salvage
    of what nobody lived to tell. Then it has files, though it may never have been active.
    """
    return rental.activated_at is not None or rental.let_in_epoch > 0


def is_without_copies(rental: Rental) -> bool:
    """Return whether its files are nowhere but where it ran: no copy of them is known, and none was asked for."""
    never = rental.last_safe_copy_at is None and not rental.began_with
    return was_activated(rental) and never and rental.restore_from is None


def nearly_full(copy: Snapshot, max_bytes: int, max_files: int) -> str:
    """Return a warning if a home holds NEARLY_FULL of what it may, or more; else an empty text."""
    held = []
    if copy.bytes >= NEARLY_FULL * max_bytes:
        held.append(f"{_megabytes(copy.bytes)} of {_megabytes(max_bytes)}")
    if copy.files >= NEARLY_FULL * max_files:
        held.append(f"{copy.files:,} of {max_files:,} files")
    if not held:
        return ""
    return f"{NEARLY_FULL_WARNING}{' and '.join(held)}: with more than that it is frozen and not copied, so make room"


def _megabytes(number: int) -> str:
    return f"{number / 10**6:,.1f} MB"


def slower_warning(interval_s: float, usual_s: float) -> str:
    """Return the warning of a home whose programs would stand still for too long if it were copied as often as usual.

    `interval_s`: the seconds between its copies, as far as they are known to be more than `usual_s`.
    """
    how_often = f"every {interval_s:.0f} s only" if interval_s > usual_s else f"less often than every {usual_s:.0f} s"
    return f"{SLOWER}{how_often}, until less changes at once"


def accepted(rental: Rental, placement: Placement, copy: Snapshot, warning: str = "", rarely: str = "") -> Step:
    """A complete copy counts, if its placement is still the one that runs. Told only when something is better now, or
    when the home has become nearly full: `warning` says that, see `nearly_full`. `rarely`: see `copied_rarely`.

    One that was begun before a planned move held it is late once it is held: it must not take the place of the last
    copy, which has every byte.
    """
    change = {"last_safe_copy_at": copy.at, "last_safe_copy_bytes": copy.bytes, "copy_problem": ""}
    change |= {"home_warning": _both(warning, rarely)}
    event = _event("rental.copied", "its files are copied from now on", rental, placement.worker_id, copy)
    told = [event] if rental.last_safe_copy_at is None or rental.copy_problem else []
    if warning and not rental.home_warning.startswith(NEARLY_FULL_WARNING):
        told.append(_event("rental.home_nearly_full", warning, rental, placement.worker_id, copy))
    return Step(_still_running(rental, placement, change, held=placement.held), tuple(told))


def _both(*warnings: str) -> str:
    return "; ".join(warning for warning in warnings if warning)


def interval_changed(rental: Rental, placement: Placement, pause_s: float, interval_s: float) -> Step:
    """Tell its owner how often a rental is copied from now on. `pause_s`: how long its programs were stopped last."""
    reason = (
        f"its programs stood still for {pause_s:.2f} s while its files were set aside, so they are copied every "
        f"{interval_s:.0f} s from now on; a smaller pause brings them back to the usual interval"
    )
    told = _event("rental.copy_interval_changed", reason, rental, placement.worker_id)
    return Step((), (told,))


def slowed(rental: Rental, placement: Placement, problem: str, rarely: str) -> Step:
    """Tell its owner that a rental is copied as soon as less of it changes. `problem`: why it was not copied now.

    `rarely` is shown until it is copied as often as usual: see `copied_rarely`.
    """
    reason = f"{problem}. It is tried again, ever later, and copied as soon as less changes"
    event = _event("rental.copy_interval_changed", reason, rental, placement.worker_id)
    full = rental.home_warning.partition(SLOWER)[0].removesuffix("; ")
    return Step(_still_running(rental, placement, {"home_warning": _both(full, rarely)}), (event,))


def failed(rental: Rental, placement: Placement, problem: str, over_limit: bool = False) -> Step | None:
    """Its files could not be copied; None when that is known already."""
    if rental.copy_problem == problem:
        return None
    kind = "rental.over_limit" if over_limit else "rental.copy_failed"
    event = _event(kind, problem, rental, placement.worker_id)
    return Step(_still_running(rental, placement, {"copy_problem": problem}), (event,))


def thawed(rental: Rental, placement: Placement, actor: str) -> Step:
    """It goes on, though its home holds more than it may."""
    problem = "it was thawed to make room, and is frozen again unless it does within ten minutes"
    event = _event("rental.thawed", problem, rental, placement.worker_id, actor=actor)
    return Step(_still_running(rental, placement, {"copy_problem": problem}), (event,))


def is_to_be_recovered(rental: Rental | None, placement: Placement) -> bool:
    """Whether what its worker still has of a lost placement is to be copied aside before it is purged.

    Also where no renter is known to have been let in: only the worker knows (NOTHING_TO_SALVAGE).
    """
    if rental is None or placement.state is not PlacementState.LOST or placement.salvaged:
        return False
    return rental.state not in ENDED | {RentalState.RELEASING}


def recovered(rental: Rental, placement: Placement, copy: Snapshot, there: Iterable[Snapshot]) -> Step:
    """What its worker still had is kept; as a salvage, unless it is just as a copy that there is already.

    And it is news that its renter was let in at that epoch: a worker that dies just then takes the outcome with it.
    `there`: all complete copies, with this one.
    """
    name, worker_id = copy.generation, placement.worker_id
    is_latest = placement.epoch >= rental.let_in_epoch
    change: dict[str, Any] = {"let_in_epoch": placement.epoch, "began_with": str(name)} if is_latest else {}
    begins = rental.restore_from is None and newest(there, replace(rental, **change)) == copy
    # One that is being made just now may have been given an older copy already.
    counts = begins and rental.state is RentalState.QUEUED
    restore = f"orion restore {rental.name} --from {name}"
    had = f"worker {worker_id} came back with its files of epoch {placement.epoch}"
    if not copy.salvage:
        reason = f"{had}: they are as in copy {name}"
    elif counts:
        reason = f"{had}: they are kept as copy {name}, the newest, with which it begins again"
    elif begins:
        reason = (
            f"{had}: they are kept as copy {name}, with which it begins again if it loses its worker before it is "
            f"copied where it is now; they are restored now by: {restore}"
        )
    else:
        reason = f"{had}: they are kept as copy {name}, and restored by: {restore}"
    change |= {"last_safe_copy_at": copy.at, "last_safe_copy_bytes": copy.bytes} if counts else {}
    writes = (
        _recovery_ends(placement),
        Write(
            kind="rental",
            id=rental.id,
            expect={"let_in_epoch": rental.let_in_epoch, "state": rental.state},
            change=change,
        ),
    )
    return Step(writes, (_event("rental.salvaged", reason, rental, worker_id, copy),))


def not_recovered(rental: Rental, placement: Placement, why: str) -> Step:
    """What its worker had beyond the last copy is lost. `why` empty: it had nothing of its own."""
    if not why:
        return Step((_recovery_ends(placement),))
    reason = (
        f"worker {placement.worker_id} came back with its files of epoch {placement.epoch}, and they could not be "
        f"copied aside before they were purged: {why}. What was written there after the last copy of that epoch is lost"
    )
    return Step((_recovery_ends(placement),), (_event("rental.salvage_failed", reason, rental, placement.worker_id),))


def _recovery_ends(placement: Placement) -> Write:
    return Write(
        kind="placement",
        id=placement.id,
        expect={"state": PlacementState.LOST, "salvaged": False},
        change={"salvaged": True},
    )


def ask_to_restore(rental: Rental, running: Placement | None, source: str, actor: str) -> Step:
    """Make it begin anew with `source`, a generation or EMPTY. What runs of it ends first, and is purged."""
    what = "without its files" if source == EMPTY else f"with copy {source}"
    if running is None:
        expect = {"state": rental.state, "epoch": rental.epoch}
        event = _event("rental.restore_asked", f"it is to begin {what}", rental, None, actor=actor)
        return Step((Write(kind="rental", id=rental.id, expect=expect, change={"restore_from": source}),), (event,))
    reason = f"it is stopped, to begin again {what}"
    stopping = move_placement(running, rental.owner, PlacementState.STOPPING, actor, reason)
    return stopping + move_rental(rental, RentalState.MIGRATING, actor, reason, running.worker_id, restore_from=source)


def began_with(report: Mapping[str, Any]) -> str:
    """Which copy a home was filled with, by the report of what filled it."""
    generation = report.get("restored", {}).get("generation") or ""
    return generation if SnapshotId.parse(generation) else ""


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
    reason += f"; not whole in it: {_first(restored['skipped'])}" if restored["skipped"] else ""
    return _event("rental.files_restored", reason, rental, worker_id, details={**restored, "age_s": round(age_s, 1)})


def lacking(report: Mapping[str, Any]) -> str:
    """Return what the explanation of a rental adds where the copy in its home is not whole; else an empty text."""
    restored = report.get("restored", {})
    skipped = restored.get("skipped")
    return f"; its files are from copy {restored['generation']}, not whole in it: {_first(skipped)}" if skipped else ""


def _first(skipped: Sequence[str]) -> str:
    return ", ".join(skipped[:NAMES_SHOWN])


def _still_running(
    rental: Rental, placement: Placement, change: Mapping[str, Any], **expect: object
) -> tuple[Write, ...]:
    """Guards of what is only true while the placement that was copied is the one that runs."""
    return (
        Write(
            kind="placement",
            id=placement.id,
            expect={"state": PlacementState.RUNNING, "epoch": placement.epoch} | expect,
            change={},
        ),
        Write(kind="rental", id=rental.id, expect={"state": RentalState.ACTIVE, "epoch": rental.epoch}, change=change),
    )


def _event(
    kind: str,
    reason: str,
    rental: Rental,
    worker_id: str | None,
    copy: Snapshot | None = None,
    details: Mapping[str, Any] | None = None,
    actor: str = ACTOR,
) -> Event:
    if copy is not None:
        details = {"generation": str(copy.generation), "bytes": copy.bytes, "files": copy.files}
    return Event(
        kind=kind,
        actor=actor,
        reason=reason,
        owner=rental.owner,
        rental_id=rental.id,
        worker_id=worker_id,
        epoch=rental.epoch,
        details=details or {},
    )
