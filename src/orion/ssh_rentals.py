"""What the machine's own ssh knows of our rentals, by `orion config-ssh`: three files beside the login.

    config        the same for ever: it includes the next, asks for what is not in there, and has every host verified
    rentals       one block for each living rental: its account, its keys, and the name that its worker must prove
    known_hosts   one line: the platform's authority for hosts

`rentals` is written anew by `orion config-ssh`, `rent` and `release`, and by `orion connect --learn`, which ssh itself
runs when it is given a name that it does not know. Standard library only, as `orion.connect`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orion import login, stream
from orion.errors import OrionError, UnreadableReply, no_reply, refusal
from orion.login import Login

DOMAIN = "orion"
ANSWER_S = 15.0
PAGE = 500
MOST = 2000
"""Rentals of an administrator, who sees everybody's."""
_ID = re.compile(r"[a-z0-9-]{1,64}")
_USERNAME = re.compile(r"r-[a-z0-9]{1,30}")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_AUTHORITY = re.compile(r"@cert-authority \*\.orion ssh-ed25519 [A-Za-z0-9+/]{20,200}={0,3}")


def folder() -> Path:
    return login.folder() / "ssh"


def is_configured() -> bool:
    return (folder() / "config").exists()


def learn(account: Login) -> None:
    """Ask the platform, and write what it says. Raises OrionError."""
    authority = str(_ask(account, "/api/ssh-authority").get("known_hosts"))
    write(_rentals(account), authority)


def learn_again() -> bool:
    """The same where ssh is configured; whether that has worked."""
    with suppress(OrionError, OSError):
        if is_configured():
            learn(login.load())
            return True
    return False


def write(rentals: Iterable[Mapping[str, Any]], authority: str) -> None:
    """Raises UnreadableReply for what ssh would take for something else, OSError."""
    check_authority(authority)
    login.private_folder()
    folder().mkdir(mode=0o700, exist_ok=True)
    login.write_private(folder() / "known_hosts", f"{authority}\n")
    login.write_private(folder() / "rentals", "".join(blocks(list(rentals), _identities())))
    login.write_private(folder() / "config", configuration())


def remove() -> None:
    for name in ("config", "rentals", "known_hosts"):
        (folder() / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder().rmdir()


def configuration() -> str:
    """What ssh reads of rentals, whichever there are. Names reach no command: ssh hands a host's name to a shell."""
    known = f'"{folder() / "rentals"}"'
    return f"""\
# Written by orion config-ssh; orion config-ssh --remove takes it away. What is changed here is lost.
Include {known}

# A name that is not known yet. (Blocks of rentals name an account, so this is not run for what is known.)
Match host *.{DOMAIN} !user r-* exec "{connect_command("--learn")}"
    Include {known}

Host *.{DOMAIN}
    ProxyCommand {connect_command("--unknown")}
    UserKnownHostsFile {_quoted(folder() / "known_hosts")}
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    UpdateHostKeys no
    VerifyHostKeyDNS no
    CheckHostIP no
    ForwardAgent no
    ServerAliveInterval 15
    ServerAliveCountMax 3
"""


def blocks(rentals: list[Mapping[str, Any]], identities: Mapping[str, str]) -> Iterator[str]:
    """One for each rental; a name that several bear is nobody's, and each of those has its id."""
    names = [rental.get("name") for rental in rentals]
    for rental in rentals:
        rental_id, name, username = (str(rental.get(field)) for field in ("id", "name", "username"))
        check_names(rental_id, name, username)
        hosts = [rental_id] if names.count(name) > 1 else [name, rental_id]
        yield f"Host {' '.join(f'{host}.{DOMAIN}' for host in hosts)}\n"
        yield f"    User {username}\n    HostKeyAlias {rental_id}.{DOMAIN}\n"
        yield f"    ProxyCommand {connect_command(rental_id)}\n"
        yield from (f"    {line}\n" for line in _identity_lines(identities.get(rental_id)))


def check_names(rental_id: str, name: str, username: str) -> None:
    """Raises UnreadableReply for what ssh, or a shell that it starts, could take for something else."""
    if not (_ID.fullmatch(rental_id) and _NAME.fullmatch(name) and _USERNAME.fullmatch(username)):
        raise UnreadableReply("the platform names a rental in a way that ssh could misunderstand")


def check_authority(line: str) -> None:
    """The same for the line by which workers are recognised."""
    if not _AUTHORITY.fullmatch(line):
        raise UnreadableReply("the platform does not say how to recognise its workers: is it of this version?")


def connect_command(argument: str) -> str:
    """For ssh, which has a shell run it. -P: a folder that somebody prepared must not slip its own modules in."""
    command = [sys.executable, "-P", "-m", "orion.connect", argument]
    if place := os.environ.get("XDG_CONFIG_HOME"):
        command = ["env", f"XDG_CONFIG_HOME={place}", *command]
    return shlex.join(command).replace("%", "%%")


def _identity_lines(known: str | None) -> list[str]:
    if known:
        # Without IdentitiesOnly an agent with many keys uses up the attempts before this one is tried.
        return [f"IdentityFile {_quoted(Path(known))}", "IdentitiesOnly yes"]
    own, home = login.folder() / "id_ed25519", Path.home() / ".ssh"
    usual = [home / name for name in ("id_ed25519", "id_ecdsa", "id_rsa")]
    return [f"IdentityFile {_quoted(file)}" for file in (own, *usual) if file.exists()]


def _identities() -> dict[str, str]:
    try:
        known = json.loads((login.folder() / "keys.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(rental_id): str(file) for rental_id, file in known.items()} if isinstance(known, dict) else {}


def _quoted(path: Path) -> str:
    """For the options in which ssh looks for tokens."""
    return '"' + str(path).replace("%", "%%") + '"'


def _rentals(account: Login) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    after = ""
    while len(found) < MOST:
        page = _ask(account, f"/api/rentals?limit={PAGE}{after}")
        found += page.get("items") or []
        if not page.get("next"):
            break
        after = f"&after={page['next']}"
    return found


def _ask(account: Login, path: str) -> dict[str, Any]:
    import http.client  # noqa: PLC0415 - it takes long to load, and a session that opens does not need it

    try:
        with stream.connect(account, ANSWER_S) as connection:
            stream.send_get(connection, account, path, {"Connection": "close"})
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            body = reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise no_reply(account.url, error) from error
    if reply.status != 200:
        headers = stream.Head((name.lower(), value) for name, value in reply.getheaders())
        raise refusal(reply.status, headers, body)
    try:
        return dict(json.loads(body))
    except (ValueError, TypeError) as error:
        raise UnreadableReply(f"{account.url} answered something else than Orion does") from error
