"""The commands below `orion admin`: backup, restore and confirm-clock."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Typer

from orion.cli import output
from orion.cli.session import AsJson, Yes, ask, confirm, platform
from orion.client.sdk import Orion
from orion.errors import InvalidInput, LocalFault, Retryable
from orion.wire import RentalName, RestorePlan

commands = Typer(no_args_is_help=True, help="Back up and restore the platform.")

RESTART_S = 60.0  # seconds to wait for the manager's restart
_SHOWN = 10  # rentals that are named before the rest is only counted


@commands.command()
def backup(
    file: Annotated[str, Argument(metavar="FILE", help="The file to make; - is stdout.")], as_json: AsJson = False
) -> None:
    """Write a copy of the database to a file.

    The platform keeps running meanwhile.
    """
    if file == "-":
        with platform("copying the database") as (orion, _tell):
            return orion.backup(sys.stdout.buffer)
    target = Path(file)
    if target.exists():
        raise InvalidInput(f"{target} already exists: give another name")
    partial = target.with_name(f".{target.name}.partial")
    try:
        _write(partial)
        partial.rename(target)
    except OSError as error:
        raise LocalFault(f"{target} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    size = target.stat().st_size
    text = f"{target}: {size >> 10} KiB. It does not contain the secrets: see docs/operations.md"
    return output.result({"file": str(target), "bytes": size}, as_json, text)


@commands.command("confirm-clock")
def confirm_clock(yes: Yes = False, as_json: AsJson = False) -> None:
    """Make the manager trust its clock again."""
    problem = ask(lambda orion: orion.status().clock)
    if problem is None:
        return output.result({"confirmed": False}, as_json, "The manager already trusts its clock.")
    confirm(f"The manager's clock: {problem}. Is it right now? Rentals that are over by it end at once", yes)
    ask(lambda orion: orion.confirm_clock())
    return output.result({"confirmed": True}, as_json, "The manager trusts its clock from now on.")


@commands.command()
def restore(
    file: Annotated[Path, Argument(metavar="FILE", help="A file of `orion admin backup`.")],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Restore a backup; the manager restarts with it."""
    try:
        with file.open("rb") as stream, platform("examining the backup") as (orion, _tell):
            plan = orion.plan_restore(stream)
    except OSError as error:
        raise LocalFault(f"{file} cannot be read: {error.strerror}") from error
    if not as_json:
        _show(plan)
    confirm("Restore it?", yes)
    if_interrupted = "the restore may continue; see: docker compose logs manager_app"
    with platform("restarting the manager", if_interrupted) as (orion, _tell):
        done = orion.restore(plan)
        _wait_for_restart(orion)
    both = plan.model_dump(mode="json") | done.model_dump(mode="json")
    kept = f"restored; the former database is kept beside it as {done.kept_as}"
    output.result(both, as_json, kept, "To watch the workers come back, run: orion status")


def _write(partial: Path) -> None:
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream, platform("copying the database") as (orion, _tell):
        orion.backup(stream)
        stream.flush()
        os.fsync(stream.fileno())


def _show(plan: RestorePlan) -> None:
    last = output.when(plan.last_event_at)
    output.say(f"The backup's last event was {last}, and it has {plan.rentals} living rentals.")
    if plan.forgotten:
        output.say(f"Not in the backup, so locked on their workers until you decide: {_names(plan.forgotten)}")
    if plan.revived:
        output.say(f"Ended since the backup, so made again with empty homes: {_names(plan.revived)}")


def _names(rentals: list[RentalName]) -> str:
    shown = ", ".join(output.plain(f"{one.name} of {one.owner}") for one in rentals[:_SHOWN])
    return shown + (f" and {len(rentals) - _SHOWN} more" if len(rentals) > _SHOWN else "")


def _wait_for_restart(orion: Orion) -> None:
    """Return when the manager has stopped answering and answers again. Raise LocalFault after RESTART_S.

    Return as well if it answers all requests for a quarter of that time: then it restarted between two of them.
    """
    began, away = time.monotonic(), False
    while time.monotonic() - began < RESTART_S:
        time.sleep(0.3)
        try:
            orion.healthz()
        except Retryable:
            away = True
            continue
        if away or time.monotonic() - began > RESTART_S / 4:
            return
    raise LocalFault("the manager has not come back yet. To see why, run on the platform's machine: make logs")
