"""The options that commands share, and the connection to the platform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

import typer
from typer import Argument, Option

from orion.cli import output
from orion.client.sdk import Orion
from orion.errors import InvalidInput


def _also_before(context: typer.Context, value: bool) -> bool:
    """Return the option's value, also for `orion --json ls`, which means `orion ls --json`."""
    return value or bool(context.find_root().params.get("as_json"))


AsJson = Annotated[bool, Option("--json", callback=_also_before, help="Print JSON; also errors, on stderr.")]
RentalName = Annotated[str, Argument(metavar="RENTAL", help="The rental's name or id.")]
WorkerName = Annotated[str, Argument(metavar="WORKER", help="The worker's id or hostname.")]
_Reply = TypeVar("_Reply")
Yes = Annotated[bool, Option("--yes", "-y", help="Do not ask for confirmation.")]


@contextmanager
def platform(doing: str = "", if_interrupted: str = "") -> Iterator[tuple[Orion, output.Tell]]:
    """Yield a connection and a function that changes the text of the progress line, which begins with `doing`.

    Ctrl-C prints `if_interrupted`, which says what continues on the platform.
    """
    try:
        with Orion.logged_in() as orion, output.progress(doing or "asking the platform") as tell:
            orion.when_retrying(lambda error, pause_s: tell(f"{error}; trying again in {pause_s:.0f} s"))
            yield orion, tell
    except KeyboardInterrupt:
        if if_interrupted:
            output.note(f"\norion: {output.plain(if_interrupted)}")
        raise


def ask(call: Callable[[Orion], _Reply], doing: str = "", if_interrupted: str = "") -> _Reply:
    """Return the result of one call of the platform. The other arguments are those of `platform`."""
    with platform(doing, if_interrupted) as (orion, _tell):
        return call(orion)


def confirm(question: str, yes: bool) -> None:
    """Ask a person for confirmation, unless `yes`. Raise InvalidInput if stdin is not a terminal."""
    if yes:
        return
    if not typer.get_text_stream("stdin").isatty():
        raise InvalidInput("this needs a confirmation, and stdin is not a terminal: add --yes")
    typer.confirm(output.plain(question), abort=True, err=True)
