"""The start command of a rental: when it is run, how it ended, and when it is run no more.

The command is run once in each boot of each worker that gets the rental, and once more at each request of its owner.
The placement has a mark of the last run, `RUN@BOOT`: the number of the requested run, and the boot id of the worker. A
restart of the worker's container changes the boot id, so the command is run again. It is run no more after TAKEOVERS
losses of its worker within TAKEOVERS_WITHIN_S seconds.

The end of a run is recorded once, so a worker that lies about ends makes one event for each run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orion.manager.domain.model import CommandEnd, Placement, Rental, Worker
from orion.manager.domain.states import PlacementState
from orion.manager.domain.steps import Event, Step, rental_event, write, write_rental

TAKEOVERS = 3
TAKEOVERS_WITHIN_S = 600.0
MAY_HAVE_RUN = frozenset({PlacementState.PREPARING, PlacementState.RUNNING})
"""The states of placements in which the start command may have run."""


def mark(rental: Rental, worker: Worker) -> str:
    return f"{rental.start_run}@{worker.boot_id}"


def due(rental: Rental, placement: Placement, worker: Worker) -> str:
    """Return the mark of the run that is due on a placement; empty if none is."""
    wanted = mark(rental, worker)
    is_due = bool(rental.start) and not rental.start_problem and placement.start_mark != wanted
    return wanted if is_due else ""


def after_loss(rental: Rental, placement: Placement, wall: float) -> tuple[Mapping[str, Any], tuple[Event, ...]]:
    """Return the changes and events of a rental whose worker was lost, or restarted, at `wall` (UTC seconds).

    A jump of the wall clock can only make the command run once more, or once less, until the owner's next request.
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
    event = rental_event("rental.start_stopped", problem, rental, placement.worker_id, epoch=placement.epoch)
    return change | {"start_problem": problem}, (event,)


def restarted(rental: Rental, placement: Placement, worker: Worker, wall: float) -> Step | None:
    """Return the step after a restart of the worker's container, which counts as a loss; None if there was none."""
    run, _, boot_id = placement.start_mark.partition("@")
    if not run or boot_id == worker.boot_id or placement.state is not PlacementState.RUNNING:
        return None
    change, events = after_loss(rental, placement, wall)
    if not change:
        return None
    restart = write(placement, new_run(""), state=placement.state, start_mark=placement.start_mark)
    return Step((restart, write_rental(rental, change)), events)


def new_run(mark: str) -> dict[str, Any]:
    """Return the changes of a placement with a new run of the command, whose end is not known."""
    return {"start_mark": mark, "start_end": "", "start_ended_at": None}


def ended(rental: Rental, placement: Placement, ends: Iterable[CommandEnd]) -> Step | None:
    """Return the step that records the end of the placement's run; None if no end is reported, or it is recorded."""
    if placement.state is not PlacementState.RUNNING or not placement.start_mark or placement.start_end:
        return None
    this = (placement.rental_id, placement.epoch, placement.start_mark)
    end = next((end for end in ends if (end.rental_id, end.epoch, end.run) == this), None)
    if end is None:
        return None
    change = {"start_end": end.how, "start_ended_at": end.at}
    reason = f"its start command {in_words(end.how)}: orion logs shows what it said"
    details = {"run": end.run.partition("@")[0], "how": end.how}
    where, epoch = placement.worker_id, placement.epoch
    event = rental_event("rental.start_ended", reason, rental, where, epoch=epoch, details=details)
    return Step(
        (write(placement, change, state=placement.state, start_mark=placement.start_mark, start_end=""),), (event,)
    )


def in_words(how: str) -> str:
    kind, _, number = how.partition(" ")
    return {"status": f"ended with status {number}", "signal": f"was ended by signal {number}"}.get(kind, "has ended")


def run_event(rental: Rental, placement: Placement, mark: str, problem: str) -> Event:
    """Return the event of a run. `problem`: the worker's reason why it could not be run; empty if it was."""
    kind = "rental.start_failed" if problem else "rental.started"
    reason = problem or "its start command is run: orion logs shows what it says"
    details = {"run": mark.partition("@")[0]}
    return rental_event(kind, reason, rental, placement.worker_id, epoch=placement.epoch, details=details)


def ask_to_start(rental: Rental, actor: str) -> Step:
    """Return the step of an owner's request: the command is run again here, or on the next worker."""
    change = {"start_run": rental.start_run + 1, "start_problem": "", "takeovers": ()}
    event = rental_event("rental.start_asked", "asked for", rental, actor=actor)
    return Step((write(rental, change, start_run=rental.start_run),), (event,))
