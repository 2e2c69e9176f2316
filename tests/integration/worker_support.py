"""Real workers in a network of the tests, a small manager that they call, real ssh and real playbooks.

The small manager listens on the network's gateway, which the workers take for the app's address. So this machine may
connect to their sshd, as the app does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.patience import PATIENCE_S

from orion.ssh_command import pinned_host_arguments

ROOT = Path(__file__).parents[2]
CHECKOUT = hashlib.sha256(str(ROOT).encode()).hexdigest()[:6]
"""Part of the names of images and projects: the tests of another checkout may run at the same time."""
IMAGE = f"orion-worker-test:{CHECKOUT}"
PREFIX = f"orion-workertest-{secrets.token_hex(3)}"
JOIN_TOKEN = f"orion_join_join_{'j' * 43}"
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    *("NET_BIND_SERVICE", "NET_ADMIN", "SETPCAP"),
)
SYSCTLS = {
    "net.ipv4.ip_unprivileged_port_start": 1024,
    "kernel.shmall": 16384,
    "kernel.msgmni": 64,
    "kernel.sem": "250 32000 32 128",
}
TMPFS = ["/dev/shm:mode=1777,size=64m,nr_inodes=16k"]  # noqa: S108
"""These three are those of docker-compose.yml.

test_the_tests_start_workers_with_the_restrictions_of_docker_compose compares them.
"""
PIDS_LIMIT = 256


def docker(*arguments: str, check: bool = True, timeout_s: float = 120) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=timeout_s)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout


SESSION_S = 120
"""Seconds that a command over ssh may take: a purge searches all files, and log-ins to a busy machine wait."""


def wait_until(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.05)
    return found


def takes_connections(place: Path) -> bool:
    """Return whether a process listens on a Unix socket, whose file exists a moment before."""
    with socket.socket(socket.AF_UNIX) as there:
        return there.connect_ex(str(place)) == 0


def is_open(address: str, port: int) -> bool:
    with socket.socket() as there:
        there.settimeout(1)
        return there.connect_ex((address, port)) == 0


@dataclass
class Key:
    """A pair of SSH keys."""

    file: Path

    @property
    def public(self) -> str:
        return " ".join(self.file.with_name(f"{self.file.name}.pub").read_text().split()[:2])


def make_key(folder: Path) -> Key:
    file = folder / f"key-{secrets.token_hex(4)}"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return Key(file)


@dataclass(frozen=True)
class AgentCall:
    """A request that the small manager received."""

    path: str
    token: str
    body: dict[str, Any]
    at: float


@dataclass
class SmallManager:
    """A manager that answers by the contract; `answers` come first, each once, to calls of its path."""

    key: Key
    interval_s: float = 0.5
    lease_s: float = 75.0
    proxy_answer_s: float = 5.0
    placements: list[dict[str, Any]] = field(default_factory=list)
    answers: deque[tuple[str, int, dict[str, Any]]] = field(default_factory=deque)
    instead: tuple[int, dict[str, str]] | None = None
    """The status and the headers of every answer while it is set; status 0 is no answer."""
    calls: list[AgentCall] = field(default_factory=list)
    url: str = ""

    def of(self, path: str, after: float = 0.0) -> list[AgentCall]:
        return [call for call in self.calls if call.path == path and call.at > after]

    def answer(self, call: AgentCall) -> tuple[int, dict[str, Any]]:
        self.calls.append(call)
        if self.answers and self.answers[0][0] == call.path:
            _, status, body = self.answers.popleft()
            return status, body
        if call.path == "/api/heartbeat":
            return 200, self._lease | {"next_heartbeat_s": self.interval_s, "placements": self.placements}
        own = re.fullmatch(r"orion_worker_(w-[a-z2-7]{8})_\w{43}", call.token)
        if not own and call.token != JOIN_TOKEN:
            return 401, {"code": "unauthorized"}
        worker_id = own[1] if own else f"w-{''.join(secrets.choice('abcdefgh') for _ in range(8))}"
        return 201, {
            "worker_id": worker_id,
            "worker_token": f"orion_worker_{worker_id}_{'s' * 43}",
            "session_id": secrets.token_hex(8),
            **self._lease,
            "heartbeat_interval_s": self.interval_s,
            "authorized_keys": [self.key.public],
            "placements": self.placements,
        }

    @property
    def _lease(self) -> dict[str, Any]:
        return {"lease_s": self.lease_s, "door_answer_s": self.proxy_answer_s}


@contextmanager
def serving(manager: SmallManager, address: str) -> Iterator[SmallManager]:
    class ManagerHandler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            token = self.headers["Authorization"].removeprefix("Bearer ")
            status, reply = manager.answer(AgentCall(self.path, token, body, time.monotonic()))
            headers: dict[str, str] = {}
            if manager.instead:
                status, headers = manager.instead
                reply = {}
            if not status:
                self.close_connection = True
                return
            data = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Log nothing: `calls` records the requests."""

    server = ThreadingHTTPServer((address, 0), ManagerHandler)
    manager.url = f"http://{address}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield manager
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class WorkerNetwork:
    name: str
    subnet: str
    gateway: str


@dataclass
class Worker:
    """A container of the worker's image."""

    name: str
    manager: SmallManager
    key: Key
    address: str = ""
    host_keys: tuple[str, ...] = ()
    worker_id: str = "w-test"

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in the container, as root, with the container's capabilities; return its output."""
        return docker("exec", self.name, *command, check=check)

    def log(self) -> str:
        done = subprocess.run(["docker", "logs", self.name], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def wait_registered(self, after: float = 0.0, within_s: float = PATIENCE_S) -> None:
        """Wait for the registration, and take address and host keys from it, as the manager does."""
        hostname = docker("inspect", "-f", "{{.Config.Hostname}}", self.name).strip()

        def registration() -> AgentCall | None:
            mine = (c for c in self.manager.of("/api/register", after) if c.body["hostname"] == hostname)
            return next(mine, None)

        call = wait_until(registration, f"{self.name} registers; its log:\n{self.log()}", within_s)
        wait_until(lambda: "registered as" in self.log(), "the agent has its identity")
        # The manager answers before the worker has its lease, without which no renter can log in.
        leased = "test -e /run/orion/acknowledged -a ! -e /run/orion/no-lease && echo yes || true"
        wait_until(lambda: self.run("sh", "-c", leased), "it has a lease")
        self.host_keys = tuple(call.body["ssh_host_keys"])
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        self.address = docker("inspect", "-f", template, self.name).strip()
        wait_until(lambda: is_open(self.address, 22), "its sshd listens")  # its log shows earlier starts too

    def ssh_command(self, user: str, key: Key, *options: str) -> list[str]:
        return [
            "ssh", "-F", "none", "-i", str(key.file), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
            "-o", f"ConnectTimeout={PATIENCE_S}", *pinned_host_arguments(self.worker_id, self.host_keys),
            *options, f"{user}@{self.address}",
        ]  # fmt: skip

    def ssh(self, user: str, key: Key, command: str, text: str = "", *options: str) -> subprocess.CompletedProcess[str]:
        arguments = [*self.ssh_command(user, key, *options), command]
        return subprocess.run(arguments, input=text, capture_output=True, text=True, check=False, timeout=SESSION_S)

    def rental(self, command: str, **request: Any) -> tuple[int, dict[str, Any]]:
        """Run `orion-rental` as the manager does, over ssh and as root; return its status and its report."""
        done = self.ssh("root", self.key, f"orion-rental {command}", json.dumps(request))
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def playbook(self, name: str, **variables: Any) -> Played:
        return play(self, name, variables)


@dataclass(frozen=True)
class Played:
    """The outcome of a playbook."""

    ok: bool
    results: list[dict[str, Any]]
    output: str

    @property
    def changed(self) -> bool:
        return any(result.get("changed") for result in self.results)

    @property
    def last(self) -> dict[str, Any]:
        return self.results[-1]


@contextmanager
def worker(
    network: WorkerNetwork, manager: SmallManager, join: Path, *options: str, slots: int = 1
) -> Iterator[Worker]:
    name = f"{PREFIX}-{secrets.token_hex(3)}"
    confinement = [f"--cap-add={capability}" for capability in CAPABILITIES]
    confinement += [f"--sysctl={each}={value}" for each, value in SYSCTLS.items()]
    confinement += [f"--tmpfs={each}" for each in TMPFS]
    docker(
        "run", "--detach", "--name", name, "--network", network.name, "--cap-drop=ALL", *confinement,
        "--security-opt=no-new-privileges:true", f"--pids-limit={PIDS_LIMIT}", "--memory=512m",
        "--env", f"ORION_URL={manager.url}", "--env", f"ORION_APP_ADDRESS={network.gateway}",
        "--env", f"ORION_SUBNET={network.subnet}", "--env", f"ORION_SLOTS={slots}",
        "--volume", f"{join}:/run/orion-join:ro", *options, IMAGE,
    )  # fmt: skip
    try:
        yield Worker(name, manager, manager.key)
    finally:
        docker("rm", "--force", "--volumes", name, check=False)


@contextmanager
def join_directory(folder: Path, token: str | None = JOIN_TOKEN) -> Iterator[Path]:
    """Yield a directory with the join token that only root can read, as the manager makes it."""
    place = folder / f"join-{secrets.token_hex(4)}"
    place.mkdir(mode=0o700)
    if token:
        (place / "token").write_text(token)
        (place / "token").chmod(0o600)
    yield place
    shutil.rmtree(place)


def play(on: Worker, name: str, variables: dict[str, Any]) -> Played:
    """Run a playbook as an operator does: ansible-playbook, and an inventory with the pinned host key."""
    folder = on.key.file.parent
    host = {
        "ansible_host": on.address,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(on.key.file),
        "ansible_ssh_common_args": shlex.join(pinned_host_arguments(on.worker_id, on.host_keys)),
    }
    inventory = folder / f"inventory-{on.name}.json"
    inventory.write_text(json.dumps({"workers": {"hosts": {on.worker_id: host}}}))
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(ROOT / "playbooks/ansible.cfg"),
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "cp"),
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
        "ANSIBLE_NOCOLOR": "1",
    }
    program = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [program, "-v", "-i", inventory, f"{name}.yml", "-e", json.dumps(variables)],
        cwd=ROOT / "playbooks", env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return Played(done.returncode == 0, _results(done.stdout), done.stdout + done.stderr)


def _results(output: str) -> list[dict[str, Any]]:
    marks = re.finditer(r"^(?:ok|changed|fatal): \[[^]]*\](?:: \w+!)? => ", output, re.MULTILINE)
    return [json.JSONDecoder().raw_decode(output, mark.end())[0] for mark in marks]
