"""Print the state machines of orion.manager.domain.states, or write them into docs/architecture.md with --write.

    PYTHONPATH=src python3 scripts/state_machines.py [--write]

tests/unit/test_architecture.py fails when the page and the tables differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from orion.manager.domain import states
from orion.manager.domain.states import Row

PAGE = Path(__file__).parents[1] / "docs/architecture.md"
TABLES: Mapping[str, Mapping[str, Row]] = {
    name.removesuffix("_TABLE").lower(): table for name, table in vars(states).items() if name.endswith("_TABLE")
}
BEGIN, END = "<!-- state machines: written by scripts/state_machines.py -->\n", "<!-- state machines: end -->\n"


def as_text(tables: Mapping[str, Mapping[str, Row]] = TABLES) -> str:
    """Return all tables as one block of a page: a line for each state, in the order of its table."""
    return "```text\n" + "\n\n".join("\n".join(_lines(kind, table)) for kind, table in tables.items()) + "\n```\n"


def written_into(page: str, tables: Mapping[str, Mapping[str, Row]] = TABLES) -> str:
    """Return the text of the page with these tables between the markers. Raise ValueError if a marker is missing."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page needs both markers: {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + as_text(tables) + END + after


def _lines(kind: str, table: Mapping[str, Row]) -> list[str]:
    order = list(table)
    width = max(map(len, order))
    return [kind, *(f"  {state:{width}} {_row(row, order)}".rstrip() for state, row in table.items())]


def _row(row: Row, order: list[str]) -> str:
    exits = ", ".join(sorted(row.exits, key=order.index))
    limit = f"; {row.deadline_s:g} s, then {row.overdue}" if row.deadline_s is not None else ""
    return f"-> {exits} ({row.owner}{limit})" if exits else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them into docs/architecture.md")
    if not parser.parse_args().write:
        sys.stdout.write(as_text())
        return
    PAGE.write_text(written_into(PAGE.read_text()))


if __name__ == "__main__":
    main()
