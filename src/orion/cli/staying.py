"""ssh as a child that may be lost and started again: signals, the terminal and the status are as if it were us."""

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

from orion.connect import REPORT, SAID
from orion.errors import LocalFault

LOST = 255
"""ssh's own status: the connection failed or broke."""


@dataclass(frozen=True)
class Left:
    """How ssh ended. `lost`: by no doing of its own; `reason` says why, where that is known."""

    status: int
    lost: bool
    there: bool
    """It was lost at the rental's worker, and not on the way to the platform."""
    reason: str


def is_usable(shell: str) -> bool:
    """Return whether it is a program that runs commands: services often have one that refuses."""
    return Path(shell).name not in {"nologin", "false", "true"} and os.access(shell, os.X_OK)


def environment() -> dict[str, str]:
    """Return what ssh is started with. It starts its ProxyCommand by $SHELL, which need not say again what was said."""
    usable = is_usable(os.environ.get("SHELL", "/bin/sh"))
    return os.environ | {SAID: "1"} | ({} if usable else {"SHELL": "/bin/sh"})


def run(arguments: Sequence[str]) -> Left:
    """ssh from its start to its end. Raises LocalFault where there is none."""
    with tempfile.TemporaryDirectory(prefix="orion-") as folder:
        report = Path(folder) / "report"
        with _Shadow() as shadow:
            try:
                child = subprocess.Popen(arguments, env=environment() | {REPORT: str(report)})
            except FileNotFoundError as error:
                raise LocalFault("ssh is not installed on this machine: apt install openssh-client") from error
            shadow.follow(child)
            status = _wait(child, shadow.woken)
        told = _read(report)
    lost = status == LOST and told.get("lost") is True
    return Left(status, lost, told.get("there") is True, str(told.get("reason") or ""))


class _Shadow:
    """Handles signals while ssh starts and runs: leaves those of the terminal to ssh and passes on all others.

    The handlers are set before ssh is started, and what comes before ssh is there is passed on as soon as it is. So no
    signal ends this process alone and leaves ssh with the terminal.
    """

    def __init__(self) -> None:
        self.woken, self._wakes = os.pipe()
        """`woken`: a descriptor that is readable after each signal. A handler alone ends no wait that begins then."""
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def __enter__(self) -> _Shadow:
        os.set_blocking(self._wakes, False)
        self._wakes_before = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        handlers = {
            signal.SIGINT: self._leave_to_ssh,
            signal.SIGQUIT: self._leave_to_ssh,
            signal.SIGTERM: self._pass_on,
            signal.SIGHUP: self._pass_on,
            signal.SIGCHLD: lambda _number, _frame: None,
        }
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakes_before)
        os.close(self.woken)
        os.close(self._wakes)

    def follow(self, child: subprocess.Popen[bytes]) -> None:
        """Pass signals on to this process from now on, and those that came before it was there."""
        self._child = child
        while self._early:
            self._pass_on(self._early.pop(0), None)

    def _pass_on(self, number: int, _frame: object) -> None:
        if self._child is None:
            self._early.append(number)
        elif self._child.returncode is None:
            os.kill(self._child.pid, number)  # not send_signal, which may take the status that _wait waits for

    def _leave_to_ssh(self, number: int, _frame: object) -> None:
        """Do nothing once ssh is there, which gets what the terminal sends to all of them."""
        if self._child is None:
            self._early.append(number)


def _wait(child: subprocess.Popen[bytes], woken: int) -> int:
    """Its status, as a shell has it. Where ssh stops itself (~^Z), so do we, so that the shell goes on."""
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
        told = json.loads(report.read_text())
    except (OSError, ValueError):
        return {}  # ssh ended it before it could say anything: then that was ssh's own end
    return told if isinstance(told, dict) else {}
