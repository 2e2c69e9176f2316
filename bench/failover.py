"""From `docker kill`, a cut network or a restart until rentals are where they belong again, and where the time goes.

Every case is real: containers are killed, cut off and restarted by Docker, and after each run the renter logs in and
must find the files as they were. Times are of this machine's one wall clock, by which the platform's events are written
as well. A time begins before the command is given to Docker, and ends when the rental is active: its renter is let in.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

from bench.figures import median, summary
from bench.rent import Renter
from bench.report import Result
from bench.stack import Stack, run, running, wait_until
from orion.manager.domain.clocks import Clocks

WORKERS = 6
MANY = 100
RESTARTED = 50
TENTH = 0.1
SLOTS = 100
CUT_AT_ONCE = 2
"""Of six workers: three would be half of the pool, and put the brake on."""
HOME = "mkdir -p files; for one in $(seq 100); do head -c {bytes} /dev/urandom > files/$one; done"
CHECKSUM = "find files -type f | sort | xargs -r sha256sum | sha256sum | cut -c 1-64"
BACK_WITHIN_S = 60.0
COPIED_WITHIN_S = 120.0
BY_LEASE_WITHIN_S = 200.0
SETTINGS = {
    "ORION_SLOTS": str(SLOTS),
    "ORION_SNAPSHOT_INTERVAL_S": "5",  # a run does not wait 30 s for its first copy; what is restored is the same
    "ORION_FLAP_WINDOW_S": "1",  # a worker that is killed again and again is shut out
}

Json = dict[str, Any]


@dataclass
class Case:
    """Runs of one kind: seconds of each, and of each of its steps."""

    seconds: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, seconds: float, steps: dict[str, float]) -> None:
        self.seconds.append(seconds)
        for step, took in steps.items():
            self.steps[step].append(took)

    def tell(self, result: Result, label: str) -> None:
        result.times(label, self.seconds)
        for step, seconds in self.steps.items():
            result.times(f"  {step}", seconds)


def measure(runs: int) -> Result:
    result = Result("failover", "A worker is lost, or the platform restarts")
    with running(WORKERS, SETTINGS) as stack:
        scene = Scene(stack)
        moved, killed, many = _moved(scene, runs), _killed(scene, runs), _many_killed(scene, max(2, runs // 5))
        cut = _cut_off(scene, CUT_AT_ONCE)
    with running(WORKERS, SETTINGS | {"ORION_CLOCK_SCALE": str(TENTH)}) as stack:
        scene = Scene(stack)
        cut_at_a_tenth = _cut_off(scene, runs)
        restarts = _restarts(scene, runs)
    moved.tell(result, "a planned move of 100 MB: held to active elsewhere")
    killed.tell(result, "docker kill to active again elsewhere, 10 MB")
    many.tell(result, f"docker kill to all {MANY} active elsewhere")
    cut.tell(result, "docker network disconnect to active elsewhere")
    cut_at_a_tenth.tell(result, "the same with all clocks at a tenth")
    for service, case in restarts.items():
        case.tell(result, f"docker restart of {service} to all {WORKERS} workers ready")
    result.at_most("a planned move of 100 MB: the longest pause", max(moved.seconds), 1, " s")
    result.at_most("killed, 10 MB: p50", median(killed.seconds), 2, " s")
    result.at_most("killed, 10 MB: p99", summary(killed.seconds).p99, 3, " s")
    result.at_most(f"killed with {MANY} rentals: the slowest", max(many.seconds), 15, " s")
    for label, case, clocks in (("", cut, Clocks()), (" at a tenth", cut_at_a_tenth, Clocks().scaled(TENTH))):
        result.at_most(f"cut off{label}: the slowest", max(case.seconds), clocks.takeover_after_s + 5, " s")
        margins = case.steps["from the freeze of the old copy to the verdict"]
        result.at_least(f"cut off{label}: the shortest time from freeze to verdict", min(margins), 0, " s")
    result.at_most(f"restarts with {RESTARTED} rentals: migrations and false downs", scene.moved, 0)
    return result


class Scene:
    """A platform with a renter on it, and what is done to its machines."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.renter = Renter(stack)
        self.door = stack.caller()
        self.moved = 0
        """Migrations and verdicts that nothing gave a reason for."""

    def workers(self) -> dict[str, Json]:
        return {one["id"]: one for one in self.door.must("GET", "/api/workers").body["items"]}

    def rental(self, rental_id: str) -> Json:
        found: Json = self.door.must("GET", f"/api/rentals/{rental_id}").body
        return found

    def rent(self, bytes_each: int) -> tuple[Json, str]:
        """An active rental with a hundred files in its home that are copied, and their checksum."""
        rental: Json = self.renter.rent(self.door).body
        checksum = self.renter.runs(rental, f"{HOME.format(bytes=bytes_each)}; {CHECKSUM}")
        self.await_copy([rental["id"]], time.time())
        return rental, checksum

    def await_copy(self, rental_ids: Sequence[str], since: float) -> None:
        def copied(rental_id: str) -> bool:
            at = self.rental(rental_id)["last_safe_copy_at"]
            return at is not None and _unix(at) >= since

        for one in rental_ids:
            wait_until(f"a copy of {one}", lambda one=one: copied(one), COPIED_WITHIN_S)  # type: ignore[misc]

    def release(self, rental_id: str) -> None:
        self.door.must("DELETE", f"/api/rentals/{rental_id}?wait_s=50")

    def last_event(self) -> int:
        after = 0
        while items := self.door.must("GET", f"/api/events?after={after}&limit=500").body["items"]:
            after = items[-1]["id"]
        return after

    def events(self, after: int) -> list[Json]:
        found: list[Json] = []
        while items := self.door.must("GET", f"/api/events?after={after}&limit=500").body["items"]:
            found += items
            after = items[-1]["id"]
        return found

    def await_active(self, after: int, epochs: dict[str, int], within_s: float = BACK_WITHIN_S) -> list[Json]:
        """The events until each rental is active with at least this epoch."""
        found: list[Json] = []

        def all_active() -> bool:
            found.extend(self.events(found[-1]["id"] if found else after))
            active = {(e["rental_id"], e["epoch"]) for e in found if e["kind"] == "rental.activated"}
            return all(any((one, e) in active for e in (epoch, epoch + 1)) for one, epoch in epochs.items())

        wait_until(f"{len(epochs)} rentals are active elsewhere", all_active, within_s)
        return found

    def await_ready(self, number: int = WORKERS) -> None:
        wait_until(f"{number} workers are ready", lambda: len(self.stack.ready_workers()) >= number, COPIED_WITHIN_S)

    def await_no_brake(self) -> None:
        wait_until("the brake is off", lambda: self.door.must("GET", "/api/status").body["brake"] is None, 320)

    def check(self, rental_id: str, checksum: str) -> None:
        found = self.renter.runs(self.rental(rental_id), CHECKSUM)
        if found != checksum:
            raise RuntimeError(f"the files of {rental_id} are not what they were")


def _moved(scene: Scene, runs: int) -> Case:
    """One rental with 100 MB is moved again and again; its renter can do nothing from the hold until it is active."""
    rental, checksum = scene.rent(1_000_000)
    case = Case()
    for _ in range(runs):
        before, after, began = scene.rental(rental["id"]), scene.last_event(), time.time()
        scene.door.must("POST", f"/api/rentals/{rental['id']}/migrate?wait_s=50")
        events = scene.await_active(after, {rental["id"]: before["epoch"] + 1})
        held, switched, active = (_at(events, f"rental.{kind}") for kind in ("held", "moved", "activated"))
        time.sleep(1.1)  # what the engine did is written down once a second
        log = scene.door.must("GET", f"/api/rentals/{rental['id']}/log").body["items"]
        frozen = next(_unix(one["at"]) for one in log if one["action"] == "freeze" and _unix(one["at"]) > held)
        steps = {"(asked for -> held: filled while it runs)": held - began, "held -> it stands still": frozen - held}
        steps |= {"it stands still -> all of it is there": switched - frozen, "-> active": active - switched}
        case.add(active - held, steps)
        scene.check(rental["id"], checksum)
    scene.release(rental["id"])
    return case


def _killed(scene: Scene, runs: int) -> Case:
    """One rental with 10 MB; its worker is killed, then started again and cleaned before the next run."""
    rental, checksum = scene.rent(100_000)
    case = Case()
    for _ in range(runs):
        rental = scene.rental(rental["id"])
        hostname, after = scene.workers()[rental["worker_id"]]["hostname"], scene.last_event()
        began = time.time()
        run(["docker", "kill", hostname], 30)
        commanded = time.time()
        events = scene.await_active(after, {rental["id"]: rental["epoch"] + 1})
        marks = [("docker kill", began), ("its watch is closed", _at(events, "worker.became_suspect"))]
        marks += [("it is proved dead", _at(events, "worker.became_down"))]
        marks += [("a place is found", _at(events, "placement.preparing"))]
        time.sleep(1.1)  # what the engine did is written down once a second
        marks += _jobs(scene, rental["id"], rental["epoch"] + 1)
        marks += [("active", _at(events, "rental.activated"))]
        steps = {f"{name} -> {to}": end - start for (name, start), (to, end) in pairwise(marks)}
        case.add(marks[-1][1] - began, steps | {"(the command docker kill)": commanded - began})
        scene.check(rental["id"], checksum)
        run(["docker", "start", hostname], 30)
        scene.await_ready()
    scene.release(rental["id"])
    return case


def _jobs(scene: Scene, rental_id: str, epoch: int) -> list[tuple[str, float]]:
    """When the account was there, when its files were, and when its renter was let in; by the log of the engine."""
    log = scene.door.must("GET", f"/api/rentals/{rental_id}/log").body["items"]
    marks = []
    for entry in sorted((one for one in log if one["epoch"] == epoch and one["ok"]), key=lambda one: str(one["at"])):
        at = _unix(entry["at"])
        if entry["action"] == "prepare_user":
            marks.append(("its account is there", at))
        elif entry["action"] == "create_user":
            marks += [("its files are there", at - entry["seconds"]), ("its renter is let in", at)]
    return marks


def _many_killed(scene: Scene, runs: int) -> Case:
    """100 rentals on one worker; all others but one are out of service, so all go to that one, and back."""
    ids = list(scene.workers())
    for one in ids[1:]:
        scene.door.must("POST", f"/api/workers/{one}/drain")
    rentals = [scene.renter.rent(scene.door).body for _ in range(MANY)]
    checksums = {one["id"]: scene.renter.runs(one, f"{HOME.format(bytes=100)}; {CHECKSUM}") for one in rentals[::10]}
    scene.await_copy([one["id"] for one in rentals], time.time())
    scene.door.must("POST", f"/api/workers/{ids[1]}/resume")
    case = Case()
    for number in range(runs):
        scene.await_ready(2)
        hostname, after = scene.workers()[ids[number % 2]]["hostname"], scene.last_event()
        epochs = {one["id"]: scene.rental(one["id"])["epoch"] + 1 for one in rentals}
        began = time.time()
        run(["docker", "kill", hostname], 30)
        events = scene.await_active(after, epochs)
        active = sorted(_unix(e["at"]) - began for e in events if e["kind"] == "rental.activated")
        down, prepared = _at(events, "worker.became_down"), _at(events, "placement.preparing")
        steps = {"docker kill -> it is proved dead": down - began, "it is proved dead -> first places": prepared - down}
        steps |= {"first places -> first active": began + active[0] - prepared}
        case.add(active[-1], steps | {"first active -> last active": active[-1] - active[0]})
        case.steps["each of the rentals"] += active
        for one, checksum in checksums.items():
            scene.check(one, checksum)
        run(["docker", "start", hostname], 30)
    for rental in rentals:
        scene.release(rental["id"])
    for one in ids[2:]:
        scene.door.must("POST", f"/api/workers/{one}/resume")
    scene.await_ready()
    return case


def _cut_off(scene: Scene, runs: int) -> Case:
    """CUT_AT_ONCE workers lose the network, each with a rental, which must stand still before it is anywhere else."""
    case = Case()
    rentals = [scene.rent(1000) for _ in range(WORKERS)]  # one on each: they go where least is used
    while len(case.seconds) < runs:
        scene.await_no_brake()
        shown = [scene.rental(rental["id"]) for rental, _ in rentals]
        victims = {one["worker_id"]: one for one in shown}
        chosen = [victims[worker] for worker in sorted(victims)][:CUT_AT_ONCE]
        after, hosts, began = scene.last_event(), scene.workers(), {}
        for one in chosen:
            began[one["id"]] = time.time()
            run(["docker", "network", "disconnect", scene.stack.network, hosts[one["worker_id"]]["hostname"]], 30)
        epochs = {one["id"]: one["epoch"] + 1 for one in chosen}
        events = scene.await_active(after, epochs, BY_LEASE_WITHIN_S)
        for one in chosen:
            start, hostname = began[one["id"]], hosts[one["worker_id"]]["hostname"]
            down = _at(events, "worker.became_down", worker_id=one["worker_id"])
            active = _at(events, "rental.activated", rental_id=one["id"])
            steps = {"docker network disconnect -> down by its lease": down - start, "down -> active": active - down}
            steps["from the freeze of the old copy to the verdict"] = down - _frozen_at(hostname, start)
            case.add(active - start, steps)
            run(["docker", "network", "connect", scene.stack.network, hostname], 30)
        scene.await_ready()
        for rental, checksum in rentals:
            scene.check(rental["id"], checksum)
    for rental, _ in rentals:
        scene.release(rental["id"])
    return case


def _frozen_at(hostname: str, since: float) -> float:
    """When its agent said that it had no right to run any more."""
    said = run(["docker", "logs", "--timestamps", "--since", str(int(since)), hostname], 30)
    return next(_unix(line.split()[0]) for line in said.splitlines() if "no right to run" in line)


def _restarts(scene: Scene, runs: int) -> dict[str, Case]:
    """Proxy and manager are restarted in turn with 50 rentals; afterwards nothing has moved and nobody was down."""
    rentals = [scene.renter.rent(scene.door).body["id"] for _ in range(RESTARTED)]
    before, after = [scene.rental(one) for one in rentals], scene.last_event()
    cases = {"manager_proxy": Case(), "manager_app": Case()}
    for _ in range(runs):
        for service, case in cases.items():
            began = time.time()
            run(["docker", "restart", scene.stack.container(service)], 60)
            commanded = time.time()
            wait_until("it answers, and all are ready", lambda: _all_ready(scene), BACK_WITHIN_S)
            steps = {"(the command docker restart)": commanded - began}
            case.add(time.time() - began, steps | {"the command -> all are ready": time.time() - commanded})
    time.sleep(2 * Clocks().scaled(TENTH).takeover_after_s)  # a false verdict would come by then
    scene.await_no_brake()
    kinds = [event["kind"] for event in scene.events(after)]
    scene.moved = sum(kinds.count(kind) for kind in ("worker.became_down", "placement.lost"))
    scene.moved += sum(
        (one["worker_id"], one["epoch"]) != (now["worker_id"], now["epoch"])
        for one, now in zip(before, (scene.rental(rental) for rental in rentals), strict=True)
    )
    return cases


def _all_ready(scene: Scene) -> bool:
    try:
        return len(scene.stack.ready_workers()) == WORKERS
    except (OSError, RuntimeError):
        return False


def _at(events: Sequence[Json], kind: str, **about: str) -> float:
    """When the first event of this kind happened."""
    for event in events:
        if event["kind"] == kind and all(event[name] == value for name, value in about.items()):
            return _unix(event["at"])
    raise RuntimeError(f"there is no {kind} in {json.dumps([event['kind'] for event in events])}")


def _unix(text: str) -> float:
    """Docker writes nanoseconds, which Python 3.11 does not read."""
    whole, _, fraction = text.rstrip("Z").removesuffix("+00:00").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
