"""The command `orion`."""

from __future__ import annotations

import sys


def main() -> None:
    from orion.cli.app import run  # noqa: PLC0415 - so that `import orion.cli` costs nothing

    sys.exit(run(sys.argv[1:]))
