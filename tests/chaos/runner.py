"""`make chaos`: run one round, print its progress, and exit with status 1 if a guarantee was violated.

python -m chaos.runner [--seed N] [--seconds 300] [--keep DIRECTORY] [--no-postgres]

One tenant has a PostgreSQL. The short round of the tests has none, because building that image takes minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import SystemRandom

from chaos.round import play


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seed", type=int, default=None, help="seed of the plan; random by default")
    arguments.add_argument("--seconds", type=float, default=300, help="seconds in which faults are injected")
    arguments.add_argument("--keep", type=Path, help="directory for the history and the logs of all containers")
    arguments.add_argument("--no-postgres", action="store_true", help="run without the tenant's PostgreSQL")
    wanted = arguments.parse_args()
    seed = SystemRandom().randrange(1_000_000) if wanted.seed is None else wanted.seed
    outcome = play(seed, wanted.seconds, _say, wanted.keep, not wanted.no_postgres)
    print(outcome.report())
    print(f"\nseed {seed}: {f'{len(outcome.violations)} violations' if outcome.violations else 'no violation'}")
    return 1 if outcome.violations else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
