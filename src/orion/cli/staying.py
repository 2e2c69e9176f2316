"""ssh as a child that may be lost and started again: signals, the terminal and the status are as if it were us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        try:
            child = subprocess.Popen(arguments, env=environment() | {REPORT: str(report)})
        except FileNotFoundError as error:
            raise LocalFault("ssh is not installed on this machine: apt install openssh-client") from error
        with _as_its_shadow(child) as woken:
            status = _wait(child, woken)
        told = _read(report)
    lost = status == LOST and told.get("lost") is True
    return Left(status, lost, told.get("there") is True, str(told.get("reason") or ""))


@contextmanager
def _as_its_shadow(child: subprocess.Popen[bytes]) -> Iterator[int]:
    """Handle signals while ssh runs: leave those of the terminal to ssh, which gets them too, and pass on all others.

    Yield a descriptor that is readable after each signal: a handler alone does not end a wait that begins just then.
    """

    def pass_on(number: int, _frame: object) -> None:
        if child.returncode is None:
            os.kill(child.pid, number)  # not send_signal, which may take the status that _wait waits for

    def leave_to_ssh(_number: int, _frame: object) -> None: ...

    handlers = {
        signal.SIGINT: leave_to_ssh,
        signal.SIGQUIT: leave_to_ssh,
        signal.SIGTERM: pass_on,
        signal.SIGHUP: pass_on,
        signal.SIGCHLD: lambda _number, _frame: None,
    }
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    wakes_before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield woken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakes_before)
        os.close(woken)
        os.close(wakes)


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
