"""The commands ssh, logs, terminal and connect. `orion ssh` runs the machine's own ssh and reopens lost sessions."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import webbrowser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from orion import login
from orion.cli import durations, keys, output, staying
from orion.cli.rentals import notices, situation
from orion.cli.session import AsJson, RentalName, ask, platform
from orion.client.sdk import ENDED, Orion
from orion.errors import Ended, InvalidInput, LocalFault, OrionError, StillWaiting
from orion.ssh_client import hosts
from orion.ssh_client.connect import TIDY
from orion.ssh_client.connect import main as relay
from orion.ssh_command import pinned_authority_arguments, ssh_command
from orion.wire import Rental, RentalState

START_LOG = ".orion/start.log"  # the log of the start command, in the rental's home (see orion_worker/start/program.py)
OLDEST_OPENSSH = (8, 5)  # the first version of OpenSSH with KnownHostsCommand
SHORT_S = 5.0  # seconds below which a lost session counts as short
MAX_SHORT = 3  # short sessions in a row after which `orion ssh` gives up, as the cause is not the loss of a worker
RECONNECT_S = 120.0  # seconds to wait for a lost rental: a silent worker is down after 90 s, a restart takes less
DEATH_KNOWN_S = 3.0  # seconds within which the manager surely knows that a worker was killed: twice the usual time
PERSISTENT = "infocmp >/dev/null 2>&1 || export TERM=xterm-256color; exec tmux new-session -A -s orion"
"""A command that attaches to the tmux session, or makes it. It sets another TERM if the worker does not know ours."""

Identity = Annotated[Path | None, Option("--identity", "-i", metavar="FILE", help="The private key to log in with.")]
Wait = Annotated[str, Option(metavar="DURATION", help="How long to wait while the rental is queued or migrating.")]


@dataclass(frozen=True, kw_only=True)
class SshRequest:
    """The command to run in a rental, and the options of the log-in."""

    command: tuple[str, ...] = ()
    identity: Path | None = None  # the private key's file; None means orion's own key
    tty: bool = False
    certified: bool = False
    forward_agent: bool = False


def ssh(
    rental: RentalName,
    command: Annotated[list[str] | None, Argument(help="A command to run instead of a shell.")] = None,
    identity: Identity = None,
    tty: Annotated[bool, Option("--tty", "-t", help="Give the command a terminal.")] = False,
    cert: Annotated[bool, Option("--cert", help="Log in with a certificate for an hour instead of a key.")] = False,
    persist: Annotated[bool, Option("--persist", help="Run in tmux; the next session shows the same screen.")] = False,
    forward_agent: Annotated[
        bool, Option("--forward-agent", "-A", help="Let the rental's programs use your SSH agent during this session.")
    ] = False,
    wait: Wait = "60s",
    as_json: AsJson = False,
) -> None:
    """Open a shell in a rental, or run a command.

    If the connection to a shell is lost, orion opens a new shell as soon as the rental is active. A command is not run
    again, because it may have done its work.
    If this machine has no key of the rental, orion logs in with a certificate.
    The exit status is that of the command, or of ssh.
    Options for orion come before RENTAL; everything after it is the command.
    """
    found = _find(rental, wait)
    words = command or []
    words = words[1:] if words[:1] == ["--"] else words  # `--` ends the options, as for ssh
    request = _request(found, words, identity, cert, persist)
    request = replace(request, tty=tty or persist, forward_agent=forward_agent)
    arguments = _opening(found, request)
    if sys.stdin.isatty() and (persist or not request.command):
        raise Exit(_stay(found, request, arguments, durations.parse(wait)))
    _become(arguments)


def logs(
    rental: RentalName,
    follow: Annotated[bool, Option("--follow", "-f", help="Also show new output as it comes.")] = False,
    identity: Identity = None,
    wait: Wait = "60s",
    as_json: AsJson = False,
) -> None:
    """Show the output of a rental's start command.

    The output is kept in ~/.orion/start.log in the rental, and is read through ssh.
    """
    found = _find(rental, wait)
    if found.start is None:
        raise InvalidInput(f"{found.name} has no start command. To rent with one, run: orion rent --start COMMAND")
    command = ["tail", "-n", "1000", *(["-F"] if follow else []), START_LOG]
    _become(_opening(found, _request(found, command, identity)))


def _find(rental: str, wait: str) -> Rental:
    """Return the rental once it is active, and print its warnings. Raise OrionError."""
    _check_version()
    within_s = durations.parse(wait)
    with platform(f"looking for {rental}") as (orion, tell):
        orion.be_patient(within_s)
        found = _active(orion, orion.find_rental(rental, ended=True), within_s, tell)
    for notice in notices(found):  # such as that the rental is frozen, so that no log-in works
        output.note(f"orion: {notice}", "yellow")
    return found


def _opening(rental: Rental, request: SshRequest) -> list[str]:
    """Return the argument list of ssh."""
    with platform() as (orion, _tell):
        orion.be_patient(RECONNECT_S)
        return _arguments(orion, rental, request)


def terminal(
    rental: RentalName,
    show: Annotated[bool, Option("--open", help="Open the address in this machine's browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print an address that opens a terminal.

    It is for a browser and works once, within a minute, on machines without ssh. Unlike with ssh, the platform can read
    the traffic.
    """
    url = ask(lambda orion: orion.terminal_url(orion.find_rental(rental).id), f"looking for {rental}")
    output.result({"url": url}, as_json, url)
    if show and not webbrowser.open(url):
        raise LocalFault("no browser was found on this machine: open the address in a browser within a minute")


def connect(rental_id: Annotated[str, Argument(metavar="RENTAL_ID", help="The rental's id.")]) -> None:
    """Connect stdin and stdout to a rental.

    This is what ssh runs for each session, as `orion config-ssh` configures it. People use `orion ssh` instead.
    """
    raise Exit(relay([rental_id]))  # cli/__init__.py calls it directly, without loading this module


def ssh_arguments(rental: Rental, authority: str, request: SshRequest, certificate: Path | None = None) -> list[str]:
    """Return the argument list of ssh. `authority` is the known_hosts line that verifies any worker of this rental.

    The server's values are checked first, because ssh would run some of them as commands.
    """
    hosts.check_names(rental.id, rental.name, rental.username)
    hosts.check_authority(authority)
    options = [
        f"ProxyCommand={hosts.connect_command(rental.id)}",
        # Without IdentitiesOnly an agent with many keys uses up the attempts before this key is tried.
        "IdentitiesOnly=yes",
        f"IdentityFile={hosts.quoted(request.identity or keys.own_key())}",
        *([f"CertificateFile={hosts.quoted(certificate)}"] if certificate else []),
        # Connections are not shared: a shared one could lead to the worker on which the rental was before.
        "ControlMaster=no",
        "ControlPath=none",
        # If the worker dies silently, the shell ends within a minute.
        "ServerAliveInterval=15",
        "ServerAliveCountMax=3",
        # The agent is forwarded on request only, because root on the worker could use it, too.
        f"ForwardAgent={'yes' if request.forward_agent else 'no'}",
        "SendEnv=LC_* COLORTERM NO_COLOR",
    ]
    pinned = pinned_authority_arguments(f"{rental.id}.orion", authority)
    to = f"{rental.username}@{rental.name}.orion"
    return ssh_command(to, pinned, options, flags=["-t"] if request.tty else [], command=request.command)


def _request(
    rental: Rental, command: list[str], identity: Path | None, cert: bool = False, persist: bool = False
) -> SshRequest:
    """Return a request with the given key, else the recorded one, else a certificate of orion's own key."""
    recorded = None if cert else keys.identity_of(rental.id)
    if identity is None and recorded is not None and recorded.exists():
        identity = recorded
    if identity is None:
        identity, cert = keys.public_key(None)[1], True
    if persist:
        inside = [shlex.quote(" ".join(command))] if command else []
        command = [" ".join([PERSISTENT, *inside])]
    return SshRequest(command=tuple(command), identity=identity, tty=persist, certified=cert)


def _arguments(orion: Orion, rental: Rental, request: SshRequest) -> list[str]:
    authority, file = orion.ssh_authority().known_hosts, None
    if request.certified and request.identity:
        certificate = orion.certificate(rental.id, keys.public_key(request.identity)[0]).certificate
        hosts.check_certificate(certificate)
        login.private_folder()
        file = hosts.certificate_file(rental.id)
        login.write_private(file, f"{certificate}\n")
    return ssh_arguments(rental, authority, request, file)


def _stay(rental: Rental, request: SshRequest, arguments: list[str], within_s: float) -> int:
    """Run ssh, again after each lost connection, and return its exit status once it ends by itself.

    Raise OrionError if the rental does not come back.
    """
    short = 0
    while True:
        began = time.monotonic()
        left = staying.run(arguments)
        if not left.lost:
            return left.status
        sys.stderr.write(TIDY)
        short = short + 1 if time.monotonic() - began < SHORT_S else 0
        if short >= MAX_SHORT:
            reason = left.reason or "the reason is unknown"
            raise OrionError(f"the connection was lost {short} times in a row: {reason}")
        output.note(f"orion: the connection to {output.plain(rental.name)} is lost; reconnecting", "yellow")
        with platform(f"waiting for {rental.name}") as (orion, tell):
            orion.be_patient(RECONNECT_S)
            if left.at_worker:
                # Wait a moment for the manager to learn of the loss; until then it calls the rental active.
                orion.rental(rental.id, wait_s=DEATH_KNOWN_S, state=RentalState.MIGRATING)
            patience_s = max(within_s, RECONNECT_S)
            now = orion.wait_for(rental.id, RentalState.ACTIVE, patience_s, lambda one: tell(situation(one)))
            _active(orion, now, 0, tell)
            arguments = _arguments(orion, now, request)
        if now.epoch != rental.epoch:
            snapshot = f"its last snapshot: {output.when(now.last_safe_copy_at, 'none')}"
            output.note(f"orion: {output.plain(now.name)} is on another worker now; {snapshot}", "yellow")
        rental = now


def _active(orion: Orion, rental: Rental, within_s: float, tell: output.Tell) -> Rental:
    """Return the rental once it is active. Raise Ended or StillWaiting."""
    if rental.state is not RentalState.ACTIVE and rental.state not in ENDED:
        tell(situation(rental))
        rental = orion.wait_for(rental.id, RentalState.ACTIVE, within_s, lambda one: tell(situation(one)))
    if rental.state in ENDED or rental.state is RentalState.RELEASING:
        raise Ended(f"{situation(rental)}. To rent another, run: orion rent")
    if rental.state is not RentalState.ACTIVE:
        raise StillWaiting(f"{situation(rental)}. To wait longer, run: orion ssh --wait 10m {rental.name}")
    return rental


def _check_version() -> None:
    """Raise LocalFault if OpenSSH is too old for `ssh_arguments`. Accept an ssh whose version is not known."""
    try:
        asked = subprocess.run(["ssh", "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LocalFault("ssh is not installed. To install it, run: apt install openssh-client") from error
    found = re.match(r"OpenSSH_(\d+)\.(\d+)", asked.stderr)
    if found and (int(found[1]), int(found[2])) < OLDEST_OPENSSH:
        needed, here = ".".join(map(str, OLDEST_OPENSSH)), f"{found[1]}.{found[2]}"
        advice = "Run orion config-ssh once, then ssh NAME.orion"
        raise LocalFault(f"orion ssh needs OpenSSH {needed} or newer, and this machine has {here}. {advice}")


def _become(arguments: list[str]) -> None:
    """Replace this process by ssh, which then handles signals and the terminal and sets the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(arguments[0], arguments, staying.environment())  # noqa: S606 - no shell is wanted
