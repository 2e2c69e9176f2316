"""A short round of chaos; `make chaos` runs longer ones, each with another seed."""

from __future__ import annotations

import os
import sys

import pytest

from chaos.round import play

SEED = int(os.environ.get("ORION_CHAOS_SEED", "5"))
SECONDS = 80.0
"""Seconds of faults. With start, settling and reading the round takes three minutes."""


@pytest.mark.timeout(900)
def test_every_guarantee_holds_while_faults_are_injected_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = play(SEED, SECONDS, lambda text: print(text, file=sys.stderr))
    with capsys.disabled():
        print(f"\nchaos, seed {SEED}: " + "; ".join(f"{what}: {value}" for what, value in outcome.figures.items()))
    assert not outcome.violations, outcome.report()
