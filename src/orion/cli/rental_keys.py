"""The command keys, which lists and changes the keys of a rental."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Typer

from orion.cli import keys, output
from orion.cli.session import AsJson, RentalName, Yes, ask, confirm, platform
from orion.errors import InvalidInput, NotFound, StillWaiting
from orion.wire import Key

commands = Typer(no_args_is_help=True)


@commands.callback()
def _keys_of(context: Context, rental: RentalName) -> None:
    """List, add and remove a rental's keys."""
    context.obj = rental


@commands.command("ls")
def list_keys(context: Context, as_json: AsJson = False) -> None:
    """List the keys that open the rental."""
    found = ask(lambda orion: orion.keys(orion.find_rental(context.obj).id))
    return _show(found, as_json)


@commands.command("add")
def add_key(
    context: Context,
    file: Annotated[
        Path | None, Argument(help="A file with a public key on each line; - is stdin. Default: orion's own key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let more keys open the rental."""
    # First, so that no key is made if the user or the rental is unknown.
    rental = ask(lambda orion: orion.find_rental(context.obj))
    if file is not None and str(file) == "-":
        added, identity = _from_stdin(), None
    else:
        added, identity = keys.public_keys(file)
    if_interrupted = f"the key may have been added; see: orion keys {rental.name} ls"
    with platform("adding the key", if_interrupted) as (orion, _tell):
        for key in added:
            found = orion.add_key(rental.id, key)
    if identity is not None and keys.identity_of(rental.id) is None:
        keys.remember(rental.id, identity)
    _report(found, as_json)


@commands.command("rm")
def remove_key(
    context: Context,
    key: Annotated[str, Argument(help="The key's id or fingerprint (orion keys RENTAL ls).")],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove a key from the rental.

    Sessions that the key opened continue. The last key cannot be removed.
    """
    with platform() as (orion, _tell):
        rental = orion.find_rental(context.obj)
        known = orion.keys(rental.id)
    found = next((one for one in known if key in {one.id, one.fingerprint}), None)
    if found is None:
        detail = f"{rental.name} has no key {key!r}. List its keys with: orion keys {rental.name} ls"
        raise NotFound(404, "not_found", detail)
    confirm(f"Remove the key {found.fingerprint} from {rental.name}?", yes)
    if_interrupted = f"the key may have been removed; see: orion keys {rental.name} ls"
    left = ask(lambda orion: orion.remove_key(rental.id, found.id), "removing the key", if_interrupted)
    _report(left, as_json)


def _from_stdin() -> list[str]:
    try:
        return keys.listed(sys.stdin.read())
    except ValueError as error:
        raise InvalidInput(f"stdin: a key {error}") from error


def _show(found: list[Key], as_json: bool) -> None:
    if as_json:
        return output.emit(found)
    here, nowhere = keys.on_this_machine(), ("-", "")
    rows = []
    for one in found:
        file, comment = here.get(one.public_key, nowhere)
        kind, in_place = one.public_key.split()[0], "yes" if one.in_place else "not yet"
        rows.append([one.id, one.fingerprint, kind, in_place, one.comment or comment or "-", file])
    headings = ["ID", "FINGERPRINT", "KIND", "IN PLACE", "COMMENT", "ON THIS MACHINE"]
    return output.table(headings, rows, wide="FINGERPRINT")


def _report(found: list[Key], as_json: bool) -> None:
    """Show the keys. Raise StillWaiting if the worker lacks some of them."""
    _show(found, as_json)
    if not all(one.in_place for one in found):
        detail = "the rental's worker does not have them yet; the platform sends them by itself"
        raise StillWaiting(f"the keys are changed, but {detail}")
