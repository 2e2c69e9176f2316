"""The engine's process with work that needs no worker: `engine_stub.py SOCKET CHILDREN`.

What a job does is in its rental_id; a job that waits opens a FIFO in the socket's directory.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from orion.manager.engine.protocol import MAX_LINE_BYTES, JobLine, OutcomeLine
from orion.manager.engine.server import Server, listen

SOCKET = Path(sys.argv[1])


def run_playbook(job: JobLine, refused_after: float) -> OutcomeLine:
    what = job.vars.rental_id
    report = {"epoch": job.vars.epoch, "refused_after": refused_after}
    if what.startswith("wait"):
        report["gate"] = (SOCKET.parent / what).read_text()
    elif what == "family":
        _found_a_family()
    elif what == "raise":
        raise RuntimeError("a fault in the engine")
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "huge":
        report["filling"] = "x" * (MAX_LINE_BYTES + 1)
    elif what == "large":
        report["filling"] = "x" * (MAX_LINE_BYTES // 2)
    return OutcomeLine(id=job.id, ok=True, report=report)


def _found_a_family() -> None:
    """A child and a grandchild, each in a session of its own, as Ansible's workers are; none ever ends by itself."""
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
        else:
            break
    with (SOCKET.parent / "family").open("w") as family:
        family.write(f"{os.getpid()}\n")
    signal.pause()


if __name__ == "__main__":
    Server(listen(SOCKET), run_playbook, int(sys.argv[2])).serve()
    SOCKET.unlink()
