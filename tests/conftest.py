"""For all layers: the longest begin first, and a property is judged by what it says, not by how long it takes."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# One example may take long on a busy machine. What decides whether a change lands looks at the same examples each time,
# as Hypothesis's own profile for that does; everybody else looks at new ones.
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
"""Files whose tests take all of the machine that they can: one after the other, so that two never do it at once."""
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
"""Where files run side by side nobody is to wait for one of them in the end."""


SHOWN_LINES = 20
"""Lines of what a failed test has asserted that are shown at once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


class ByFile(LoadFileScheduling):
    """Gives a process the tests of one file at a time; those of all that attack are as of one file."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "attacks" if Path(file).name in ATTACKS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """What was loaded is there to stay; looking through it again and again for garbage takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Name what fails at once, not only after the last test, which may be killed before.

    With several processes the one that reports does it.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(NameFailures(reporter))


class NameFailures:
    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            said = [line for line in report.longreprtext.splitlines() if line.startswith("E ")][:SHOWN_LINES]
            self._reporter.write_line("\n".join((f"\nfailed: {report.nodeid} ({report.when})", *said)))
