"""Many rents at once over four workers, then as many releases, against warm ssh to the same workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench.baselines import baselines
from bench.calls import Caller, TimedReply
from bench.rent import BenchRenter
from bench.report import Result
from bench.stack import BenchStack, running

WORKERS = 4
SLOTS = 64
ROUNDS = 2
WAIT_S = 55
PER_BASELINE = 40


@dataclass(frozen=True)
class Burst:
    """Calls that began together. `seconds`: of each that succeeded; `whole_s`: until the last ended."""

    replies: list[TimedReply]
    failures: int
    whole_s: float

    @property
    def seconds(self) -> list[float]:
        return [reply.seconds for reply in self.replies]

    @property
    def per_s(self) -> float:
        return len(self.replies) / self.whole_s


def measure(rents: int) -> Result:
    result = Result("burst", f"{rents} rents at once over {WORKERS} workers, then {rents} releases")
    with running(WORKERS, {"ORION_SLOTS": str(SLOTS)}) as stack:
        renter = BenchRenter(stack)
        rounds = [_round(stack, renter, rents) for _ in range(ROUNDS)]
    for name, bursts in (("rent", [one for one, _, _ in rounds]), ("release", [one for _, one, _ in rounds])):
        result.times(f"one {name} of them", [second for burst in bursts for second in burst.seconds])
        per_s = min(burst.per_s for burst in bursts)
        result.value(f"{name}s a second (the slower round)", "1/s", per_s)
        result.at_least(f"{name}s a second", per_s, 20)
        result.at_most(f"failed {name}s", sum(burst.failures for burst in bursts), 0)
    alone = sum(rate for _, _, rate in rounds) / ROUNDS
    result.value(f"warm ssh, useradd and key, {WORKERS} workers one after the other", "1/s", alone)
    return result


def _round(stack: BenchStack, renter: BenchRenter, rents: int) -> tuple[Burst, Burst, float]:
    payload = {"ssh_public_key": renter.public_key, "wait_s": WAIT_S}
    rented = _at_once(stack, [lambda proxy: proxy.call("POST", "/api/rent", payload)] * rents, 201)
    _check_some_log_ins(renter, [reply.body for reply in rented.replies])
    released = _at_once(stack, [_release(reply.body["id"]) for reply in rented.replies], 200)
    return rented, released, _warm_ssh(stack, renter)


def _release(rental_id: str) -> Callable[[Caller], TimedReply]:
    return lambda proxy: proxy.call("DELETE", f"/api/rentals/{rental_id}?wait_s={WAIT_S}")


def _at_once(stack: BenchStack, calls: Sequence[Callable[[Caller], TimedReply]], wanted: int) -> Burst:
    """Make each call on its own connection, all at the same moment."""
    start = threading.Barrier(len(calls) + 1)

    def begin(call: Callable[[Caller], TimedReply]) -> TimedReply | None:
        with stack.caller() as proxy:
            proxy.must("GET", "/healthz")
            start.wait()
            try:
                return call(proxy)
            except OSError:
                return None

    with ThreadPoolExecutor(len(calls)) as together:
        pending = [together.submit(begin, call) for call in calls]
        start.wait()
        began = time.perf_counter()
        replies = [one.result() for one in pending]
        whole_s = time.perf_counter() - began
    good = [reply for reply in replies if reply is not None and reply.status == wanted]
    return Burst(good, len(calls) - len(good), whole_s)


def _check_some_log_ins(renter: BenchRenter, rentals: Sequence[dict[str, Any]]) -> None:
    for rental in rentals[:: max(1, len(rentals) // 8)]:
        renter.check_log_in(rental)


def _warm_ssh(stack: BenchStack, renter: BenchRenter) -> float:
    """Return the accounts per second that warm ssh makes, one after the other, on the workers in turn."""
    with baselines(stack, renter.public_key) as without:
        workers = stack.ready_workers()
        for worker in workers:
            without.open(worker)
        seconds = [without.warm_ssh(workers[number % len(workers)]) for number in range(PER_BASELINE)]
    return len(seconds) / sum(seconds)
