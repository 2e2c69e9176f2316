"""What every command shares: its options, and the connection to the platform."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from orion.cli import output
from orion.client import Orion
from orion.errors import InvalidInput, Retryable


def _also_before_the_command(context: typer.Context, value: bool) -> bool:
    """`orion --json ls` means `orion ls --json`."""
    return value or bool(context.find_root().params.get("as_json"))


AsJson = Annotated[
    bool, typer.Option("--json", callback=_also_before_the_command, help="Print JSON, errors too (on stderr).")
]
RentalName = Annotated[str, typer.Argument(metavar="RENTAL", help="Its name or id.", show_default=False)]
WorkerName = Annotated[str, typer.Argument(metavar="WORKER", help="Its id or hostname.", show_default=False)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@contextmanager
def platform(doing: str = "", if_interrupted: str = "") -> Iterator[tuple[Orion, output.Tell]]:
    """Yield the connection, and a function that tells a watching person what is going on.

    `if_interrupted` says what Ctrl-C leaves behind.
    """
    with (
        _explained(if_interrupted),
        Orion.logged_in() as orion,
        output.progress(doing or "asking the platform") as tell,
    ):

        def retrying(error: Retryable, pause_s: float) -> None:
            tell(f"{error}; trying again in {pause_s:.0f} s")

        orion.when_retrying(retrying)
        yield orion, tell


@contextmanager
def _explained(if_interrupted: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if if_interrupted:
            output.note(f"\norion: {output.plain(if_interrupted)}")
        raise


def confirm(question: str, yes: bool) -> None:
    """Ask a person; a script must have said --yes."""
    if yes:
        return
    if not typer.get_text_stream("stdin").isatty():
        raise InvalidInput("there is nobody to ask here: add --yes")
    typer.confirm(output.plain(question), abort=True, err=True)
