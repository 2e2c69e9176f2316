"""What the machine's own ssh knows of our rentals, by `orion config-ssh`: three files beside the login.

    config        one block for each living rental (its account, its keys, the name that its worker must prove); it asks
                  for a name that is not among them, and has every host verified
    rentals       the blocks again, which `config` includes after it has asked
    known_hosts   one line: the platform's authority for hosts

They are written anew by `orion config-ssh`, `rent` and `release`, and by `orion connect --learn`, which ssh itself runs
when it is given a name that it does not know. The blocks are in `config` itself because not every tool follows an
Include of an included file. Nothing is put in place before the machine's ssh has read it without complaint: a line that
ssh refuses would end every ssh of this user. Standard library only, as `orion.connect`.
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

from orion import login, stream
from orion.errors import InvalidInput, LocalFault, OrionError, UnreadableReply, no_reply, refusal
from orion.login import Login

DOMAIN = "orion"
ANSWER_S = 15.0
PAGE = 500
MOST = 2000
"""Rentals of everybody, whom an administrator sees: own ones are known besides."""
CERTIFICATE_S = 3600
"""Seconds that a certificate is asked for."""
CONNECT_TIMEOUT_S = 180
"""Seconds that ssh waits for a worker to answer: longer than `orion connect` waits for a rental (KEEP_TRYING_S)."""
ENOUGH_S = 600
"""Seconds that a certificate must still be good for, to be used again: log-ins that follow must not be surprised."""
CHECK_S = 10.0
"""Seconds within which ssh has read its configuration."""
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
"""What no shell, no ssh and no other reader of ssh's configuration takes for anything but itself."""
_GLOB_CLASSES = {"*": "[*]", "?": "[?]", "[": "[[]", '"': "[!-#]", "%": "[#-&]", "$": "[#-&]", "\\": "[Z-^]"}
"""Classes of glob(7) that match a character, and at most four others, without writing it: versions of ssh differ in
what they make of it in an Include."""
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
    own, others = own_and_others(account)
    write(own, others, authority)


def learn_again() -> bool:
    """The same where ssh is configured; whether that has worked."""
    with suppress(OrionError, OSError):
        if is_configured():
            learn(login.load())
            return True
    return False


def write(own: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], authority: str) -> None:
    """Write all three files. Raises UnreadableReply for what ssh would take for something else, LocalFault for what it
    refuses, OSError.
    """
    check_authority(authority)
    check_place()
    login.private_folder()
    folder().mkdir(mode=0o700, exist_ok=True)
    known = "".join(blocks(own, others, _identities()))
    written = configuration(known)
    check_by_ssh(written)
    login.write_private(folder() / "known_hosts", f"{authority}\n")
    login.write_private(folder() / "rentals", known)
    login.write_private(folder() / "config", written)


def remove() -> None:
    for name in ("config", "rentals", "known_hosts"):
        (folder() / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder().rmdir()


def check_place() -> None:
    """Raise InvalidInput if the folder's path cannot be written in ssh's configuration in any way."""
    place = str(folder())
    if not place.isprintable() or "${" in place:
        raise InvalidInput(f"ssh would misunderstand the path {place!r}: set XDG_CONFIG_HOME to another folder")


def include_line() -> str:
    """Return the line that includes `config`. Raises InvalidInput as `check_place`."""
    check_place()
    return _include(folder() / "config")


def check_by_ssh(written: str) -> None:
    """Raise LocalFault if the machine's ssh does not read this text as a configuration, or not as it is meant.

    Without an ssh there is nothing that it could break. No command of the text is run: the user is one of our accounts.
    """
    program = shutil.which("ssh")
    if program is None:
        return
    candidate = folder() / "candidate"
    command = [program, "-F", str(candidate), "-G", "-l", "r-check", f"check.{DOMAIN}"]
    try:
        login.write_private(candidate, written)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=CHECK_S, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise LocalFault(f"ssh did not read its configuration within {CHECK_S:.0f} s: nothing was changed") from error
    finally:
        candidate.unlink(missing_ok=True)
    if done.returncode or "orion.connect --unknown" not in done.stdout:
        said = (done.stderr.strip().splitlines() or ["it does not find what is included"])[0]
        raise LocalFault(
            f"ssh of this machine would not understand its new configuration ({said}), so nothing was changed: "
            "set XDG_CONFIG_HOME to a folder whose path has letters, digits and - only"
        )


def configuration(known: str) -> str:
    """Return what ssh reads of rentals. Names reach no command: ssh hands a host's name to a shell.

    `known` are the blocks of the rentals that are known now.
    """
    return f"""\
# Written by orion config-ssh; orion config-ssh --remove takes it away. What is changed here is lost.
{known}
# A name that is not known yet. (Blocks of rentals name an account, so this is not run for what is known.)
Match host *.{DOMAIN} !user r-* exec "{connect_command("--learn")}"
    {_include(folder() / "rentals")}
# A connection that is shared with an earlier one leads to where the rental was before it moved.
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
    """Yield one block for each rental, which has its id, and its name if that is nobody else's.

    An own rental's name goes before others', as in `Orion.find_rental`.
    """
    for rentals, rivals in ((own, own), (others, [*own, *others])):
        bearers = Counter(str(rental.get("name")) for rental in rivals)
        for rental in rentals:
            rental_id, name, username = (str(rental.get(field)) for field in ("id", "name", "username"))
            check_names(rental_id, name, username)
            hosts = [rental_id] if bearers[name] > 1 else [name, rental_id]
            yield f"Host {' '.join(f'{host}.{DOMAIN}' for host in hosts)}\n"
            yield f"    User {username}\n    HostKeyAlias {rental_id}.{DOMAIN}\n"
            yield f"    ProxyCommand {connect_command(rental_id)}\n"
            yield from _identity_lines(rental_id, username, hosts, identities.get(rental_id))


def check_names(rental_id: str, name: str, username: str) -> None:
    """Raises UnreadableReply for what ssh, or a shell that it starts, could take for something else."""
    if not (_ID.fullmatch(rental_id) and _NAME.fullmatch(name) and _USERNAME.fullmatch(username)):
        raise UnreadableReply("the platform names a rental in a way that ssh could misunderstand")


def check_authority(line: str) -> None:
    """The same for the line by which workers are recognised."""
    if not _AUTHORITY.fullmatch(line):
        raise UnreadableReply("the platform does not say how to recognise its workers: is it of this version?")


def connect_command(argument: str) -> str:
    """Return the command for ssh, which has a shell run it; other tools split it at blanks and run it without one.

    A word that any of them could misunderstand stands there in base 64. -P: a folder that somebody prepared must not
    slip its own modules in.
    """
    command = [sys.executable, "-P", "-m", "orion.connect", argument]
    if place := os.environ.get("XDG_CONFIG_HOME"):
        command = ["env", f"XDG_CONFIG_HOME={place}", *command]
    if all(_PLAIN.fullmatch(word) for word in command):
        return " ".join(command)
    return f"/bin/sh -c 'IFS=;set -f;exec {' '.join(_spelt(word) for word in command)}'"


def _spelt(word: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    return f"$(echo {binascii.b2a_base64(os.fsencode(word), newline=False).decode()}|base64 -d)"


def _include(path: Path) -> str:
    """An absolute path in quotes, for ~ is no home in quotes."""
    return f'Include "{"".join(_GLOB_CLASSES.get(letter, letter) for letter in str(path))}"\n'


def _identity_lines(rental_id: str, username: str, hosts: list[str], recorded: str | None) -> Iterator[str]:
    """The recorded key if its file is there, else a certificate for our own, made anew when ssh is about to need it.

    With IdentitiesOnly: an agent with many keys would use up the attempts before the right one is tried. The
    certificate is for that account alone: `orion ssh` uses the host name NAME.orion for another's rental too.
    """
    identity = Path(recorded) if recorded else login.folder() / "id_ed25519"
    if "${" not in str(identity) and str(identity).isprintable():
        yield f"    IdentityFile {quoted(identity)}\n    IdentitiesOnly yes\n"
    if recorded and identity.exists():
        return
    names = ",".join(f"{host}.{DOMAIN}" for host in hosts)
    yield f'Match host {names} user {username} exec "{connect_command(f"--certify={rental_id}")}"\n'
    yield f"    CertificateFile {quoted(certificate_file(rental_id))}\n"


def _identities() -> dict[str, str]:
    try:
        known = json.loads((login.folder() / "keys.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(rental_id): str(file) for rental_id, file in known.items()} if isinstance(known, dict) else {}


def quoted(path: Path) -> str:
    """Return the path as a value of the options in which ssh looks for tokens."""
    return '"' + str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"') + '"'


def certificate_file(rental_id: str) -> Path:
    return login.folder() / f"{rental_id}-cert.pub"


def certify(account: Login, rental_id: str, epoch: int) -> None:
    """Have a certificate of our own key for that rental at that epoch in its file. Raises OrionError."""
    file = certificate_file(rental_id)
    with suppress(OSError, ValueError, IndexError):  # one that `orion ssh` left says neither
        held_epoch, wall, monotonic = map(int, file.read_text().split()[2].split("/"))
        if held_epoch == epoch and _is_fresh(wall, monotonic):
            return
    try:
        public_key = " ".join((login.folder() / "id_ed25519.pub").read_text().split()[:2])
    except OSError as error:
        raise LocalFault("orion's own key is not there: orion config-ssh makes it") from error
    asked = {"ssh_public_key": public_key, "ttl_s": CERTIFICATE_S}
    signed = str(_ask(account, f"/api/rentals/{rental_id}/certificate", asked).get("certificate"))
    check_certificate(signed)
    login.write_private(file, f"{signed} {epoch}/{int(time.time())}/{int(time.monotonic())}\n")


def _is_fresh(wall: int, monotonic: int) -> bool:
    """Return whether a certificate that was asked for at these seconds of two clocks still serves.

    It ends by the worker's clock, which this machine does not know. Of its own, one may be set and one stops in sleep.
    """
    ages_s = (time.time() - wall, time.monotonic() - monotonic)
    return min(ages_s) >= 0 and max(ages_s) < CERTIFICATE_S - ENOUGH_S


def check_certificate(line: str) -> None:
    """Raise UnreadableReply for what is no certificate."""
    if not re.fullmatch(r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+", line):
        raise UnreadableReply("the platform sent something else than a certificate")


def look_up(account: Login, rental_id: str, wait_s: float) -> dict[str, Any]:
    """The rental, once it is active or has ended, or after `wait_s`. Raises OrionError."""
    return _ask(account, f"/api/rentals/{rental_id}?state=active&wait_s={wait_s:g}", within_s=ANSWER_S + wait_s)


def own_and_others(account: Login) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the living rentals of this login's name, and those that an administrator sees besides. Raises OrionError.

    All that one owner has counts as own: no two of them bear the same name. So for a client one list is enough.
    """
    found = _rentals(account)
    if len({str(rental.get("owner")) for rental in found}) < 2 and len(found) < MOST:
        return found, []
    own = _rentals(account, "&mine=true")
    known = {str(rental.get("id")) for rental in own}
    return own, [rental for rental in found if str(rental.get("id")) not in known]


def _rentals(account: Login, which: str = "") -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    after = ""
    while len(found) < MOST:
        page = _ask(account, f"/api/rentals?limit={PAGE}{which}{after}")
        found += page.get("items") or []
        if not page.get("next"):
            break
        after = f"&after={page['next']}"
    return found


def _ask(
    account: Login, path: str, body: Mapping[str, Any] | None = None, within_s: float = ANSWER_S
) -> dict[str, Any]:
    """Send a GET, or a POST where there is a body. Raises OrionError."""
    import http.client  # noqa: PLC0415 - it takes long to load, and a session that opens does not need it

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
        raise UnreadableReply(f"{account.url} answered something else than Orion does") from error
