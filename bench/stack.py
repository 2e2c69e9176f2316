"""The platform to measure: docker-compose.yml as a separate project, which is removed when the measurement ends."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from bench.calls import Caller

ROOT = Path(__file__).parents[1]
PROJECT = f"orionbench{hashlib.sha256(str(ROOT).encode()).hexdigest()[:6]}"
UP_WITHIN_S = 120.0
Done = subprocess.CompletedProcess[str]


class NotReady(Exception):
    """The measurement cannot begin or go on."""


class BenchStack:
    """The compose project of a measurement."""

    def __init__(self, folder: Path, settings: Mapping[str, str], files: tuple[str, ...]) -> None:
        self.folder = folder
        self.subnet = _free_subnet()
        self.http_port, self._https_port = _free_ports(2)
        self._settings = dict(settings)
        self._files = files
        self._empty = folder / "no.env"
        self._empty.touch()
        self.token = ""

    @property
    def network(self) -> str:
        return f"{PROJECT}_orion_net"

    @property
    def proxy_address(self) -> IPv4Address:
        return self.subnet.network_address + 2

    def up(self, workers: int) -> None:
        self.remove()
        self.compose("build", timeout_s=900)
        self.compose("up", "-d", "--no-build", "--scale", f"worker={workers}", timeout_s=180)
        wait_until("the manager answers through the proxy", self._answers, UP_WITHIN_S)
        self.token = self.inside("manager_app", "cat", "/var/lib/orion/secrets/admin_token").strip()
        wait_until(f"{workers} workers are ready", lambda: len(self.ready_workers()) >= workers, UP_WITHIN_S)

    def change(self, **settings: str) -> None:
        """Recreate the manager with other settings; all other containers stay."""
        before = len(self.ready_workers())
        self._settings |= settings
        self.compose("up", "-d", "--no-build", "--no-deps", "manager_app", timeout_s=120)
        wait_until("the manager answers again", self._answers, UP_WITHIN_S)
        wait_until("the workers are ready again", lambda: len(self.ready_workers()) >= before, UP_WITHIN_S)

    def caller(self) -> Caller:
        """Return a connection of the administrator through the published port."""
        return Caller("127.0.0.1", self.http_port, self.token)

    def ready_workers(self) -> list[dict[str, Any]]:
        with self.caller() as proxy:
            workers: list[dict[str, Any]] = proxy.must("GET", "/api/workers?limit=200").body["items"]
        return [one for one in workers if one["health"] == "ready" and one["intent"] == "active"]

    def container(self, service: str) -> str:
        return self.containers(service)[0]

    def containers(self, *services: str) -> list[str]:
        """Return the running containers of these services."""
        found: list[str] = []
        for service in services:
            filters = (f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}")
            options = [word for one in filters for word in ("--filter", f"label={one}")]
            found += run(["docker", "ps", "--quiet", *options], 30).split()
        return found

    def pid(self, service: str) -> int:
        return int(run(["docker", "inspect", "-f", "{{.State.Pid}}", self.container(service)], 30))

    def inside(self, service: str, *command: str) -> str:
        return run(["docker", "exec", self.container(service), *command], 60)

    def logs(self, service: str, tail: int = 1000) -> list[str]:
        return self.compose("logs", "--no-color", "--tail", str(tail), service).splitlines()

    def remove(self) -> None:
        """Remove containers, network, volumes and images of the project, those of an interrupted run too."""
        self.compose("down", "--volumes", "--remove-orphans", "--rmi", "local", "--timeout", "3", timeout_s=180)

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        files = [word for name in ("docker-compose.yml", *self._files) for word in ("-f", str(ROOT / name))]
        command = [*_compose_command(), "--env-file", str(self._empty), *files]
        return run([*command, *arguments], timeout_s, env=self.environment(), cwd=ROOT)

    def environment(self) -> dict[str, str]:
        """Return the variables of compose, without those of the caller's own platform."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORION_", "COMPOSE_"))}
        first = self.subnet.network_address
        return kept | {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_INTERACTIVE_NO_CLI": "1",
            "ORION_SUBNET": str(self.subnet),
            "ORION_GATEWAY": str(first + 1),
            "ORION_PROXY_ADDRESS": str(self.proxy_address),
            "ORION_APP_ADDRESS": str(first + 3),
            "ORION_WORKER_RANGE": str(list(self.subnet.subnets())[1]),
            "ORION_HTTP_PORT": str(self.http_port),
            "ORION_HTTPS_PORT": str(self._https_port),
            **self._settings,
        }

    def _answers(self) -> bool:
        try:
            with self.caller() as proxy:
                return proxy.call("GET", "/healthz").status == 200
        except OSError:
            return False


@contextmanager
def running(workers: int, settings: Mapping[str, str], files: tuple[str, ...] = ()) -> Iterator[BenchStack]:
    """Run a platform with this number of ready workers. `files`: more compose files, from the repository's root."""
    with tempfile.TemporaryDirectory(prefix="orion-bench-") as folder:
        stack = BenchStack(Path(folder), settings, files)
        try:
            stack.up(workers)
            yield stack
        finally:
            stack.remove()


def wait_until(what: str, condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise NotReady(f"not within {within_s:g} s: {what}")
        time.sleep(0.1)


def run(command: list[str], timeout_s: float, **options: Any) -> str:
    done: Done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)
    if done.returncode:
        raise NotReady(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def json_lines(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in lines of `docker-compose logs`."""
    for line in lines:
        if (start := line.find("{")) >= 0:
            try:
                yield json.loads(line[start:])
            except ValueError:
                continue


def _compose_command() -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def _free_subnet() -> IPv4Network:
    """Return the first candidate that overlaps no other Docker network."""
    names = run(["docker", "network", "ls", "--format", "{{.Name}}"], 30).split()
    wanted = "{{range .IPAM.Config}}{{.Subnet}} {{end}}"
    others = [name for name in names if name != f"{PROJECT}_orion_net"]
    subnets = run(["docker", "network", "inspect", "-f", wanted, *others], 30).split()
    taken = [IPv4Network(one) for one in subnets if ":" not in one]
    candidates = (IPv4Network(f"10.{number}.0.0/16") for number in (96, 97, 98, 99, 196, 197, 198))
    return next(one for one in candidates if not any(one.overlaps(other) for other in taken))


def _free_ports(number: int) -> list[int]:
    """Return free ports, below those that the kernel gives to outgoing connections."""
    free = (port for port in random.sample(range(20_000, 30_000), 1000) if _is_free(port))
    return [next(free) for _ in range(number)]


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("0.0.0.0", port)).close()  # noqa: S104 - Docker will listen there too
    except OSError:
        return False
    return True
