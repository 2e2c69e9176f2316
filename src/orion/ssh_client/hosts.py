"""The configuration by which this machine's ssh reaches the user's rentals: three files beside the login.

    config        one block for each living rental, a command that looks up an unknown name, and the verification
    rentals       the same blocks, which `config` includes after that command
    known_hosts   one line: the platform's authority for host certificates

`orion connect --learn`, which ssh runs for an unknown name, writes them as well. `config` contains the blocks, too,
because not every tool follows an Include of an included file. A line that ssh refuses would break every ssh of this
user, so the machine's ssh must first accept the new text. This module uses the standard library only.
"""

from __future__ import annotations

import binascii
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from orion import login
from orion.errors import InvalidInput, LocalFault, OrionError, UnreadableReply, no_reply, refusal
from orion.login import Login
from orion.ssh_client import stream

DOMAIN = "orion"  # the last part of a rental's host name
ANSWER_S = 15.0  # seconds to wait for each step of a request
PAGE = 500  # rentals in one page of a list
MAX_LISTED = 2000  # rentals that are read of one list, at most; an administrator's own ones have their own list
CERTIFICATE_S = 3600  # seconds for which a new certificate is valid
CONNECT_TIMEOUT_S = 180  # seconds that ssh waits for a worker: longer than `orion connect` does (KEEP_TRYING_S)
ENOUGH_S = 600  # seconds for which a stored certificate must still be valid to be used, so that later log-ins work, too
CHECK_S = 10.0  # seconds within which ssh must have read its new configuration
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")  # a word that no shell and no reader of ssh's configuration interprets
_GLOB_CLASSES = {"*": "[*]", "?": "[?]", "[": "[[]", '"': "[!-#]", "%": "[#-&]", "$": "[#-&]", "\\": "[Z-^]"}
"""Classes of glob(7) for special characters, which versions of ssh read differently; each matches at most four more."""
_ID = re.compile(r"[a-z0-9-]{1,64}")
_USERNAME = re.compile(r"r-[a-z0-9]{1,30}")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_AUTHORITY = re.compile(r"@cert-authority \*\.orion ssh-ed25519 [A-Za-z0-9+/]{20,200}={0,3}")


def folder() -> Path:
    """Return the folder of the three files."""
    return login.folder() / "ssh"


def is_configured() -> bool:
    """Return whether `orion config-ssh` was run."""
    return (folder() / "config").exists()


def learn(account: Login) -> None:
    """Ask the platform for the rentals and its authority, and write the files. Raise OrionError."""
    authority = str(_ask(account, "/api/ssh-authority").get("known_hosts"))
    write(*own_and_others(account), authority)


def learn_again() -> bool:
    """Write the files again if ssh is configured, and return whether that worked."""
    with suppress(OrionError, OSError):
        if is_configured():
            learn(login.load())
            return True
    return False


def write(own: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], authority: str) -> None:
    """Write all three files. Raise UnreadableReply if ssh could misread a value, LocalFault if ssh refuses the text."""
    check_authority(authority)
    check_folder()
    login.private_folder()
    folder().mkdir(mode=0o700, exist_ok=True)
    known = "".join(blocks(own, others, identities()))
    check_by_ssh(text := configuration(known))
    login.write_private(folder() / "known_hosts", f"{authority}\n")
    login.write_private(folder() / "rentals", known)
    login.write_private(folder() / "config", text)


def remove() -> None:
    """Delete the three files."""
    for name in ("config", "rentals", "known_hosts"):
        (folder() / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder().rmdir()


def check_folder() -> None:
    """Raise InvalidInput if there is no way to write the folder's path in ssh's configuration."""
    path = str(folder())
    if not path.isprintable() or "${" in path:
        raise InvalidInput(f"ssh would misread the path {path!r}: set XDG_CONFIG_HOME to another folder")


def include_line() -> str:
    """Return the line that includes `config`. Raise InvalidInput as `check_folder` does."""
    check_folder()
    return _include(folder() / "config")


def check_by_ssh(text: str) -> None:
    """Raise LocalFault if the machine has an ssh that refuses or misreads this text as its configuration.

    The check does not run the commands in the text, because it names a user for whom they do not apply.
    """
    if not (program := shutil.which("ssh")):
        return
    candidate = folder() / "candidate"
    command = [program, "-F", str(candidate), "-G", "-l", "r-check", f"check.{DOMAIN}"]
    try:
        login.write_private(candidate, text)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=CHECK_S, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        detail = f"ssh took longer than {CHECK_S:.0f} s to read its new configuration: nothing changed"
        raise LocalFault(detail) from error
    finally:
        candidate.unlink(missing_ok=True)
    if done.returncode or "orion.connect --unknown" not in done.stdout:
        reason = (done.stderr.strip().splitlines() or ["it does not find the included file"])[0]
        advice = "set XDG_CONFIG_HOME to a folder whose path has only letters, digits and -"
        detail = f"this machine's ssh does not accept its new configuration ({reason}), so nothing was changed"
        raise LocalFault(f"{detail}: {advice}")


def configuration(known: str) -> str:
    """Return the text of `config` with these blocks of the known rentals.

    No command contains a host name that a user typed, because ssh passes its commands to a shell.
    """
    return f"""\
# Written by orion config-ssh, which overwrites all changes; orion config-ssh --remove deletes this file.
{known}
# Looks up an unknown name. (The block of a known rental sets a user, so this does not run for known names.)
Match host *.{DOMAIN} !user r-* exec "{connect_command("--learn")}"
    {_include(folder() / "rentals")}
# Connections are not shared: a shared one would lead to the worker on which the rental was before.
Host *.{DOMAIN}
    ProxyCommand {connect_command("--unknown")}
    UserKnownHostsFile {quoted(folder() / "known_hosts")}
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    UpdateHostKeys no
    VerifyHostKeyDNS no
    CheckHostIP no
    ForwardAgent no
    ControlMaster no
    ControlPath none
    ConnectTimeout {CONNECT_TIMEOUT_S}
    ServerAliveInterval 15
    ServerAliveCountMax 3
    SendEnv LC_* COLORTERM NO_COLOR
"""


def blocks(
    own: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], identities: Mapping[str, str]
) -> Iterator[str]:
    """Yield one block for each rental, for its id and, if no other rental has it, its name.

    A name of an own rental is not given to other people's, as in `Orion.find_rental`.
    """
    for rentals, all_with_names in ((own, own), (others, [*own, *others])):
        uses = Counter(str(rental.get("name")) for rental in all_with_names)
        for rental in rentals:
            rental_id, name, username = (str(rental.get(field)) for field in ("id", "name", "username"))
            check_names(rental_id, name, username)
            hosts = [rental_id] if uses[name] > 1 else [name, rental_id]
            yield f"Host {' '.join(f'{host}.{DOMAIN}' for host in hosts)}\n"
            yield f"    User {username}\n    HostKeyAlias {rental_id}.{DOMAIN}\n"
            yield f"    ProxyCommand {connect_command(rental_id)}\n"
            yield from _identity_lines(rental_id, username, hosts, identities.get(rental_id))


def check_names(rental_id: str, name: str, username: str) -> None:
    """Raise UnreadableReply if ssh, or a shell that ssh starts, could misread one of the names."""
    if not (_ID.fullmatch(rental_id) and _NAME.fullmatch(name) and _USERNAME.fullmatch(username)):
        raise UnreadableReply("the platform sent a rental whose name ssh could misread")


def check_authority(line: str) -> None:
    """Raise UnreadableReply if the line is not a known_hosts line of the platform's authority."""
    if not _AUTHORITY.fullmatch(line):
        advice = "Check that it has the same version as orion"
        raise UnreadableReply(f"the platform did not send the key that verifies its workers. {advice}")


def connect_command(argument: str) -> str:
    """Return the command line of `orion connect` with this argument, for ssh's configuration.

    ssh passes the line to a shell; other tools split it at blanks and run it without a shell. Words that one of them
    could misread are encoded in base 64. With -P Python does not import modules from the current folder.
    """
    command = [sys.executable, "-P", "-m", "orion.connect", argument]
    if config_home := os.environ.get("XDG_CONFIG_HOME"):
        command = ["env", f"XDG_CONFIG_HOME={config_home}", *command]
    if all(_PLAIN.fullmatch(word) for word in command):
        return " ".join(command)
    return f"/bin/sh -c 'IFS=;set -f;exec {' '.join(_encoded(word) for word in command)}'"


def _encoded(word: str) -> str:
    encoded = binascii.b2a_base64(os.fsencode(word), newline=False).decode()
    return word if _PLAIN.fullmatch(word) else f"$(echo {encoded}|base64 -d)"


def _include(path: Path) -> str:
    """Return the line that includes this absolute path, in quotes."""
    return f'Include "{"".join(_GLOB_CLASSES.get(letter, letter) for letter in str(path))}"\n'


def _identity_lines(rental_id: str, username: str, hosts: list[str], recorded: str | None) -> Iterator[str]:
    """Yield the lines for the recorded key if its file exists, else for a certificate of our own key.

    ssh itself runs the command that renews the certificate. IdentitiesOnly keeps an agent with many keys from using up
    the attempts before the right key is tried. The certificate is limited to this user name, because `orion ssh` uses
    the host name NAME.orion for other people's rentals, too.
    """
    identity = Path(recorded) if recorded else login.folder() / "id_ed25519"
    if "${" not in str(identity) and str(identity).isprintable():
        yield f"    IdentityFile {quoted(identity)}\n    IdentitiesOnly yes\n"
    if recorded and identity.exists():
        return
    names = ",".join(f"{host}.{DOMAIN}" for host in hosts)
    yield f'Match host {names} user {username} exec "{connect_command(f"--certify={rental_id}")}"\n'
    yield f"    CertificateFile {quoted(certificate_file(rental_id))}\n"


def identities() -> dict[str, str]:
    """Return the recorded key file of each rental, by the rental's id."""
    try:
        known = json.loads((login.folder() / "keys.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(rental_id): str(file) for rental_id, file in known.items()} if isinstance(known, dict) else {}


def quoted(path: Path) -> str:
    """Return the path as a value of the options in which ssh looks for tokens."""
    return '"' + str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"') + '"'


def certificate_file(rental_id: str) -> Path:
    """Return the path of the certificate for a rental."""
    return login.folder() / f"{rental_id}-cert.pub"


def certify(account: Login, rental_id: str, epoch: int) -> None:
    """Store a certificate of our own key for the rental at this epoch, unless a fresh one is stored."""
    file = certificate_file(rental_id)
    with suppress(OSError, ValueError, IndexError):  # a certificate that `orion ssh` stored has no epoch and no times
        stored_epoch, wall, monotonic = map(int, file.read_text().split()[2].split("/"))
        if stored_epoch == epoch and _is_fresh(wall, monotonic):
            return
    try:
        public_key = " ".join((login.folder() / "id_ed25519.pub").read_text().split()[:2])
    except OSError as error:
        raise LocalFault("orion's own SSH key is missing. To make it, run: orion config-ssh") from error
    request = {"ssh_public_key": public_key, "ttl_s": CERTIFICATE_S}
    certificate = str(_ask(account, f"/api/rentals/{rental_id}/certificate", request).get("certificate"))
    check_certificate(certificate)
    login.write_private(file, f"{certificate} {epoch}/{int(time.time())}/{int(time.monotonic())}\n")


def _is_fresh(wall: int, monotonic: int) -> bool:
    """Return whether a certificate that was made at these seconds of the two clocks is valid for long enough.

    The worker's clock decides, which this machine does not know. Neither of its own clocks is sure: the wall clock may
    be set, and the monotonic clock stops while the machine sleeps. So the older age counts.
    """
    ages_s = (time.time() - wall, time.monotonic() - monotonic)
    return min(ages_s) >= 0 and max(ages_s) < CERTIFICATE_S - ENOUGH_S


def check_certificate(line: str) -> None:
    """Raise UnreadableReply if the line is not a certificate."""
    if not re.fullmatch(r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+", line):
        raise UnreadableReply("the platform did not send a valid certificate")


def look_up(account: Login, rental_id: str, wait_s: float) -> dict[str, Any]:
    """Return the rental once it is active or has ended, or as it is after `wait_s`. Raise OrionError."""
    return _ask(account, f"/api/rentals/{rental_id}?state=active&wait_s={wait_s:g}", within_s=ANSWER_S + wait_s)


def own_and_others(account: Login) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the living rentals of this login's owner, and those of other people, which an administrator sees.

    Rentals of one owner alone count as own ones, as no two of them have the same name; so a client reads one list.
    """
    found = _rentals(account)
    if len({str(rental.get("owner")) for rental in found}) < 2 and len(found) < MAX_LISTED:
        return found, []
    own = _rentals(account, "&mine=true")
    known = {str(rental.get("id")) for rental in own}
    return own, [rental for rental in found if str(rental.get("id")) not in known]


def _rentals(account: Login, which: str = "") -> list[Mapping[str, Any]]:
    page = _ask(account, f"/api/rentals?limit={PAGE}{which}")
    found: list[Mapping[str, Any]] = list(page.get("items") or [])
    while page.get("next") and len(found) < MAX_LISTED:
        page = _ask(account, f"/api/rentals?limit={PAGE}{which}&after={page['next']}")
        found += page.get("items") or []
    return found


def _ask(
    account: Login, path: str, body: Mapping[str, Any] | None = None, within_s: float = ANSWER_S
) -> dict[str, Any]:
    """Send a GET, or a POST if there is a body, and return the JSON of the reply. Raise OrionError."""
    import http.client  # noqa: PLC0415 - this module takes long to load, and opening a session does not need it

    try:
        with stream.connect(account, within_s) as connection:
            stream.send(connection, account, path, {"Connection": "close"}, body)
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            content = reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise no_reply(account.url, error) from error
    if reply.status not in {200, 201}:
        headers = stream.Head((name.lower(), value) for name, value in reply.getheaders())
        raise refusal(reply.status, headers, content)
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise UnreadableReply(f"{account.url} did not answer as Orion does") from error
