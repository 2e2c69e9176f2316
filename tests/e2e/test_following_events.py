"""Events: their pages, and the live stream, which passes the proxy without delay."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from queue import Queue

import pytest
from conftest import Rent
from renter import Renter
from stack import Stack

from orion.client.sdk import Orion
from orion.wire import Event

AT_ONCE_S = 10.0
"""Seconds on a busy machine. A proxy that buffers would delay events by up to 15 s, the interval of comments."""
FOLLOWED_S = 60.0


def test_the_events_of_a_rental_show_its_whole_life_in_order(stack: Stack, orion: Orion, rent: Rent) -> None:
    rental = rent("described")
    orion.release(rental.id, wait_s=30)
    found = list(orion.events(rental_id=rental.id, limit=2))
    # A snapshot may have been made meanwhile.
    assert [event.kind for event in found if event.kind != "rental.copied"] == [
        "rental.queued",
        "rental.placed",
        "placement.reserved",
        "placement.preparing",
        "placement.running",
        "rental.activated",
        "rental.release_started",
        "placement.stopping",
        "placement.stopped",
        "placement.purged",
        "rental.released",
    ]
    assert [event.id for event in found] == sorted({event.id for event in found})
    assert all(event.actor and event.reason and event.owner == "admin" for event in found)
    assert list(orion.events(rental_id=rental.id, after=found[-1].id)) == []


@pytest.fixture
def arriving(stack: Stack) -> Iterator[Queue[tuple[float, Event]]]:
    """Yield a queue of the stream's events, each with the time of its arrival."""
    arrived: Queue[tuple[float, Event]] = Queue()
    mark = stack.mark()

    def listen() -> None:
        with stack.connect() as connection:
            for event in connection.follow_events(after=mark, for_s=FOLLOWED_S):
                arrived.put((time.time(), event))
                if event.kind == "token.revoked":
                    return

    listener = threading.Thread(target=listen)
    listener.start()
    yield arrived
    with stack.connect() as connection:
        connection.revoke_token(connection.create_token("the-end").id)
    listener.join(timeout=FOLLOWED_S + 30)
    assert not listener.is_alive()


def test_the_stream_sends_each_event_at_once(orion: Orion, arriving: Queue[tuple[float, Event]]) -> None:
    for number in range(3):
        asked = time.time()
        orion.create_token(f"streamed-{number}")
        moment, event = arriving.get(timeout=AT_ONCE_S)
        assert (event.kind, f"streamed-{number}" in event.reason) == ("token.created", True)
        assert moment - asked < AT_ONCE_S


def test_the_command_follows_events_as_they_happen(stack: Stack, renter: Renter, rent: Rent) -> None:
    mark = stack.mark()
    following = renter.following("events", "-f", "--json", "--after", str(mark))
    try:
        rental = rent("followed")
        kinds = []
        assert following.stdout is not None
        watchdog = threading.Timer(60, following.kill)
        watchdog.start()
        for line in following.stdout:
            event = json.loads(line)
            if event["rental_id"] == rental.id:
                kinds.append(event["kind"])
            if event["kind"] == "rental.activated":
                break
        watchdog.cancel()
        assert kinds[0] == "rental.queued"
        assert kinds[-1] == "rental.activated"
    finally:
        following.kill()
        following.communicate()
    shown = renter.orion("events", "--rental", "followed").stdout
    assert "rental.activated" in shown
