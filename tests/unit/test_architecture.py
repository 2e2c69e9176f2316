"""docs/architecture.md shows the state machines that the manager has, and stays short enough to be read.

Constructors show what they are given: at most three arguments by position.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.readme import ROOT

from orion.manager.domain.states import RENTAL_TABLE
from scripts.state_machines import TABLES, as_text, written_into

SOURCES = [file for folder in ("src", "worker") for file in (ROOT / folder).rglob("*.py")]
MOST_BY_POSITION = 3
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


def by_position(made: ast.ClassDef) -> int:
    """Return the number of arguments that the constructor of a class takes by position."""
    for part in made.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return len(part.args.args) - 1
    decorators = [ast.unparse(one) for one in made.decorator_list]
    if not any(one.startswith("dataclass") and "kw_only=True" not in one for one in decorators):
        return 0
    fields = [part for part in made.body if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part)]
    return sum("init=False" not in ast.unparse(part) for part in fields)


def classes(files: list[Path]) -> Iterator[tuple[str, ast.ClassDef]]:
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{file.relative_to(ROOT)}: {node.name}", node


def test_constructors_take_at_most_three_arguments_by_position() -> None:
    found = {name: by_position(made) for name, made in classes(SOURCES)}
    assert len(found) > 300
    assert {name: number for name, number in found.items() if number > MOST_BY_POSITION} == {}


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("@dataclass(frozen=True)\nclass A:\n    a: int\n    b: int\n    c: int\n    d: int = 0", 4),
        ("@dataclass(kw_only=True)\nclass A:\n    a: int\n    b: int\n    c: int\n    d: int", 0),
        ("@dataclass\nclass A:\n    a: ClassVar[int]\n    b: int = field(init=False)\n    c: int", 1),
        ("class A:\n    def __init__(self, a, b, c, d): ...", 4),
        ("class A:\n    def __init__(self, a, *, b, c, d): ...", 1),
    ],
)
def test_arguments_by_position_are_counted(source: str, number: int) -> None:
    (made,) = ast.parse(source).body
    assert isinstance(made, ast.ClassDef)
    assert by_position(made) == number
