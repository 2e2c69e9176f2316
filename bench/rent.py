"""One rent at a time through the proxy, compared with warm ssh and a stock playbook."""

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
"""Rounds between two stock playbooks: each takes seconds, and few are enough for a median."""
SLOWEST_RELEASE_S = 30.0
PARTS = 20
"""Repetitions of each part of a rent that is measured by itself."""


@dataclass
class RentTimes:
    """The times of all rounds, in seconds."""

    rents: list[float]
    warm: list[float]
    stock: list[float]
    defaults: list[float]
    steps: dict[str, list[float]]


class BenchRenter:
    """A renter with a key, who rents, logs in and releases."""

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

    def rent(self, proxy: Caller) -> TimedReply:
        reply = proxy.call("POST", "/api/rent", {"ssh_public_key": self.public_key, "wait_s": 50})
        if reply.status != 201:
            raise RuntimeError(f"a rent was answered with {reply.status}: {reply.body}")
        return reply

    def check_log_in(self, rental: dict[str, Any]) -> None:
        """Raise RuntimeError if the renter cannot log in: then the rent has failed."""
        if self.runs(rental, "id -un") != rental["username"]:
            raise RuntimeError(f"the log-in to {rental['id']} is another account's")

    def runs(self, rental: dict[str, Any], command: str, within_s: float = 60) -> str:
        """Return the output of a command in the rental. Raise RuntimeError if the log-in or the command fails."""
        arguments = ssh_arguments(
            Rental.model_validate(rental), self._authority, SshRequest(command=(command,), identity=self._key)
        )
        environment = {"PATH": os.environ["PATH"], "HOME": str(self._stack.folder), "PYTHONPATH": str(ROOT / "src")}
        environment |= {"ORION_URL": f"http://127.0.0.1:{self._stack.http_port}"}
        environment |= {"ORION_TOKEN_FILE": str(self._token_file)}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=within_s, check=False)
        if done.returncode:
            raise RuntimeError(f"the command in {rental['id']} failed: {done.stderr}")
        return done.stdout.strip()


def measure(rounds: int, budget_s: float) -> Result:
    """Measure rents in turn with the baselines; the rounds end after `budget_s` seconds."""
    result = Result("rent", "One rent, from the request through the proxy to the 201")
    with running(3, {"ORION_SLOTS": "8"}) as stack:
        renter = BenchRenter(stack)
        _report(result, _interleaved(stack, renter, rounds, budget_s))
    return result


def _interleaved(stack: BenchStack, renter: BenchRenter, rounds: int, budget_s: float) -> RentTimes:
    """Run rents, warm ssh and some stock playbooks in turn, so that all are measured on the same machine."""
    times = RentTimes([], [], [], [], defaultdict(list))
    baseline_worker = stack.ready_workers()[-1]
    deadline = time.monotonic() + budget_s
    with stack.caller() as proxy, baselines(stack, renter.public_key) as without:
        # The baselines get a drained worker: the playbook makes unknown rentals, for which a worker is quarantined.
        proxy.must("POST", f"/api/workers/{baseline_worker['id']}/drain")
        without.open(baseline_worker)
        _release(proxy, renter.rent(proxy).body["id"])  # opens the connections that stay open
        for number in range(rounds):
            if time.monotonic() > deadline:
                break
            _round(renter, proxy, without, baseline_worker, times)
            if number % STOCK_EVERY == 0:
                times.stock.append(without.stock_playbook(baseline_worker, {}))
                times.defaults.append(without.stock_playbook(baseline_worker, DEFAULTS))
        parts: dict[str, Callable[[], float]] = {
            "(the proxy alone: its own answer)": lambda: proxy.must("GET", "/.well-known/proxy").seconds,
            "(proxy and manager: /healthz)": lambda: proxy.must("GET", "/healthz").seconds,
            "(ssh alone: `true` over the warm connection)": lambda: without.nothing(baseline_worker),
            "(ssh and the start of orion-rental on the worker)": lambda: without.module_alone(baseline_worker),
        }
        for part, measured in parts.items():
            times.steps[part] = [measured() for _ in range(PARTS)]
        proxy.must("POST", f"/api/workers/{baseline_worker['id']}/resume")
    return times


def _round(
    renter: BenchRenter, proxy: Caller, without: Baselines, baseline_worker: dict[str, Any], times: RentTimes
) -> None:
    began = time.time()
    reply = renter.rent(proxy)
    ended = began + reply.seconds
    times.rents.append(reply.seconds)
    events = proxy.must("GET", f"/api/events?rental_id={reply.body['id']}").body["items"]
    for step, seconds in steps(began, ended, events).items():
        times.steps[step].append(seconds)
    renter.check_log_in(reply.body)
    _release(proxy, reply.body["id"])
    times.warm.append(without.warm_ssh(baseline_worker))


def steps(began: float, ended: float, events: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each step of one rent, by the events of its transactions (same clock as the client)."""
    marks = [("the request", began)]
    for event in events:
        at = datetime.fromisoformat(event["at"]).timestamp()
        if at - marks[-1][1] > 0.0002 or len(marks) == 1:  # the events of one transaction are one mark
            marks.append((event["kind"], at))
        else:
            marks[-1] = (event["kind"], marks[-1][1])
    marks.append(("the answer", ended))
    return {f"{before} -> {after}": end - start for (before, start), (after, end) in pairwise(marks)}


def _release(proxy: Caller, rental_id: str) -> float:
    reply = proxy.call("DELETE", f"/api/rentals/{rental_id}?wait_s={SLOWEST_RELEASE_S:g}")
    if reply.status != 200:
        raise RuntimeError(f"a release was answered with {reply.status}: {reply.body}")
    return reply.seconds


def _report(result: Result, times: RentTimes) -> None:
    result.times("rent to 201", times.rents)
    result.times("warm ssh: useradd and key", times.warm)
    result.times("stock ansible-playbook from cold", times.stock)
    result.times("the same without our ansible.cfg", times.defaults)
    for step, seconds in times.steps.items():
        if len(seconds) * 2 > len(times.rents) or step.startswith("("):
            result.times(f"  {step}", seconds)
    rent, warm, stock = median(times.rents), median(times.warm), median(times.stock)
    result.at_most("rent p50", rent, 0.5, " s")
    result.at_most("rent p50 over warm ssh p50", rent / warm, 3)
    result.at_least("stock playbook p50 over rent p50", stock / rent, 30)
    result.at_most("rent p50, quiet machine", 1000 * rent, 100, " ms")
    result.at_most("rent p99", summary(times.rents).p99, 1, " s")
