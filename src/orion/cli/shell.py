"""ssh: the machine's own ssh, through the platform, which comes back by itself where a session is lost."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from orion import login
from orion.cli import durations, keys, output, staying
from orion.cli.rentals import notices, situation
from orion.cli.session import AsJson, RentalName, platform
from orion.client import ENDED, Orion
from orion.connect import TIDY
from orion.connect import main as relay
from orion.errors import AlreadyEnded, InvalidInput, LocalFault, OrionError, StillWaiting
from orion.ssh import pinned_authority_arguments, ssh_command
from orion.ssh_rentals import (
    certificate_file,
    check_authority,
    check_certificate,
    check_names,
    connect_command,
    quoted,
)
from orion.wire import Rental, RentalState

START_LOG = ".orion/start.log"
"""In the rental's home: see orion_worker/start/program.py."""
SHOW_LOG = ["tail", "-n", "1000"]
OLDEST = (8, 5)
"""The first OpenSSH with KnownHostsCommand."""
SHORT_S = 5.0
MOST_SHORT = 3
"""Sessions in a row that were lost before they had lasted: then something else is wrong than a worker."""
COMES_BACK_S = 120.0
"""A worker that falls silent is down after 90 s; the manager is restarted within less."""
KNOWN_WITHIN_S = 3.0
"""Twice what the manager needs to be sure that a worker that was killed is gone."""
PERSISTENT = "infocmp >/dev/null 2>&1 || export TERM=xterm-256color; exec tmux new-session -A -s orion"
"""Comes back to the screen that is there, or makes one; also for terminals that the worker has never heard of."""


@dataclass(frozen=True)
class Wish:
    """What is to run there, and how to log in. `identity` None: with orion's own key."""

    command: tuple[str, ...] = ()
    identity: Path | None = None
    tty: bool = False
    certified: bool = False
    forward_agent: bool = False


def ssh(
    rental: RentalName,
    command: Annotated[
        list[str] | None, typer.Argument(help="A command to run instead of a shell.", show_default=False)
    ] = None,
    identity: Annotated[
        Path | None, typer.Option("--identity", "-i", metavar="FILE", help="The private key to log in with.")
    ] = None,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the command a terminal.")] = False,
    cert: Annotated[
        bool, typer.Option("--cert", help="Log in by a certificate for an hour, not by a key that the rental knows.")
    ] = False,
    persist: Annotated[
        bool, typer.Option("--persist", help="In tmux: whoever comes back finds the screen as it was.")
    ] = False,
    forward_agent: Annotated[
        bool,
        typer.Option(
            "--forward-agent", "-A", help="Let programs there use your SSH agent, as long as the session lasts."
        ),
    ] = False,
    wait: Annotated[
        str, typer.Option(metavar="DURATION", help="How long to wait while it is queued or on the move.")
    ] = "60s",
    as_json: AsJson = False,
) -> None:
    """Open a shell in a rental, or run a command.

    A shell that is lost, with its worker or on the way, is opened again as soon as the rental is there. A command is
    not: it may have done its work.
    A rental of which this machine has no key is opened by a certificate.
    The exit status is that of the command, or of ssh.
    Options for orion come before RENTAL; everything after it is the command.
    """
    found = _find(rental, wait)
    wish = _wish(found, _after_two_dashes(command or []), identity, tty, cert, persist)
    wish = replace(wish, forward_agent=forward_agent)
    arguments = _opening(found, wish)
    if sys.stdin.isatty() and (persist or not wish.command):
        raise typer.Exit(_stay(found, wish, arguments, durations.parse(wait)))
    _become(arguments)


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
    """Show what a rental's start command says.

    Its log is ~/.orion/start.log in the rental, and is read through ssh.
    """
    found = _find(rental, wait)
    if found.start is None:
        raise InvalidInput(f"{found.name} was rented without a start command: orion rent --start COMMAND")
    command = SHOW_LOG + (["-F"] if follow else []) + [START_LOG]
    _become(_opening(found, _wish(found, command, identity)))


def _find(rental: str, wait: str) -> Rental:
    _check_version()
    within_s = durations.parse(wait)
    with platform(f"looking for {rental}") as (orion, tell):
        orion.be_patient(within_s)
        found = _active(orion, orion.find_rental(rental, ended=True), within_s, tell)
    for notice in notices(found):  # it may be frozen for what it holds, and then nobody is let in
        output.note(f"orion: {notice}", "yellow")
    return found


def _opening(rental: Rental, wish: Wish) -> list[str]:
    with platform() as (orion, _tell):
        orion.be_patient(COMES_BACK_S)
        return _arguments(orion, rental, wish)


def terminal(
    rental: RentalName,
    show: Annotated[bool, typer.Option("--open", help="Open it in this machine's browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the address of a terminal in a browser.

    The address is good once, for a minute. It works where there is no ssh. Unlike with ssh, the platform can read what
    passes.
    """
    with platform(f"looking for {rental}") as (orion, _tell):
        url = orion.terminal_url(orion.find_rental(rental).id)
    if as_json:
        output.emit({"url": url})
    else:
        output.say(url)
    if show and not webbrowser.open(url):
        raise LocalFault("no browser was found on this machine: open the address in one yourself, within a minute")


def connect(
    rental_id: Annotated[str, typer.Argument(metavar="RENTAL_ID", help="The rental's id.", show_default=False)],
) -> None:
    """What ssh runs for each session: not for people.

    Its stdin and stdout become one SSH connection to the rental. `orion config-ssh` has ssh run it.
    """
    raise typer.Exit(relay([rental_id]))  # cli/__init__.py does so without loading any of this


def ssh_arguments(rental: Rental, authority: str, wish: Wish, certificate: Path | None = None) -> list[str]:
    """The argument list of ssh. What came from the server is checked first: ssh would run some of it as commands.

    `authority`: the line by which the worker is recognised, whichever it is, as this rental's.
    """
    check_names(rental.id, rental.name, rental.username)
    check_authority(authority)
    options = [
        f"ProxyCommand={connect_command(rental.id)}",
        *_identity_options(wish.identity),
        *([f"CertificateFile={quoted(certificate)}"] if certificate else []),
        # A connection shared with an earlier one could lead to where the rental was before it moved.
        "ControlMaster=no",
        "ControlPath=none",
        # When the worker dies silently, the shell ends within a minute instead of hanging.
        "ServerAliveInterval=15",
        "ServerAliveCountMax=3",
        # Only who asks for it this time: whoever is root there could use the agent as well.
        f"ForwardAgent={'yes' if wish.forward_agent else 'no'}",
        "SendEnv=LC_* COLORTERM NO_COLOR",
    ]
    pinned = pinned_authority_arguments(f"{rental.id}.orion", authority)
    to = f"{rental.username}@{rental.name}.orion"
    return ssh_command(to, pinned, options, flags=["-t"] if wish.tty else [], command=wish.command)


def _wish(
    rental: Rental,
    command: Sequence[str],
    identity: Path | None,
    tty: bool = False,
    cert: bool = False,
    persist: bool = False,
) -> Wish:
    """By the key that was given, or the one that the rental was rented with, or by a certificate for orion's own."""
    recorded = None if cert else keys.identity_of(rental.id)
    if identity is None and recorded is not None and recorded.exists():
        identity = recorded
    if identity is None:
        identity, cert = keys.public_key(None)[1], True
    if persist:
        inside = [shlex.quote(" ".join(command))] if command else []
        command, tty = [" ".join([PERSISTENT, *inside])], True
    return Wish(tuple(command), identity, tty, cert)


def _after_two_dashes(command: list[str]) -> list[str]:
    return command[1:] if command[:1] == ["--"] else command  # ssh, too, takes it for the end of its options


def _arguments(orion: Orion, rental: Rental, wish: Wish) -> list[str]:
    authority = orion.ssh_authority().known_hosts
    certificate = _new_certificate(orion, rental, wish.identity) if wish.certified and wish.identity else None
    return ssh_arguments(rental, authority, wish, certificate)


def _new_certificate(orion: Orion, rental: Rental, identity: Path) -> Path:
    public_key, _ = keys.public_key(identity)
    signed = orion.certificate(rental.id, public_key).certificate
    check_certificate(signed)
    login.private_folder()
    file = certificate_file(rental.id)
    login.write_private(file, f"{signed}\n")
    return file


def _stay(rental: Rental, wish: Wish, arguments: list[str], within_s: float) -> int:
    """Be ssh until it ends by itself; the status of that. Raises OrionError where the rental does not come back."""
    short = 0
    while True:
        began = time.monotonic()
        left = staying.run(arguments)
        if not left.lost:
            return left.status
        sys.stderr.write(TIDY)
        short = short + 1 if time.monotonic() - began < SHORT_S else 0
        if short >= MOST_SHORT:
            raise OrionError(f"the connection was lost {short} times in a row: {left.reason or 'nobody said why'}")
        output.note(f"orion: the connection to {output.plain(rental.name)} is lost; coming back", "yellow")
        with platform(f"waiting for {rental.name}") as (orion, tell):
            orion.be_patient(COMES_BACK_S)
            if left.there:
                # That its worker is gone is known a moment later: whoever asks at once is told that it is active.
                orion.rental(rental.id, wait_s=KNOWN_WITHIN_S, state=RentalState.MIGRATING)
            patience_s = max(within_s, COMES_BACK_S)
            now = orion.wait_for(rental.id, RentalState.ACTIVE, patience_s, lambda one: tell(situation(one)))
            _active(orion, now, 0, tell)
            arguments = _arguments(orion, now, wish)
        if now.epoch != rental.epoch:
            copied = output.when(now.last_safe_copy_at, "never")
            output.note(
                f"orion: {output.plain(now.name)} is on another worker; its files were copied {copied}", "yellow"
            )
        rental = now


def _active(orion: Orion, rental: Rental, within_s: float, tell: output.Tell) -> Rental:
    if rental.state is not RentalState.ACTIVE and rental.state not in ENDED:
        tell(situation(rental))
        rental = orion.wait_for(rental.id, RentalState.ACTIVE, within_s, lambda one: tell(situation(one)))
    if rental.state in ENDED or rental.state is RentalState.RELEASING:
        raise AlreadyEnded(f"{situation(rental)}. Rent another with: orion rent")
    if rental.state is not RentalState.ACTIVE:
        raise StillWaiting(f"{situation(rental)}. Wait longer with: orion ssh --wait 10m {rental.name}")
    return rental


def _identity_options(identity: Path | None) -> list[str]:
    # Without IdentitiesOnly an agent with many keys uses up the attempts before this one is tried.
    identity = identity or keys.own_key()
    return ["IdentitiesOnly=yes", f"IdentityFile={quoted(identity)}"]


def _check_version() -> None:
    """Raise LocalFault for an OpenSSH that does not know what ssh_arguments asks for. What is unknown may know it."""
    try:
        said = subprocess.run(["ssh", "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LocalFault("ssh is not installed on this machine: apt install openssh-client") from error
    found = re.match(r"OpenSSH_(\d+)\.(\d+)", said.stderr)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        needed, here = ".".join(map(str, OLDEST)), f"{found[1]}.{found[2]}"
        raise LocalFault(
            f"orion ssh needs OpenSSH {needed} or newer, and this machine has {here}: type orion config-ssh once, "
            "then ssh NAME.orion"
        )


def _become(arguments: list[str]) -> None:
    """Replace this process: signals, the terminal and the exit status are ssh's from here on."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(arguments[0], arguments, staying.environment())  # noqa: S606 - no shell is wanted
