"""snapshots, restore: the copies of a rental's files."""

from __future__ import annotations

from typing import Annotated

import typer

from orion.cli import output
from orion.cli.session import AsJson, RentalName, Yes, confirm, platform
from orion.errors import InvalidInput


def snapshots(rental: RentalName, as_json: AsJson = False) -> None:
    """List the copies of a rental's files that are kept."""
    with platform() as (orion, _tell):
        found = orion.find_rental(rental, ended=True)
        copies = orion.snapshots(found.id)
    if as_json:
        return output.emit(copies)
    if not copies:
        return output.note(f"there is no copy of {output.plain(found.name)} yet")
    rows = [
        [
            one.generation,
            "salvage" if one.salvage else "copy",
            output.when(one.at),
            output.size(one.bytes),
            str(one.files),
            ", ".join(one.skipped) or "-",
        ]
        for one in copies
    ]
    return output.table(["GENERATION", "KIND", "AGE", "SIZE", "FILES", "NOT WHOLE"], rows, wide="NOT WHOLE")


def restore(
    rental: RentalName,
    source: Annotated[
        str | None, typer.Option("--from", metavar="GENERATION", help="A copy that `orion snapshots` lists.")
    ] = None,
    empty: Annotated[bool, typer.Option("--empty", help="Begin again without any files.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Do not copy first what is there now.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Go back to an older copy of a rental's files.

    The rental is stopped, all that runs in it ends, and it begins again with that copy, or without files.
    """
    if (source is None) != empty:
        raise InvalidInput("give either --from GENERATION or --empty; orion snapshots lists the copies")
    with platform() as (orion, _tell):
        found = orion.find_rental(rental)
    what = "without its files" if empty else f"with copy {source}"
    confirm(f"Stop {found.name}, end all that runs in it, and begin again {what}?", yes)
    goes_on = f"{found.name} may begin again {what} all the same; see: orion show {found.name}"
    with platform(f"copying {found.name} as it is now", goes_on) as (orion, _tell):
        asked = orion.restore_files(found.id, source, empty=empty, discard=discard)
    if as_json:
        return output.emit(asked)
    return output.say(f"{output.plain(asked.name)} begins again {what}; watch it with: orion events -f")
