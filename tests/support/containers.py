"""Helpers of all tests with containers."""

import subprocess
import time

NOT_FROZEN = "unable to freeze"
PAUSED_WITHIN_S = 30


def pause(container: str) -> None:
    """Stop all processes of a container at once.

    With cgroups of version 1 runc gives up where processes are made while it freezes, and leaves another try to its
    caller (github.com/opencontainers/runc, pull requests 2791 and 4388).
    """
    deadline = time.monotonic() + PAUSED_WITHIN_S
    command = ["docker", "pause", container]
    while (done := subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)).returncode:
        assert NOT_FROZEN in done.stderr, f"{' '.join(command)}: {done.stderr}"
        assert time.monotonic() < deadline, f"not within {PAUSED_WITHIN_S} s: {' '.join(command)}: {done.stderr}"
