#!/usr/bin/python3 -IS
"""Runs a rental's start command in its login shell, and keeps what it says. Runs as the renter, and is nobody else.

    start.py RUN COMMAND        in the renter's home

It goes its own way at once: who called it only learns that it could. What the command says goes to ~/.orion/start.log,
which is opened with the renter's own rights, so that whatever the renter puts there leads nowhere that it could not go
anyway; at LARGEST_BYTES the file makes room, as start.log.1. Where it cannot be written, what is said is lost, and the
command goes on all the same.

~/.orion/start.run holds RUN, and how that ended once it has; it is locked as long as this program runs. The agent reads
it (launching.py), and believes it of this rental alone.
"""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

LOG = Path(".orion/start.log")
NOTE = Path(".orion/start.run")
LARGEST_BYTES = 1 << 20
READ_BYTES = 1 << 16


class StartLog:
    """A file that never grows beyond LARGEST_BYTES, with the one before it."""

    def __init__(self) -> None:
        self._descriptor = self._open()

    def write(self, content: bytes) -> None:
        if self._descriptor is None:
            return
        try:
            if os.fstat(self._descriptor).st_size + len(content) > LARGEST_BYTES:
                self._make_room()
            if self._descriptor is not None:
                os.write(self._descriptor, content[-LARGEST_BYTES:])
        except OSError:
            pass  # its disk is full, or it was made something else: the command must not wait for that

    def say(self, line: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.write(f"orion: {now} {line}\n".encode(errors="replace"))

    def _make_room(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        LOG.replace(f"{LOG}.1")
        self._descriptor = self._open()

    def _open(self) -> int | None:
        """Not a FIFO, which would keep it waiting, and not through a link, where nobody would look for it."""
        try:
            LOG.parent.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(LOG, flags, 0o600)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        return descriptor


class RunNote:
    """Which run this is, and how it ended. Nobody is kept waiting for it: where it cannot be kept, nothing is told."""

    def __init__(self, run: str) -> None:
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = self._begin(f"{run}\n".encode())

    def end(self, how: str) -> None:
        """Note how the run ended and when, by the clock that no one can set."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.write(self._descriptor, f"{how} {time.clock_gettime(time.CLOCK_BOOTTIME):.1f}\n".encode())

    def _begin(self, content: bytes) -> int:
        """A file of its own for each run, and whole in its place: an earlier run may still hold the one before."""
        new = NOTE.with_name(f"{NOTE.name}.{os.getpid()}")
        new.parent.mkdir(mode=0o700, exist_ok=True)
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            os.write(descriptor, content)
            new.replace(NOTE)
        except OSError:
            os.close(descriptor)
            new.unlink(missing_ok=True)
            raise
        return descriptor


def run(which: str, command: str) -> None:
    """Until the command, and all that it leaves behind with its output, has ended. `which`: see launching.py."""
    log, note = StartLog(), RunNote(which)
    log.say(f"runs: {command}")
    shell = subprocess.Popen(
        ["/bin/bash", "--login", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert shell.stdout is not None  # noqa: S101 - it was asked for
    while content := os.read(shell.stdout.fileno(), READ_BYTES):
        log.write(content)
    status = shell.wait()
    log.say(f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}")
    note.end(f"signal {-status}" if status < 0 else f"status {status}")


def main() -> int:
    try:
        if os.fork():
            return 0
    except OSError:
        return 1  # the renter has as many processes as it may have
    os.setsid()
    run(*sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
