"""The agent's end of start/confine.py, the program that starts sshd without the right to write below /proc."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from orion_worker.start import confine
from orion_worker.system import processes

STOPS_WITHIN_S = 1.0


class ConfinedCommand:
    """A command that start/confine.py runs for the agent, again each time `start` is called.

    `score`: the oom_score_adj that the command begins with. `errors`: a descriptor for its standard error; None: the
    agent's own.
    """

    def __init__(self, command: Sequence[str], score: int, errors: int | None = None) -> None:
        self._command = [confine.__file__, *command]
        self._score = score
        self._errors = errors
        self._running = -1
        """The pidfd of the command's process; -1: there is none."""
        self._begin()

    def start(self) -> None:
        """Start the command. If confine.py itself has ended, `ended` returns that."""
        self._give(self._score)
        with suppress(OSError, ValueError):
            self._asks.write(b"\n")
            self._running = os.pidfd_open(int(self._line()))
        self._give(processes.own_score())

    def ended(self) -> str | None:
        """Return the command's exit status, None while it runs. After a status it may be started again."""
        if not select.select([self._tells], [], [], 0)[0]:
            return None
        status = self._line()
        self.stop()  # if confine.py ended, the command may still run, and hold the port that the next one needs
        if not status:
            self._program.kill()
            self._program.wait()
            self._begin()
        return status or "unknown"

    def stop(self) -> None:
        """End the command, if it runs."""
        if self._running < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._running, signal.SIGTERM)
            if not select.select([self._running], [], [], STOPS_WITHIN_S)[0]:
                signal.pidfd_send_signal(self._running, signal.SIGKILL)
        os.close(self._running)
        self._running = -1

    def _begin(self) -> None:
        pipe = subprocess.PIPE
        program = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=self._errors, bufsize=0)
        assert program.stdin is not None  # noqa: S101 - both were asked for
        assert program.stdout is not None  # noqa: S101
        self._program, self._asks, self._tells = program, program.stdin, program.stdout

    def _give(self, score: int) -> None:
        with suppress(OSError):  # the command runs with any score
            processes.give_score(self._program.pid, score)

    def _line(self) -> str:
        """Return the next line of confine.py's output; empty at its end."""
        return self._tells.readline().decode().strip()
