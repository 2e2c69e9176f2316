"""ssh as a child process, so that `orion ssh` can start it again after a lost connection.

Signals, the terminal and the exit status behave as if ssh itself had been started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion.errors import LocalFault
from orion.ssh_client.connect import REPORT, SAID

LOST = 255  # ssh's exit status after a connection that failed or broke


@dataclass(frozen=True, kw_only=True)
class Left:
    """The end of ssh."""

    status: int  # the exit status
    lost: bool  # whether the connection was lost, so that ssh did not end by itself
    at_worker: bool  # whether the connection was lost at the rental's worker, not on the way to the platform
    reason: str  # the reason for the loss, or an empty text


def is_usable(shell: str) -> bool:
    """Return whether the program runs commands. The shell of a service account often refuses to."""
    return Path(shell).name not in {"nologin", "false", "true"} and os.access(shell, os.X_OK)


def environment() -> dict[str, str]:
    """Return the environment for ssh, which starts its ProxyCommand by $SHELL.

    SAID keeps the ProxyCommand from printing the remark that `orion ssh` has printed.
    """
    usable = is_usable(os.environ.get("SHELL", "/bin/sh"))
    return os.environ | {SAID: "1"} | ({} if usable else {"SHELL": "/bin/sh"})


def run(arguments: Sequence[str]) -> Left:
    """Run ssh and return how it ended. Raise LocalFault if ssh is not installed."""
    with tempfile.TemporaryDirectory(prefix="orion-") as folder:
        report = Path(folder) / "report"
        with _Shadow() as shadow:
            try:
                child = subprocess.Popen(arguments, env=environment() | {REPORT: str(report)})
            except FileNotFoundError as error:
                raise LocalFault("ssh is not installed. To install it, run: apt install openssh-client") from error
            shadow.follow(child)
            status = _wait(child, shadow.woken)
        reported = _read(report)
    lost = status == LOST and reported.get("lost") is True
    return Left(
        status=status, lost=lost, at_worker=reported.get("there") is True, reason=str(reported.get("reason") or "")
    )


class _Shadow:
    """The handlers of signals while ssh runs: they pass them on, except those that the terminal sends to ssh anyway.

    The handlers are set before ssh starts, and a signal that comes before is passed on when ssh runs. So no signal ends
    this process alone and leaves ssh with the terminal.
    """

    def __init__(self) -> None:
        self.woken, self._wakes = os.pipe()
        """A pipe with a readable end after each signal. A handler alone would not end a wait that begins after it."""
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def __enter__(self) -> _Shadow:
        os.set_blocking(self._wakes, False)
        self._wakes_before = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        self._before = {one: signal.signal(one, self._leave_to_ssh) for one in (signal.SIGINT, signal.SIGQUIT)}
        self._before |= {one: signal.signal(one, self._pass_on) for one in (signal.SIGTERM, signal.SIGHUP)}
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakes_before)
        os.close(self.woken)
        os.close(self._wakes)

    def follow(self, child: subprocess.Popen[bytes]) -> None:
        """Pass signals on to this process from now on, and also those that came before."""
        self._child = child
        while self._early:
            self._pass_on(self._early.pop(0), None)

    def _pass_on(self, number: int, _frame: object) -> None:
        if self._child is None:
            self._early.append(number)
        elif self._child.returncode is None:
            os.kill(self._child.pid, number)  # send_signal could collect the exit status for which _wait waits

    def _leave_to_ssh(self, number: int, _frame: object) -> None:
        """Do nothing if ssh runs, because it gets the terminal's signal itself. Else keep the signal for it."""
        if self._child is None:
            self._early.append(number)


def _wait(child: subprocess.Popen[bytes], woken: int) -> int:
    """Wait until ssh ends, and return its exit status as a shell does. If ssh stops itself (~^Z), stop as well."""
    while True:
        changed, status = os.waitpid(child.pid, os.WUNTRACED | os.WNOHANG)
        if not changed:
            os.read(woken, 4096)
            continue
        if os.WIFSTOPPED(status):
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(child.pid, signal.SIGCONT)
            continue
        child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _read(report: Path) -> dict[str, Any]:
    try:
        reported = json.loads(report.read_text())
    except (OSError, ValueError):
        return {}  # ssh ended `orion connect` before it could write a report, so ssh ended by itself
    return reported if isinstance(reported, dict) else {}
