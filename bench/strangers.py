"""Measures what strangers without a token cost those who are inside: by thousands of connections, by calls without end.

Their connections come from addresses of their own, which this machine gets for it (198.18.0.0/15 is set aside for
measurements, RFC 2544), in a process of its own. The processor time of that process is lacking to all others here.
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
from bench.keystrokes import BUSY, READY, RENTALS, Typist, busy_terminals, doubts, echoes, ssh_typist
from bench.rent import BenchRenter
from bench.report import Result
from bench.scene import processor_s
from bench.sessions import key_pair, rent
from bench.stack import ROOT, BenchStack, running

MANY = 8
"""Addresses: more than it takes to hold all connections that visitors may have."""
SETTLES_S = 3.0
NOBODYS_PORT = 1
"""An attack there costs this machine what the attackers themselves take of it: with that the others are compared."""
CALLS_AT_ONCE = 100
MEMORY = ("sh", "-c", "cat /sys/fs/cgroup/memory.stat 2>/dev/null || cat /sys/fs/cgroup/memory/memory.stat")
"""The command that prints a container's memory, inside it; see `counted_kib`."""


class Attack(NamedTuple):
    connections: int
    first: bytes
    """Sent at once on each."""
    then: bytes
    """Sent on each once a second, and where it is a whole request, whenever the one before was answered."""


LARGE_BODY = b"POST /api/rent HTTP/1.1\r\nHost: x\r\nContent-Length: 130000\r\n\r\n" + b"a" * 15_000
BODY = LARGE_BODY.replace(b"130000", b"16000")
"""Small enough for the manager to wait for it, whoever sends it."""
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
    """Give this machine more addresses, from which nobody else calls; by root alone.

    Their scope keeps the kernel from choosing one of them for anybody who did not ask for it.
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


class Strangers:
    """Hold as many connections as come about, and try again what was refused."""

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
        """Attack until the end is asked for, and for two minutes at most."""
        ends_at, next_bit_at = time.monotonic() + 120, time.monotonic() + 1
        while not ending.is_set() and time.monotonic() < ends_at:
            missing = self._attack.connections - len(self._selector.get_map())
            for _ in range(min(50 if self.has_tried_all else 200, missing)):
                self._try()
            if self.has_tried_all:
                time.sleep(0.02)
            for key, events in self._selector.select(0.05):
                with suppress(OSError):
                    self._go_on(key.fileobj, events)  # type: ignore[arg-type]
            if time.monotonic() > next_bit_at and self._attack.then != self._attack.first:
                next_bit_at += 1
                for there in list(self._held):
                    self._send(there, self._attack.then)
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)  # type: ignore[arg-type]
        self._selector.close()

    def _try(self) -> None:
        there = socket.socket()
        there.setblocking(False)
        there.bind((self._sources[self._tried % len(self._sources)], 0))
        there.connect_ex(self._to)
        self._selector.register(there, selectors.EVENT_READ | selectors.EVENT_WRITE)
        self._tried += 1

    def _go_on(self, there: socket.socket, events: int) -> None:
        if events & selectors.EVENT_READ:
            self._read(there)
        elif there not in self._held:
            self._held.add(there)
            self._selector.modify(there, selectors.EVENT_READ)
            self._send(there, self._attack.first)

    def _read(self, there: socket.socket) -> None:
        try:
            answered = there.recv(65536)
        except OSError:
            answered = b""
        if not answered:
            self._drop(there)
        elif self._attack.then == self._attack.first:
            self._send(there, self._attack.then)

    def _send(self, there: socket.socket, data: bytes) -> None:
        try:
            there.send(data)
        except OSError:
            self._drop(there)

    def _drop(self, there: socket.socket) -> None:
        self._selector.unregister(there)
        self._held.discard(there)
        there.close()


def open_from(sources: Sequence[str], proc_net_tcp: str) -> int:
    """Return how many connections these addresses have established, by the text of /proc/net/tcp at the other end."""
    of_them = {socket.inet_aton(one)[::-1].hex().upper() for one in sources}
    rows = [line.split() for line in proc_net_tcp.splitlines()]
    return sum(row[2].partition(":")[0] in of_them and row[3] == "01" for row in rows)


def counted_kib(memory_stat: str) -> float:
    """Return the memory that counts against a container's limit, without the cache of files, in KiB."""
    told = {name: int(value) for name, value in (line.split() for line in memory_stat.splitlines())}
    kinds = ("anon", "shmem", "kernel", "sock") if "anon" in told else ("total_rss", "total_shmem")
    return sum(told.get(kind, 0) for kind in kinds) / 1024


@contextmanager
def attacking(attack: Attack, to: tuple[str, int], sources: Sequence[str]) -> Iterator[Strangers]:
    """Attack from a thread of this process, which needs many descriptors for it."""
    ending, unknown_rentals = threading.Event(), Strangers(attack, to, sources)
    thread = threading.Thread(target=unknown_rentals.run, args=(ending,), daemon=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 30_000), hard))
    thread.start()
    try:
        yield unknown_rentals
    finally:
        ending.set()
        thread.join(60)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class InsiderTimes:
    """Measurements of those who are inside, in seconds."""

    keys: list[float] = field(default_factory=list)
    rents: list[float] = field(default_factory=list)
    newcomers: list[float] = field(default_factory=list)
    """Times of a first call, its connection included."""
    failed: int = 0
    kept_out: int = 0


def measure(keys: int) -> Result:
    result = Result("strangers", f"What strangers cost {BUSY} busy sessions and a rent each second")
    with (
        running(3, {"ORION_SLOTS": "16"}) as stack,
        stack.caller() as door,
        addresses(MANY) as sources,
    ):
        key = key_pair(stack.folder)
        rentals = [rent(door, key.with_suffix(".pub").read_text().strip()) for _ in range(RENTALS)]
        renter = BenchRenter(stack)
        with ssh_typist(stack, door, rentals[1], str(key)) as typist, busy_terminals(stack, rentals):
            _case(result, stack, renter, typist, keys, "without an attack", None)
            elsewhere = {"attack": "bodies", "to": ("127.0.0.1", NOBODYS_PORT), "sources": sources}
            alone = _case(result, stack, renter, typist, keys, "with an attack on nobody", elsewhere)
            for name, attack, number in _cases():
                unknown_rentals = {"attack": attack, "to": (str(stack.proxy_address), 80), "sources": sources[:number]}
                found = _case(result, stack, renter, typist, keys, name, unknown_rentals)
                _compare(result, name, alone, found)
        with stack.caller() as asking:
            doubted = doubts(asking)
        result.details["doubted"] = doubted
        result.at_most("workers that were doubted meanwhile", len(doubted), 0)
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
    unknown_rentals: dict[str, Any] | None,
) -> InsiderTimes:
    inside, ending = InsiderTimes(), threading.Event()
    with stack.caller() as door, _process(unknown_rentals, lambda: door.must("GET", "/healthz")):
        renting = threading.Thread(target=_rent_each_second, args=(door, renter, inside, ending))
        coming = threading.Thread(target=_come_each_second, args=(stack, inside, ending))
        containers = {service: stack.container(service) for service in ("manager_proxy", "manager_app")}
        before = {service: processor_s(one) for service, one in containers.items()}
        began = time.monotonic()
        for thread in (renting, coming):
            thread.start()
        inside.keys = echoes(typist, keys)
        memory_mib = counted_kib(stack.inside("manager_proxy", *MEMORY)) / 1024
        held = open_from(
            unknown_rentals["sources"] if unknown_rentals else (), stack.inside("manager_proxy", "cat", "/proc/net/tcp")
        )
        ending.set()
        for thread in (renting, coming):
            thread.join(90)
        lasted_s = time.monotonic() - began
        used = {service: (processor_s(one) - before[service]) / lasted_s for service, one in containers.items()}
    result.times(f"key to screen, {name}", inside.keys)
    result.times(f"rent, {name}", inside.rents, f"{inside.failed} failed" if inside.failed else "")
    result.times(f"newcomer, {name}", inside.newcomers, f"{inside.kept_out} kept out" if inside.kept_out else "")
    cost = f"{held} connections, {memory_mib:.0f} MiB; processors: "
    cost += ", ".join(f"{service} {share:.2f}" for service, share in used.items())
    result.value("  cost", "processors", sum(used.values()), cost)
    return inside


def _compare(result: Result, name: str, alone: InsiderTimes, found: InsiderTimes) -> None:
    result.at_most(f"{name}: p99 of a key over that with an attack on nobody", _over(found.keys, alone.keys), 2)
    result.at_most(f"{name}: p99 of a rent over that with an attack on nobody", _over(found.rents, alone.rents), 2)
    result.at_most(f"{name}: failed rents", found.failed, 0)


def _over(now: Sequence[float], before: Sequence[float]) -> float:
    return percentile(now, 0.99) / percentile(before, 0.99) if now and before else math.inf


@contextmanager
def _process(unknown_rentals: dict[str, Any] | None, before: Callable[[], object]) -> Iterator[None]:
    """Have a process of its own attack, if anybody is to. `before`: what those who are inside have done by then."""
    before()
    if unknown_rentals is None:
        yield
        return
    command = [sys.executable, "-m", "bench.strangers"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("both are pipes")
        process.stdin.write(json.dumps(unknown_rentals) + "\n")
        process.stdin.flush()
        if process.stdout.readline().strip() != READY:
            raise RuntimeError("the attack ended before it began")
        try:
            yield
        finally:
            process.kill()


def _rent_each_second(door: Caller, renter: BenchRenter, inside: InsiderTimes, ending: threading.Event) -> None:
    """Rent and release by a connection that is open already."""
    while not ending.is_set():
        began = time.monotonic()
        try:
            reply = renter.rent(door)
            inside.rents.append(reply.seconds)
            door.must("DELETE", f"/api/rentals/{reply.body['id']}")
        except (OSError, HTTPException, RuntimeError):
            inside.failed += 1
        ending.wait(max(0.0, 1 - (time.monotonic() - began)))


def _come_each_second(stack: BenchStack, inside: InsiderTimes, ending: threading.Event) -> None:
    while not ending.wait(1):
        began = time.monotonic()
        with Caller("127.0.0.1", stack.http_port, stack.token, timeout_s=10) as door:
            try:
                door.must("GET", "/api/status")
                inside.newcomers.append(time.monotonic() - began)
            except (OSError, HTTPException, RuntimeError):
                inside.kept_out += 1


def _attack(attack: str, to: Sequence[Any], sources: list[str]) -> None:
    kind = CALLS if attack == "calls" else ATTACKS[attack]
    with attacking(kind, (to[0], to[1]), sources):
        time.sleep(SETTLES_S)
        print(READY, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _attack(**json.loads(sys.stdin.readline()))
