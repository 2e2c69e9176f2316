"""The command `orion`."""

from __future__ import annotations

import sys


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["connect"] and not {"-h", "--help"} & set(arguments):
        # ssh starts it for every session: it must not wait for what the other commands need.
        from orion.connect import main as connect  # noqa: PLC0415

        sys.exit(connect(arguments[1:]))
    from orion.cli.app import run  # noqa: PLC0415 - so that `import orion.cli` costs nothing

    sys.exit(run(arguments))
