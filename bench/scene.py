"""A platform with a renter and rentals: what the cases of failover.py and snapshots.py share."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from bench.rent import BenchRenter
from bench.report import Result
from bench.stack import BenchStack, run, wait_until

HOME = "mkdir -p files; for one in $(seq 100); do head -c {bytes} /dev/urandom > files/$one; done"
CHECKSUM = "find files -type f | sort | xargs -r sha256sum | sha256sum | cut -c 1-64"
FILL_ALL = """
cd /home && mkdir /tmp/files && for one in $(seq 100); do head -c {bytes} /dev/urandom > /tmp/files/$one; done
for home in r-*; do
    cp -r /tmp/files "$home/files" && echo "$home" > "$home/files/whose" && chown -R --reference="$home" "$home/files"
done
rm -r /tmp/files
"""
"""The script that fills all homes of a worker as root: a hundred log-ins would take half a minute."""
PROGRAM = Path(__file__).with_name("inside_rental.py")
FILLED_WITHIN_S = 240.0
BACK_WITHIN_S = 90.0
SNAPSHOT_WITHIN_S = 120.0
READY_WITHIN_S = 180.0
BRAKE_WITHIN_S = 320.0
V1, V2 = "cpuacct/cpuacct.usage", "cpu.stat"

Json = dict[str, Any]
A = TypeVar("A")
B = TypeVar("B")


@dataclass
class Case:
    """The runs of one case: the seconds of each run and of each of its steps."""

    seconds: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, seconds: float, steps: dict[str, float]) -> None:
        self.seconds.append(seconds)
        for step, took in steps.items():
            self.steps[step].append(took)

    def report(self, result: Result, label: str) -> None:
        result.times(label, self.seconds)
        for step, seconds in self.steps.items():
            result.times(f"  {step}", seconds)


AT_ONCE = 8


def each(do: Callable[[A], B], several: Iterable[A]) -> list[B]:
    """Return the results for all items, several at once: this is work that is not measured."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(do, several))


class RentedPlatform:
    """A running platform, its renter, and how a measurement prepares and looks at it."""

    def __init__(self, stack: BenchStack, workers: int) -> None:
        self.stack = stack
        self.renter = BenchRenter(stack)
        self.number = workers
        self._last_event = 0

    def show_progress(self, case: str, done: int) -> None:
        print(f"bench: {case}: {done} runs are done, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)

    def ask(self, method: str, path: str) -> Any:
        """Return the body of the reply, by a new connection: the proxy closes one that was idle for a while."""
        with self.stack.caller() as proxy:
            return proxy.must(method, path).body

    def workers(self) -> dict[str, Json]:
        return {one["id"]: one for one in self.ask("GET", "/api/workers?limit=200")["items"]}

    def rental(self, rental_id: str) -> Json:
        found: Json = self.ask("GET", f"/api/rentals/{rental_id}")
        return found

    def rent(self) -> Json:
        with self.stack.caller() as proxy:
            rental: Json = self.renter.rent(proxy).body
        return rental

    def fill(self, rental: Json, bytes_each: int) -> str:
        """Write a hundred files in the home; return their checksum."""
        return self.renter.runs(rental, f"{HOME.format(bytes=bytes_each)}; {CHECKSUM}")

    def fill_with(self, rental: Json, megabytes: int, files: int) -> str:
        """Write this number of files of equal size in the home; return their checksum."""
        program = shlex.join(["python3", "-c", PROGRAM.read_text(), "fill", str(megabytes), str(files)])
        return self.renter.runs(rental, f"{program}; {CHECKSUM}", FILLED_WITHIN_S)

    def fill_all(self, hostname: str, bytes_each: int) -> None:
        run(["docker", "exec", hostname, "sh", "-ec", FILL_ALL.format(bytes=bytes_each)], 60)

    def checksum(self, rental_id: str) -> str:
        return self.renter.runs(self.rental(rental_id), CHECKSUM, FILLED_WITHIN_S)

    def await_snapshots(self, rental_ids: Sequence[str]) -> None:
        """Wait for snapshots of the homes as they are now."""
        now = time.time()

        def is_taken(rental_id: str) -> bool:
            began_at = self.rental(rental_id)["last_safe_copy_at"]
            return began_at is not None and unix(began_at) >= now

        for one in rental_ids:
            wait_until(f"a snapshot of {one}", lambda one=one: is_taken(one), SNAPSHOT_WITHIN_S)  # type: ignore[misc]

    def release(self, rental_id: str) -> None:
        self.ask("DELETE", f"/api/rentals/{rental_id}?wait_s=50")

    def last_event(self) -> int:
        self.events(self._last_event)
        return self._last_event

    def events(self, after: int) -> list[Json]:
        found: list[Json] = []
        while items := self.ask("GET", f"/api/events?after={after}&limit=500")["items"]:
            found += items
            after = items[-1]["id"]
        self._last_event = max(self._last_event, after)
        return found

    def await_active(self, after: int, epochs: dict[str, int], within_s: float = BACK_WITHIN_S) -> list[Json]:
        """Wait until each rental is active with at least this epoch; return the events until then."""
        found: list[Json] = []

        def all_active() -> bool:
            found.extend(self.events(found[-1]["id"] if found else after))
            active = {(e["rental_id"], e["epoch"]) for e in found if e["kind"] == "rental.activated"}
            return all(any((one, e) in active for e in (epoch, epoch + 1)) for one, epoch in epochs.items())

        wait_until(f"{len(epochs)} rentals are active elsewhere", all_active, within_s)
        return found

    def await_ready(self, number: int | None = None) -> None:
        wanted = number or self.number
        wait_until(f"{wanted} workers are ready", lambda: len(self.stack.ready_workers()) >= wanted, READY_WITHIN_S)

    def await_no_brake(self) -> None:
        def is_off() -> bool:
            return self.ask("GET", "/api/status")["brake"] is None

        wait_until("the brake is off", is_off, BRAKE_WITHIN_S)

    def check(self, rental_id: str, checksum: str) -> None:
        if self.checksum(rental_id) != checksum:
            raise RuntimeError(f"the files of {rental_id} have changed")


def at(events: Sequence[Json], kind: str, **about: str) -> float:
    """Return when the first event of this kind happened. Raise RuntimeError if there is none."""
    for event in events:
        if event["kind"] == kind and all(event[name] == value for name, value in about.items()):
            return unix(event["at"])
    raise RuntimeError(f"there is no {kind} in {json.dumps([event['kind'] for event in events])}")


def unix(text: str) -> float:
    """Return the Unix time of an ISO text. Docker writes nanoseconds, which Python 3.11 does not read."""
    whole, _, fraction = text.rstrip("Z").removesuffix("+00:00").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def processor_s(container: str) -> float:
    """Return the processor seconds that a container has used, by the control group of either version."""
    usage = run(["docker", "exec", container, "sh", "-c", f"cd /sys/fs/cgroup; cat {V1} 2>/dev/null || cat {V2}"], 30)
    return int(usage) / 1e9 if usage.strip().isdecimal() else int(usage.split()[1]) / 1e6
