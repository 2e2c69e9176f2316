"""The mutants of tests/simulation/mutants patch the source as it is; `make mutants` shows that tests fail for each."""

from __future__ import annotations

import pytest
from simulation.mutants.catalogue import ROOT, Mutant, all_mutants


@pytest.mark.parametrize("mutant", all_mutants(), ids=lambda mutant: mutant.name)
def test_a_mutant_applies_to_the_source(mutant: Mutant) -> None:
    assert mutant.applies(), f"{mutant.file} has changed: write tests/simulation/mutants/{mutant.name}.toml anew"
    assert all((ROOT / test.split("::")[0]).exists() for test in mutant.tests)


def test_there_are_at_least_fifteen_mutants() -> None:
    assert len(all_mutants()) >= 15
