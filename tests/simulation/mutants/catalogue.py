"""The mutants: small replacements of source text, each of which breaks the code so that a test must fail."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@dataclass(frozen=True)
class Mutant:
    """A replacement of `old` by `new` in a source file."""

    name: str
    breaks: str
    """One sentence about the behaviour that the mutant breaks."""
    file: str
    """The path of the source file in the work tree."""
    old: str
    new: str
    tests: tuple[str, ...] = ()
    """Tests that fail sooner than the simulation, or instead of it; none: the simulation must fail."""

    def applies(self, root: Path = ROOT) -> bool:
        return (root / self.file).read_text().count(self.old) == 1

    def apply(self, root: Path) -> None:
        source = root / self.file
        source.write_text(source.read_text().replace(self.old, self.new))


def all_mutants() -> list[Mutant]:
    return [_read(file) for file in sorted(HERE.glob("*.toml"))]


def _read(file: Path) -> Mutant:
    fields = tomllib.loads(file.read_text())
    return Mutant(file.stem, **fields | {"tests": tuple(fields.get("tests", ()))})
