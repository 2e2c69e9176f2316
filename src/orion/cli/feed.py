"""The command events, which shows past and new events."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

from typer import Option

from orion.cli import output
from orion.cli.session import AsJson, platform
from orion.client.sdk import Orion
from orion.client.transport import OnRetry
from orion.errors import Retryable
from orion.wire import MAX_PAGE, Event


def events(
    follow: Annotated[bool, Option("--follow", "-f", help="Also show new events as they happen.")] = False,
    rental: Annotated[str | None, Option(help="Show only events of this rental.")] = None,
    worker: Annotated[str | None, Option(help="Show only events of this worker.")] = None,
    last: Annotated[int, Option("--last", "-n", min=0, help="How many of the newest events to show.")] = 20,
    after: Annotated[int | None, Option(metavar="ID", help="Show all events after this one instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show events; with --json one object per line."""
    with platform() as (orion, _tell):
        rental_id = orion.find_rental(rental, ended=True).id if rental else None
        worker_id = orion.find_worker(worker).id if worker else None
        subject: dict[str, Any] = {"rental_id": rental_id, "worker_id": worker_id}
        if after is not None:
            shown = list(orion.events(after=after, limit=MAX_PAGE, **subject))
        else:
            wanted = max(1, last)  # at least one, whose id says where to follow from
            newest = orion.events(newest_first=True, limit=min(wanted, MAX_PAGE), **subject)
            shown = list(islice(newest, wanted))[::-1]
        reached = shown[-1].id if shown else after or 0
    for event in shown if last or after is not None else []:
        _print(event, as_json)
    if follow:
        with Orion.logged_in() as orion:
            orion.when_retrying(_note_each_reason_once())
            for event in orion.follow_events(after=reached, rental_id=rental_id, worker_id=worker_id):
                _print(event, as_json)


def _note_each_reason_once() -> OnRetry:
    """Return a function that prints the reason for a retry, unless it is the same as the last one."""
    last_reason = ""

    def note(error: Retryable, _pause_s: float) -> None:
        nonlocal last_reason
        if str(error) != last_reason:
            last_reason = str(error)
            output.note(f"orion: {output.plain(last_reason.rstrip('.'))}. Trying again.", "dim")

    return note


def _print(event: Event, as_json: bool) -> None:
    if as_json:
        return output.emit_line(event)
    about = [event.rental_id, event.worker_id, f"epoch {event.epoch}" if event.epoch else None]
    subject = " ".join(one for one in about if one)
    time = event.at.astimezone().strftime("%H:%M:%S")
    line = f"{time} {event.kind} {subject} - {event.reason} ({event.actor})"
    return output.say(output.plain(line))
