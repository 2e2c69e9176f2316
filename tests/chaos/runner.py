"""`make chaos`: one round, told as it goes. Ends with 1 when a promise was broken.

python -m chaos.runner [--seed N] [--seconds 300] [--keep DIRECTORY]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import SystemRandom

from chaos.round import play


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seed", type=int, default=None, help="of the plan; another one each time by default")
    arguments.add_argument("--seconds", type=float, default=300, help="how long the nemesis is at it")
    arguments.add_argument("--keep", type=Path, help="a directory for the history and what all containers said")
    wanted = arguments.parse_args()
    seed = SystemRandom().randrange(1_000_000) if wanted.seed is None else wanted.seed
    outcome = play(seed, wanted.seconds, lambda text: print(text, flush=True), wanted.keep)
    print(outcome.report())
    print(
        f"\nseed {seed}: {f'{len(outcome.violations)} promises broken' if outcome.violations else 'all promises kept'}"
    )
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
