"""Chaos: renters at work on the whole platform while everything is taken from under it; a checker reads it all.

The platform itself, its renters and bounded waits are those of tests/e2e, whose modules are found by their bare names.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
