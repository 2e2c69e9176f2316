"""The snapshot service: takes and restores snapshots of homes. `python -m orion.manager.snapshots.server`, as root.

Its capabilities (CAP_SETUID, SETGID, CHOWN, KILL) let it act under a rental's uid, but not read files of other uids. It
listens on a Unix socket for the manager and forks one process for each request. That process ends at its deadline, or
when the manager disconnects, with all that it started.

The service has one thread, so that a fork is safe. It only accepts connections and reaps children.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from orion.manager.channel import BlockingChannel, BrokenLine, ChannelError, decode_as
from orion.manager.snapshots.jobs import Directories, SnapshotJob
from orion.manager.snapshots.lifetime import Abandoned, Lifetime
from orion.manager.snapshots.port import SnapshotError
from orion.manager.snapshots.protocol import MAX_REQUEST_BYTES, SnapshotReply, SnapshotRequest

REQUEST_WITHIN_S = 5.0
MAX_JOBS = 32

log = logging.getLogger("orion.snapshots")


def serve(listening: socket.socket, directories: Directories) -> None:
    """Serve until SIGTERM or SIGINT. Jobs that still run end when the manager disconnects."""
    wakeup, wake = socket.socketpair()
    for end in (wakeup, wake, listening):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    jobs: set[int] = set()
    gc.freeze()
    listening.listen(64)
    while not stopping:
        wanted = [wakeup, listening] if len(jobs) < MAX_JOBS else [wakeup]
        ready, _, _ = select.select(wanted, [], [])
        if wakeup in ready:
            wakeup.recv(4096)
        jobs = {job for job in jobs if not os.waitpid(job, os.WNOHANG)[0]}
        if listening in ready:
            with suppress(BlockingIOError):
                client, _ = listening.accept()
                with client:
                    job = os.fork()
                    if job == 0:
                        _run_job(listening, client, directories)
                    jobs.add(job)


def _run_job(listening: socket.socket, client: socket.socket, directories: Directories) -> None:
    """Run one job in the child, and never return."""
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        listening.close()
        client.setblocking(True)
        with suppress(Abandoned, BrokenPipeError, ChannelError):
            reply, job = _answer(client, directories)
            BlockingChannel(client).send(reply)
            if job:
                job.tidy()
        status = 0
    except BaseException:
        log.exception("a job failed")
    finally:
        sys.stderr.flush()
        os._exit(status)


def _answer(client: socket.socket, directories: Directories) -> tuple[SnapshotReply, SnapshotJob | None]:
    """Return the reply and its job, which is None if the request is not valid. Raise Abandoned or ChannelError."""
    client.settimeout(REQUEST_WITHIN_S)
    line = BlockingChannel(client, MAX_REQUEST_BYTES).receive()
    if line is None:
        raise Abandoned
    client.settimeout(None)
    try:
        request = decode_as(SnapshotRequest, line)
    except BrokenLine as error:
        return SnapshotReply(ok=False, code="invalid_request", message=f"{error.field}: {error.reason}"), None
    job = SnapshotJob(request, directories, Lifetime(client, request.deadline_s))
    try:
        return job.run(), job
    except SnapshotError as error:
        return SnapshotReply(ok=False, code=error.code, message=str(error), restored=error.restored), job
    except OSError as error:
        log.exception("a job failed")
        return SnapshotReply(ok=False, code="failed", message=f"the snapshot service failed: {error}"), job


def bind(path: Path, group: int) -> socket.socket:
    """Return a socket that root and the manager's group may connect to. `serve` makes it listen."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    listening.bind(str(path))
    os.umask(before)
    os.chown(path, -1, group)
    return listening


def main() -> None:
    usual = Directories()
    parser = argparse.ArgumentParser(description="Orion-Sec's snapshot service: takes and restores snapshots of homes.")
    parser.add_argument("--copies", type=Path, default=usual.copies)
    parser.add_argument("--run", type=Path, default=usual.run)
    parser.add_argument("--ssh-uid", type=int, default=usual.ssh_uid, help="uid of ssh, with its key in RUN/ssh")
    parser.add_argument("--group", type=int, default=900, help="the group that may connect")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    directories = Directories(arguments.copies, arguments.run, arguments.ssh_uid)
    directories.locks.mkdir(mode=0o700, exist_ok=True)
    socket_path = directories.run / "vault.sock"
    listening = bind(socket_path, arguments.group)
    log.info("ready on %s; snapshots are in %s", socket_path, directories.copies)
    try:
        serve(listening, directories)
    finally:
        socket_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
