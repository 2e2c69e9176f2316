"""Tests of workers in a network with IPv6: they do not use IPv6, and it does not bypass the filter of renters."""

from __future__ import annotations

import ipaddress
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from rental_support import Rental, new_rental
from test_worker_walls import CONNECT
from worker_support import (
    IMAGE,
    PREFIX,
    SmallManager,
    Worker,
    WorkerNetwork,
    docker,
    make_key,
    serving,
    wait_until,
    worker,
)

NOWHERE = {
    "Permission denied",
    "No route to host",
    "Network is unreachable",
    "silent",
    "Cannot assign requested address",
}
CALL = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def call(told):
    place, kind = told
    there = socket.socket(socket.AF_INET6, kind)
    there.settimeout(1)
    try:
        there.connect((place, 22, 0, int(sys.argv[1]) if place.startswith(("fe80", "ff")) else 0))
        there.sendall(b"x")
        return there.recv(10)
    except OSError as error:
        return type(error).__name__
asked = [(place, kind) for place in {places!r} for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
with ThreadPoolExecutor(len(asked)) as pool:
    for told, answer in zip(asked, pool.map(call, asked)):
        print(*told, answer)
"""


@pytest.fixture(scope="module")
def dual(worker_image: str) -> Iterator[tuple[WorkerNetwork, str]]:
    """Yield a network as orion_net, which also has a prefix of IPv6."""
    first = f"10.{20 + secrets.randbelow(70)}.{secrets.randbelow(256)}"
    prefix = f"fd{secrets.token_hex(1)}:{secrets.token_hex(2)}:{secrets.token_hex(2)}:1"
    made = WorkerNetwork(f"{PREFIX}-dual", f"{first}.0/24", f"{first}.1")
    own = ("--subnet", made.subnet, "--gateway", made.gateway)
    docker("network", "create", "--ipv6", *own, "--subnet", f"{prefix}::/64", "--gateway", f"{prefix}::1", made.name)
    yield made, prefix
    docker("network", "rm", made.name)


@pytest.fixture(scope="module")
def scene(dual: tuple[WorkerNetwork, str], join: Path, folder: Path) -> Iterator[tuple[Rental, Worker, str]]:
    """Yield a renter on a worker whose operator opened all of IPv6, its neighbour, and the gateway's address.

    The host name of the manager has addresses of both protocols, as Docker's names have.
    """
    network, prefix = dual
    with serving(SmallManager(make_key(folder)), network.gateway) as manager:
        called = replace(manager, url=manager.url.replace(network.gateway, "manager.test"))
        names = [f"--add-host=manager.test:{place}" for place in (f"{prefix}::1", network.gateway)]
        opened = ["--env=ORION_EGRESS=internet,::/0,ff00::/8", f"--env=ORION_HOST_ADDRESSES=192.0.2.9,{prefix}::1"]
        with worker(network, called, join, *names, *opened) as one, worker(network, called, join, *names) as other:
            for each in (one, other):
                each.manager = manager
                each.wait_registered()
            yield new_rental(one, folder).create_quickly(), other, f"{prefix}::1"


def address_of(on: Worker) -> str:
    return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.GlobalIPv6Address}}{{end}}", on.name).strip()


def link_local(on: Worker) -> str:
    shown = on.run("ip", "-6", "-o", "addr", "show", "eth0").split()
    return next(part for part in shown if part.startswith("fe80")).partition("/")[0]


def test_a_worker_in_a_network_with_ipv6_calls_home_by_ipv4_and_in_time(scene: tuple[Rental, Worker, str]) -> None:
    on = scene[0].on
    before = time.monotonic()
    wait_until(lambda: len(on.manager.of("/api/heartbeat", before)) > 12, "both call home")
    calls = on.manager.of("/api/heartbeat", before)
    its = [[call.at for call in calls if call.token == token] for token in {call.token for call in calls}]
    between = median(later - earlier for each in its for earlier, later in pairwise(each))
    assert between < on.manager.interval_s + 0.9, "its calls cost no seconds"
    assert "failed" not in on.log()


def test_a_renter_reaches_no_address_by_ipv6_with_any_egress_setting(scene: tuple[Rental, Worker, str]) -> None:
    rental, neighbour, gateway = scene
    interface = rental.on.run("cat", "/sys/class/net/eth0/ifindex").strip()
    places = [address_of(neighbour), link_local(neighbour), gateway, "2001:db8::1", "ff02::1", "ff02::2"]
    assert all(ipaddress.ip_address(place).version == 6 for place in places)
    done = rental.ssh(f"python3 - {interface}", CALL.format(places=places))
    assert done.returncode == 0, done.stderr
    answers = [line.rsplit(" ", 1)[1] for line in done.stdout.splitlines()]
    assert len(answers) == 2 * len(places)
    assert set(answers) <= {"OSError", "PermissionError", "TimeoutError"}, done.stdout
    assert rental.python(CONNECT.format(address="::1", port=22)).strip() in NOWHERE
    neighbours = rental.on.run("ip", "-6", "neigh", "show")
    assert "lladdr" not in neighbours, "it resolves no address of a neighbour"


def test_a_worker_accepts_no_ipv6_packet_and_no_router_advertisement(scene: tuple[Rental, Worker, str]) -> None:
    """Send from a container that was attached by hand and may send any packet to the network."""
    rental = scene[0]
    on = rental.on
    routes = on.run("ip", "-6", "route")
    rental.ssh("setsid python3 -m http.server --bind :: 8000 >/dev/null 2>&1 </dev/null &")
    wait_until(lambda: "open" in rental.python(CONNECT.format(address="::1", port=8000)), "it listens")
    mac = docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.MacAddress}}{{end}}", on.name).strip()
    target = address_of(on)
    program = f"""
import socket, struct
for port in (22, 80, 8000):
    there = socket.socket(socket.AF_INET6)
    there.settimeout(0.5)
    try:
        there.connect(({target!r}, port))
        print("open")
    except TimeoutError:
        print("silent")
prefix = struct.pack("!BBBBIII16s", 3, 4, 64, 0xC0, 7200, 7200, 0, socket.inet_pton(socket.AF_INET6, "2001:db8:bad::"))
sends = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
sends.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
sends.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix,
             ("ff02::1", 0, 0, socket.if_nametoindex("eth0")))
"""
    script = f'ip -6 neigh replace {target} lladdr {mac} dev eth0; exec python3 -c "$0"'
    template = "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}"
    network = docker("inspect", "-f", template, on.name).strip()
    powers = ("--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--entrypoint=sh")
    said = docker("run", "--rm", "--network", network, *powers, IMAGE, "-c", script, program)
    assert said.split() == ["silent"] * 3
    assert on.run("ip", "-6", "route") == routes
    assert "2001:db8:bad" not in on.run("ip", "-6", "addr")
