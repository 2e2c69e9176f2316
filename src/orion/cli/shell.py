"""ssh: the machine's own ssh, through the platform, with the worker's host key pinned."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from orion.cli import durations, keys, output
from orion.cli.rentals import situation
from orion.cli.session import AsJson, RentalName, platform
from orion.client import ENDED, Orion
from orion.errors import Ended, InvalidInput, LocalFault, StillWaiting, UnreadableReply
from orion.ssh import pinned_host_arguments
from orion.wire import Rental, RentalState, one_public_key

START_LOG = ".orion/start.log"
"""In the rental's home: see worker/start.py."""
SHOW_LOG = ["tail", "-n", "1000"]
_WORKER_ID = re.compile(r"[a-z0-9-]{1,64}")
_USERNAME = re.compile(r"r-[a-z0-9]{1,30}")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


def ssh(
    rental: RentalName,
    command: Annotated[
        list[str] | None, typer.Argument(help="A command to run instead of a shell.", show_default=False)
    ] = None,
    identity: Annotated[
        Path | None, typer.Option("--identity", "-i", metavar="FILE", help="The private key to log in with.")
    ] = None,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the command a terminal.")] = False,
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="How long to wait while it is queued or on the move.")
    ] = "60s",
    as_json: AsJson = False,
) -> None:
    """Open a shell in a rental, or run a command.

    The exit status is that of the command, or of ssh.
    Options for orion come before RENTAL; everything after it is the command.
    """
    found = _find(rental, wait)
    _become(ssh_arguments(found, _identity(found, identity), command or [], tty))


def logs(
    rental: RentalName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what it says from now on.")] = False,
    identity: Annotated[
        Path | None, typer.Option("--identity", "-i", metavar="FILE", help="The private key to log in with.")
    ] = None,
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="How long to wait while it is queued or on the move.")
    ] = "60s",
    as_json: AsJson = False,
) -> None:
    """Show what a rental's start command says: its log is a file in the rental, read through ssh."""
    found = _find(rental, wait)
    if found.start is None:
        raise InvalidInput(f"{found.name} was rented without a start command: orion rent --start COMMAND")
    command = SHOW_LOG + (["-F"] if follow else []) + [START_LOG]
    _become(ssh_arguments(found, _identity(found, identity), command))


def _find(rental: str, wait: str) -> Rental:
    within_s = durations.parse(wait)
    with platform(f"looking for {rental}") as (orion, tell):
        found = _active(orion, orion.find_rental(rental, ended=True), within_s, tell)
    if found.copy_problem:  # it may be frozen for that, and then nobody is let in
        output.note(f"orion: {output.plain(found.name)} is not copied: {output.plain(found.copy_problem)}", "yellow")
    return found


def _identity(found: Rental, identity: Path | None) -> Path | None:
    known = identity or keys.identity_of(found.id)
    if known is not None and not known.exists():
        raise InvalidInput(f"the key of {found.name}, {known}, is gone: give one with orion ssh -i FILE {found.name}")
    if known is None and sys.stderr.isatty():
        output.note(
            f"orion: {output.plain(found.name)} was not rented from here; if your keys are refused: "
            f"orion ssh -i FILE {output.plain(found.name)}"
        )
    return known


def ssh_arguments(rental: Rental, identity: Path | None, command: Sequence[str], tty: bool = False) -> list[str]:
    """The argument list of ssh. What came from the server is checked first: ssh would run some of it as commands."""
    worker_id, host_keys = _checked(rental)
    if command and command[0] == "--":
        command = command[1:]  # ssh, too, takes it for the end of its options
    # -P: a folder that somebody prepared must not slip its own modules in when it is the working directory.
    relay = [sys.executable, "-P", "-m", "orion.connect", rental.id]
    return [
        "ssh",
        "-o", f"ProxyCommand={shlex.join(relay).replace('%', '%%')}",
        *pinned_host_arguments(worker_id, host_keys),
        *_identity_options(identity),
        # A connection shared with an earlier one could lead to where the rental was before it moved.
        "-o", "ControlMaster=no",
        "-o", "ControlPath=none",
        # When the worker dies silently, the shell ends within a minute instead of hanging.
        "-o", "ServerAliveInterval=15",
        "-o", "ServerAliveCountMax=3",
        *(["-t"] if tty else []),
        "--",
        f"{rental.username}@{rental.name}.orion",
        *command,
    ]  # fmt: skip


def _active(orion: Orion, rental: Rental, within_s: float, tell: output.Tell) -> Rental:
    if rental.state is not RentalState.ACTIVE and rental.state not in ENDED:
        tell(situation(rental))
        rental = orion.wait_for(rental.id, RentalState.ACTIVE, within_s, lambda one: tell(situation(one)))
    if rental.state in ENDED or rental.state is RentalState.RELEASING:
        raise Ended(f"{situation(rental)}. Rent another with: orion rent")
    if rental.state is not RentalState.ACTIVE:
        raise StillWaiting(f"{situation(rental)}. Wait longer with: orion ssh --wait 10m {rental.name}")
    return rental


def _checked(rental: Rental) -> tuple[str, list[str]]:
    safe = (
        _WORKER_ID.fullmatch(rental.worker_id or "")
        and _WORKER_ID.fullmatch(rental.id)
        and _USERNAME.fullmatch(rental.username)
        and _NAME.fullmatch(rental.name)
    )
    try:
        host_keys = [one_public_key(key) for key in rental.ssh_host_keys]
    except ValueError:
        host_keys = []
    if not safe or not host_keys:
        raise UnreadableReply(f"the platform does not say how to recognise the worker of {rental.name}: try again")
    return str(rental.worker_id), host_keys


def _identity_options(identity: Path | None) -> list[str]:
    if identity is not None:
        # Without IdentitiesOnly an agent with many keys uses up the attempts before this one is tried.
        return ["-o", "IdentitiesOnly=yes", "-i", str(identity)]
    own = keys.own_key()
    return ["-i", str(own)] if own.exists() else []


def _become(arguments: list[str]) -> None:
    """Replace this process: signals, the terminal and the exit status are ssh's from here on."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(arguments[0], arguments)  # noqa: S606 - no shell is wanted
    except FileNotFoundError as error:
        raise LocalFault("ssh is not installed on this machine: apt install openssh-client") from error
