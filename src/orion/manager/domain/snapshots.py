"""Snapshots of a rental's home: their ids, which are kept, which one a restore takes, and the steps that record them.

Only a complete snapshot counts. Snapshots are ordered by (epoch, number), so a snapshot of an earlier placement never
comes after one of a later placement.

A recovered snapshot (`salvage` in the database and the API) is made of the home that a lost worker still has when it
comes back. It may lack what was written at a later epoch, so a restore takes it without a request only if that gives up
nothing known of a later epoch (`newest`); otherwise it waits for a request (`waiting_recovered_snapshot`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from orion.manager.domain.model import Origin, Placement, Rental
from orion.manager.domain.states import ENDED, PlacementState, RentalState
from orion.manager.domain.steps import Event, Step, move_placement, move_rental, rental_event, write, write_rental

NEWEST_KEPT = 3
RECOVERED_KEPT = 2
EXPIRED_KEPT_S = 24 * 3600.0
"""Seconds for which the last snapshot of an expired rental is kept; that of a released one is removed at once."""
RECOVERED_SHOWN_S = 7 * 24 * 3600.0
"""Seconds for which a rental shows a recovered snapshot that waits for a request; it is kept and listed for longer.
A line that appeared at each log-in for ever would soon be read by no renter."""
NEARLY_FULL_WARNING = "its home holds "
"""The beginning of the warning that a home is nearly full."""
SLOWER = "so much of its home changes at once that it is copied "
"""The beginning of the warning that snapshots of a home are taken less often than usual."""
NEARLY_FULL = 0.8
"""The share of its limit at which the renter of a home is warned."""
BLOCK_BYTES = 4096
"""The bytes that an entry of a home counts for at least: on most disks a directory takes a block."""
MAX_ORIGINS = 32
"""The number of latest epochs whose origins are kept. A recovered snapshot of an earlier epoch waits for a request."""
NAMES_SHOWN = 3
"""The number of file names in a sentence about an incomplete snapshot; the event's details have all that are known."""
_ID = re.compile(r"([1-9][0-9]{0,15})-([1-9][0-9]{0,15})")


@dataclass(frozen=True, order=True)
class SnapshotId:
    """The id of a snapshot: the epoch of its placement, and its number within that epoch."""

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
    """One complete snapshot of a home."""

    id: SnapshotId
    at: float
    """UTC seconds at which the home was as in the snapshot: the start of the look at it."""
    bytes: int
    """The bytes of all entries (see `counted`). A file with several names counts once."""
    files: int
    """The number of entries of every kind: files, directories, links, FIFOs, sockets; each name counts."""
    skipped: tuple[str, ...] = ()
    """The first names of incomplete entries: missing, or without some attribute or the mode."""
    recovered: bool = False
    """Whether it is a recovered snapshot: see `newest`."""


_by_id = attrgetter("id")


def described(snapshot: Snapshot) -> dict[str, Any]:
    """Return the fields of a snapshot by their released names, as in messages, reports of tasks and `about.json`."""
    renamed = {"generation": str(snapshot.id), "salvage": snapshot.recovered, "skipped": list(snapshot.skipped)}
    return {"at": snapshot.at, "bytes": snapshot.bytes, "files": snapshot.files} | renamed


def kept(complete: Iterable[Snapshot]) -> set[SnapshotId]:
    """Return the snapshots to keep: the newest, the newest of the epoch before, and the newest recovered ones."""
    latest_first = sorted(complete, key=_by_id, reverse=True)
    regular = [snapshot.id for snapshot in latest_first if not snapshot.recovered]
    recovered = [snapshot.id for snapshot in latest_first if snapshot.recovered]
    before = [snapshot_id for snapshot_id in regular if snapshot_id.epoch < regular[0].epoch]
    return {*regular[:NEWEST_KEPT], *before[:1], *recovered[:RECOVERED_KEPT]}


def counted(blocks: int, size: int) -> int:
    """Return the bytes for which an entry of any kind counts. `blocks`: of 512 bytes; `size`: in bytes, with holes.

    The worker counts in the same way (`size_of` of orion_worker/snapshots/scan.py). BLOCK_BYTES make the two agree
    where one file system keeps a directory or a link in its inode and the other does not.
    """
    return max(512 * blocks, size, BLOCK_BYTES)


def may_stay(complete: Iterable[Snapshot], spare: SnapshotId | None) -> list[set[SnapshotId]]:
    """Return the sets of snapshots that may be kept, the largest first; the caller takes the first that has room.

    The first set is `kept` and `spare`; each next set lacks the oldest snapshot of the set before. Each set has the
    latest regular snapshot, `spare`, and the recovered ones.
    """
    all_ = list(complete)
    regular = [snapshot.id for snapshot in all_ if not snapshot.recovered]
    staying = kept(all_) | {snapshot.id for snapshot in all_ if snapshot.id == spare}
    by_choice = sorted(staying.intersection(regular) - {spare, max(regular, default=None)})
    return [staying - set(by_choice[:number]) for number in range(len(by_choice) + 1)]


def newest(complete: Iterable[Snapshot], rental: Rental) -> Snapshot | None:
    """Return the snapshot that a rental is restored from without a request; None: there is none.

    It is the latest since the renter was last activated; else the latest that grew out of the snapshot of that
    activation, which may be a recovered one; if that is unknown, the latest regular one.
    """
    ordered = sorted(complete, key=_by_id)
    since = [snapshot for snapshot in ordered if snapshot.id.epoch >= rental.activated_epoch]
    grown = _grown_from_origin(ordered, rental)
    regular = [snapshot for snapshot in ordered if not snapshot.recovered]
    return next((each[-1] for each in (since, grown, regular) if each), None)


def _grown_from_origin(ordered: Sequence[Snapshot], rental: Rental) -> list[Snapshot]:
    """Return the kept snapshots from the one that the rental began with to the latest that contains it.

    A snapshot contains the earlier ones of the same home, and the one that its home was filled with. If a snapshot has
    both kinds of successors, each lacks something of the other: those of the same home are taken, for the other home
    may be unchanged. A request for an older snapshot gives up what was later in that home.
    """
    chain = [snapshot for snapshot in ordered if str(snapshot.id) == rental.began_with]
    origin = _origin(rental, rental.activated_epoch)
    if origin is None:
        return chain
    latest, asked = SnapshotId.parse(rental.began_with), origin.requested
    while grown := _successors(latest, asked, ordered, rental):
        chain.append(grown[-1])
        latest, asked = grown[-1].id, False
    return chain


def _successors(latest: SnapshotId | None, asked: bool, ordered: Sequence[Snapshot], rental: Rental) -> list[Snapshot]:
    """Return the later snapshots that contain `latest`, oldest first. `latest` None: the home was empty.

    `asked`: a request went back to `latest`, and gave up what was later in the same home.
    """
    name = str(latest) if latest else ""
    later = [s for s in ordered if latest is None or s.id > latest]
    same_home = [s for s in later if latest and not asked and s.id.epoch == latest.epoch]
    filled_with_it = [s for s in later if Origin(s.id.epoch, name, asked) in rental.lineage]
    if latest is None and not asked:  # every snapshot contains an empty home
        filled_with_it += [s for s in later if _origin(rental, s.id.epoch) is None]
        filled_with_it.sort(key=_by_id)
    return same_home or filled_with_it


def waiting_recovered_snapshot(complete: Iterable[Snapshot], rental: Rental, wall: float) -> Snapshot | None:
    """Return the newest recovered snapshot that the rental's home does not contain, and will not after a restore.

    `wall`: UTC seconds. Without RECOVERED_SHOWN_S each one would be shown for as long as the rental lives.
    """
    if rental.state in ENDED | {RentalState.RELEASING}:
        return None
    all_ = list(complete)
    runs = rental.state is RentalState.ACTIVE
    again = newest(all_, rental)
    next_origin = rental.restore_from or (str(again.id) if again else "")
    contained = _ancestors(rental, rental.began_with if runs else next_origin)
    shown = [s for s in all_ if s.recovered and wall - s.at < RECOVERED_SHOWN_S]
    shown = [s for s in shown if not (runs and s.id.epoch >= rental.activated_epoch)]
    waiting = [s for s in shown if s.id.number > contained.get(s.id.epoch, 0)]
    return max(waiting, key=_by_id, default=None)


def _ancestors(rental: Rental, name: str) -> dict[int, int]:
    """Return the snapshots that the one named `name` contains, itself included: epoch -> latest number."""
    found: dict[int, int] = {}
    snapshot_id = SnapshotId.parse(name)
    while snapshot_id and snapshot_id.epoch not in found:
        found[snapshot_id.epoch] = snapshot_id.number
        origin = _origin(rental, snapshot_id.epoch)
        snapshot_id = SnapshotId.parse(origin.snapshot) if origin else None
    return found


def _origin(rental: Rental, epoch: int) -> Origin | None:
    return next((origin for origin in rental.lineage if origin.epoch == epoch), None)


def activated(rental: Rental, epoch: int, name: str) -> dict[str, Any]:
    """Return the changes of a rental whose renter is activated at `epoch`. `name`: the snapshot in the home, or "".

    An origin that was requested counts as requested again if the next epoch begins with it too, because then there is
    no snapshot of the epoch between them.
    """
    before = _origin(rental, rental.activated_epoch)
    same = before is not None and before.requested and before.snapshot == name
    origin = Origin(epoch, name, rental.restore_from is not None or same)
    others = [each for each in rental.lineage if each.epoch != epoch]
    return {"activated_epoch": epoch, "began_with": name, "lineage": (*others, origin)[-MAX_ORIGINS:]}


def base_of(complete: Iterable[Snapshot], epoch: int, recovered: bool) -> Snapshot | None:
    """Return the snapshot with which a new one of this epoch is compared: the latest that may be like it."""
    before = (s for s in complete if s.id.epoch <= epoch and (recovered or not s.recovered))
    return max(before, key=_by_id, default=None)


def next_number(ids: Sequence[SnapshotId], epoch: int) -> int:
    return 1 + max((each.number for each in ids if each.epoch == epoch), default=0)


NEWEST = "newest"
EMPTY = "empty"
"""The values of a restore that name no snapshot; NEWEST is used if nothing was requested."""
ACTOR = "copies"
"""The actor of events about snapshots, as it was released."""


def wanted(rental: Rental) -> str | None:
    """Return the snapshot, NEWEST or EMPTY for the next home; None if the renter was never activated."""
    return (rental.restore_from or NEWEST) if was_activated(rental) else None


def was_activated(rental: Rental) -> bool:
    """Return whether the renter was activated at any epoch, so that there may be files.

    The rental may never have been active: a recovered snapshot shows the activation if the worker could not report it.
    """
    return rental.activated_at is not None or rental.activated_epoch > 0


def is_without_snapshots(rental: Rental) -> bool:
    """Return whether the files are only where the rental ran: no snapshot is known, and none was requested."""
    never = rental.last_snapshot_at is None and not rental.began_with
    return was_activated(rental) and never and rental.restore_from is None


def nearly_full(snapshot: Snapshot, max_bytes: int, max_files: int) -> str:
    """Return a warning if a home holds NEARLY_FULL of its limit or more; else an empty text."""
    near = []
    if snapshot.bytes >= NEARLY_FULL * max_bytes:
        near.append(f"{snapshot.bytes / 10**6:,.1f} MB of {max_bytes / 10**6:,.1f} MB")
    if snapshot.files >= NEARLY_FULL * max_files:
        near.append(f"{snapshot.files:,} of {max_files:,} files")
    full = f"{NEARLY_FULL_WARNING}{' and '.join(near)}: with more than that it is frozen and not copied, so make room"
    return full if near else ""


def slower_warning(interval_s: float, usual_s: float) -> str:
    """Return the warning for a home whose programs would be paused for too long at the usual interval.

    `interval_s`: the seconds between its snapshots, if they are known to be more than `usual_s`.
    """
    how_often = f"every {interval_s:.0f} s only" if interval_s > usual_s else f"less often than every {usual_s:.0f} s"
    return f"{SLOWER}{how_often}, until less changes at once"


def accepted(rental: Rental, placement: Placement, snapshot: Snapshot, warning: str = "", slower: str = "") -> Step:
    """Return the step that records a complete snapshot, if its placement is still the one that runs.

    `warning`: see `nearly_full`; `slower`: see `slower_warning`. The step is void if the placement was quiesced
    meanwhile: this snapshot must not replace that of the final sync, which has every byte.
    """
    change = {"last_snapshot_at": snapshot.at, "last_snapshot_bytes": snapshot.bytes, "snapshot_problem": ""}
    change |= {"home_warning": _joined(warning, slower)}
    event = _event("rental.copied", "its files are copied from now on", rental, placement.worker_id, _sizes(snapshot))
    events = [event] if rental.last_snapshot_at is None or rental.snapshot_problem else []
    if warning and not rental.home_warning.startswith(NEARLY_FULL_WARNING):
        events.append(_event("rental.home_nearly_full", warning, rental, placement.worker_id, _sizes(snapshot)))
    return _if_running(rental, placement, change, *events, quiesced_for=placement.quiesced_for)


def _joined(*warnings: str) -> str:
    return "; ".join(filter(None, warnings))


def interval_changed(rental: Rental, placement: Placement, pause_s: float, interval_s: float) -> Step:
    """Return the step with the event of another interval. `pause_s`: seconds of the last pause of programs."""
    reason = (
        f"its programs were paused for {pause_s:.2f} s by a snapshot, so snapshots are taken every {interval_s:.0f} s "
        f"from now on; a shorter pause brings back the usual interval"
    )
    return Step((), (_event("rental.copy_interval_changed", reason, rental, placement.worker_id),))


def slowed(rental: Rental, placement: Placement, problem: str, slower: str) -> Step:
    """Return the step that records that snapshots are less frequent because of `problem`.

    The rental shows `slower` until snapshots are taken at the usual interval: see `slower_warning`.
    """
    reason = f"{problem}. The snapshot is tried again at growing intervals, until less changes at once"
    event = _event("rental.copy_interval_changed", reason, rental, placement.worker_id)
    full = rental.home_warning.partition(SLOWER)[0].removesuffix("; ")
    return _if_running(rental, placement, {"home_warning": _joined(full, slower)}, event)


def failed(rental: Rental, placement: Placement, problem: str, over_limit: bool = False) -> Step | None:
    """Return the step that records why no snapshot could be taken; None if that is known already."""
    if rental.snapshot_problem == problem:
        return None
    kind = "rental.over_limit" if over_limit else "rental.copy_failed"
    event = _event(kind, problem, rental, placement.worker_id)
    return _if_running(rental, placement, {"snapshot_problem": problem}, event)


def thawed(rental: Rental, placement: Placement, actor: str) -> Step:
    """Return the step that records a thaw of a rental whose home holds more than its limit."""
    problem = "it was thawed to make room, and is frozen again unless it does within ten minutes"
    event = rental_event("rental.thawed", problem, rental, placement.worker_id, actor=actor)
    return _if_running(rental, placement, {"snapshot_problem": problem}, event)


def is_to_be_recovered(rental: Rental | None, placement: Placement) -> bool:
    """Return whether a recovered snapshot of a lost placement is to be made before its worker purges it.

    A recovery is tried also if no activation is known: only the worker knows that (NOTHING_TO_RECOVER). A failed
    placement is not recovered: no renter was told that it runs.
    """
    if rental is None or placement.state is not PlacementState.LOST or placement.files_recovered:
        return False
    return rental.state not in ENDED | {RentalState.RELEASING}


def recovered(rental: Rental, placement: Placement, snapshot: Snapshot, there: Iterable[Snapshot]) -> Step:
    """Return the step that records the home on a returned worker. `there`: all complete snapshots, with this one.

    `snapshot`: the recovered snapshot, or the regular one that is equal to the home. The step also records the
    activation at that epoch, which a worker that died at once could not report.
    """
    name, worker_id = snapshot.id, placement.worker_id
    is_latest = placement.epoch >= rental.activated_epoch
    change: dict[str, Any] = {"activated_epoch": placement.epoch, "began_with": str(name)} if is_latest else {}
    is_newest = rental.restore_from is None and newest(there, replace(rental, **change)) == snapshot
    # A rental that is being made may have been filled with an older snapshot already.
    is_restored = is_newest and rental.state is RentalState.QUEUED
    restore = f"orion restore {rental.name} --from {name}"
    had = f"worker {worker_id} came back with its files of epoch {placement.epoch}"
    if not snapshot.recovered:
        reason = f"{had}: they are as in snapshot {name}"
    elif is_restored:
        reason = f"{had}: they are kept as snapshot {name}, the newest, from which it is restored"
    elif is_newest:
        reason = (
            f"{had}: they are kept as snapshot {name}, from which it is restored if it loses its worker before the "
            f"first snapshot of where it is now; to restore them now: {restore}"
        )
    else:
        reason = f"{had}: they are kept as snapshot {name}; to restore them: {restore}"
    change |= {"last_snapshot_at": snapshot.at, "last_snapshot_bytes": snapshot.bytes} if is_restored else {}
    known = write(rental, change, activated_epoch=rental.activated_epoch, state=rental.state)
    event = _event("rental.salvaged", reason, rental, worker_id, _sizes(snapshot))
    return _recovery_ends(placement) + Step((known,), (event,))


def not_recovered(rental: Rental, placement: Placement, why: str) -> Step:
    """Return the step that gives up the files of a lost placement. `why` empty: its worker had none that are new."""
    if not why:
        return _recovery_ends(placement)
    had = f"worker {placement.worker_id} came back with its files of epoch {placement.epoch}"
    lost = "What was written there after the last snapshot of that epoch is lost"
    reason = f"{had}, and they could not be recovered before they were purged: {why}. {lost}"
    event = _event("rental.salvage_failed", reason, rental, placement.worker_id)
    return _recovery_ends(placement) + Step((), (event,))


def _recovery_ends(placement: Placement) -> Step:
    return Step((write(placement, {"files_recovered": True}, state=PlacementState.LOST, files_recovered=False),))


def ask_to_restore(rental: Rental, running: Placement | None, source: str, actor: str) -> Step:
    """Return the step that requests a restore from `source`, a snapshot's name or EMPTY; `running` is stopped first."""
    begins = "without its files" if source == EMPTY else f"with snapshot {source}"
    if running is None:
        event = rental_event("rental.restore_asked", f"it is to begin {begins}", rental, actor=actor)
        return Step((write_rental(rental, {"restore_from": source}),), (event,))
    reason = f"it is stopped, to begin again {begins}"
    stopping = move_placement(running, rental.owner, PlacementState.STOPPING, actor, reason)
    return stopping + move_rental(rental, RentalState.MIGRATING, actor, reason, running.worker_id, restore_from=source)


def began_with(report: Mapping[str, Any]) -> str:
    """Return the name of the snapshot that a home was filled with, from the report of the restore; else ""."""
    name = report.get("restored", {}).get("generation") or ""
    return name if SnapshotId.parse(name) else ""


def filled(rental: Rental, worker_id: str, report: Mapping[str, Any], wall: float) -> Event | None:
    """Return the event of a restore from its report; None if no home was filled."""
    if "restored" not in report:
        return None
    restored = report["restored"]
    name = restored.get("generation")
    if not name:
        return _event("rental.started_empty", restored["reason"], rental, worker_id)
    if "at" not in restored:
        return _event("rental.files_restored", f"snapshot {name}", rental, worker_id, {"generation": name})
    age_s = max(0.0, wall - restored["at"])
    reason = f"snapshot {name}, {age_s:.0f} s old, {restored['files']} files, {restored['bytes']} bytes"
    reason += f"; incomplete in it: {_first(restored['skipped'])}" if restored["skipped"] else ""
    return _event("rental.files_restored", reason, rental, worker_id, {**restored, "age_s": round(age_s, 1)})


def lacking(report: Mapping[str, Any]) -> str:
    """Return the end of a rental's explanation if the snapshot in its home is incomplete; else an empty text."""
    restored = report.get("restored", {})
    if not restored.get("skipped"):
        return ""
    return f"; its files are from snapshot {restored['generation']}, incomplete in it: {_first(restored['skipped'])}"


def _first(skipped: Sequence[str]) -> str:
    return ", ".join(skipped[:NAMES_SHOWN])


def _if_running(rental: Rental, placement: Placement, change: dict[str, Any], *events: Event, **expect: object) -> Step:
    """Return the step that changes a rental only if the placement of the snapshot is still the one that runs."""
    runs = write(placement, {}, state=PlacementState.RUNNING, epoch=placement.epoch, **expect)
    return Step((runs, write_rental(rental, change, state=RentalState.ACTIVE)), events)


def _event(kind: str, reason: str, rental: Rental, worker_id: str, details: Mapping[str, Any] | None = None) -> Event:
    return rental_event(kind, reason, rental, worker_id, actor=ACTOR, details=details)


def _sizes(snapshot: Snapshot) -> Mapping[str, Any]:
    return {"generation": str(snapshot.id), "bytes": snapshot.bytes, "files": snapshot.files}
