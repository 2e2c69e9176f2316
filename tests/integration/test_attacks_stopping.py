"""Attacks of a renter that stops (SIGSTOP) processes of root for its rental: all end at their deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from orion_worker.limits.stopped_log_ins import LOOK_EVERY_S, LOOKS
from rental_support import Rental, new_rental
from snapshot_service_contract import refusal
from snapshot_support import RealSnapshotService, home_of, snapshot_service
from worker_support import Worker, docker, wait_until

from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.snapshots.port import SnapshotError

LIMITS = SnapshotLimits(max_files=20_000, max_bytes=64 << 20)
ROUNDS = 4
DEADLINE_S = 8.0
"""Seconds that each snapshot and restore of the attacker may take."""
LATE_S = 30.0
"""Seconds after its deadline within which a transfer has to be gone, on a busy machine."""
LOG_INS = 12
STOP_EACH_RSYNC = """
import os, signal
while True:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/comm") as comm:
                if comm.read() == "rsync\\n":
                    os.kill(int(name), signal.SIGSTOP)
        except OSError:
            pass
"""
STOP_ALL = "import os, signal\nwhile True: os.kill(-1, signal.SIGSTOP)"


@pytest.fixture(scope="module")
def real(pair: tuple[Worker, Worker], folder: Path) -> Iterator[RealSnapshotService]:
    with snapshot_service(folder, pair[0].key) as running:
        yield running


@pytest.fixture
def rental(host: Worker, folder: Path) -> Rental:
    return new_rental(host, folder).create_quickly()


@contextmanager
def running(rental: Rental, program: str) -> Iterator[None]:
    """Run a Python program of the renter without a log-in, and beyond the reach of a freeze."""
    become = ["setpriv", f"--reuid={rental.uid}", f"--regid={rental.uid}", "--clear-groups"]
    docker("exec", "--detach", rental.on.name, *become, "python3", "-c", program)
    try:
        wait_until(lambda: rental.on.run("pgrep", "-u", str(rental.uid), "python3", check=False), "it runs")
        yield
    finally:
        rental.on.run("pkill", "-KILL", "-u", str(rental.uid), "python3", check=False)


def transfers(worker: Worker) -> list[str]:
    """Return all processes of rsync, and those of root that wait for one, each with its age in seconds."""
    listed = worker.run("ps", "-eo", "etimes=,pid=,uid=,stat=,args=").splitlines()
    begun = ("orion-rental send", "orion-rental receive", "orion-rental salvage", "rsync --server")
    return [line for line in listed if any(each in line for each in begun)]


def too_old(worker: Worker) -> list[str]:
    return [line for line in transfers(worker) if int(line.split()[0]) > DEADLINE_S + LATE_S]


async def test_a_renter_that_stops_each_rsync_leaves_no_process_and_snapshots_of_others_continue(
    real: RealSnapshotService, rental: Rental, roommate: Rental
) -> None:
    with running(rental, STOP_EACH_RSYNC):
        for number in range(ROUNDS):
            for each in (rental, roommate):
                done = await asyncio.to_thread(each.ssh, f"head -c 300000 /dev/urandom > file{number}")
                assert done.returncode == 0, done.stderr
            own = asyncio.create_task(real.client.take(home_of(rental), LIMITS, DEADLINE_S))
            copied = await real.client.take(home_of(roommate), LIMITS)
            assert copied.snapshot.files >= number + 1
            with suppress(SnapshotError):
                await own
            assert await asyncio.to_thread(too_old, rental.on) == []
        await asyncio.to_thread(
            wait_until, lambda: not transfers(rental.on), "no transfer is left", DEADLINE_S + LATE_S
        )
    assert (await real.client.take(home_of(rental), LIMITS)).snapshot.files >= ROUNDS


async def test_a_restore_that_a_former_process_of_the_renter_stops_ends_and_is_repeated(
    real: RealSnapshotService, rental: Rental, neighbour: Worker
) -> None:
    await asyncio.to_thread(rental.ssh, "head -c 60000000 /dev/urandom > file")
    await real.client.take(home_of(rental), LIMITS)
    restored = replace(rental, on=neighbour, epoch=2)
    create = lambda: neighbour.rental("create", **restored.variables, public_keys=[restored.key.public])  # noqa: E731
    assert (await asyncio.to_thread(create))[0] == 0
    with running(restored, STOP_EACH_RSYNC):
        refused = await refusal(real.client.restore(home_of(restored), deadline_s=DEADLINE_S))
        assert refused.code in {"timed_out", "stalled"}, refused
        await asyncio.to_thread(
            wait_until,
            lambda: not transfers(neighbour),
            "no part of it is left, stopped or not",
            LATE_S,
        )
    assert (await asyncio.to_thread(create))[0] == 0, "the rental's lock is free"
    assert await real.client.restore(home_of(restored))
    assert (await asyncio.to_thread(restored.delete)).ok


def test_a_renter_that_stops_its_start_command_before_it_begins_keeps_no_lock(rental: Rental) -> None:
    boot_id = rental.on.run("cat", "/run/orion/boot-id").strip()
    asked = {**rental.variables, "public_keys": [rental.key.public], "start": "sleep 1000"}
    with running(rental, STOP_ALL):
        for number in range(1, 4):
            began = time.monotonic()
            status, report = rental.on.rental("run", **asked, start_mark=f"{number}@{boot_id}")
            assert status == 0, report
            assert report.get("started") or "start_problem" in report
            assert time.monotonic() - began < 20
        left = rental.on.run("pgrep", "-u", "0", "-fc", "orion-rental run", check=False)
        assert left.strip() == "0"
        assert rental.on.rental("purge", **rental.variables)[0] == 0, "a release needs the rental's lock"
    assert rental.traces() == ""


def test_a_renter_that_stops_its_log_ins_keeps_no_process_of_root(rental: Rental, roommate: Rental) -> None:
    """Disconnect its clients: sshd's process of root waits for the stopped one, and counts for no renter."""
    clients = [rental.log_in("echo $PPID; kill -STOP $PPID; exec sleep 1000") for _ in range(LOG_INS)]
    quiet = roommate.log_in("exec sleep 1000")

    def stopped() -> int:
        states = rental.on.run("ps", "-o", "stat=", "-u", str(rental.uid), check=False).split()
        return sum(state.startswith("T") for state in states)

    def of_root() -> int:
        return int(rental.on.run("pgrep", "-u", "0", "-fc", f"sshd-session: {rental.username} ", check=False))

    try:
        wait_until(lambda: stopped() == LOG_INS, "each log-in is stopped", within_s=60)
        assert of_root() == LOG_INS
        for client in clients:
            client.kill()
        wait_until(lambda: of_root() == 0, "none of them is left", within_s=3 * LOOKS * LOOK_EVERY_S)
        wait_until(lambda: stopped() == 0, "the stopped process that it waited for has ended too")
        assert rental.accepts()
        assert quiet.poll() is None, "no other log-in was ended"
    finally:
        for client in (*clients, quiet):
            client.kill()
            client.wait()
