"""docs/architecture.md shows the state machines that the manager has, and stays short enough to be read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.readme import ROOT

from orion.manager.domain.states import RENTAL_TABLE
from scripts.state_machines import TABLES, as_text, written_into

PAGE = ROOT / "docs/architecture.md"
MAX_BYTES = 10 << 10


def test_the_page_shows_the_tables_as_they_are() -> None:
    page = PAGE.read_text()
    assert written_into(page) == page, "run: PYTHONPATH=src python3 scripts/state_machines.py --write"


def test_each_state_and_each_of_its_exits_is_on_the_page() -> None:
    text = as_text()
    for kind, table in TABLES.items():
        machine = text.split(f"\n{kind}\n")[1].split("\n\n")[0]
        for state, row in table.items():
            (line,) = (line for line in machine.splitlines() if f"{line} ".startswith(f"  {state} "))
            assert all(way_out in line for way_out in row.exits)
            assert row.overdue in line


def test_a_page_with_other_tables_is_detected() -> None:
    changed = {**RENTAL_TABLE, "queued": replace(RENTAL_TABLE["queued"], owner="somebody else")}
    assert written_into(PAGE.read_text(), {**TABLES, "rental": changed}) != PAGE.read_text()


def test_a_page_without_markers_is_not_written() -> None:
    with pytest.raises(ValueError, match="markers"):
        written_into("# A page\n")


def test_the_page_is_read_in_fifteen_minutes() -> None:
    assert PAGE.stat().st_size <= MAX_BYTES
