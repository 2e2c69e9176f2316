"""Failures of a rental's worker: it dies, is paused, loses the network, or restarts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from conftest import Figures, Rent
from precious import check_all_is_there, furnish
from renter import Renter
from stack import MOVED_WITHIN_S, PROJECT, TAKEOVER_S, Container, Stack, story
from support.containers import pause
from waiting import eventually

from orion.client.sdk import Orion
from orion.wire import Event, Rental, RentalState, WorkerHealth

RETURNED_WITHIN_S = 90.0
FROZEN_WITHIN_S = 2.0
PROVED_WITHIN_S = TAKEOVER_S
"""Seconds for a takeover by a proof of death, which takes 2 s on an idle machine. A lease ends later than that."""
BY_LEASE = "no heartbeat for"
BY_PROOF = "its container is gone"


@pytest.fixture
def rental(stack: Stack, orion: Orion, rent: Rent, renter: Renter) -> Rental:
    """Yield a rental with a file in its home, once no earlier fault delays the manager's decisions about its worker.

    The rental writes a line each 0.2 s, numbered by the time, so that the test can measure losses.
    """
    rented = rent()
    write = "while :; do date +%s.%N >> lines; sleep 0.2; done"
    renter.inside(rented, f"echo precious > kept; chmod 640 kept; nohup sh -c '{write}' >/dev/null 2>&1 &")
    written_at = datetime.now(UTC)
    eventually("a snapshot is made", lambda: (orion.rental(rented.id).last_safe_copy_at or written_at) > written_at, 60)
    stack.await_no_brake()
    return rented


def test_a_killed_worker_loses_its_rental_and_is_purged_when_it_returns(
    stack: Stack, orion: Orion, rental: Rental, renter: Renter, figures: Figures
) -> None:
    dead, tree = stack.container_of(rental.worker_id), furnish(renter, rental)
    _await_copy(orion, rental)
    mark, began = stack.mark(), time.monotonic()
    stack.docker("kill", dead.id)
    killed_at, shown = time.time(), orion.rental(rental.id)
    stack.await_kind(mark, "worker.became_down", PROVED_WITHIN_S, rental.worker_id)
    figures["docker kill to down, by proof"] = f"{time.monotonic() - began:.1f} s"
    stack.await_active(mark, rental, rental.epoch + 1)
    figures["docker kill to active on another worker"] = f"{time.monotonic() - began:.1f} s"
    _check_takeover(stack, mark, rental, BY_PROOF)
    _check_moved(orion, rental, renter)
    _check_files(orion, rental, renter, killed_at, shown, figures)
    check_all_is_there(renter, orion.rental(rental.id), tree)

    mark = stack.mark()
    stack.docker("start", dead.id)
    _check_return(stack, mark, rental, dead)
    _check_moved(orion, rental, renter)


@contextmanager
def copy_of(stack: Stack, worker: Container) -> Iterator[str]:
    """Run a second container with a copy of all files of this one, while that runs, and yield its name."""
    name = f"{PROJECT}-copy"
    stack.docker("commit", "--pause=false", worker.id, f"{name}:latest")
    found = json.loads(stack.docker("inspect", worker.id))[0]
    same = [f"--cap-add={one}" for one in found["HostConfig"]["CapAdd"]]
    same += [
        f"--volume={found['HostConfig']['Binds'][0]}",
        f"--network={stack.network}",
        "--label=com.docker.compose.project=copy",
    ]
    confined = ("--cap-drop=ALL", "--security-opt=no-new-privileges:true", "--pids-limit=512", "--memory=512m")
    try:
        stack.docker("run", "--detach", "--name", name, *confined, *same, f"{name}:latest")
        yield name
    finally:
        stack.docker("rm", "--force", "--volumes", name)
        stack.docker("rmi", f"{name}:latest")


def test_a_copied_worker_is_refused_with_advice_and_replaces_the_original_once_that_is_gone(
    stack: Stack, orion: Orion, rental: Rental, renter: Renter
) -> None:
    worker = stack.container_of(rental.worker_id)
    mark = stack.mark()
    with copy_of(stack, worker) as copy:

        def said() -> str:
            done = stack.exec(copy, "true")
            assert done.returncode == 0, "it continues to call"
            return stack.docker("logs", copy)

        eventually("the copy is refused repeatedly", lambda: said().count("identity_in_use") >= 3, 60)
        assert f"worker {rental.worker_id} still answers at" in said()
        assert "your volume is a copy of its own, remove it" in said()
        events = [one for one in stack.events(mark) if one.kind != "rental.copied"]
        # On a busy machine a heartbeat of any other worker may be late.
        late = ("worker.became_suspect", "worker.became_ready")
        events = [one for one in events if one.kind not in late or one.worker_id == rental.worker_id]
        assert events == [], story(events)
        shown = orion.rental(rental.id)
        assert (shown.state, shown.worker_id, shown.epoch) == (RentalState.ACTIVE, rental.worker_id, rental.epoch)
        assert renter.inside(rental, "cat kept") == "precious"

        mark = stack.mark()
        stack.docker("kill", worker.id)
        stack.await_active(mark, rental, rental.epoch + 1)
        stack.await_kind(mark, "worker.became_ready", RETURNED_WITHIN_S, rental.worker_id)
        hostname = orion.worker(rental.worker_id or "").hostname
        assert hostname == stack.docker("inspect", "--format", "{{.Config.Hostname}}", copy).strip()
        _check_moved(orion, rental, renter)
        assert stack.exec(copy, "ls", "/home").stdout == "", (
            "the files of the rental were kept as a recovered snapshot and purged"
        )


def test_a_worker_that_was_paused_too_long_returns_without_its_rental(
    stack: Stack, orion: Orion, rental: Rental, renter: Renter
) -> None:
    asleep = stack.container_of(rental.worker_id)
    mark = stack.mark()
    pause(asleep.id)
    stack.await_active(mark, rental, rental.epoch + 1)
    _check_takeover(stack, mark, rental, BY_LEASE)

    mark, frozen_before = stack.mark(), _frozen_at(stack, asleep)
    stack.docker("unpause", asleep.id)
    woken_at = datetime.now(UTC)

    def frozen_anew() -> datetime | None:
        at = _frozen_at(stack, asleep)
        return at if at != frozen_before else None

    frozen_at = eventually("the worker freezes the rental after the unpause", frozen_anew, 30)
    assert frozen_at
    assert (frozen_at - woken_at).total_seconds() < FROZEN_WITHIN_S
    _check_return(stack, mark, rental, asleep)
    _check_moved(orion, rental, renter)


def test_a_worker_that_was_cut_off_from_the_network_returns_without_its_rental(
    stack: Stack, orion: Orion, rental: Rental, renter: Renter
) -> None:
    alone = stack.container_of(rental.worker_id)
    mark = stack.mark()
    stack.docker("network", "disconnect", stack.network, alone.id)
    down = stack.await_kind(mark, "worker.became_down", MOVED_WITHIN_S, rental.worker_id)
    assert _states(stack, alone, rental) == {"T"}
    frozen_at = _frozen_at(stack, alone)
    assert frozen_at
    assert frozen_at < down.at, f"frozen at {frozen_at}, taken over at {down.at}"
    stack.await_active(mark, rental, rental.epoch + 1)
    _check_takeover(stack, mark, rental, BY_LEASE)

    mark = stack.mark()
    stack.docker("network", "connect", stack.network, alone.id)
    _check_return(stack, mark, rental, alone)
    _check_moved(orion, rental, renter)


def test_a_worker_whose_sshd_is_restarted_only_looks_suspect_for_a_moment(
    stack: Stack, orion: Orion, rental: Rental, renter: Renter
) -> None:
    container = stack.container_of(rental.worker_id)
    mark, frozen_before = stack.mark(), _frozen_at(stack, container)
    assert stack.exec(container.id, "pkill", "-KILL", "-x", "sshd|sshd-session").returncode == 0
    stack.await_kind(mark, "worker.became_ready", RETURNED_WITHIN_S, rental.worker_id)
    heard_at: set[datetime | None] = set()

    def is_heard_twice_more() -> bool:
        heard_at.add(orion.worker(str(rental.worker_id)).last_heartbeat_at)
        return len(heard_at) > 2

    eventually(
        "the worker sends heartbeats for longer than a proof of death takes", is_heard_twice_more, RETURNED_WITHIN_S
    )
    happened = stack.events(mark)
    verdicts = [kind for kind in _kinds(happened, worker_id=str(rental.worker_id)) if kind.startswith("worker.")]
    assert verdicts[:2] == ["worker.became_suspect", "worker.became_ready"], story(happened)
    assert set(verdicts[2:]) <= set(verdicts[:2]), story(happened)
    of_rental = [kind for kind in _kinds(happened, rental_id=rental.id) if not kind.startswith("rental.session_")]
    assert of_rental == [], story(happened)
    assert _frozen_at(stack, container) == frozen_before
    assert "T" not in _states(stack, container, rental)
    assert renter.inside(orion.rental(rental.id), "cat kept") == "precious"


def test_a_rental_migrates_with_its_files_before_its_worker_restarts(
    stack: Stack, orion: Orion, rental: Rental, renter: Renter
) -> None:
    worker_id = str(rental.worker_id)
    mark = stack.mark()
    stack.docker("restart", stack.container_of(worker_id).id, timeout_s=90)
    stack.await_active(mark, rental, rental.epoch + 1)
    assert renter.inside(orion.rental(rental.id), "cat kept") == "precious"
    stack.await_kind(mark, "worker.became_ready", RETURNED_WITHIN_S, worker_id)
    happened = stack.events(mark)
    assert "placement.lost" not in _kinds(happened, rental_id=rental.id), story(happened)
    assert "worker.became_down" not in _kinds(happened, worker_id=worker_id)


def _states(stack: Stack, container: Container, rental: Rental) -> set[str]:
    """Return the states of the rental's processes from ps, where T means stopped.

    Z is left out: a process that ended just before its parent was stopped runs no more, and its parent cannot reap it.
    """
    shown = stack.exec(container.id, "ps", "-o", "stat=", "-U", rental.username).stdout
    return {line.strip()[0] for line in shown.splitlines()} - {"Z"}


def _frozen_at(stack: Stack, container: Container) -> datetime | None:
    """Return when the agent last logged, in this boot of its container, that its lease had ended."""
    since = container.started_at.isoformat()
    logged = stack.docker("logs", "--timestamps", "--since", since, container.id).splitlines()
    times = [line.split()[0] for line in logged if "no right to run" in line]
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*Z$", r"\1+00:00", times[-1])) if times else None


def _check_files(
    orion: Orion, rental: Rental, renter: Renter, killed_at: float, shown: Rental, figures: Figures
) -> None:
    """Assert that the files are back, and that only files newer than the reported snapshot are missing."""
    migrated = orion.rental(rental.id)
    assert renter.inside(migrated, "cat kept; stat -c %a kept") == "precious\n640"
    last_line = float(renter.inside(migrated, "tail -n 1 lines"))
    assert shown.last_safe_copy_at
    assert last_line >= shown.last_safe_copy_at.timestamp() - 0.5
    figures["lines lost by a kill"] = f"{killed_at - last_line:.1f} s of them"
    restored = next(event for event in orion.events(rental_id=rental.id) if event.kind == "rental.files_restored")
    assert restored.details["generation"].startswith("1-")
    assert restored.details["files"] >= 3


def _await_copy(orion: Orion, rental: Rental) -> None:
    """Wait for a snapshot of the rental's home as it is now."""
    now = time.time()

    def is_copied() -> bool:
        began_at = orion.rental(rental.id).last_safe_copy_at
        return began_at is not None and began_at.timestamp() >= now

    eventually("a snapshot of the present home is made", is_copied, 60)


def _check_takeover(stack: Stack, mark: int, rental: Rental, reason: str) -> None:
    """Assert the order of events: suspect, then down by lease or by proof of death, then active on another worker."""
    events = stack.events(mark)
    of_worker = _kinds(events, worker_id=rental.worker_id)
    verdicts = [kind for kind in of_worker if kind.startswith("worker.became_")]
    assert verdicts[-2:] == ["worker.became_suspect", "worker.became_down"], story(events)
    down = next(event for event in events if event.kind == "worker.became_down")
    assert reason in down.reason
    lost = next(event for event in events if event.kind == "placement.lost")
    assert (lost.rental_id, lost.worker_id, lost.epoch) == (rental.id, rental.worker_id, rental.epoch)
    activated = next(event for event in events if event.kind == "rental.activated")
    assert down.id < lost.id < activated.id
    assert activated.worker_id != rental.worker_id


def _check_moved(orion: Orion, rental: Rental, renter: Renter) -> None:
    """Assert that the rental has the same name, account, key and expiry, and the pinned host key of its new worker."""
    migrated = orion.rental(rental.id)
    assert (migrated.state, migrated.epoch) == (RentalState.ACTIVE, rental.epoch + 1)
    assert migrated.worker_id != rental.worker_id
    assert migrated.ssh_host_keys == orion.worker(str(migrated.worker_id)).ssh_host_keys != rental.ssh_host_keys
    assert (migrated.name, migrated.username, migrated.expires_at) == (rental.name, rental.username, rental.expires_at)
    assert renter.inside(migrated, "id -un") == rental.username


def _check_return(stack: Stack, mark: int, rental: Rental, container: Container) -> None:
    """Assert that the worker was cleaned before it became ready, and that it has no residue of the rental."""
    ready = stack.await_kind(mark, "worker.became_ready", RETURNED_WITHIN_S, rental.worker_id)
    events = stack.events(mark, worker_id=rental.worker_id)
    purged = [event for event in events if event.kind == "placement.purged"]
    assert [(event.rental_id, event.epoch) for event in purged] == [(rental.id, rental.epoch)], story(events)
    assert purged[0].details["report"]["left"] == []
    assert purged[0].id < ready.id
    assert stack.exec(container.id, "getent", "passwd", rental.username).returncode == 2
    assert stack.exec(container.id, "ls", "-A", "/home").stdout == ""
    with stack.connect() as orion:
        assert orion.worker(str(rental.worker_id)).health is WorkerHealth.READY


def _kinds(events: list[Event], rental_id: str | None = None, worker_id: str | None = None) -> list[str]:
    return [
        event.kind for event in events if rental_id in {None, event.rental_id} and worker_id in {None, event.worker_id}
    ]
