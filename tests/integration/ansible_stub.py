"""The engine's process with work that needs no worker: `ansible_stub.py SOCKET RUNNERS PATIENCE_S DIRECTORY`.

The rental_id of a job determines its behaviour. A waiting job opens a FIFO in the socket's directory. The jobs of one
run are done one after the other.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from orion.manager.ansible.protocol import BatchMessage, BatchOrder, ResultMessage
from orion.manager.ansible.runners import ReportResult
from orion.manager.ansible.server import Server, bind
from orion.manager.channel import MAX_LINE_BYTES

SOCKET = Path(sys.argv[1])


def play(batch: BatchMessage, say: ReportResult) -> None:
    orders = [order for of_host in batch.hosts for order in of_host.orders]
    for order in orders:
        say(done(order, len(orders)))


def done(order: BatchOrder, together: int) -> ResultMessage:
    what = order.order.rental_id
    report = {"epoch": order.order.epoch, "refused_after": order.refused_after, "together": together}
    if what.startswith("wait"):
        with (SOCKET.parent / f"{what}-begun").open("a") as begun:
            begun.write(f"{os.getpid()}\n")
        report["gate"] = (SOCKET.parent / what).read_text()
    elif what.startswith("unreachable"):
        return ResultMessage(number=order.number, ok=False, message=f"not there, with {together}", unreachable=True)
    elif what == "family":
        _found_a_family()
        signal.pause()
    elif what == "orphans":
        if _found_a_family():
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    elif what == "raise":
        raise RuntimeError("a fault in the engine")
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "huge":
        report["filling"] = "x" * (MAX_LINE_BYTES + 1)
    elif what == "large":
        report["filling"] = "x" * (MAX_LINE_BYTES // 2)
    return ResultMessage(number=order.number, report=report)


def _found_a_family() -> bool:
    """Start a child and a grandchild, each in a session of its own, as Ansible's workers; none ends by itself.

    Each writes its number to the file `family`. True in their parent, once both have: it may die then.
    """
    reading, writing = os.pipe()
    first = True
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            first = False
        else:
            break
    with (SOCKET.parent / "family").open("a") as family:
        family.write(f"{os.getpid()}\n")
    os.close(writing)
    if first:
        os.read(reading, 1)
    return first


if __name__ == "__main__":
    Server(
        listening=bind(SOCKET),
        play=play,
        most_runners=int(sys.argv[2]),
        directory=Path(sys.argv[4]),
        patience_s=float(sys.argv[3]),
    ).serve()
    SOCKET.unlink()
