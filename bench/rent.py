"""One rent at a time through the proxy, against warm ssh and a stock playbook."""

from __future__ import annotations

import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from bench.baselines import DEFAULTS, Baselines, baselines
from bench.calls import Caller, TimedReply
from bench.figures import median, summary
from bench.report import Result
from bench.stack import ROOT, BenchStack, running
from orion.cli.shell import SshRequest, ssh_arguments
from orion.client.sdk import Orion
from orion.wire import Rental

STOCK_EVERY = 12
"""A stock playbook takes seconds: one in so many rounds is enough for its median."""
SLOWEST_RELEASE_S = 30.0
PARTS = 20
"""Of what a rent is made of, each by itself: so many of each."""


@dataclass
class Way:
    """What the rounds measured, in seconds."""

    rents: list[float]
    warm: list[float]
    stock: list[float]
    defaults: list[float]
    steps: dict[str, list[float]]


class BenchRenter:
    """Somebody with a key who rents, gets in, and releases."""

    def __init__(self, stack: BenchStack) -> None:
        self._stack = stack
        self._key = stack.folder / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._key], check=True)
        self.public_key = self._key.with_suffix(".pub").read_text().strip()
        self._token_file = stack.folder / "token"
        self._token_file.write_text(stack.token)
        self._token_file.chmod(0o600)
        with Orion.at(f"http://127.0.0.1:{stack.http_port}", stack.token) as orion:
            self._authority = orion.ssh_authority().known_hosts

    def rent(self, door: Caller) -> TimedReply:
        reply = door.call("POST", "/api/rent", {"ssh_public_key": self.public_key, "wait_s": 50})
        if reply.status != 201:
            raise RuntimeError(f"a rent was answered with {reply.status}: {reply.body}")
        return reply

    def gets_in(self, rental: dict[str, Any]) -> None:
        """Raises RuntimeError when the renter cannot log in: then the rent was no rent."""
        if self.runs(rental, "id -un") != rental["username"]:
            raise RuntimeError(f"somebody else is in {rental['id']}")

    def runs(self, rental: dict[str, Any], command: str, within_s: float = 60) -> str:
        """What a command in the rental prints. Raises RuntimeError when it fails, or nobody is let in."""
        arguments = ssh_arguments(Rental.model_validate(rental), self._authority, SshRequest((command,), self._key))
        environment = {"PATH": os.environ["PATH"], "HOME": str(self._stack.folder), "PYTHONPATH": str(ROOT / "src")}
        environment |= {"ORION_URL": f"http://127.0.0.1:{self._stack.http_port}"}
        environment |= {"ORION_TOKEN_FILE": str(self._token_file)}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=within_s, check=False)
        if done.returncode:
            raise RuntimeError(f"no login to {rental['id']}, which is said to be active: {done.stderr}")
        return done.stdout.strip()


def measure(rounds: int, budget_s: float) -> Result:
    """Measure rents in turn with the baselines; the rounds end after `budget_s` seconds."""
    result = Result("rent", "One rent, from the request through the proxy to the 201")
    with running(3, {"ORION_SLOTS": "8"}) as stack:
        renter = BenchRenter(stack)
        _tell(result, _interleaved(stack, renter, rounds, budget_s))
    return result


def _interleaved(stack: BenchStack, renter: BenchRenter, rounds: int, budget_s: float) -> Way:
    """Rent, warm ssh, and now and then a stock playbook, one after the other, so that all see the same machine."""
    way = Way([], [], [], [], defaultdict(list))
    aside = stack.ready_workers()[-1]
    deadline = time.monotonic() + budget_s
    with stack.caller() as door, baselines(stack, renter.public_key) as without:
        # Its own worker: the playbook makes what the database has never placed, and a worker that shows such is put
        # into quarantine.
        door.must("POST", f"/api/workers/{aside['id']}/drain")
        without.open(aside)
        _release(door, renter.rent(door).body["id"])  # opens what stays open
        for number in range(rounds):
            if time.monotonic() > deadline:
                break
            _round(renter, door, without, aside, way)
            if number % STOCK_EVERY == 0:
                way.stock.append(without.stock_playbook(aside, {}))
                way.defaults.append(without.stock_playbook(aside, DEFAULTS))
        parts: dict[str, Callable[[], float]] = {
            "(the proxy alone: an answer of its own)": lambda: door.must("GET", "/.well-known/proxy").seconds,
            "(proxy and manager: /healthz)": lambda: door.must("GET", "/healthz").seconds,
            "(ssh alone: `true` over the warm connection)": lambda: without.nothing(aside),
            "(ssh and the start of orion-rental on the worker)": lambda: without.module_alone(aside),
        }
        for part, measured in parts.items():
            way.steps[part] = [measured() for _ in range(PARTS)]
        door.must("POST", f"/api/workers/{aside['id']}/resume")
    return way


def _round(renter: BenchRenter, door: Caller, without: Baselines, aside: dict[str, Any], way: Way) -> None:
    began = time.time()
    reply = renter.rent(door)
    ended = began + reply.seconds
    way.rents.append(reply.seconds)
    events = door.must("GET", f"/api/events?rental_id={reply.body['id']}").body["items"]
    for step, seconds in steps(began, ended, events).items():
        way.steps[step].append(seconds)
    renter.gets_in(reply.body)
    _release(door, reply.body["id"])
    way.warm.append(without.warm_ssh(aside))


def steps(began: float, ended: float, events: list[dict[str, Any]]) -> dict[str, float]:
    """Where the time of one rent went, by the events of its transactions, which share a clock with the client."""
    marks = [("the request", began)]
    for event in events:
        at = datetime.fromisoformat(event["at"]).timestamp()
        if at - marks[-1][1] > 0.0002 or len(marks) == 1:  # what one transaction wrote is one mark
            marks.append((event["kind"], at))
        else:
            marks[-1] = (event["kind"], marks[-1][1])
    marks.append(("the answer", ended))
    return {f"{before} -> {after}": end - start for (before, start), (after, end) in pairwise(marks)}


def _release(door: Caller, rental_id: str) -> float:
    reply = door.call("DELETE", f"/api/rentals/{rental_id}?wait_s={SLOWEST_RELEASE_S:g}")
    if reply.status != 200:
        raise RuntimeError(f"a release was answered with {reply.status}: {reply.body}")
    return reply.seconds


def _tell(result: Result, way: Way) -> None:
    result.times("rent to 201", way.rents)
    result.times("warm ssh: useradd and key", way.warm)
    result.times("stock ansible-playbook from cold", way.stock)
    result.times("the same without our ansible.cfg", way.defaults)
    for step, seconds in way.steps.items():
        if len(seconds) * 2 > len(way.rents) or step.startswith("("):
            result.times(f"  {step}", seconds)
    rent, warm, stock = median(way.rents), median(way.warm), median(way.stock)
    result.at_most("rent p50", rent, 0.5, " s")
    result.at_most("rent p50 over warm ssh p50", rent / warm, 3)
    result.at_least("stock playbook p50 over rent p50", stock / rent, 30)
    result.at_most("rent p50, quiet machine", 1000 * rent, 100, " ms")
    result.at_most("rent p99", summary(way.rents).p99, 1, " s")
