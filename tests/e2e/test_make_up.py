"""Tests of `make up` on a platform in use: rentals lose nothing, and nothing is stopped without a question."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from conftest import Figures, Rent
from renter import Renter
from stack import ROOT, WORKERS, Container, Stack, story

from orion.client.sdk import Orion
from orion.wire import Rental, RentalState

HOME = """
set -e; i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo $i > file$i; done
ln file1 link; ln -s file2 soft; chmod 444 file3; mkdir -m 700 shut; echo a > "shut/with blank"
"""
TREE = "find . -name 'count*' -prune -o -type f -printf '%M %n %T@ %p ' -exec sha256sum {} + | sort | sha256sum"
WRITING = """nohup sh -c 'i=0; while :; do i=$((i+1)); echo $i > count.new; sync count.new; mv count.new count; sync .
sleep 0.02; done' > /dev/null 2>&1 &"""


def up(stack: Stack, act: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the part of scripts/up.sh that changes services, on the platform of the tests."""
    environment = stack.environment() | {"PYTHONPATH": str(ROOT / "src"), **settings}
    command = [sys.executable, "-B", str(ROOT / "scripts/rollout.py"), act]
    environment["ORION_WHY"] = str(stack.folder / "why")
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400, check=False
    )


def rolled(stack: Stack, **settings: str) -> str:
    said = ""
    for act in ("ask", "apply"):
        done = up(stack, act, CONFIRM="yes", UP_COMMAND="make up", **settings)
        said += done.stdout
        assert done.returncode == 0, f"{said}\n{done.stderr}\n{story(stack.events(stack.mark() - 60))}"
    return said


@pytest.mark.timeout(900)
def test_a_rental_survives_new_settings_and_a_restart_of_the_machine(
    stack: Stack, orion: Orion, renter: Renter, rent: Rent, figures: Figures
) -> None:
    rental = rent("moved-along")
    renter.inside(rental, HOME)
    tree = renter.inside(rental, TREE)
    renter.inside(rental, WRITING)
    before = _workers(stack)

    refused = up(stack, "ask", ORION_SLOTS="2", UP_COMMAND="ORION_SLOTS=2 make up")
    assert refused.returncode == 1
    assert f"{WORKERS} workers have other settings, or another image" in refused.stdout
    assert "will migrate" in refused.stdout
    assert rental.name in refused.stdout
    assert "run: CONFIRM=yes ORION_SLOTS=2 make up" in refused.stderr
    assert _workers(stack) == before, "nothing was changed"

    mark, began = stack.mark(), time.monotonic()
    said = rolled(stack, ORION_SLOTS="2")
    figures["make up with other settings, one rental of 400 files"] = f"{time.monotonic() - began:.0f} s"
    assert f"Migrated, with all files: {rental.name}" in said
    migrated = _still_there(stack, orion, renter, mark, rental, tree)
    assert migrated.epoch == rental.epoch + 1
    assert not set(_workers(stack)) & set(before)
    assert [one.slots for one in orion.workers()] == [2] * WORKERS

    renter.inside(migrated, WRITING)
    time.sleep(3)
    mark, written = stack.mark(), _power_cut(stack, migrated)
    said = rolled(stack, ORION_SLOTS="1")
    assert f"Starting {WORKERS} stopped worker(s) unchanged" in said
    last = _still_there(stack, orion, renter, mark, migrated, tree)
    assert int(renter.inside(last, "cat count")) >= written, "the files are at least as new as those on the disk"
    assert last.epoch == migrated.epoch + 1
    assert [one.slots for one in orion.workers()] == [1] * WORKERS

    same = _workers(stack)
    assert "Migrated" not in rolled(stack, ORION_SLOTS="1")
    assert _workers(stack) == same, "unchanged workers are kept"


def _workers(stack: Stack) -> list[str]:
    return [one.id for one in stack.containers("worker")]


def _still_there(stack: Stack, orion: Orion, renter: Renter, mark: int, rental: Rental, tree: str) -> Rental:
    """Check that the rental is active with the same files, and never began again from an older snapshot."""
    now = orion.rental(rental.id)
    events = stack.events(mark)
    assert now.state is RentalState.ACTIVE, story(events)
    assert not {"placement.lost", "rental.move_failed"} & {event.kind for event in events}, story(events)
    assert renter.inside(now, TREE) == tree
    return now


def _power_cut(stack: Stack, rental: Rental) -> int:
    """Everything is killed at once; the last number that is on the disk of the rental's worker."""
    holder: Container = stack.container_of(rental.worker_id)
    stack.docker("kill", *(one.id for one in stack.containers()))
    place = stack.folder / "count"
    stack.docker("cp", f"{holder.id}:/home/{rental.username}/count", str(place))
    return int(place.read_text())
