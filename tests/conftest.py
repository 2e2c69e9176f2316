"""Settings of all tests: the longest files begin first, and a slow example of a property is no failure."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# One example may take long on a busy machine. In CI, which decides whether a change lands, the examples are the same
# each time, as in Hypothesis's own profile for CI; elsewhere they are new ones.
settings.register_profile("orion", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("orion")

ATTACKS = (
    "test_attacks_connections.py",
    "test_attacks_renter.py",
    "test_attacks_stopping.py",
    "test_attacks_web_ports.py",
    "test_attacks_floods.py",
    "test_attacks_locks.py",
    "test_attacks_exhaustion.py",
)
"""Files whose tests take all of the machine that they can; one process runs them one after the other."""
LONGEST = (
    "test_crash_points.py",
    *ATTACKS,
    "test_engine.py",
    "test_states_that_existed.py",
    "test_proxy.py",
    "test_attacks_engine.py",
    "test_playbooks_delete.py",
    "test_contract_fuzzed.py",
    "test_worker_agent.py",
    "test_bench.py",
)
"""Files that begin first, so that no run ends with one process that works on a long file while the others idle."""


SHOWN_LINES = 20
"""Lines of a failed assertion that are shown at once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


class ByFile(LoadFileScheduling):
    """Gives a process the tests of one file at a time; the files of ATTACKS count as one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "attacks" if Path(file).name in ATTACKS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """Exempt all modules from garbage collection, which would take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Have each failure shown at once: a run that is killed shows no summary.

    Where several processes run tests, only the one with the reporter does it.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(NameFailures(reporter))


class NameFailures:
    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")][:SHOWN_LINES]
            self._reporter.write_line("\n".join((f"\nfailed: {report.nodeid} ({report.when})", *lines)))
