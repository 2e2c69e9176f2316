"""The whole platform for tests: docker-compose.yml in a project of its own, with all clocks at a tenth.

Tests use the platform like a user, through the published port; `docker` is used only for faults of machines.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Network
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from waiting import TooLate, eventually

from orion.client.sdk import ENDED, Orion
from orion.errors import Conflict
from orion.wire import Event, Rental, RentalState, Worker, WorkerHealth, WorkerIntent

ROOT = Path(__file__).parents[2]
PROJECT = f"orione2e{hashlib.sha256(str(ROOT).encode()).hexdigest()[:6]}"
"""The Compose project of this checkout. Tests of another checkout may run at the same time."""
WORKERS = 3
CLOCK_SCALE = 0.1
TAKEOVER_S = 90 * CLOCK_SCALE
GOODBYE_S = 5.0
"""Seconds by the default clocks: a restart of a container does not become faster with faster clocks."""
UP_WITHIN_S = 120.0
WHOLE_WITHIN_S = 90.0
MOVED_WITHIN_S = 75.0
"""Seconds for a takeover, which takes about 10 s. On a busy machine the brake may delay it by up to 30 s."""


@dataclass(frozen=True)
class Container:
    id: str
    name: str
    service: str
    number: int
    running: bool
    paused: bool
    connected: bool
    started_at: datetime

    @property
    def hostname(self) -> str:
        """The hostname by which a worker in the container registers."""
        return self.id[:12]


class Stack:
    def __init__(
        self, folder: Path, files: Sequence[Path] = (), settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """`files`: additional compose files. `settings`: additional environment variables of Compose."""
        self.folder = folder
        self._files = (ROOT / "docker-compose.yml", *files)
        self._settings = settings
        self.slots = WORKERS * int(settings.get("ORION_SLOTS", "1"))
        self.subnet = _free_subnet()
        self.http_port, self.https_port = _free_ports(2)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.https_url = f"https://127.0.0.1:{self.https_port}"
        self.spared: set[str] = set()
        """The ids of rentals that are not released after a test."""
        self._empty = folder / "no.env"
        self._empty.touch()
        self._last_event = 0

    # Bring-up

    def up(self) -> None:
        self.remove()
        self.build()
        try:
            self.scale(WORKERS)
            eventually("the platform answers", self._answers, UP_WITHIN_S)
            self.wait_whole(UP_WITHIN_S)
        except (AssertionError, subprocess.TimeoutExpired):
            sys.stderr.write(self.telling_logs())
            raise

    def build(self) -> None:
        self.compose("build", timeout_s=900)

    def scale(self, workers: int) -> None:
        self.compose("up", "-d", "--no-build", "--no-recreate", "--scale", f"worker={workers}", timeout_s=180)

    def remove(self) -> None:
        """Remove containers, network and volumes of the project, also those of an interrupted run.

        The removal is forced, because the engine may still run a command whose client has timed out, such as a restart.
        """
        for container in self.containers():
            if container.paused:
                self.docker("unpause", container.id)
        if found := [container.id for container in self.containers()]:
            self.docker("rm", "--force", "--volumes", *found)
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "3", timeout_s=180)

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        files = [word for file in self._files for word in ("-f", str(file))]
        command = [*_compose_command(), "--env-file", str(self._empty), *files]
        return _run([*command, *arguments], timeout_s, env=self.environment(), cwd=ROOT)

    def environment(self) -> dict[str, str]:
        """Return the environment of Compose, without settings of the caller and of a .env file."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORION_", "COMPOSE_"))}
        first = self.subnet.network_address
        return kept | {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "ORION_SUBNET": str(self.subnet),
            "ORION_GATEWAY": str(first + 1),
            "ORION_PROXY_ADDRESS": str(first + 2),
            "ORION_APP_ADDRESS": self.app_address,
            "ORION_WORKER_RANGE": str(list(self.subnet.subnets())[1]),
            "ORION_HTTP_PORT": str(self.http_port),
            "ORION_HTTPS_PORT": str(self.https_port),
            "ORION_CLOCK_SCALE": str(CLOCK_SCALE),
            "ORION_GOODBYE_AFTER_S": str(GOODBYE_S / CLOCK_SCALE),
            **self._settings,
        }

    @property
    def app_address(self) -> str:
        return str(self.subnet.network_address + 3)

    @property
    def network(self) -> str:
        return f"{PROJECT}_orion_net"

    # Containers

    def docker(self, *arguments: str, timeout_s: float = 60) -> str:
        return _run(["docker", *arguments], timeout_s)

    def exec(
        self, container: str, *command: str, stdin: str = "", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a container, and return its output and its status."""
        run = ["docker", "exec", "-i", container, *command]
        return subprocess.run(run, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)

    def containers(self, service: str | None = None) -> list[Container]:
        filters = [f"label=com.docker.compose.project={PROJECT}"]
        if service:
            filters.append(f"label=com.docker.compose.service={service}")
        found = self.docker("ps", "--all", "--quiet", *(word for one in filters for word in ("--filter", one))).split()
        described = json.loads(self.docker("inspect", *found)) if found else []
        return sorted((_container(one) for one in described), key=lambda one: (one.service, one.number))

    def container(self, service: str) -> Container:
        return self.containers(service)[0]

    def container_of(self, worker_id: str | None) -> Container:
        with self.connect() as orion:
            hostname = orion.worker(worker_id or "").hostname
        return next(one for one in self.containers("worker") if one.hostname == hostname)

    def logs(self, tail: int = 60) -> str:
        return self.compose("logs", "--no-color", "--tail", str(tail))

    def telling_logs(self) -> str:
        """Return the logs without the proxy's lines about successful requests."""
        return "\n".join(line for line in self.logs(400).splitlines() if not _went_well(line))

    def secret(self, service: str, path: str) -> str:
        read = self.exec(self.container(service).id, "cat", path)
        assert read.returncode == 0, f"{service} has no {path}: {read.stderr}"
        return read.stdout.strip()

    # Calls through the proxy

    def admin_token(self) -> str:
        return self.secret("manager_app", "/var/lib/orion/secrets/admin_token")

    def connect(self, token: str | None = None) -> Orion:
        return Orion.at(self.url, token or self._admin)

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """Send a request of the admin without the checks of the SDK."""
        headers = {"Authorization": f"Bearer {self._admin}"}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60, trust_env=False)

    @property
    def _admin(self) -> str:
        kept = self.folder / "admin_token"
        if not kept.exists():
            kept.write_text(self.admin_token())
        return kept.read_text()

    def mark(self) -> int:
        """Return the id of the last event, so that a test can read the events after it."""
        for event in self.events(self._last_event):
            self._last_event = event.id
        return self._last_event

    def events(self, after: int, rental_id: str | None = None, worker_id: str | None = None) -> list[Event]:
        with self.connect() as orion:
            return list(orion.events(after=after, rental_id=rental_id, worker_id=worker_id, limit=500))

    def await_event(self, after: int, what: str, wanted: Callable[[Event], bool], within_s: float) -> Event:
        """Wait for the first event that is wanted, and return it."""
        with self.connect() as orion:
            for event in orion.follow_events(after=after, for_s=within_s):
                if wanted(event):
                    return event
        raise TooLate(f"not within {within_s:g} s: {what}; instead:\n{story(self.events(after))}")

    def await_kind(
        self, after: int, kind: str, within_s: float, worker_id: str | None = None, rental_id: str | None = None
    ) -> Event:
        def wanted(event: Event) -> bool:
            about = worker_id in {None, event.worker_id} and rental_id in {None, event.rental_id}
            return event.kind == kind and about

        return self.await_event(after, f"{kind} of {rental_id or worker_id or 'anything'}", wanted, within_s)

    def await_active(self, after: int, rental: Rental, epoch: int, within_s: float = MOVED_WITHIN_S) -> Event:
        """Wait for the event that the rental is active with this epoch, and return it."""

        def wanted(event: Event) -> bool:
            return (event.rental_id, event.kind, event.epoch) == (rental.id, "rental.activated", epoch)

        return self.await_event(after, f"{rental.name} is active with epoch {epoch}", wanted, within_s)

    def free_slots(self) -> int:
        """Return the number of free slots, including those of workers whose heartbeat is late."""
        with self.connect() as orion:
            return sum(worker.slots_free for worker in orion.workers())

    def await_no_brake(self) -> None:
        """Wait until the brake is off, so that earlier faults do not delay a following takeover."""
        with self.connect() as orion:
            eventually("the brake is off", lambda: orion.status().brake is None, WHOLE_WITHIN_S)

    # Between two tests

    def restore(self) -> None:
        """Restore the platform: all containers run, the test's rentals are released, and three workers are ready."""
        self._revive()
        if len(self.containers("worker")) != WORKERS:
            self.scale(WORKERS)
        with self.connect() as orion:
            eventually("the platform answers", self._answers, WHOLE_WITHIN_S)
            for rental in self._foreign_rentals(orion):
                eventually(f"{rental.name} is released", lambda one=rental: _released(orion, one), WHOLE_WITHIN_S)
            for worker in orion.workers():
                orion.resume(worker.id)  # this also resets the count of losses, of which three cause a quarantine
        self.wait_whole(WHOLE_WITHIN_S)

    def wait_whole(self, within_s: float) -> None:
        with self.connect() as orion:
            eventually("three ready workers, all free", lambda: self._is_whole(orion), within_s)

    def _is_whole(self, orion: Orion) -> bool:
        hostnames = {one.hostname for one in self.containers("worker")}
        workers = list(orion.workers())
        for worker in workers:
            if worker.hostname not in hostnames and worker.health is WorkerHealth.DOWN:
                orion.remove_worker(worker.id)
            elif worker.health is WorkerHealth.QUARANTINED or worker.intent is not WorkerIntent.ACTIVE:
                orion.resume(worker.id)
        living = sum(rental.state is RentalState.ACTIVE for rental in orion.rentals())
        free = sum(worker.slots_free for worker in workers)
        ready = [worker for worker in workers if _is_ready(worker) and worker.hostname in hostnames]
        return len(ready) == len(workers) == WORKERS and free == self.slots - living

    def _revive(self) -> None:
        for container in self.containers():
            if container.paused:
                self.docker("unpause", container.id)
            elif not container.running:
                self.docker("start", container.id)
            if container.service == "worker" and not container.connected:
                self.docker("network", "connect", self.network, container.id)

    def _foreign_rentals(self, orion: Orion) -> list[Rental]:
        return [rental for rental in orion.rentals() if rental.id not in self.spared]

    def _answers(self) -> bool:
        with self.connect() as orion:
            orion.healthz()
        return True


@contextmanager
def running(folder: Path) -> Iterator[Stack]:
    stack = Stack(folder)
    try:
        stack.up()
        yield stack
    finally:
        if os.environ.get("ORION_E2E_KEEP"):
            sys.stderr.write(f"\nkept: project {PROJECT} at {stack.url}; docker ps --filter name={PROJECT}\n")
        else:
            stack.remove()


def story(events: Iterable[Event]) -> str:
    """Return the events as text, a line for each."""
    lines = [
        f"  {event.at:%H:%M:%S.%f} {event.kind} {event.rental_id or ''} {event.worker_id or ''} {event.epoch or ''}"
        f" - {event.reason} ({event.actor})"
        for event in events
    ]
    return "\n".join(lines) or "  (nothing happened)"


def _went_well(line: str) -> bool:
    return '"manager_status":"2' in line or "ssh_packet_send_debug" in line


def _is_ready(worker: Worker) -> bool:
    return worker.health is WorkerHealth.READY and worker.intent is WorkerIntent.ACTIVE


def _released(orion: Orion, rental: Rental) -> bool:
    try:
        return orion.release(rental.id, wait_s=5).state in ENDED
    except Conflict:
        return False


def _container(described: Mapping[str, Any]) -> Container:
    labels, state = described["Config"]["Labels"], described["State"]
    return Container(
        described["Id"],
        described["Name"].lstrip("/"),
        labels["com.docker.compose.service"],
        int(labels["com.docker.compose.container-number"]),
        state["Running"],
        state["Paused"],
        f"{PROJECT}_orion_net" in described["NetworkSettings"]["Networks"],
        # Docker writes nanoseconds, which Python 3.11 does not read.
        datetime.fromisoformat(re.sub(r"(\.\d{6})\d*Z$", r"\1+00:00", state["StartedAt"])),
    )


def _compose_command() -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def _run(command: list[str], timeout_s: float, **how: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **how)
    assert done.returncode == 0, (
        f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
    )
    return done.stdout


def _free_subnet() -> IPv4Network:
    """Return the first candidate that overlaps neither another network nor a rule that a former engine left."""
    names = _run(["docker", "network", "ls", "--format", "{{.Name}}"], 30).split()
    wanted = "{{range .IPAM.Config}}{{.Subnet}} {{end}}"
    others = [name for name in names if name != f"{PROJECT}_orion_net"]
    subnets = _run(["docker", "network", "inspect", "-f", wanted, *others], 30).split()
    rules = _run(
        ["bash", "-c", f". {ROOT}/scripts/common.sh; . {ROOT}/scripts/addresses.sh; rules_without_network"], 30
    )
    taken = [IPv4Network(one) for one in (*subnets, *rules.split()[1::2]) if ":" not in one]
    candidates = (IPv4Network(f"10.{number}.0.0/16") for number in (92, 93, 94, 95, 190, 191, 192))
    return next(one for one in candidates if not any(one.overlaps(other) for other in taken))


def _free_ports(number: int) -> list[int]:
    """Return free ports below the range that the kernel uses for outgoing connections."""
    free = (port for port in random.sample(range(20_000, 30_000), 1000) if _is_free(port))
    return list(itertools.islice(free, number))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("0.0.0.0", port)).close()  # noqa: S104 - Docker will listen there too
    except OSError:
        return False
    return True
