"""The SSH keys of this machine, and a file beside the login that records which key opens which rental."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orion import login
from orion.cli import output
from orion.errors import InvalidInput, LocalFault
from orion.ssh_client.hosts import identities
from orion.wire import comment_of, named_key, one_public_key

REMEMBERED = 1000  # rentals whose key is recorded, at most; the oldest records are dropped


def own_key() -> Path:
    """Return the path of orion's own private key."""
    return login.folder() / "id_ed25519"


def public_key(chosen: Path | None) -> tuple[str, Path]:
    """Return the public key to rent with, and the file to pass to `ssh -i`. The default is orion's own key."""
    found, identity = public_keys(chosen)
    if len(found) > 1:
        advice = "rent with a file that holds one key, then add the others with: orion keys RENTAL add FILE"
        raise InvalidInput(f"{chosen} holds {len(found)} keys: {advice}")
    return found[0], identity


def listed(text: str) -> list[str]:
    """Return the public keys in the text of a file, with their comments. Raise ValueError if there are none."""
    lines = (line.strip() for line in text.splitlines())
    return [named_key(line) for line in lines if line and not line.startswith("#")] or [named_key("")]


def public_keys(chosen: Path | None) -> tuple[list[str], Path]:
    """Return the public keys in a file, and the file to pass to `ssh -i`.

    The default is orion's own key, which is made if it does not exist.
    """
    if chosen is None:
        chosen = own_key()
        if not chosen.exists():
            _make_own_key()
    public = chosen if chosen.suffix == ".pub" else chosen.with_name(chosen.name + ".pub")
    try:
        found = listed(public.read_text())
    except FileNotFoundError:
        raise InvalidInput(f"there is no public key {public}. To make a key pair, run: ssh-keygen -t ed25519") from None
    except OSError as error:
        raise InvalidInput(f"cannot read {public}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(f"{public}: a key {error}") from error
    private = public.with_suffix("")
    # If an agent or a security key holds the private key, only the public file exists; ssh -i accepts it, too.
    return found, (private if private.exists() else public).absolute()


def on_this_machine() -> dict[str, tuple[str, str]]:
    """Return the private key's path and the comment of each key in ~/.ssh and of orion's own, by the public key."""
    found = {}
    for file in [*sorted((Path.home() / ".ssh").glob("*.pub")), own_key().with_suffix(".pub")]:
        with suppress(OSError, ValueError):  # skip files that cannot be read or are not keys
            text = file.read_text().strip()
            found[one_public_key(text)] = str(file.with_suffix("")), comment_of(text)
    return found


def remember(rental_id: str, identity: Path) -> None:
    """Record which key opens the rental. If that fails, print a note, because the rental exists already."""
    try:
        with _locked() as place:
            known = {**identities(), rental_id: str(identity)}
            _write(place, dict(list(known.items())[-REMEMBERED:]))
    except (LocalFault, OSError) as error:
        output.note(f"orion: {error}; log in with the option -i {identity}")


def forget(rental_id: str) -> None:
    """Delete the record of the rental's key."""
    if rental_id in identities():
        with _locked() as place:
            _write(place, {key: value for key, value in identities().items() if key != rental_id})


def identity_of(rental_id: str) -> Path | None:
    """Return the file to pass to `ssh -i`, or None if this machine did not rent the rental."""
    known = identities().get(rental_id)
    return Path(known) if known else None


def _make_own_key() -> None:
    try:
        with _locked() as place:
            if own_key().exists():
                return
            with tempfile.TemporaryDirectory(dir=place, prefix=".key-") as folder:
                made = Path(folder) / "key"
                _run_keygen(made)
                made.with_suffix(".pub").replace(own_key().with_suffix(".pub"))
                made.replace(own_key())
    except LocalFault as error:
        raise LocalFault(f"{error}; or rent with your own key: --key FILE") from error
    output.note(f"made an SSH key for your rentals: {own_key()}")


def _run_keygen(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "orion", "-f", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise LocalFault("ssh-keygen is missing. To install it, run: apt install openssh-client") from error
    except subprocess.CalledProcessError as error:
        raise LocalFault(f"ssh-keygen could not make a key: {error.stderr.strip()}") from error


def _write(place: Path, known: dict[str, str]) -> None:
    login.write_private(place / "keys.json", json.dumps(known, indent=2) + "\n")


@contextmanager
def _locked() -> Iterator[Path]:
    """Yield the folder of the keys while no other command can change the files in it. Raise LocalFault."""
    try:
        place = login.private_folder()
        handle = os.open(place / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalFault(f"cannot keep keys in {login.folder()}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield place
    finally:
        os.close(handle)
