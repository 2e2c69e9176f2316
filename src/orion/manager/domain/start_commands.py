"""The start command of a rental: when it is to be run, and when no more.

It is run once in each life of each worker's container that the rental comes to be on, and once more when its owner asks
for it. What was run is written on the placement as a mark, `RUN@BOOT`: which run was asked for, in which life of the
container. So a restart of the container, after which nothing of the rental goes on, asks for it again by itself.

How a run ended is the worker's word, written down once for each run: so a worker that lies makes one event of it.

One that keeps killing its workers is run no more: TAKEOVERS of them lost within TAKEOVERS_WITHIN_S.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orion.manager.domain.model import CommandEnd, Placement, Rental, Worker
from orion.manager.domain.states import PlacementState
from orion.manager.domain.steps import Event, Step, Write

ACTOR = "reconciler"
TAKEOVERS = 3
TAKEOVERS_WITHIN_S = 600.0
MAY_HAVE_RUN = frozenset({PlacementState.PREPARING, PlacementState.RUNNING})
"""Placements that are lost in these states may have been lost by the command."""


def mark(rental: Rental, worker: Worker) -> str:
    return f"{rental.start_run}@{worker.boot_id}"


def due(rental: Rental, placement: Placement, worker: Worker) -> str:
    """The mark with which the command is to be run there now; empty where it is not."""
    wanted = mark(rental, worker)
    is_due = bool(rental.start) and not rental.start_problem and placement.started != wanted
    return wanted if is_due else ""


def after_loss(rental: Rental, placement: Placement, wall: float) -> tuple[Mapping[str, Any], tuple[Event, ...]]:
    """What changes in a rental whose worker, or its container's life, was lost at `wall` (UTC seconds), and why.

    A wall clock that jumps makes it run once more, or once less, until its owner asks for it: nothing else.
    """
    if not rental.start or placement.state not in MAY_HAVE_RUN:
        return {}, ()
    recent = (*(at for at in rental.takeovers if abs(wall - at) < TAKEOVERS_WITHIN_S), wall)[-TAKEOVERS:]
    change: dict[str, Any] = {"takeovers": recent}
    if len(recent) < TAKEOVERS or rental.start_problem:
        return change, ()
    problem = (
        f"its start command is not run any more: {TAKEOVERS} times within {TAKEOVERS_WITHIN_S / 60:.0f} minutes it "
        f"lost the worker that it ran on. To run it again: orion start {rental.name}"
    )
    return change | {"start_problem": problem}, (_event("rental.start_stopped", ACTOR, problem, rental, placement),)


def restarted(rental: Rental, placement: Placement, worker: Worker, wall: float) -> Step | None:
    """The container restarted under a command that had been run there: that counts as a loss of its worker."""
    run, _, boot_id = placement.started.partition("@")
    if not run or boot_id == worker.boot_id or placement.state is not PlacementState.RUNNING:
        return None
    change, events = after_loss(rental, placement, wall)
    if not change:
        return None
    here = {"state": placement.state, "started": placement.started}
    writes = (
        Write(kind="placement", id=placement.id, expect=here, change=new_run("")),
        Write(kind="rental", id=rental.id, expect={"state": rental.state, "epoch": rental.epoch}, change=change),
    )
    return Step(writes, events)


def new_run(mark: str) -> dict[str, Any]:
    """Return what changes in a placement with a run of the command: of this one nobody knows an end."""
    return {"started": mark, "start_end": "", "start_ended_at": None}


def ended(rental: Rental, placement: Placement, ends: Iterable[CommandEnd]) -> Step | None:
    """The step that writes down how the run ended that the placement has had; None: nothing is known, or it is."""
    if placement.state is not PlacementState.RUNNING or not placement.started or placement.start_end:
        return None
    this = (placement.rental_id, placement.epoch, placement.started)
    end = next((end for end in ends if (end.rental_id, end.epoch, end.run) == this), None)
    if end is None:
        return None
    expect = {"state": placement.state, "started": placement.started, "start_end": ""}
    write = Write(
        kind="placement", id=placement.id, expect=expect, change={"start_end": end.how, "start_ended_at": end.at}
    )
    reason = f"its start command {in_words(end.how)}: orion logs shows what it said"
    run = {"run": end.run.partition("@")[0], "how": end.how}
    return Step((write,), (_event("rental.start_ended", ACTOR, reason, rental, placement, run),))


def in_words(how: str) -> str:
    kind, _, number = how.partition(" ")
    return {"status": f"ended with status {number}", "signal": f"was ended by signal {number}"}.get(kind, "has ended")


def run_event(rental: Rental, placement: Placement, mark: str, problem: str) -> Event:
    """`problem`: why it could not be run, in the worker's words; empty where it was."""
    kind = "rental.start_failed" if problem else "rental.started"
    reason = problem or "its start command is run: orion logs shows what it says"
    return _event(kind, ACTOR, reason, rental, placement, {"run": mark.partition("@")[0]})


def ask_to_start(rental: Rental, actor: str) -> Step:
    """Run it now, or where the rental comes to be next, whatever it did before."""
    change = {"start_run": rental.start_run + 1, "start_problem": "", "takeovers": ()}
    event = Event(
        kind="rental.start_asked",
        actor=actor,
        reason="asked for",
        owner=rental.owner,
        rental_id=rental.id,
        epoch=rental.epoch,
    )
    return Step((Write(kind="rental", id=rental.id, expect={"start_run": rental.start_run}, change=change),), (event,))


def _event(
    kind: str,
    actor: str,
    reason: str,
    rental: Rental,
    placement: Placement,
    details: Mapping[str, Any] | None = None,
) -> Event:
    owner, where = rental.owner, placement.worker_id
    return Event(
        kind=kind,
        actor=actor,
        reason=reason,
        owner=owner,
        rental_id=rental.id,
        worker_id=where,
        epoch=placement.epoch,
        details=details or {},
    )
