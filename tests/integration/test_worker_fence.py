"""Tests of the fence: processes on a worker without a lease are stopped, even hostile ones, and continue later."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from rental_support import Rental, new_rental, placement
from support.containers import pause
from worker_support import SESSION_S, SmallManager, Worker, WorkerNetwork, docker, make_key, serving, wait_until, worker

LEASE_S = 3.0
PROXY_ANSWER_S = 0.5
LONG_LEASE_S = 75.0
"""The lease while a scene is set up: a busy machine may leave a worker no time to renew a short one."""
BUSY_S = 4.0
"""Seconds by which the worker may be late on one processor that its renters use up, while other tests run.
By the clocks of the platform, 15 s are between a lease's end and a takeover."""
FROZEN_WITHIN_S = LEASE_S + BUSY_S
WAKE_BUDGET_S = 0.5
AWAY = {"X-Orion-Manager": "unreachable"}

TICKS = """
import ctypes, fcntl, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
log = os.open("ticks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def tick():
    os.write(log, b"%.3f\\n" % time.time())
class Event(ctypes.Structure):
    _fields_ = [("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("rest", ctypes.c_int * 13)]
def continued_every(nanoseconds):
    signal.signal(signal.SIGCONT, lambda *_: None)
    timer = ctypes.c_void_p()
    times = (ctypes.c_long * 4)(0, nanoseconds, 0, nanoseconds)
    assert not libc.timer_create(1, ctypes.byref(Event(None, signal.SIGCONT)), ctypes.byref(timer))
    assert not libc.timer_settime(timer, 0, times, None)
def tick_for_ever():
    while True:
        tick()
        time.sleep(0.01)
"""

FIGHTS = {
    "ignores hang-ups in a session of its own": "os.setsid(); tick_for_ever()",
    "goes on in its child and ends": """
while True:
    tick()
    try:
        if os.fork():
            os._exit(0)
    except OSError:  # all its processes are in use: one that ended has not been waited for yet
        continue
""",
    "is sent SIGCONT by another process of its own": """
ticking = os.fork()
if not ticking:
    tick_for_ever()
for _ in range(3):
    if not os.fork():
        os.setsid()
while True:
    os.kill(ticking, signal.SIGCONT)
""",
    "has the kernel send it SIGCONT by a timer": "continued_every(2_000_000)\ntick_for_ever()",
    "stops itself again each time that a slow timer wakes it": """
continued_every(300_000_000)
while True:
    tick()
    os.kill(os.getpid(), signal.SIGSTOP)
""",
    "has ended its first thread": """
import threading
threading.Thread(target=tick_for_ever).start()
libc.pthread_exit(None)
""",
}


@dataclass
class LeasedWorker:
    worker: Worker
    manager: SmallManager
    rentals: dict[str, Rental]
    lease_s: float = LEASE_S
    cut_at: float = 0.0

    def ticks(self, of: Rental) -> list[float]:
        ticks = self.worker.run("sh", "-c", f"cat /home/{of.username}/ticks 2>/dev/null || true")
        return [float(line) for line in ticks.split() if line.count(".") == 1]

    def states(self, of: Rental) -> set[str]:
        """Return those of all processes with this real uid. (The agent's own helper has it as its effective one.)"""
        return set(self.worker.run("sh", "-c", f"ps -o stat= -U {of.uid} | cut -c1 || true").split())

    def shown(self, of: Rental) -> str:
        items = json.loads(self.worker.run("orion-rental", "inventory"))["rentals"]
        return next(str(item["state"]) for item in items if item["rental_id"] == of.rental_id)

    def shorten(self) -> None:
        """Give it short leases until `mend`, and wait for the second call, which shows that it knows of them."""
        self.manager.lease_s = self.lease_s
        now = time.monotonic()
        wait_until(lambda: len(self.manager.of("/api/heartbeat", after=now)) > 1, "it has a short lease")

    def cut(self, status: int = 0) -> None:
        self.manager.instead = (status, {})
        self.cut_at = time.time()

    def mend(self) -> None:
        self.manager.lease_s = LONG_LEASE_S
        self.manager.placements = [placement(rental, "run") for rental in self.rentals.values()]
        self.manager.instead = None


@contextmanager
def scene(
    network: WorkerNetwork, join: Path, folder: Path, names: list[str], *options: str,
    lease_s: float = LEASE_S, proxy_answer_s: float = PROXY_ANSWER_S,
) -> Iterator[LeasedWorker]:  # fmt: skip
    manager = SmallManager(make_key(folder), 0.2, LONG_LEASE_S, proxy_answer_s)
    with serving(manager, network.gateway), worker(network, manager, join, "--cpus=1", *options, slots=8) as new:
        new.wait_registered()
        yield LeasedWorker(new, manager, {name: new_rental(new, folder).create_quickly() for name in names}, lease_s)


def run_in_background(rental: Rental, program: str) -> None:
    done = rental.ssh("cat >program.py; nohup python3 program.py >out 2>&1 </dev/null &", TICKS + program)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def fought(network: WorkerNetwork, join: Path, folder: Path) -> Iterator[LeasedWorker]:
    """Yield one rental for each attack on one worker, whose manager then stops answering."""
    with scene(network, join, folder, [*FIGHTS]) as found:
        for name, program in FIGHTS.items():
            run_in_background(found.rentals[name], program)
        for name, rental in found.rentals.items():
            wait_until(lambda one=rental: len(found.ticks(one)) > 2, f"what {name} is at work")
        found.shorten()
        found.cut()
        time.sleep(FROZEN_WITHIN_S + 0.5)
        yield found


@pytest.mark.parametrize("fight", FIGHTS)
def test_a_renter_cannot_resist_a_freeze(fought: LeasedWorker, fight: str) -> None:
    rental = fought.rentals[fight]
    ticks = fought.ticks(rental)
    late = max(ticks) - fought.cut_at
    assert 0 < late < FROZEN_WITHIN_S, f"{late:.3f} s\n{fought.worker.log()}"
    assert fought.states(rental) <= {"T", "Z"}
    assert not rental.accepts()
    assert fought.shown(rental) == "frozen"
    time.sleep(0.4)
    assert fought.ticks(rental) == ticks


def test_all_processes_continue_when_a_reply_says_run(network: WorkerNetwork, join: Path, folder: Path) -> None:
    with scene(network, join, folder, ["one"]) as found:
        rental = found.rentals["one"]
        run_in_background(rental, "os.setsid(); tick_for_ever()")
        rental.ssh("nohup sleep 777 >/dev/null 2>&1 </dev/null & sleep 0.3; kill -STOP $!")
        terminal = subprocess.Popen(
            found.worker.ssh_command(rental.username, rental.key, "-tt"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        assert terminal.stdin
        terminal.stdin.write("PS1=; cat\n")
        terminal.stdin.write("before\n")
        wait_until(
            lambda: "cat" in found.worker.run("ps", "-o", "comm=", "-u", str(rental.uid)), "the terminal is open"
        )

        found.shorten()
        found.cut(status=429)
        wait_until(lambda: found.shown(rental) == "frozen", "frozen")
        frozen_at = time.monotonic()
        wait_until(lambda: found.states(rental) == {"T"}, "each has had the turn in which it stops")
        ticks = found.ticks(rental)
        assert max(ticks) - found.cut_at < FROZEN_WITHIN_S
        terminal.stdin.write("while it stood\n")
        time.sleep(0.5)
        assert found.ticks(rental) == ticks
        beats = wait_until(lambda: found.manager.of("/api/heartbeat", after=frozen_at)[1:], "it has called since")
        assert beats[-1].body["inventory"][0]["state"] == "frozen"
        assert found.worker.rental("unlock", rental_id=rental.rental_id, epoch=1)[1]["code"] == "frozen"
        assert found.worker.rental("thaw", rental_id=rental.rental_id, epoch=1)[1]["code"] == "no_lease"

        found.mend()
        wait_until(lambda: found.shown(rental) == "running", "thawed")
        wait_until(lambda: len(found.ticks(rental)) > len(ticks), "it ticks again")
        assert rental.accepts()
        terminal.stdin.write("after\nexit\n")
        terminal.stdin.write("\x04exit\n")
        said = terminal.communicate(timeout=SESSION_S)[0]
        assert "while it stood" in said
        assert "after" in said
        assert "Stopped" not in said, "its shell did not notice"
        stopped = found.worker.run("sh", "-c", f"ps -o stat=,args= -u {rental.uid} | grep 'sleep 777'")
        assert stopped.startswith("T"), "processes that the renter had stopped stay stopped"


def test_a_worker_keeps_its_lease_while_the_proxy_says_that_the_manager_is_away(
    network: WorkerNetwork, join: Path, folder: Path
) -> None:
    lease_s, proxy_answer_s = BUSY_S + 3.0, BUSY_S + 1.0
    with scene(network, join, folder, ["one"], lease_s=lease_s, proxy_answer_s=proxy_answer_s) as found:
        rental = found.rentals["one"]
        run_in_background(rental, "os.setsid(); tick_for_ever()")
        wait_until(lambda: found.ticks(rental), "it ticks")
        found.shorten()
        found.manager.instead = (502, AWAY)
        time.sleep(lease_s + 1.5)
        assert found.shown(rental) == "running"
        assert rental.accepts()
        found.cut(status=502)
        wait_until(lambda: found.shown(rental) == "frozen", "frozen")
        wait_until(lambda: found.states(rental) == {"T"}, "each has had the turn in which it stops")
        assert max(found.ticks(rental)) - found.cut_at < proxy_answer_s + BUSY_S


@pytest.mark.parametrize("asleep", ["its container", "its agent alone"])
def test_a_worker_that_wakes_up_without_a_lease_first_freezes_its_rentals(
    network: WorkerNetwork, join: Path, folder: Path, asleep: str
) -> None:
    with scene(network, join, folder, ["one"]) as found:
        rental = found.rentals["one"]
        run_in_background(rental, "[os.fork() for _ in range(4)]\nwhile True: tick()")
        wait_until(lambda: found.ticks(rental), "it ticks")
        found.mend()
        found.shorten()
        if asleep == "its container":
            pause(found.worker.name)
        else:
            found.worker.run("pkill", "-STOP", "-f", "orion/orion-agent")
        found.cut()
        time.sleep(LEASE_S + 0.5)
        if asleep == "its container":
            docker("unpause", found.worker.name)
            woke = time.time()
        else:  # by the worker's own log: a command in a container begins late on a busy machine
            woke = float(found.worker.run("sh", "-c", "date +%s.%N; pkill -CONT -f orion/orion-agent"))
        time.sleep(WAKE_BUDGET_S + BUSY_S)
        late = max(found.ticks(rental)) - woke
        assert late < WAKE_BUDGET_S + BUSY_S, found.worker.log()
        wait_until(lambda: found.states(rental) == {"T"}, "each has had the turn in which it stops")


def test_an_order_freezes_and_thaws_and_no_older_reply_does(network: WorkerNetwork, join: Path, folder: Path) -> None:
    with scene(network, join, folder, ["one"]) as found:
        rental = found.rentals["one"]
        run_in_background(rental, "os.setsid(); tick_for_ever()")
        order = {"rental_id": rental.rental_id, "epoch": rental.epoch}
        played = found.worker.playbook("freeze", **order)
        assert played.ok, played.output
        assert (played.changed, played.last["state"]) == (True, "frozen")
        wait_until(lambda: found.states(rental) == {"T"}, "each has had the turn in which it stops")
        ticks = found.ticks(rental)
        assert not rental.accepts()
        assert found.worker.rental("freeze", **order)[1]["changed"] is False
        assert found.ticks(rental) == ticks
        assert found.states(rental) == {"T"}
        thawed = found.worker.playbook("thaw", **order)
        assert (thawed.ok, thawed.changed, thawed.last["state"]) == (True, True, "running"), thawed.output
        wait_until(lambda: len(found.ticks(rental)) > len(ticks), "it ticks again")
        assert found.worker.rental("freeze", **order)[1]["state"] == "frozen"
        assert rental.delete().last["left"] == []


WRONG_CLOCK = """
import os, time
right = time.time
def wrong():
    with open("/clock/shift") as file:
        return right() + float(file.read())
if os.getuid() == 0:
    time.time = wrong
"""


class WallClock:
    """The wall clock of all that is root in a worker's container and Python, which a file sets while it runs."""

    def __init__(self, folder: Path) -> None:
        self._place = folder / "clock"
        self._place.mkdir()
        (self._place / "wrong_clock.py").write_text(WRONG_CLOCK)
        (self._place / "wrong_clock.pth").write_text("import wrong_clock\n")
        self.set(0)
        libraries = "/usr/lib/python3/dist-packages"
        files = [
            f"--volume={self._place}/{name}:{libraries}/{name}:ro" for name in ("wrong_clock.py", "wrong_clock.pth")
        ]
        self.options = [f"--volume={self._place}:/clock:ro", *files]

    def set(self, hours: float) -> None:
        (self._place / "next").write_text(str(hours * 3600))
        (self._place / "next").rename(self._place / "shift")

    def shown_in(self, on: Worker) -> float:
        """Return the hours by which it is wrong."""
        return (float(on.run("python3", "-c", "import time; print(time.time())")) - time.time()) / 3600


def test_a_jump_of_the_wall_clock_neither_ends_nor_lengthens_a_lease(
    network: WorkerNetwork, join: Path, folder: Path
) -> None:
    clock = WallClock(folder)
    with scene(network, join, folder, ["one"], *clock.options) as found:
        rental, on = found.rentals["one"], found.worker
        run_in_background(rental, "os.setsid(); tick_for_ever()")
        wait_until(lambda: len(found.ticks(rental)) > 2, "it ticks")
        for hours in (-5, 720):
            clock.set(hours)
            assert abs(clock.shown_in(on) - hours) < 0.1
            beats, ticks = len(found.manager.of("/api/heartbeat")), len(found.ticks(rental))
            wait_until(lambda n=beats: len(found.manager.of("/api/heartbeat")) > n + 3, "it calls home as before")
            assert len(found.ticks(rental)) > ticks
            assert found.states(rental) != {"T"}
        assert "no right to run" not in on.log().partition("registered as")[2]
        found.shorten()
        found.cut()
        clock.set(-960)  # a lease by this clock would now end in a month
        wait_until(lambda: found.states(rental) == {"T"}, "it is frozen as ever")
        assert max(found.ticks(rental)) - found.cut_at < FROZEN_WITHIN_S
        clock.set(960)
        found.mend()
        wait_until(lambda: found.shown(rental) == "running", "the program continues")
        assert found.states(rental) != {"T"}
        items = json.loads(on.run("orion-rental", "inventory"))["rentals"]
        assert [(item["rental_id"], item["state"]) for item in items] == [(rental.rental_id, "running")]
