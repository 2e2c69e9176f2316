"""The mutants: the code broken on purpose, each a small replacement of source text that a test must notice."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@dataclass(frozen=True)
class Mutant:
    name: str
    breaks: str
    """In words, what is wrong with it."""
    file: str
    """In the work tree."""
    old: str
    new: str
    tests: tuple[str, ...] = ()
    """Those that notice it sooner than the simulation, or where that does not; none: the simulation must."""

    def applies(self, root: Path = ROOT) -> bool:
        return (root / self.file).read_text().count(self.old) == 1

    def apply(self, root: Path) -> None:
        source = root / self.file
        source.write_text(source.read_text().replace(self.old, self.new))


def all_mutants() -> list[Mutant]:
    return [_read(file) for file in sorted(HERE.glob("*.toml"))]


def _read(file: Path) -> Mutant:
    told = tomllib.loads(file.read_text())
    return Mutant(file.stem, **told | {"tests": tuple(told.get("tests", ()))})
