"""The cost of attackers without a token for sessions and rents: thousands of connections, or calls without a pause.

The attack runs in another process and comes from extra addresses of this machine (198.18.0.0/15 is reserved for
measurements, RFC 2544). All other processes lack the processor time of the attack.
"""

from __future__ import annotations

import json
import math
import resource
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, NamedTuple

from bench.calls import Caller
from bench.figures import percentile
from bench.keystrokes import BUSY, READY, RENTALS, Typist, busy_terminals, echoes, ssh_typist, suspicions
from bench.rent import BenchRenter
from bench.report import Result
from bench.scene import processor_s
from bench.sessions import key_pair, rent
from bench.stack import ROOT, BenchStack, running

MANY = 8
"""Addresses: more than are needed to hold all connections that visitors may have."""
SETTLES_S = 3.0
CLOSED_PORT = 1
"""An attack on this port costs only the processor time of the attackers: the baseline of all attacks."""
CALLS_AT_ONCE = 100
MEMORY = ("sh", "-c", "cat /sys/fs/cgroup/memory.stat 2>/dev/null || cat /sys/fs/cgroup/memory/memory.stat")
"""The command that prints the memory of its container; see `counted_kib`."""


class Attack(NamedTuple):
    """The number of connections, and what is sent on each."""

    connections: int
    first: bytes
    """The bytes that are sent at once on each connection."""
    then: bytes
    """The bytes that are sent each second on each connection; a whole request instead after each answer."""


LARGE_BODY = b"POST /api/rent HTTP/1.1\r\nHost: x\r\nContent-Length: 130000\r\n\r\n" + b"a" * 15_000
BODY = LARGE_BODY.replace(b"130000", b"16000")
"""A body that is small enough for the manager to wait for it without a token."""
HEADERS = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 7000) for n in range(2))
CALL = b"GET /api/rentals HTTP/1.1\r\nHost: x\r\n\r\n"
ATTACKS = {
    "bodies": Attack(4400, BODY, b"a"),
    "large-bodies": Attack(4400, LARGE_BODY, b"a"),
    "headers": Attack(9500, HEADERS, b"X"),
}
CALLS = Attack(CALLS_AT_ONCE, CALL, CALL)


@contextmanager
def addresses(number: int) -> Iterator[tuple[str, ...]]:
    """Give this machine more addresses, which no other program uses; only root may do that.

    Their scope keeps the kernel from choosing one of them for other connections.
    """
    net = f"198.18.{secrets.randbelow(256)}"
    made = tuple(f"{net}.{last}" for last in range(1, number + 1))
    for one in made:
        subprocess.run(["ip", "address", "add", f"{one}/32", "dev", "lo", "scope", "host"], check=True)
    try:
        yield made
    finally:
        for one in made:
            subprocess.run(["ip", "address", "del", f"{one}/32", "dev", "lo"], check=True)


class Attackers:
    """Hold as many connections as the proxy accepts, and repeat those that it refuses."""

    def __init__(self, attack: Attack, to: tuple[str, int], sources: Sequence[str]) -> None:
        self._attack = attack
        self._to = to
        self._sources = sources
        self._selector = selectors.DefaultSelector()
        self._held: set[socket.socket] = set()
        self._tried = 0

    @property
    def has_tried_all(self) -> bool:
        return self._tried >= self._attack.connections

    def run(self, ending: threading.Event) -> None:
        """Attack until `ending` is set, and for two minutes at most."""
        ends_at, next_bit_at = time.monotonic() + 120, time.monotonic() + 1
        while not ending.is_set() and time.monotonic() < ends_at:
            missing = self._attack.connections - len(self._selector.get_map())
            for _ in range(min(50 if self.has_tried_all else 200, missing)):
                self._try()
            if self.has_tried_all:
                time.sleep(0.02)
            for key, events in self._selector.select(0.05):
                with suppress(OSError):
                    self._handle(key.fileobj, events)  # type: ignore[arg-type]
            if time.monotonic() > next_bit_at and self._attack.then != self._attack.first:
                next_bit_at += 1
                for connection in list(self._held):
                    self._send(connection, self._attack.then)
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)  # type: ignore[arg-type]
        self._selector.close()

    def _try(self) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        connection.bind((self._sources[self._tried % len(self._sources)], 0))
        connection.connect_ex(self._to)
        self._selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        self._tried += 1

    def _handle(self, connection: socket.socket, events: int) -> None:
        if events & selectors.EVENT_READ:
            self._read(connection)
        elif connection not in self._held:
            self._held.add(connection)
            self._selector.modify(connection, selectors.EVENT_READ)
            self._send(connection, self._attack.first)

    def _read(self, connection: socket.socket) -> None:
        try:
            answered = connection.recv(65536)
        except OSError:
            answered = b""
        if not answered:
            self._drop(connection)
        elif self._attack.then == self._attack.first:
            self._send(connection, self._attack.then)

    def _send(self, connection: socket.socket, data: bytes) -> None:
        try:
            connection.send(data)
        except OSError:
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._held.discard(connection)
        connection.close()


def open_from(sources: Sequence[str], proc_net_tcp: str) -> int:
    """Return how many connections of these addresses are established, by the other end's /proc/net/tcp."""
    of_them = {socket.inet_aton(one)[::-1].hex().upper() for one in sources}
    rows = [line.split() for line in proc_net_tcp.splitlines()]
    return sum(row[2].partition(":")[0] in of_them and row[3] == "01" for row in rows)


def counted_kib(memory_stat: str) -> float:
    """Return the memory that counts against a container's limit, without the cache of files, in KiB."""
    usage = {name: int(value) for name, value in (line.split() for line in memory_stat.splitlines())}
    kinds = ("anon", "shmem", "kernel", "sock") if "anon" in usage else ("total_rss", "total_shmem")
    return sum(usage.get(kind, 0) for kind in kinds) / 1024


@contextmanager
def attacking(attack: Attack, to: tuple[str, int], sources: Sequence[str]) -> Iterator[Attackers]:
    """Attack from a thread of this process, with a higher limit of descriptors."""
    ending, attackers = threading.Event(), Attackers(attack, to, sources)
    thread = threading.Thread(target=attackers.run, args=(ending,), daemon=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 30_000), hard))
    thread.start()
    try:
        yield attackers
    finally:
        ending.set()
        thread.join(60)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class InsiderTimes:
    """The times of sessions and rents during one case, in seconds."""

    keys: list[float] = field(default_factory=list)
    rents: list[float] = field(default_factory=list)
    newcomers: list[float] = field(default_factory=list)
    """Seconds of a first call, its connection included."""
    failed: int = 0
    kept_out: int = 0


def measure(keys: int) -> Result:
    result = Result("strangers", f"What attackers cost {BUSY} busy sessions and a rent each second")
    with (
        running(3, {"ORION_SLOTS": "16"}) as stack,
        stack.caller() as proxy,
        addresses(MANY) as sources,
    ):
        key = key_pair(stack.folder)
        rentals = [rent(proxy, key.with_suffix(".pub").read_text().strip()) for _ in range(RENTALS)]
        renter = BenchRenter(stack)
        with ssh_typist(stack, proxy, rentals[1], str(key)) as typist, busy_terminals(stack, rentals):
            _case(result, stack, renter, typist, keys, "without an attack", None)
            elsewhere = {"attack": "bodies", "to": ("127.0.0.1", CLOSED_PORT), "sources": sources}
            alone = _case(result, stack, renter, typist, keys, "with an attack on a closed port", elsewhere)
            for name, attack, number in _cases():
                attack_options = {"attack": attack, "to": (str(stack.proxy_address), 80), "sources": sources[:number]}
                found = _case(result, stack, renter, typist, keys, name, attack_options)
                _compare(result, name, alone, found)
        with stack.caller() as caller:
            suspected = suspicions(caller)
        result.details["suspected"] = suspected
        result.at_most("workers that were suspected meanwhile", len(suspected), 0)
    return result


def _cases() -> list[tuple[str, str, int]]:
    kinds = {"bodies": "4,400 endless bodies", "headers": "9,500 endless headers", "calls": "calls without a pause"}
    return [
        (f"{what} of {number} address{'es' if number > 1 else ''}", kind, number)
        for kind, what in kinds.items()
        for number in (1, MANY)
    ]


def _case(
    result: Result,
    stack: BenchStack,
    renter: BenchRenter,
    typist: Typist,
    keys: int,
    name: str,
    attack_options: dict[str, Any] | None,
) -> InsiderTimes:
    times, ending = InsiderTimes(), threading.Event()
    with stack.caller() as proxy, _process(attack_options, lambda: proxy.must("GET", "/healthz")):
        renting = threading.Thread(target=_rent_each_second, args=(proxy, renter, times, ending))
        coming = threading.Thread(target=_come_each_second, args=(stack, times, ending))
        containers = {service: stack.container(service) for service in ("manager_proxy", "manager_app")}
        before = {service: processor_s(one) for service, one in containers.items()}
        began = time.monotonic()
        for thread in (renting, coming):
            thread.start()
        times.keys = echoes(typist, keys)
        memory_mib = counted_kib(stack.inside("manager_proxy", *MEMORY)) / 1024
        connections = open_from(
            attack_options["sources"] if attack_options else (), stack.inside("manager_proxy", "cat", "/proc/net/tcp")
        )
        ending.set()
        for thread in (renting, coming):
            thread.join(90)
        lasted_s = time.monotonic() - began
        used = {service: (processor_s(one) - before[service]) / lasted_s for service, one in containers.items()}
    result.times(f"key to screen, {name}", times.keys)
    result.times(f"rent, {name}", times.rents, f"{times.failed} failed" if times.failed else "")
    result.times(f"newcomer, {name}", times.newcomers, f"{times.kept_out} kept out" if times.kept_out else "")
    cost = f"{connections} connections, {memory_mib:.0f} MiB; processors: "
    cost += ", ".join(f"{service} {share:.2f}" for service, share in used.items())
    result.value("  cost", "processors", sum(used.values()), cost)
    return times


def _compare(result: Result, name: str, alone: InsiderTimes, found: InsiderTimes) -> None:
    result.at_most(f"{name}: p99 of a key over that with an attack on a closed port", _over(found.keys, alone.keys), 2)
    result.at_most(
        f"{name}: p99 of a rent over that with an attack on a closed port", _over(found.rents, alone.rents), 2
    )
    result.at_most(f"{name}: failed rents", found.failed, 0)


def _over(now: Sequence[float], before: Sequence[float]) -> float:
    return percentile(now, 0.99) / percentile(before, 0.99) if now and before else math.inf


@contextmanager
def _process(attack_options: dict[str, Any] | None, before: Callable[[], object]) -> Iterator[None]:
    """Run another process that attacks, if there are options for it. `before` is called first."""
    before()
    if attack_options is None:
        yield
        return
    command = [sys.executable, "-m", "bench.strangers"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the attack has no pipes")
        process.stdin.write(json.dumps(attack_options) + "\n")
        process.stdin.flush()
        if process.stdout.readline().strip() != READY:
            raise RuntimeError("the attack ended before it began")
        try:
            yield
        finally:
            process.kill()


def _rent_each_second(proxy: Caller, renter: BenchRenter, times: InsiderTimes, ending: threading.Event) -> None:
    """Rent and release over a connection that is already open."""
    while not ending.is_set():
        began = time.monotonic()
        try:
            reply = renter.rent(proxy)
            times.rents.append(reply.seconds)
            proxy.must("DELETE", f"/api/rentals/{reply.body['id']}")
        except (OSError, HTTPException, RuntimeError):
            times.failed += 1
        ending.wait(max(0.0, 1 - (time.monotonic() - began)))


def _come_each_second(stack: BenchStack, times: InsiderTimes, ending: threading.Event) -> None:
    while not ending.wait(1):
        began = time.monotonic()
        with Caller("127.0.0.1", stack.http_port, stack.token, timeout_s=10) as proxy:
            try:
                proxy.must("GET", "/api/status")
                times.newcomers.append(time.monotonic() - began)
            except (OSError, HTTPException, RuntimeError):
                times.kept_out += 1


def _attack(attack: str, to: Sequence[Any], sources: list[str]) -> None:
    kind = CALLS if attack == "calls" else ATTACKS[attack]
    with attacking(kind, (to[0], to[1]), sources):
        time.sleep(SETTLES_S)
        print(READY, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _attack(**json.loads(sys.stdin.readline()))
