"""`make chaos`: one round, told as it goes. Ends with 1 when a promise was broken.

python -m chaos.runner [--seed N] [--seconds 300] [--keep DIRECTORY] [--no-postgres]

One tenant has a PostgreSQL, which the short round of the tests leaves out: its layer of the image takes minutes.
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
    arguments.add_argument("--no-postgres", action="store_true", help="no tenant has a PostgreSQL")
    wanted = arguments.parse_args()
    seed = SystemRandom().randrange(1_000_000) if wanted.seed is None else wanted.seed
    outcome = play(seed, wanted.seconds, _say, wanted.keep, not wanted.no_postgres)
    print(outcome.report())
    print(
        f"\nseed {seed}: {f'{len(outcome.violations)} promises broken' if outcome.violations else 'all promises kept'}"
    )
    return 1 if outcome.violations else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
