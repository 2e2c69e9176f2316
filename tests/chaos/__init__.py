"""Chaos tests: renters work on the whole platform while faults are injected, and a checker verifies every guarantee.

The platform, its renters and bounded waits come from tests/e2e, whose modules are imported by their bare names.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
