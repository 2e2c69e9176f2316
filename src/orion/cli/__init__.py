"""The command `orion`: its entry point, which loads the commands only when they are needed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process and exit with its status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["connect"] and not {"-h", "--help"} & set(arguments):
        # ssh starts `orion connect` for every session, so it must not load the modules of the other commands.
        from orion.ssh_client.connect import main as connect  # noqa: PLC0415

        sys.exit(connect(arguments[1:]))
    from orion.cli.app import run  # noqa: PLC0415 - so that `import orion.cli` costs nothing

    sys.exit(run(arguments))
