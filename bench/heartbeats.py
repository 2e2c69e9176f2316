"""Heartbeats of simulated workers through the proxy, compared with constant answers of the same Nginx."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from bench import pool
from bench.calls import Caller
from bench.figures import median
from bench.processes import cpu_s
from bench.report import Result, Row
from bench.stack import ROOT, BenchStack, run, running, wait_until

ROUNDS = 3
CONNECTIONS = 48
THREADS = 1
"""Threads of wrk: one makes several times the load that is measured, and leaves more processors to the platform."""
FIRST_NUMBER = 1_000_000_000
NEW_CONNECTIONS_S = 1.0
"""Seconds of load with a new connection for each heartbeat.

Each occupies one of the client's ports (28,232 by default) for a minute after its end: a longer load would need more.
"""
RENT_EVERY_S = 0.5
AGENT_EVERY_S = 2.0
READY_WITHIN_S = 60.0
LOAD = {"cpu": 0.1, "memory_used_bytes": 40_000_000, "memory_limit_bytes": 512_000_000, "processes": 9}

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """The figures of one run of wrk. Times in seconds; processor time as a share of the whole machine."""

    per_s: float
    refused: int
    broken: int
    p50: float
    p95: float
    p99: float
    wrk: float
    proxy: float
    manager: float


@dataclass(frozen=True)
class HeartbeatRound:
    """One round: constant answers, heartbeats over open connections, and rents (seconds)."""

    constant: Load
    beats: Load
    quiet: list[float]
    """Seconds of rents without any load."""
    loaded: list[float]
    """Seconds of rents during the heartbeats over open connections."""


def measure(workers: int, load_s: float) -> Result:
    result = Result("heartbeats", f"Heartbeats through the proxy, {workers:,} simulated workers")
    seed = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="orion-bench-") as folder:
        settings = {"BENCH_WORKERS": str(workers), "BENCH_SEED": seed, "BENCH_LIMITS": str(_limits(Path(folder)))}
        listed = Path(folder) / "workers.tsv"
        listed.write_text("".join(f"{line}\n" for line in _lines(seed, workers)))
        with running(0, settings, ("bench/heartbeats.yml",)) as stack, RentingAgent(stack, seed, workers) as agent:
            _warm_up(stack, listed, workers)
            suspects = _suspected(stack)
            rounds = [_round(stack, agent, listed, load_s, number) for number in range(ROUNDS)]
            anew = _wrk(stack, 80, listed, 10_000 * (ROUNDS + 1), NEW_CONNECTIONS_S, "Connection: close")
            suspects = _suspected(stack) - suspects
    _report(result, rounds, anew, suspects)
    return result


class RentingAgent:
    """The one worker with free slots, whose heartbeats follow its rentals, as those of a real agent."""

    def __init__(self, stack: BenchStack, seed: str, number: int) -> None:
        self._stack = stack
        self._number = number
        self._token = pool.token(seed, number)
        self._rentals: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> RentingAgent:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def rents(self, during: threading.Event) -> list[float]:
        """Rent and release one after the other until `during` is set; return the seconds of each rent."""
        seconds = []
        with self._stack.caller() as proxy:
            while not during.wait(RENT_EVERY_S):
                reply = proxy.must("POST", "/api/rent", {"ssh_public_key": pool.A_PUBLIC_KEY, "wait_s": 50})
                if reply.status != 201:
                    raise RuntimeError(f"a rent under load was answered with {reply.status}: {reply.body}")
                seconds.append(reply.seconds)
                self._add(reply.body)
                with self._lock:
                    del self._rentals[reply.body["id"]]
                proxy.must("DELETE", f"/api/rentals/{reply.body['id']}?wait_s=30")
        return seconds

    def _add(self, rental: dict[str, Any]) -> None:
        shown = {"rental_id": rental["id"], "username": rental["username"], "epoch": rental["epoch"]}
        with self._lock:
            self._rentals[rental["id"]] = shown | {"uid": 900_000, "state": "running"}

    def _run(self) -> None:
        seq = FIRST_NUMBER
        with Caller("127.0.0.1", self._stack.http_port, self._token) as proxy:
            while not self._ended.wait(AGENT_EVERY_S):
                seq += 1
                with self._lock:
                    inventory = list(self._rentals.values())
                body = {"session_id": pool.session(self._number), "seq": seq, "load": LOAD, "lease_s": 75}
                proxy.call("POST", "/api/heartbeat", body | {"inventory": inventory})


def _limits(folder: Path) -> Path:
    """Write limits.conf without the limit of one address, and with the server of the constant; return its path.

    The simulated workers share one address. Nginx still counts each heartbeat for that address.
    """
    place = folder / "limits.conf"
    ours = (ROOT / "manager_proxy" / "limits.conf").read_text()
    ours, found = re.subn(r"(zone=heartbeat_address:\w+ +rate=)\d+r/s", r"\g<1>1000000r/s", ours)
    if found != 1:
        raise RuntimeError("limits.conf has another limit for the heartbeats of an address: adapt the benchmark")
    place.write_text(ours + Path(__file__).with_name("constant.conf").read_text())
    folder.chmod(0o755)
    return place


def _lines(seed: str, workers: int) -> list[str]:
    def line(number: int) -> str:
        rest = {"load": LOAD, "inventory": [pool.item(number)], "lease_s": 75.0, "leaving": False}
        return f"{pool.token(seed, number)}\t{pool.session(number)}\t{json.dumps(rest)[1:]}"

    return [line(number) for number in range(workers)]


def _warm_up(stack: BenchStack, listed: Path, workers: int) -> None:
    """Send heartbeats until all workers are ready: to a manager that has just started their health is unknown."""
    number = count(1)

    def ready() -> bool:
        one = next(number)
        _wrk(stack, 80, listed, one, min(2.0 * one, 10.0))
        return _workers(stack).get("ready", 0) >= workers

    wait_until("the simulated workers are ready", ready, READY_WITHIN_S)


def _round(stack: BenchStack, agent: RentingAgent, listed: Path, load_s: float, number: int) -> HeartbeatRound:
    part = 10_000 * (number + 1)
    _, quiet = _rents_during(agent, lambda: time.sleep(load_s / 2))
    constant = _wrk(stack, 8081, listed, 0, load_s / 2)
    beats, loaded = _rents_during(agent, partial(_wrk, stack, 80, listed, part, load_s))
    return HeartbeatRound(constant, beats, quiet, loaded)


def _rents_during(agent: RentingAgent, work: Callable[[], T]) -> tuple[T, list[float]]:
    over = threading.Event()
    with ThreadPoolExecutor(1) as aside:
        rents = aside.submit(agent.rents, over)
        try:
            done = work()
        finally:
            over.set()
        return done, rents.result()


def _wrk(stack: BenchStack, port: int, listed: Path, part: int, seconds: float, *headers: str) -> Load:
    """Run wrk. `part`: sets the first heartbeat number, above those of earlier runs. `headers`: one line at most."""
    pids = {"proxy": stack.pid("manager_proxy"), "manager": stack.pid("manager_app")}
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    own_before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    script = Path(__file__).with_name("heartbeat.lua")
    options = [f"-t{THREADS}", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(script), "--timeout", "10s"]
    address = f"http://{stack.proxy_address}:{port}/api/heartbeat"
    first = FIRST_NUMBER + 10_000 * part
    output = run(["wrk", *options, address, "--", str(listed), str(first), str(THREADS), *headers], seconds + 60)
    own, whole = resource.getrusage(resource.RUSAGE_CHILDREN), (time.monotonic() - began) * (os.cpu_count() or 1)
    figures = json.loads(output.splitlines()[-1])
    return Load(
        figures["requests"] / figures["seconds"],
        figures["refused"],
        figures["broken"],
        figures["p50"],
        figures["p95"],
        figures["p99"],
        (own.ru_utime + own.ru_stime - own_before.ru_utime - own_before.ru_stime) / whole,
        proxy=(cpu_s(pids["proxy"]) - before["proxy"]) / whole,
        manager=(cpu_s(pids["manager"]) - before["manager"]) / whole,
    )


def _workers(stack: BenchStack) -> dict[str, int]:
    with stack.caller() as proxy:
        found: dict[str, int] = proxy.must("GET", "/api/status").body["workers"]
    return found


def _suspected(stack: BenchStack) -> int:
    """Return how many workers are not ready: more than before the load were suspected without reason."""
    return sum(number for health, number in _workers(stack).items() if health != "ready")


def _report(result: Result, rounds: list[HeartbeatRound], anew: Load, suspects: int) -> None:
    constant, beats = [one.constant for one in rounds], [one.beats for one in rounds]
    _row(result, "one heartbeat", beats)
    _row(result, "one heartbeat on a new connection", [anew], "one run")
    _row(result, "Nginx answering a constant", constant)
    per_s, limit = median([load.per_s for load in beats]), median([load.per_s for load in constant])
    result.value("heartbeats a second", "1/s", per_s)
    result.value("heartbeats a second, each on a new connection", "1/s", anew.per_s)
    result.value("constant answers a second", "1/s", limit)
    result.value("heartbeats over constant answers", "ratio", per_s / limit)
    for name in ("wrk", "proxy", "manager"):
        share = median([getattr(load, name) for load in beats])
        result.value(f"processor during heartbeats: {name}", "% of all", 100 * share)
    result.times("a rent without load (its job: 50 ms)", [second for one in rounds for second in one.quiet])
    under_load = [second for one in rounds for second in one.loaded]
    result.times("a rent during the heartbeats", under_load)
    failed = sum(load.refused + load.broken for load in [*beats, anew, *constant])
    result.at_least("heartbeats a second", per_s, 6000)
    result.at_least("heartbeats a second, the goal", per_s, 10_000)
    result.at_most("heartbeats refused or broken", failed, 0)
    result.at_most("workers falsely suspected", suspects, 0)
    result.at_most("slowest rent during the heartbeats", max(under_load, default=math.inf), 1, " s")


def _row(result: Result, label: str, loads: list[Load], remark: str = "medians of the rounds") -> None:
    p50, p95, p99 = (1000 * median([getattr(load, name) for load in loads]) for name in ("p50", "p95", "p99"))
    result.rows.append(Row(label, "ms", sum(1 for _ in loads), p50, p95, p99, remark))
