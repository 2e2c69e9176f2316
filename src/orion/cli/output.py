"""The output of the commands: tables and sentences for people, JSON for programs, and no control characters."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orion.cli import durations
from orion.errors import Ambiguous, ApiError, OrionError

Tell = Callable[[str], None]  # a function that changes the text of a progress line
MIN_FOLDED_WIDTH = 10  # columns of the terminal that a folded cell of a table has, at least
PROGRESS_AFTER_S = 0.4  # seconds after which a progress line appears


def plain(text: object) -> str:
    """Return the text with control characters made visible: escapes, line ends, bidirectional controls."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "replace").decode() for letter in str(text)
    )


def say(text: str, style: str = "") -> None:
    """Print a line on stdout. Rich's markup has no effect: a label `[red]` is printed as it is."""
    _stdout().print(Text(text, style), soft_wrap=True)


def note(text: str, style: str = "") -> None:
    """Print a line on stderr, so that stdout has the result alone."""
    Console(stderr=True, highlight=False).print(Text(text, style), soft_wrap=True)


def emit(value: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """Print JSON on stdout: an object, or an array for a list."""
    print(json.dumps(value, indent=2, default=lambda model: model.model_dump(mode="json")))


def result(value: BaseModel | Sequence[BaseModel] | dict[str, Any], as_json: bool, *lines: str) -> None:
    """Print the value as JSON, or else these lines without control characters."""
    if as_json:
        return emit(value)
    for line in lines:
        say(plain(line))
    return None


def emit_line(value: BaseModel) -> None:
    """Print a JSON object on one line and flush it, for output without an end."""
    print(json.dumps(value.model_dump(mode="json")), flush=True)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], wide: str) -> None:
    """Print a table. Only the column `wide` is folded if the terminal is narrow; the others keep their width.

    If the terminal is too narrow even for that, print each row as a list, so that no name or id is ever cut.
    """
    console = _stdout()
    cells = [[plain(cell) for cell in row] for row in rows]
    if _least_width(headings, cells, wide) > console.width:
        return _lists(headings, cells)
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        grid.add_column(heading, no_wrap=heading != wide, overflow="fold")
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    return console.print(grid)


def _least_width(headings: Sequence[str], rows: Sequence[Sequence[str]], wide: str) -> int:
    """Return the number of columns of the terminal that a table needs at least."""
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    saved = max(0, widths[list(headings).index(wide)] - MIN_FOLDED_WIDTH)
    return sum(widths) - saved + 2 * (len(widths) - 1)


def _lists(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for number, row in enumerate(rows):
        if number:
            say("")
        fields([(heading.lower(), cell) for heading, cell in zip(headings, row, strict=True)])


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair on each line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        say(f"{name:<{width}}  {plain(value)}".rstrip())


@contextmanager
def progress(text: str) -> Iterator[Tell]:
    """Show a progress line on stderr while the body runs, and yield a function that changes its text.

    Show nothing if stderr is not a terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _text: None
        return
    status = console.status(Text(plain(text)))
    starter = threading.Timer(PROGRESS_AFTER_S, status.start)
    starter.start()
    try:
        yield lambda changed: status.update(Text(plain(changed)))
    finally:
        starter.cancel()
        starter.join()
        status.stop()


def failure(error: OrionError, as_json: bool) -> None:
    """Print the error on stderr, as a sentence or as a JSON object."""
    text = f"orion: {plain(error)}"
    described: dict[str, Any] = {"code": error.code, "detail": str(error), "exit_code": error.exit_code}
    if isinstance(error, ApiError):
        described |= {"status": error.status, "request_id": error.request_id, "errors": error.errors}
        if error.status >= 500 and error.request_id:
            text += f"\n  (search the platform's log for request {plain(error.request_id)})"
    if isinstance(error, Ambiguous) and error.candidates:
        described["candidates"] = error.candidates
    if as_json:
        return print(json.dumps({"error": described}), file=sys.stderr)
    return note(text, "red")


def when(moment: datetime | None, absent: str = "-") -> str:
    """Return the time relative to now, such as `in 3 h` or `12 s ago`."""
    if moment is None:
        return absent
    seconds = (moment - datetime.now(UTC)).total_seconds()
    return f"in {durations.rough(seconds)}" if seconds > 0 else f"{durations.rough(-seconds)} ago"


def size(number: int | None, absent: str = "-") -> str:
    """Return a number of bytes in units of powers of 1000, such as `812 B` or `10 MB`."""
    if number is None:
        return absent
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} B"


def labels(pairs: dict[str, str]) -> str:
    """Return labels on one line, such as `team=blue,zone=north`."""
    return ",".join(f"{key}={value}" if value else key for key, value in sorted(pairs.items())) or "-"


def _stdout() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width, so lines for the program that reads it are not folded.
        console.width = 500
    return console
