"""Planned migrations, drains and parks lose no byte."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import Figures, Rent
from precious import check_all_is_there, furnish
from renter import Renter
from stack import WHOLE_WITHIN_S, WORKERS, Stack, story
from waiting import eventually

from orion.client.sdk import Orion
from orion.errors import Conflict
from orion.wire import Event, Rental, RentalState, WorkerIntent

COUNTING = "i=0; while :; do i=$((i+1)); echo $i >> lines; echo $i; sleep 0.01; done"
BULK = (
    "head -c 100000000 /dev/urandom > bulk; mkdir many; for i in $(seq 500); do echo $i > many/$i; done; sha256sum bulk"
)


@contextmanager
def counting(renter: Renter, rental: Rental) -> Iterator[subprocess.Popen[str]]:
    """Run a renter's program that writes numbers to a file, and prints each number after it was written."""
    arguments = renter.arguments(rental, COUNTING)
    with subprocess.Popen(
        arguments, env=renter.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as at_work:
        try:
            assert at_work.stdout
            assert at_work.stdout.readline() == "1\n"
            yield at_work
        finally:
            at_work.kill()


def last_number(at_work: subprocess.Popen[str]) -> int:
    """Return the last number that was printed, after the session has ended."""
    said, _ = at_work.communicate(timeout=60)
    return max((int(line) for line in said.split("\n")[:-1]), default=1)


def check_nothing_is_missing(renter: Renter, migrated: Rental, last_printed: int) -> None:
    lines = [int(line) for line in renter.inside(migrated, "cat lines").split()]
    assert lines == list(range(1, len(lines) + 1))
    assert len(lines) >= last_printed


def kinds(events: list[Event], rental: Rental) -> list[str]:
    return [event.kind for event in events if event.rental_id == rental.id]


def test_a_rental_of_100_mb_migrates_while_its_renter_works(
    stack: Stack, orion: Orion, rent: Rent, renter: Renter, figures: Figures
) -> None:
    rental = rent("mover")
    bulk, tree = renter.inside(rental, BULK), furnish(renter, rental)
    with counting(renter, rental) as at_work:
        mark = stack.mark()
        said = renter.orion("migrate", "mover")
        last_printed = last_number(at_work)
    migrated = orion.rental(rental.id)
    assert said.stdout == f"mover is on worker {migrated.worker_id} now.\n"
    assert (migrated.state, migrated.epoch) == (RentalState.ACTIVE, rental.epoch + 1)
    assert migrated.worker_id != rental.worker_id
    check_nothing_is_missing(renter, migrated, last_printed)
    check_all_is_there(renter, migrated, tree)
    assert renter.inside(migrated, "sha256sum bulk; ls many | wc -l") == f"{bulk}\n500"
    events = stack.events(mark)
    quiesced, active = (next(e for e in events if e.kind == kind) for kind in ("rental.held", "rental.activated"))
    figures["planned migration of 100 MB: quiesce to active"] = f"{(active.at - quiesced.at).total_seconds():.2f} s"
    assert "placement.lost" not in kinds(events, rental), story(events)
    eventually("the source is purged", lambda: "placement.purged" in kinds(stack.events(mark), rental), 60)


@pytest.mark.usefixtures("all_slots")
def test_a_drain_migrates_rentals_explains_why_it_waits_and_ends(
    stack: Stack, orion: Orion, rent: Rent, renter: Renter
) -> None:
    rentals = [rent() for _ in range(WORKERS)]
    stays, other = rentals[0], rentals[1]
    drained = str(stays.worker_id)
    with pytest.raises(Conflict, match="no other worker can take it") as refused:
        orion.migrate(stays.id)
    assert refused.value.code == "nowhere_to_go"
    with counting(renter, stays) as at_work:
        renter.orion("drain", drained, "--no-wait")
        waits = "1 rental is to be migrated, and no worker can take one: of 3 workers, 1 draining, 2 full"
        # On a busy machine another worker's heartbeat may be late, which the explanation mentions as well.
        eventually("the drain explains why it waits", lambda: orion.worker(drained).explanation == waits, 60)
        orion.release(other.id)
        said = renter.orion("drain", drained)
        last_printed = last_number(at_work)
    assert said.stdout == f"{drained} is drained.\n"
    migrated = orion.rental(stays.id)
    assert (migrated.state, migrated.worker_id) == (RentalState.ACTIVE, other.worker_id)
    check_nothing_is_missing(renter, migrated, last_printed)
    waiting = orion.rent(ssh_public_key=renter.public_key, wait_s=0)
    eventually(
        "the explanation has the drained worker", lambda: "1 draining" in orion.rental(waiting.id).explanation, 60
    )
    renter.orion("resume", drained)
    active = orion.rental(waiting.id, state=RentalState.ACTIVE, wait_s=50)
    assert (active.state, active.worker_id) == (RentalState.ACTIVE, drained)


def test_rentals_are_parked_when_the_platform_stops_and_continue_on_new_workers(
    stack: Stack, orion: Orion, rent: Rent, renter: Renter, figures: Figures
) -> None:
    rentals = [rent(), rent()]
    tree = furnish(renter, rentals[0])
    with counting(renter, rentals[0]) as first, counting(renter, rentals[1]) as second:
        mark, began = stack.mark(), time.monotonic()
        stack.compose("down", timeout_s=180)
        figures["docker compose down, two rentals at work"] = f"{time.monotonic() - began:.1f} s"
        last_printed = [last_number(first), last_number(second)]
    stack.scale(WORKERS)
    eventually("the platform answers", orion.status, WHOLE_WITHIN_S)
    for rental, last in zip(rentals, last_printed, strict=True):
        stack.await_active(mark, rental, rental.epoch + 2)  # parking uses an epoch of its own
        check_nothing_is_missing(renter, orion.rental(rental.id), last)
    check_all_is_there(renter, orion.rental(rentals[0].id), tree)
    assert "placement.lost" not in [event.kind for event in stack.events(mark)], story(stack.events(mark))
    for worker in orion.workers():
        assert worker.intent is WorkerIntent.ACTIVE
