"""Failures of the manager or the proxy: no worker is declared down, and no rent in progress is lost or doubled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from conftest import Rent
from renter import Renter
from stack import TAKEOVER_S, WHOLE_WITHIN_S, Stack, story
from support.containers import pause
from waiting import eventually

from orion.client.sdk import Orion
from orion.errors import ManagerUnreachable, OrionError
from orion.wire import Rental, RentalState, RentReply

AWAY_S = TAKEOVER_S + 2
ASLEEP_S = 15.0


def _kill_the_proxy(stack: Stack) -> Callable[[], object]:
    container = stack.container("manager_proxy").id
    stack.docker("kill", container)
    return lambda: stack.docker("start", container)


def _kill_the_manager(stack: Stack) -> Callable[[], object]:
    container = stack.container("manager_app").id
    stack.docker("kill", container)
    return lambda: stack.docker("start", container)


def _pause_the_manager(stack: Stack) -> Callable[[], object]:
    container = stack.container("manager_app").id
    pause(container)
    return lambda: stack.docker("unpause", container)


@pytest.mark.parametrize(
    ("take_away", "away_s"),
    [(_kill_the_proxy, AWAY_S), (_kill_the_manager, AWAY_S), (_pause_the_manager, ASLEEP_S)],
    ids=["killed proxy", "killed manager", "paused manager"],
)
def test_no_rental_migrates_after_an_outage_of_the_platform(
    stack: Stack, rent: Rent, renter: Renter, take_away: Callable[[Stack], Callable[[], object]], away_s: float
) -> None:
    rental, mark = rent(), stack.mark()
    renter.inside(rental, "echo precious > kept")
    bring_back = take_away(stack)
    time.sleep(away_s)  # longer than a takeover takes
    bring_back()
    eventually("the platform answers", lambda: _platform_answers(stack), WHOLE_WITHIN_S)
    # When the brake is off and all workers have sent heartbeats, the outage cannot cause a takeover any more.
    stack.await_no_brake()
    with stack.connect() as orion:
        eventually(
            "all workers are ready", lambda: {one.health for one in orion.workers()} == {"ready"}, WHOLE_WITHIN_S
        )
        after = orion.rental(rental.id)
    events = stack.events(mark)
    assert {event.kind for event in events if event.kind in {"worker.became_down", "placement.lost"}} == set(), story(
        events
    )
    assert (after.state, after.epoch, after.worker_id) == (RentalState.ACTIVE, rental.epoch, rental.worker_id)
    assert renter.inside(after, "cat kept") == "precious"


def _platform_answers(stack: Stack) -> bool:
    with stack.connect() as orion:
        orion.healthz()
    return True


def test_a_platform_that_was_stopped_as_a_whole_continues_unchanged(stack: Stack, rent: Rent, renter: Renter) -> None:
    rental, mark = rent(), stack.mark()
    renter.inside(rental, "echo precious > kept")
    stack.compose("stop")
    stack.compose("start")
    eventually("the platform answers", lambda: _platform_answers(stack), WHOLE_WITHIN_S)
    eventually("the renter can log in again", lambda: renter.can_log_in(rental), WHOLE_WITHIN_S)
    assert renter.inside(rental, "cat kept") == "precious"
    stack.await_no_brake()
    with stack.connect() as orion:
        after = orion.rental(rental.id)
    kinds = [event.kind for event in stack.events(mark, rental.id)]
    assert after.state is RentalState.ACTIVE, story(stack.events(mark))
    assert "rental.parked" in kinds, "the workers are stopped first, while the manager can still receive its files"
    assert not {"placement.lost", "rental.taken_over"} & set(kinds), story(stack.events(mark))


def test_the_proxy_reports_that_the_manager_is_away(stack: Stack) -> None:
    stack.docker("kill", stack.container("manager_app").id)
    with stack.connect() as orion, pytest.raises(ManagerUnreachable) as refusal:
        orion.status()
    assert refusal.value.code == "manager_unreachable"


def test_a_manager_killed_in_the_middle_of_a_rent_neither_loses_nor_doubles_it(stack: Stack, renter: Renter) -> None:
    mark, wish = stack.mark(), {"name": "interrupted", "idempotency_key": "interrupted-once"}
    outcome: list[RentReply | OrionError] = []

    def ask() -> None:
        with stack.connect() as own:
            try:
                outcome.append(own.rent(ssh_public_key=renter.public_key, retry_for_s=0, **wish))  # type: ignore[arg-type]
            except OrionError as error:
                outcome.append(error)

    manager = stack.container("manager_app").id
    asking = threading.Thread(target=ask)
    asking.start()
    stack.await_kind(mark, "placement.preparing", 60)
    stack.docker("kill", manager)
    asking.join(timeout=60)
    assert not asking.is_alive()
    stack.docker("start", manager)
    eventually("the platform answers", lambda: _platform_answers(stack), WHOLE_WITHIN_S)

    with stack.connect() as orion:
        rental = orion.rent(ssh_public_key=renter.public_key, wait_s=55, **wish)  # type: ignore[arg-type]
        assert rental.state is RentalState.ACTIVE, story(stack.events(mark))
        assert [one.id for one in orion.rentals(name="interrupted", ended=True)] == [rental.id]
        living = {one.username: 1 for one in orion.rentals()}
        assert _accounts(stack) == living, story(stack.events(mark))
    if isinstance(outcome[0], Rental):
        assert outcome[0].id == rental.id, "it was answered before the kill"
    assert renter.can_log_in(rental)


def _accounts(stack: Stack) -> dict[str, int]:
    """Return for each renter's account the number of workers that have it."""
    found: dict[str, int] = {}
    for container in stack.containers("worker"):
        for line in stack.exec(container.id, "getent", "passwd").stdout.splitlines():
            name = line.partition(":")[0]
            if name.startswith("r-"):
                found[name] = found.get(name, 0) + 1
    return found


KILL_THE_ENGINE = """
import os, pathlib, signal
for entry in pathlib.Path("/proc").iterdir():
    try:
        words = (entry / "cmdline").read_bytes().split(b"\\0")
    except OSError:
        continue
    if b"orion.manager.ansible.server" in words:
        os.kill(int(entry.name), signal.SIGKILL)
        print(entry.name)
"""


def test_a_rent_works_after_the_engine_has_died(stack: Stack, orion: Orion, renter: Renter) -> None:
    killed = stack.exec(stack.container("manager_app").id, "python", "-c", KILL_THE_ENGINE)
    assert killed.stdout.split(), killed.stderr
    rental = orion.rent(ssh_public_key=renter.public_key, wait_s=55)
    assert rental.state is RentalState.ACTIVE, rental.explanation
    assert renter.can_log_in(rental)
