"""Which SSH key opens which rental, kept beside the login: `orion ssh` simply works after `orion rent`."""

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
from orion.wire import comment_of, named_key, one_public_key

REMEMBERED = 1000
"""Rentals whose key is kept in mind; the oldest are forgotten."""


def own_key() -> Path:
    return login.folder() / "id_ed25519"


def public_key(chosen: Path | None) -> tuple[str, Path]:
    """Return the one public key to rent with, and the file that `ssh -i` wants. Without a choice it is our own key."""
    found, identity = public_keys(chosen)
    if len(found) > 1:
        more = "rent with a file of one, and add the others with: orion keys RENTAL add FILE"
        raise InvalidInput(f"{chosen} holds {len(found)} keys: {more}")
    return found[0], identity


def listed(text: str) -> list[str]:
    """Return the public keys of a file with their comments, without blank lines and remarks.

    Raise ValueError if it has none.
    """
    lines = (line.strip() for line in text.splitlines())
    return [named_key(line) for line in lines if line and not line.startswith("#")] or [named_key("")]


def public_keys(chosen: Path | None) -> tuple[list[str], Path]:
    """Return the public keys of the chosen file, and the file that `ssh -i` wants: else our own, made if need be."""
    if chosen is None:
        _make_own_key()
        chosen = own_key()
    public = chosen if chosen.suffix == ".pub" else chosen.with_name(chosen.name + ".pub")
    try:
        found = listed(public.read_text())
    except FileNotFoundError:
        raise InvalidInput(f"there is no public key {public}: ssh-keygen -t ed25519 makes a pair") from None
    except OSError as error:
        raise InvalidInput(f"cannot read {public}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(f"what {public} holds {error}") from error
    private = public.with_suffix("")
    # Only the public half is here when an agent or a security key holds the private one: ssh -i takes it as well.
    return found, (private if private.exists() else public).absolute()


def on_this_machine() -> dict[str, tuple[str, str]]:
    """Return where this machine has a public key, and its comment: of the usual places, by the key itself."""
    found = {}
    for file in [*sorted((Path.home() / ".ssh").glob("*.pub")), own_key().with_suffix(".pub")]:
        with suppress(OSError, ValueError):  # what cannot be read, or is no key, is no help here
            text = file.read_text().strip()
            found[one_public_key(text)] = str(file.with_suffix("")), comment_of(text)
    return found


def remember(rental_id: str, identity: Path) -> None:
    """The rental stands already: where nothing can be kept, that is said and no more."""
    try:
        with _locked() as place:
            known = {**_known(), rental_id: str(identity)}
            _write(place, dict(list(known.items())[-REMEMBERED:]))
    except (LocalFault, OSError) as error:
        output.note(f"orion: {error}; get in with -i {identity}")


def forget(rental_id: str) -> None:
    if rental_id in _known():
        with _locked() as place:
            _write(place, {key: value for key, value in _known().items() if key != rental_id})


def identity_of(rental_id: str) -> Path | None:
    """The file to give to `ssh -i`; None when the rental was not rented from here."""
    known = _known().get(rental_id)
    return Path(known) if known else None


def _make_own_key() -> None:
    if own_key().exists():
        return
    try:
        _make_key_once()
    except LocalFault as error:
        raise LocalFault(f"{error}; or rent with a key of yours: --key FILE") from error


def _make_key_once() -> None:
    with _locked() as place:
        if own_key().exists():
            return
        with tempfile.TemporaryDirectory(dir=place, prefix=".key-") as folder:
            made = Path(folder) / "key"
            _run_keygen(made)
            made.with_suffix(".pub").replace(own_key().with_suffix(".pub"))
            made.replace(own_key())
    output.note(f"made an SSH key for your rentals: {own_key()}")


def _run_keygen(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "orion", "-f", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise LocalFault("ssh-keygen is missing: apt install openssh-client") from error
    except subprocess.CalledProcessError as error:
        raise LocalFault(f"ssh-keygen could not make a key: {error.stderr.strip()}") from error


def _write(place: Path, known: dict[str, str]) -> None:
    login.write_private(place / "keys.json", json.dumps(known, indent=2) + "\n")


def _known() -> dict[str, str]:
    try:
        known = json.loads((login.folder() / "keys.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


@contextmanager
def _locked() -> Iterator[Path]:
    """One command at a time changes what is kept here."""
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
