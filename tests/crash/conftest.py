"""Preload the manager in the process from which crash tests fork it, and summarise the crash points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crash.environment import CRASH_POINTS, PROCESSES, VICTIMS

ROOT = Path(__file__).parents[2]

os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("src", "worker", "tests"))
PROCESSES.set_forkserver_preload(["crash.manager", "support.harness"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    scenarios = [
        dict(report.user_properties)[CRASH_POINTS] for report in reports if report.when == "call" and _counts(report)
    ]
    if scenarios:
        terminalreporter.section("crash points")
        for name, *counts, took_s in scenarios:
            killed = ", ".join(f"the {victim} at {count}" for victim, count in zip(VICTIMS, counts, strict=True))
            terminalreporter.line(f"{name}: killed {killed}, in {took_s} s")
        totals = (
            f"the {victim} {sum(scenario[1 + position] for scenario in scenarios)}"
            for position, victim in enumerate(VICTIMS)
        )
        terminalreporter.line(f"all: {', '.join(totals)}")


def _counts(report: pytest.TestReport) -> bool:
    return any(name == CRASH_POINTS for name, _ in report.user_properties)
