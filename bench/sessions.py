"""The cost of the gateway: opening a session, copying 1 GB, and 200 idle sessions.

A worker accepts SSH from the manager's address alone, so both directly and through the proxy it runs in the manager's
container, in turn: the same ssh, the same sshd, the same machine. Through the proxy means the whole path: `orion
connect` as ssh's ProxyCommand, Nginx, the manager, the worker.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bench.baselines import Baselines, baselines
from bench.calls import Caller
from bench.figures import median
from bench.processes import family, memory_mb
from bench.report import Result
from bench.stack import BenchStack, running, wait_until
from orion.login import Login
from orion.ssh_client import frames, stream
from orion.ssh_command import pinned_authority_arguments, pinned_host_arguments

GIGABYTE = 1 << 30
RENTALS = 6
IDLE = 200
INSIDE = "/tmp/orion-bench"  # noqa: S108 - inside_app.PLACE
PYTHON = "/opt/orion/venv/bin/python"
SETTLED_S = 2.0


class SshCommands:
    """The commands to one rental, directly and through the proxy."""

    def __init__(
        self, stack: BenchStack, rental: dict[str, Any], worker: dict[str, Any], authority: str, key: str
    ) -> None:
        self._rental = rental
        self._worker = worker
        self._authority = authority
        self.files = {"key": key, "ca.pem": stack.inside("manager_proxy", "cat", "/etc/orion-tls/tls.crt")}

    def direct(self, program: str, *rest: str) -> list[str]:
        pinned = pinned_host_arguments(self._worker["id"], self._worker["ssh_host_keys"])
        return [program, *renter_options(f"{INSIDE}/key"), *pinned, *self._to(rest)]

    def through_proxy(self, program: str, *rest: str) -> list[str]:
        through = through_the_proxy(PYTHON, self._rental["id"], self._authority)
        return [program, *renter_options(f"{INSIDE}/key"), *through, *self._to(rest)]

    def _to(self, rest: tuple[str, ...]) -> list[str]:
        target = f"{self._rental['username']}@{self._worker['address']}"
        return [part.replace("TARGET", target) for part in rest]


def renter_options(key: str) -> list[str]:
    return ["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-i", key]


def through_the_proxy(python: str, rental_id: str, authority: str) -> list[str]:
    """Return ssh's options for `orion connect` as the way to the worker, verified by the platform's authority."""
    connect = shlex.join([python, "-P", "-m", "orion.connect", rental_id])
    return ["-o", f"ProxyCommand={connect}", *pinned_authority_arguments(f"{rental_id}.orion", authority)]


def measure(openings: int, copies: int) -> Result:
    result = Result("sessions", "Sessions through the gateway, beside ssh to the same sshd")
    with running(3, {"ORION_SLOTS": "4"}) as stack, stack.caller() as proxy:
        key = key_pair(stack.folder)
        public_key = key.with_suffix(".pub").read_text().strip()
        rentals = [rent(proxy, public_key) for _ in range(RENTALS)]
        authority = proxy.must("GET", "/api/ssh-authority").body["known_hosts"]
        workers = {worker["id"]: worker for worker in stack.ready_workers()}
        commands = SshCommands(stack, rentals[0], workers[rentals[0]["worker_id"]], authority, key.read_text())
        with baselines(stack, public_key) as inside:
            inside.open(workers[rentals[0]["worker_id"]])  # makes the folder of its files
            _openings(result, inside, commands, openings)
            _copies(result, inside, commands, copies)
        _idle(result, stack, rentals)
    return result


def _openings(result: Result, inside: Baselines, commands: SshCommands, rounds: int) -> None:
    direct, through, secure = [], [], []
    for _ in range(rounds):
        direct.append(inside.session(commands.direct("ssh", "TARGET", "true"), {}, commands.files))
        through.append(inside.session(commands.through_proxy("ssh", "TARGET", "true"), _plain(), commands.files))
        secure.append(inside.session(commands.through_proxy("ssh", "TARGET", "true"), _tls(), commands.files))
    result.times("ssh, and `true`: directly", direct)
    result.times("the same through the proxy, HTTP", through)
    result.times("the same through the proxy, TLS", secure)
    result.at_most("opening through the proxy over directly, p50", median(through) / median(direct), 1.5)


def _copies(result: Result, inside: Baselines, commands: SshCommands, rounds: int) -> None:
    inside.session(commands.direct("ssh", "TARGET", f"truncate -s {GIGABYTE} large"), {}, commands.files)
    copy = ("-q", "TARGET:large", "/dev/null")
    direct, through, secure = [], [], []
    for _ in range(rounds):
        direct.append(GIGABYTE / 1e6 / inside.session(commands.direct("scp", *copy), {}, commands.files))
        through.append(GIGABYTE / 1e6 / inside.session(commands.through_proxy("scp", *copy), _plain(), commands.files))
        secure.append(GIGABYTE / 1e6 / inside.session(commands.through_proxy("scp", *copy), _tls(), commands.files))
    result.value("scp of 1 GB: directly", "MB/s", median(direct))
    result.value("the same through the proxy, HTTP", "MB/s", median(through))
    result.value("the same through the proxy, TLS", "MB/s", median(secure))
    result.at_least("scp through the proxy over directly, HTTP", median(through) / median(direct), 0.4)
    result.value("scp through the proxy over directly, TLS", "", median(secure) / median(direct))


def _idle(result: Result, stack: BenchStack, rentals: list[dict[str, Any]]) -> None:
    """Measure sessions that stay at sshd's greeting: the manager's memory for one does not depend on its data."""
    account = Login(f"http://127.0.0.1:{stack.http_port}", stack.token)
    manager = _manager(stack)
    before = memory_mb(manager)
    with ExitStack() as open_ones:
        for number in range(IDLE):
            rental_id = rentals[number % len(rentals)]["id"]
            open_ones.enter_context(_session(account, rental_id))
        time.sleep(SETTLED_S)
        during = memory_mb(manager)
    result.value(f"the manager's memory before {IDLE} sessions", "MB", before)
    result.value(f"with {IDLE} sessions", "MB", during)
    result.at_most(f"{IDLE} idle sessions cost the manager", during - before, 100, " MB")


def _session(account: Login, rental_id: str) -> Any:
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": frames.new_key(),
    }
    connection = stream.connect(account, 20)
    head, _ = stream.ask(connection, account, f"/api/rentals/{rental_id}/ssh", upgrade)
    if head.status != 101:
        raise RuntimeError(
            f"a session was answered with {head.status}: {stream.rest_of_refusal(connection, head, b'')!r}"
        )
    return connection


def _manager(stack: BenchStack) -> int:
    for pid in family(stack.pid("manager_app")):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:3] == [b"-m", b"orion.manager.main"]:
                return pid
    raise ProcessLookupError("there is no manager")


def key_pair(folder: Path) -> Path:
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    return key


def rent(proxy: Caller, public_key: str) -> dict[str, Any]:
    rental: dict[str, Any] = proxy.must("POST", "/api/rent", {"ssh_public_key": public_key, "wait_s": 50}).body
    wait_until(f"rental {rental['id']} is active", lambda: _state(proxy, rental["id"]) == "active", 30)
    return dict(proxy.must("GET", f"/api/rentals/{rental['id']}").body)


def _state(proxy: Caller, rental_id: str) -> str:
    return str(proxy.must("GET", f"/api/rentals/{rental_id}").body["state"])


def _plain() -> dict[str, str]:
    return {}


def _tls() -> dict[str, str]:
    token = "/var/lib/orion/secrets/admin_token"  # noqa: S105 - a path
    return {
        "ORION_URL": "https://manager_proxy",
        "ORION_TOKEN_FILE": token,
        "ORION_CA_FILE": f"{INSIDE}/ca.pem",
    }
