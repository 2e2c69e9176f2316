"""The cost of the manager with more and more workers, and as many rentals. It needs neither Docker nor wrk.

The manager runs as a process of this machine on a database that pool.py has filled; the calls go to it directly, with
the proxy secret. Its clocks are ten times slower, so it suspects no worker while it is measured.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import asyncssh

from bench import pool
from bench.calls import Caller
from bench.figures import median, steepest
from bench.processes import cpu_s, memory_mb
from bench.report import Result
from bench.stack import ROOT, json_lines
from orion.manager.store.tokens import make_token

PROXY_SECRET = "benchmark"  # noqa: S105 - of a manager that listens on the loopback for a minute
ADDRESS = "172.20.0.1"
"""The address of all workers, from which all calls seem to come."""
START_WITHIN_S = 60.0
SETTLE_WITHIN_S = 45.0
IDLE_S = 5.0
RENTS = 15
PAGE = 50
"""Half of the smallest pool, so that a page from the middle is full at every size."""
CALLS_WITHIN_S = 12.0
"""Seconds for the calls of one kind."""
SIZE_WITHIN_S = 100.0
"""Seconds for one size."""
CALL_WITHIN_S = 20.0
"""Seconds for one call: a manager that has become slow must not delay the benchmark."""

SETTLED = "start-up until the pool's state is settled"
WHOLE = {"memory", "start-up until it answers", SETTLED, "processor, at rest"}
"""The costs that may grow as the pool does. All others are of one worker, rental or page, and must not grow."""
LINEAR, FLAT = 1.1, 0.15

Measured = dict[str, list[float]]


@dataclass
class MeasuredManager:
    process: subprocess.Popen[bytes]
    port: int
    admin_token: str
    log: Path
    started_s: float = 0.0

    def caller(self, token: str | None = None) -> Caller:
        headers = {"X-Orion-Proxy-Secret": PROXY_SECRET, "X-Real-IP": ADDRESS}
        return Caller("127.0.0.1", self.port, token or self.admin_token, headers, CALL_WITHIN_S)

    def decisions(self) -> list[float]:
        """Return the seconds of each decision that led to a step."""
        lines = json_lines(self.log.read_text().splitlines())
        return [line["seconds"] for line in lines if line.get("bench") == "decision" and line["steps"]]


@dataclass
class At:
    """The figures of one size. Times in seconds, memory in MB, processor in seconds per second."""

    size: int
    deadline: float
    """The moment of the monotonic clock after which no more calls begin."""
    values: Measured = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measure(sizes: list[int], samples: int) -> Result:
    result = Result("growth", f"The manager with up to {max(sizes):,} registered workers and as many rentals")
    found = [_at(size, samples) for size in sorted(sizes)]
    for one in found:
        for label, values in one.values.items():
            _row(result, f"{one.size:,}: {label}", label, values)
        result.details[str(one.size)] = one.notes
    for label in found[0].values:
        points = [(one.size, median(one.values[label])) for one in found if one.values.get(label)]
        _judge(result, label, points, sizes=len(found))
    _promises(result, found[-1])
    return result


def _row(result: Result, name: str, label: str, values: list[float]) -> None:
    unit, factor = _unit(label)
    if unit == "ms":
        result.times(name, values)
    else:
        result.value(name, unit, factor * values[0])


def _unit(label: str) -> tuple[str, float]:
    """Return the unit in which a value is shown, and the factor to it."""
    return {"memory": ("MB", 1.0), "processor, at rest": ("% of one core", 100.0)}.get(label, ("ms", 1000.0))


def _judge(result: Result, label: str, points: list[tuple[int, float]], sizes: int) -> None:
    """Add the targets of one cost: how fast it may grow, and that every size answered in time."""
    most = LINEAR if label in WHOLE else FLAT
    unit, factor = _unit(label)
    result.lines[f"{label} ({unit})"] = [(size, factor * value) for size, value in points]
    if len(points) < sizes:
        result.at_least(f"{label}: sizes at which it answered in time", len(points), sizes)
    if len(points) > 1:
        exponent = steepest([size for size, _ in points], [max(value, 1e-6) for _, value in points])
        result.at_most(f"{label}: cost grows as workers to the power of", round(exponent, 2), most)


def _promises(result: Result, largest: At) -> None:
    def worst(*labels: str) -> float:
        return max((median(largest.values[label]) for label in labels if largest.values.get(label)), default=9999.0)

    size = f"{largest.size:,} workers"
    pages = [label for label in largest.values if label.startswith("one page")]
    result.at_most(f"{size}: memory", worst("memory"), 600, " MB")
    result.at_most(f"{size}: slowest page (p50)", 1000 * worst(*pages), 50, " ms")
    result.at_most(
        f"{size}: one placement decision (p50)", 1000 * worst("one decision that led to something"), 10, " ms"
    )
    result.at_most(f"{size}: start-up until it answers", worst("start-up until it answers"), 10, " s")


def _at(size: int, samples: int) -> At:
    with tempfile.TemporaryDirectory(prefix="orion-bench-") as place:
        seed = secrets.token_hex(16)
        url = f"sqlite:///{place}/orion.db"
        pool.fill(url, seed, size, 2, ADDRESS)
        at = At(size, time.monotonic() + SIZE_WITHIN_S)
        with _running(Path(place), url) as manager:
            at.values["start-up until it answers"] = [manager.started_s]
            at.values[SETTLED] = _settled(manager, size, at)
            _measure_all(manager, seed, size, samples, at)
            at.values["memory"] = [memory_mb(manager.process.pid)]
    return at


def _measure_all(manager: MeasuredManager, seed: str, size: int, samples: int, at: At) -> None:
    used, began = cpu_s(manager.process.pid), time.monotonic()
    at.values["longest pause, at rest"] = [_longest_pause(manager)]
    at.values["processor, at rest"] = [(cpu_s(manager.process.pid) - used) / (time.monotonic() - began)]
    chance = random.Random(size)
    with manager.caller() as proxy:
        for name, path in _pages(size).items():
            at.values[f"one page of {name}"] = _calls(partial(_timed_get, proxy, path), samples, at)
        seq = iter(range(1, 10**9))
        at.values["one heartbeat"] = _calls(
            lambda: _heartbeat(manager, seed, chance.randrange(size // 2, size), next(seq)), samples, at
        )
        payload = {"ssh_public_key": pool.A_PUBLIC_KEY, "wait_s": 30}
        at.values["one rent, its engine job nothing"] = _calls(
            lambda: proxy.must("POST", "/api/rent", payload).seconds, min(RENTS, samples), at
        )
    at.values["one decision that led to something"] = manager.decisions()


def _pages(size: int) -> dict[str, str]:
    """Return the paths of the first page and of a middle page of each list that grows, by name."""
    middle = size // 2
    return {
        "workers, first": f"/api/workers?limit={PAGE}",
        "workers, middle": f"/api/workers?limit={PAGE}&after={pool.worker_id(middle)}",
        "rentals, first": f"/api/rentals?limit={PAGE}",
        "rentals, middle": f"/api/rentals?limit={PAGE}&after={pool.rental_id(middle)}",
        "events, first": f"/api/events?limit={PAGE}",
        "events, middle": f"/api/events?limit={PAGE}&after={2 * size}",
        "one rental's events": f"/api/events?rental_id={pool.rental_id(middle)}",
        "status": "/api/status",
    }


def _timed_get(proxy: Caller, path: str) -> float:
    return proxy.must("GET", path).seconds


def _heartbeat(manager: MeasuredManager, seed: str, number: int, seq: int) -> float:
    body = {"session_id": pool.session(number), "seq": seq, "inventory": [pool.item(number)], "lease_s": 750.0}
    with manager.caller(pool.token(seed, number)) as agent:
        return agent.must("POST", "/api/heartbeat", body).seconds


def _calls(one: Callable[[], float], samples: int, at: At) -> list[float]:
    """Return the seconds of this number of calls; fewer if they are slow, none if the manager does not answer."""
    seconds: list[float] = []
    deadline = min(at.deadline, time.monotonic() + CALLS_WITHIN_S)
    while len(seconds) < samples and time.monotonic() < deadline:
        try:
            seconds.append(one())
        except (OSError, HTTPException, RuntimeError) as error:
            at.notes.append(f"{type(error).__name__}: {error}")
            break
    if not seconds:
        at.notes.append("no answer in time")
    return seconds


def _longest_pause(manager: MeasuredManager) -> float:
    """Return the slowest answer of /healthz while the manager has nothing else to do: how long a controller blocks."""
    deadline, longest = time.monotonic() + IDLE_S, 0.0
    with manager.caller() as proxy:
        while time.monotonic() < deadline:
            try:
                longest = max(longest, proxy.must("GET", "/healthz").seconds)
            except OSError:
                return CALL_WITHIN_S
            time.sleep(0.005)
    return longest


def _settled(manager: MeasuredManager, size: int, at: At) -> list[float]:
    """Return the seconds from the start until all workers have unknown health; [] if that was not in time."""
    deadline = time.monotonic() + SETTLE_WITHIN_S
    paths = [f"/api/workers/{pool.worker_id(number)}" for number in (0, size // 2, size - 1)]
    with manager.caller() as proxy, suppress(OSError):  # a manager that does not answer has not settled
        while time.monotonic() < deadline:
            if all(proxy.must("GET", path).body["health"] == "unknown" for path in paths):
                return [manager.started_s + SETTLE_WITHIN_S - (deadline - time.monotonic())]
            time.sleep(0.05)
    at.notes.append(f"the pool's state was not settled {SETTLE_WITHIN_S:g} s after the start")
    return []


@contextmanager
def _running(place: Path, url: str) -> Iterator[MeasuredManager]:
    admin = make_token("admin", "admin")
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        json.dump(_secrets(admin), pipe)
    port = _free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORION_")} | {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "ORION_SECRETS_FD": str(reading),
        "ORION_DATABASE_URL": url,
        "ORION_PORT": str(port),
        "ORION_CLOCK_SCALE": "10",
    }
    log = place / "manager.log"
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.manager"], env=environment, pass_fds=(reading,), stdout=output, stderr=output
        )
    os.close(reading)
    manager = MeasuredManager(process, port, admin, log)
    try:
        _await_answer(manager)
        manager.started_s = time.monotonic() - began
        yield manager
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _await_answer(manager: MeasuredManager) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while True:
        if manager.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the manager did not start: {manager.log.read_text()[-2000:]}")
        try:
            with manager.caller() as proxy:
                proxy.must("GET", "/api/workers?limit=1")
                return
        except (OSError, HTTPException):
            time.sleep(0.02)


def _secrets(admin_token: str) -> dict[str, Any]:
    return {
        "admin_token": admin_token,
        "join_token": make_token("join", "join"),
        "proxy_secret": PROXY_SECRET,
        "ssh_private_key": "",
        "ssh_public_key": pool.A_PUBLIC_KEY,
        "host_authority": _new_private_key(),
        "user_authority": _new_private_key(),
    }


def _new_private_key() -> str:
    key: Any = asyncssh.generate_private_key("ssh-ed25519")
    return str(key.export_private_key("openssh").decode())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
