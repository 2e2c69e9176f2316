"""ssh as a child process: its exit status, its signals, and the reason for its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orion.cli import staying

REPORTS = (
    "import json, os, sys; open(os.environ['ORION_CONNECT_REPORT'], 'w').write(sys.argv[1]); sys.exit(int(sys.argv[2]))"
)


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


@pytest.mark.parametrize(
    ("report", "status", "lost"),
    [
        ({"lost": True, "there": True, "reason": "its worker is down"}, 255, True),
        ({"lost": True}, 0, False),
        ({"lost": True}, 1, False),
        ({"lost": False}, 255, False),
        ({}, 255, False),
        ([], 255, False),
    ],
)
def test_a_session_counts_as_lost_only_if_its_connection_was_lost(report: object, status: int, lost: bool) -> None:
    left = staying.run(python(REPORTS, json.dumps(report), str(status)))
    assert (left.status, left.lost) == (status, lost)
    if lost:
        assert (left.at_worker, left.reason) == (True, "its worker is down")


def test_without_a_report_ssh_ended_by_itself() -> None:
    assert staying.run(python("import sys; sys.exit(255)")) == staying.Left(
        status=255, lost=False, at_worker=False, reason=""
    )


def test_a_killed_child_has_the_exit_status_that_a_shell_gives() -> None:
    assert staying.run(python("import os; os.kill(os.getpid(), 9)")).status == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_elsewhere_is_passed_on(number: signal.Signals, tmp_path: Path) -> None:
    """A signal to our process ends the child, and our process then returns the child's status."""
    ready = tmp_path / "ready"
    program = (
        f"import signal, sys, pathlib; signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}]); "
        f"pathlib.Path({str(ready)!r}).touch(); signal.sigwait([{int(number)}]); sys.exit(7)"
    )

    def send() -> None:
        while not ready.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert staying.run(python(program)).status == 7
    sender.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_comes_before_ssh_runs_is_passed_on_to_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.Popen

    def struck_while_it_starts(*arguments: Any, **how: Any) -> subprocess.Popen[bytes]:
        child = started(*arguments, **how)
        os.kill(os.getpid(), number)
        return child

    monkeypatch.setattr(subprocess, "Popen", struck_while_it_starts)
    assert staying.run(["sleep", "60"]).status == 128 + number


def test_a_child_that_stops_itself_stops_us_and_continues_with_us() -> None:
    """~^Z of ssh stops ssh in this way, and the shell must get its terminal back."""
    child = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP); raise SystemExit(5)"
    ours = f"import sys; from orion.cli import staying; sys.exit(staying.run([sys.executable, '-c', {child!r}]).status)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(python(ours), env=environment) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 5
