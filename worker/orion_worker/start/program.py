#!/usr/bin/python3 -IS
"""The program that runs a rental's start command in its login shell, as the renter, and keeps its output.

    program.py RUN COMMAND      in the renter's home

The program forks at once, and its caller learns only whether that worked. The command's output goes to
~/.orion/start.log, which is opened with the renter's own rights, so a link there leads nowhere that the renter could
not write anyway. At LARGEST_BYTES the file is renamed to start.log.1. Where the log cannot be written, the output is
lost and the command runs on.

~/.orion/start.run holds RUN, and how that run ended once it has; this program holds the file's lock while it runs. The
agent reads it (start/launcher.py), and trusts it for this rental alone.
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
    """The log of a start command: a file that never grows beyond LARGEST_BYTES, and the full one before it."""

    def __init__(self) -> None:
        self._descriptor = self._open()

    def write(self, content: bytes) -> None:
        """Append to the log; what cannot be written is lost."""
        with suppress(OSError):  # if the disk is full, or the renter replaced the file, the command must not wait
            if self._descriptor is not None and os.fstat(self._descriptor).st_size + len(content) > LARGEST_BYTES:
                os.close(self._descriptor)
                self._descriptor = None
                LOG.replace(f"{LOG}.1")
                self._descriptor = self._open()
            if self._descriptor is not None:
                os.write(self._descriptor, content[-LARGEST_BYTES:])

    def say(self, line: str) -> None:
        """Append a line of this program's own, with the time."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.write(f"orion: {now} {line}\n".encode(errors="replace"))

    def _open(self) -> int | None:
        """Open the log. Return None for a FIFO, which would block the command, for a link, or where opening fails."""
        try:
            LOG.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        return descriptor


class RunNote:
    """The note of which run this is and how it ended. Where it cannot be written, the command runs without one."""

    def __init__(self, run: str) -> None:
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = self._begin(f"{run}\n".encode())

    def end(self, how: str) -> None:
        """Note how the run ended and when, by CLOCK_BOOTTIME, which cannot be set."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.write(self._descriptor, f"{how} {time.clock_gettime(time.CLOCK_BOOTTIME):.1f}\n".encode())

    def _begin(self, content: bytes) -> int:
        """Write a new file for this run and rename it into place: an earlier run may still hold the lock of its own."""
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
    """Run the command until it, and each process that keeps its output open, has ended. `which`: epoch and mark."""
    log, note = StartLog(), RunNote(which)
    log.say(f"runs: {command}")
    login, silence, pipe, same = ["/bin/bash", "--login", "-c"], subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    shell = subprocess.Popen([*login, command], stdin=silence, stdout=pipe, stderr=same, start_new_session=True)
    assert shell.stdout is not None  # noqa: S101 - it was asked for
    while content := os.read(shell.stdout.fileno(), READ_BYTES):
        log.write(content)
    status = shell.wait()
    log.say(f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}")
    note.end(f"signal {-status}" if status < 0 else f"status {status}")


def main() -> int:
    """Fork, run the command in the child, and return whether the fork worked: 0 if so."""
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
