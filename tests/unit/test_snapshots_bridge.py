"""The remote shell of the local rsync passes its two pipes and stays until the other end closes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from orion.manager.snapshots.transfer import BRIDGE, _receive_pipe_ends


def test_the_bridge_passes_its_two_pipes_and_ends_when_the_other_end_closes() -> None:
    mine, theirs = socket.socketpair()
    bridge = subprocess.Popen(
        [sys.executable, "-I", "-S", str(BRIDGE), str(theirs.fileno())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(theirs.fileno(),),
    )
    theirs.close()
    assert bridge.stdin and bridge.stdout  # noqa: PT018
    mine.settimeout(30)
    from_rsync, to_rsync = _receive_pipe_ends(mine)
    os.write(bridge.stdin.fileno(), b"asked")
    assert os.read(from_rsync, 100) == b"asked"
    os.write(to_rsync, b"answered")
    assert os.read(bridge.stdout.fileno(), 100) == b"answered"
    assert bridge.poll() is None
    mine.close()
    assert bridge.wait(timeout=30) == 0
    for end in (from_rsync, to_rsync):
        os.close(end)
    bridge.stdin.close()
    bridge.stdout.close()
