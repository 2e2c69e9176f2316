"""events: what happened, and what happens."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from orion.cli import output
from orion.cli.session import AsJson, platform
from orion.client import Orion
from orion.errors import Retryable
from orion.transport import OnRetry
from orion.wire import MAX_PAGE, Event


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens from now on.")] = False,
    rental: Annotated[str | None, typer.Option(help="Only of this rental.")] = None,
    worker: Annotated[str | None, typer.Option(help="Only of this worker.")] = None,
    last: Annotated[int, typer.Option("--last", "-n", min=0, help="How many of the latest to show.")] = 20,
    after: Annotated[
        int | None, typer.Option(metavar="ID", help="Show all after the event of this number instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what happened; with --json one object per line."""
    with platform() as (orion, _tell):
        rental_id = orion.find_rental(rental, ended=True).id if rental else None
        worker_id = orion.find_worker(worker).id if worker else None
        whose: dict[str, Any] = {"rental_id": rental_id, "worker_id": worker_id}
        if after is not None:
            shown = list(orion.events(after=after, limit=MAX_PAGE, **whose))
        else:
            wanted = max(1, last)  # at least one: where to go on
            newest = orion.events(newest_first=True, limit=min(wanted, MAX_PAGE), **whose)
            shown = list(islice(newest, wanted))[::-1]
        reached = shown[-1].id if shown else after or 0
    for event in shown if last or after is not None else []:
        _print(event, as_json)
    if follow:
        with Orion.logged_in() as orion:
            orion.when_retrying(_tell_once())
            for event in orion.follow_events(after=reached, rental_id=rental_id, worker_id=worker_id):
                _print(event, as_json)


def _tell_once() -> OnRetry:
    """A reason for trying again is told when it is another than the one before."""
    told = ""

    def tell(error: Retryable, _pause_s: float) -> None:
        nonlocal told
        if str(error) != told:
            told = str(error)
            output.note(f"orion: {output.plain(told)} Trying again.", "dim")

    return tell


def _print(event: Event, as_json: bool) -> None:
    if as_json:
        return output.emit_line(event)
    about = [event.rental_id, event.worker_id, f"epoch {event.epoch}" if event.epoch else None]
    subject = " ".join(one for one in about if one)
    time = event.at.astimezone().strftime("%H:%M:%S")
    line = f"{time} {event.kind} {subject} - {event.reason} ({event.actor})"
    return output.say(output.plain(line))
