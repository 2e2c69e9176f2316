"""The commands snapshots and restore."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from orion.cli import output
from orion.cli.session import AsJson, RentalName, Yes, ask, confirm, platform
from orion.errors import InvalidInput
from orion.wire import Snapshot


def snapshots(rental: RentalName, as_json: AsJson = False) -> None:
    """List the snapshots of a rental's home."""
    with platform() as (orion, _tell):
        found = orion.find_rental(rental, ended=True)
        kept = orion.snapshots(found.id)
    if as_json:
        return output.emit(kept)
    if not kept:
        return output.note(f"there is no snapshot of {output.plain(found.name)} yet")
    rows = [_row(one) for one in kept]
    return output.table(["SNAPSHOT", "KIND", "AGE", "SIZE", "FILES", "INCOMPLETE"], rows, wide="INCOMPLETE")


def _row(one: Snapshot) -> list[str]:
    kind, skipped = "recovered" if one.salvage else "regular", ", ".join(one.skipped) or "-"
    return [one.generation, kind, output.when(one.at), output.size(one.bytes), str(one.files), skipped]


def restore(
    rental: RentalName,
    source: Annotated[
        str | None, Option("--from", metavar="SNAPSHOT", help="A snapshot that `orion snapshots` lists.")
    ] = None,
    empty: Annotated[bool, Option("--empty", help="Start with an empty home instead.")] = False,
    discard: Annotated[bool, Option("--discard", help="Do not make a snapshot of the present files first.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Restore a snapshot of a rental's home.

    The rental is stopped, all its processes end, and it starts again with the snapshot or with an empty home.
    """
    if (source is None) != empty:
        raise InvalidInput("give either --from SNAPSHOT or --empty. List the snapshots with: orion snapshots RENTAL")
    found = ask(lambda orion: orion.find_rental(rental))
    what = "with an empty home" if empty else f"with snapshot {source}"
    confirm(f"Stop {found.name}, end all its processes, and start it again {what}?", yes)
    if_interrupted = f"{found.name} may start again {what} all the same; see: orion show {found.name}"
    with platform(f"making a snapshot of {found.name}", if_interrupted) as (orion, _tell):
        restored = orion.restore_files(found.id, source, empty=empty, discard=discard)
    output.result(restored, as_json, f"{restored.name} starts again {what}. To watch it, run: orion events -f")
