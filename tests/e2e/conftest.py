"""One platform for all end-to-end tests: it is started once, and restored after each test."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright
from renter import Renter
from stack import Stack, running, story
from waiting import eventually

from orion.client.sdk import ENDED, Orion
from orion.wire import Rental, RentalState

HERE = Path(__file__).parent
ORDER = (
    "test_bring_up.py",
    "test_by_hand.py",
    "test_renting.py",
    "test_getting_in.py",
    "test_way_in.py",
    "test_browser_terminal.py",
    "test_web_ports.py",
    "test_owners.py",
    "test_following_events.py",
    "test_pool.py",
    "test_planned_moves.py",
    "test_scaling.py",
    "test_make_up.py",
    "test_readme.py",
    "test_lost_workers.py",
    "test_lost_manager.py",
    "test_afterwards.py",
)
"""The order of the test files: first those without failures, last the one that reads the traces of all others."""

SHORTEST_TTL_S = 60

FIGURES = pytest.StashKey[dict[str, str]]()
Figures = dict[str, str]


class Rent(Protocol):
    """Rent as the admin with the renter's key; it must be active at once."""

    def __call__(self, name: str | None = None, ttl_s: int = 3600) -> Rental: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: 1 + ORDER.index(item.path.name) if item.path.parent == HERE else 0)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    return pytestconfig.stash.setdefault(FIGURES, {})


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory, figures: Figures) -> Iterator[Stack]:
    began = time.monotonic()
    with running(tmp_path_factory.mktemp("stack")) as stack:
        figures["bring-up to three ready workers, images from the cache"] = f"{time.monotonic() - began:.1f} s"
        yield stack


@pytest.fixture(scope="session")
def renter(platform: Stack, tmp_path_factory: pytest.TempPathFactory) -> Renter:
    """Return a renter that is logged in as the admin."""
    return Renter(tmp_path_factory.mktemp("renter"), platform.url, platform.admin_token())


@pytest.fixture(scope="session")
def short_rental(platform: Stack, renter: Renter) -> Rental:
    """Return a rental with the shortest TTL, which expires while other tests run."""
    with platform.connect() as orion:
        rental = orion.rent(name="short", ssh_public_key=renter.public_key, ttl_s=SHORTEST_TTL_S)
    platform.spared.add(rental.id)
    return rental


@pytest.fixture
def stack(platform: Stack, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Yield the platform with all workers ready, and restore it after the test."""
    if any("short_rental" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("short_rental")
    yield platform
    platform.restore()


@pytest.fixture
def all_slots(stack: Stack) -> None:
    """Wait until the short rental has ended, so that only the test occupies or frees slots."""
    with stack.connect() as connection:
        for rental_id in stack.spared:
            within_s = SHORTEST_TTL_S + 60
            eventually(
                "the short rental has ended", lambda one=rental_id: connection.rental(one).state in ENDED, within_s
            )


@pytest.fixture
def orion(stack: Stack) -> Iterator[Orion]:
    """Yield a connection of the admin."""
    with stack.connect() as connection:
        yield connection


@pytest.fixture
def rent(orion: Orion, renter: Renter) -> Rent:
    def make(name: str | None = None, ttl_s: int = 3600) -> Rental:
        rental = orion.rent(name=name, ssh_public_key=renter.public_key, ttl_s=ttl_s)
        assert rental.state is RentalState.ACTIVE, f"{rental.name} is {rental.state}: {rental.explanation}"
        return rental

    return make


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def chromium(playwright: Playwright) -> Iterator[Browser]:
    program = shutil.which("chromium")
    if not program:
        pytest.fail("These tests need a browser: apt install chromium (scripts/test.sh does)", pytrace=False)
    # Chromium's sandbox refuses to run as root, which runs the tests; the browser opens only pages of the tests.
    browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=os.geteuid() != 0)
    yield browser
    browser.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the platform's events and logs to the report of a failed test."""
    report = yield
    platform = getattr(item, "funcargs", {}).get("platform")
    if report.failed and call.when != "setup" and isinstance(platform, Stack):
        _add_section(report, "events", lambda: story(platform.events(max(0, platform.mark() - 60))))
        _add_section(report, "logs", lambda: "\n".join(platform.telling_logs().splitlines()[-250:]))
    return report


def _add_section(report: pytest.TestReport, title: str, what: Callable[[], str]) -> None:
    try:
        text = what()
    except Exception as error:  # the platform may not run: then the error is the section's text
        text = repr(error)
    report.sections.append((f"platform: {title}", text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(FIGURES, {})
    if figures:
        terminalreporter.section("figures of the platform, clocks at a tenth")
        for what, value in figures.items():
            terminalreporter.line(f"{what}: {value}")
