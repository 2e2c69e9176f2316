"""The time from `docker kill`, a cut network or a restart until all rentals are active again, and its parts.

Docker kills, cuts off and restarts the containers; after each run the renter logs in and must find the same files. All
times are of this machine's wall clock, with which the platform's events are written as well. A time begins before the
command is given to Docker, and ends when the rental is active, so that its renter can log in.

All clocks are the default ones, except in the case `restarts`: with the default ones a restarted manager hears no
worker for up to 30 s. There all clocks are at a tenth, so a false verdict has a tenth of the time, and a restart takes
as long as ever. The cases run on one platform, ordered so that none waits for the work of another; the last one changes
it for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

from bench.figures import median, summary
from bench.report import Result
from bench.scene import BACK_WITHIN_S, Case, Json, RentedPlatform, at, each, processor_s, unix
from bench.stack import run, running, wait_until
from orion.manager.domain.clocks import Clocks

WORKERS = 24
CUT_AT_ONCE = 11
"""Workers that lose the network together: half of the pool would set the brake."""
FEW_WORKERS = 6
TENTH = 0.1
MANY = 100
RESTARTED = 50
SLOTS = 100
CHECKED = 5
"""Rentals of the case `many` that are checked by a log-in after each run: each takes seconds."""
BY_LEASE_WITHIN_S = 200.0
SETTINGS = {
    "ORION_SLOTS": str(SLOTS),
    "ORION_FLAP_WINDOW_S": "1",  # with the default a worker that is killed repeatedly is quarantined
}
AT_A_TENTH = {
    "ORION_CLOCK_SCALE": str(TENTH),
    "ORION_SNAPSHOT_INTERVAL_S": "300",  # scaled too: snapshots are taken as often as ever
}
FILES = ("bench/failover.yml",)
HOMES = {"100MB": (100, 100), "500MB": (500, 26_000), "1GB": (1000, 100_000)}
"""The size of each home in megabytes, and its number of files."""
SMALLEST = "100MB"
RUNS_OF_LARGE = 5
MIGRATED_WITHIN_S = 300.0
CASES = ("moved", "killed", "cut", "many", "restarts")
Measure = Callable[[RentedPlatform, int, Result], None]


def measure(runs: int, chosen: Sequence[str] = CASES, homes: Sequence[str] = tuple(HOMES)) -> Result:
    """Measure the chosen cases. `homes`: the names of HOMES that the case `moved` migrates."""
    result = Result("failover", "A worker is lost, or the platform restarts")
    cases: dict[str, Measure] = {
        "moved": partial(_migrated, homes=homes),
        "killed": _killed,
        "cut": _cut_off,
        "many": _many_killed,
    }
    if wanted := [name for name in cases if name in chosen]:
        with _scene(WORKERS, SETTINGS, result) as scene:
            for name in wanted:
                _timed(cases[name], scene, runs, result)
    if "restarts" in chosen:
        with _scene(FEW_WORKERS, SETTINGS | AT_A_TENTH, result) as scene:
            _timed(_restarts, scene, runs, result)
    return result


@contextmanager
def _scene(workers: int, settings: Mapping[str, str], result: Result) -> Iterator[RentedPlatform]:
    began = time.monotonic()
    with running(workers, settings, FILES) as stack:
        result.value(f"until {workers} workers are built, up and ready", "s", time.monotonic() - began)
        yield RentedPlatform(stack, workers)


def _timed(case: Measure, scene: RentedPlatform, runs: int, result: Result) -> None:
    began = time.monotonic()
    case(scene, runs, result)
    result.value("  (the whole case, with the time between the runs)", "s", time.monotonic() - began)


def _migrated(scene: RentedPlatform, runs: int, result: Result, homes: Sequence[str]) -> None:
    """Migrate one rental after the other, repeatedly. Its renter has to wait from the quiesce until it is active."""
    for name in homes:
        _migrate_home(scene, runs if name == SMALLEST else min(runs, RUNS_OF_LARGE), result, HOMES[name])


def _migrate_home(scene: RentedPlatform, runs: int, result: Result, home: tuple[int, int]) -> None:
    rental, case, what = scene.rent(), Case(), f"a planned migration of {home[0]:,} MB in {home[1]:,} files"
    checksum = scene.fill_with(rental, *home)
    scene.await_snapshots([rental["id"]])
    for number in range(runs):
        scene.show_progress(what, number)
        before, after, began = scene.rental(rental["id"]), scene.last_event(), time.time()
        scene.ask("POST", f"/api/rentals/{rental['id']}/migrate?wait_s=50")
        events = scene.await_active(after, {rental["id"]: before["epoch"] + 1}, MIGRATED_WITHIN_S)
        quiesced, cutover, active = (at(events, f"rental.{kind}") for kind in ("held", "moved", "activated"))
        time.sleep(1.1)  # the job log is written once a second
        log = scene.ask("GET", f"/api/rentals/{rental['id']}/log")["items"]
        frozen = next(unix(one["at"]) for one in log if one["action"] == "freeze" and unix(one["at"]) > quiesced)
        steps = {"(request -> quiesce: precopy)": quiesced - began, "quiesce -> frozen": frozen - quiesced}
        steps |= {"frozen -> cutover: final sync": cutover - frozen, "cutover -> active": active - cutover}
        case.add(active - quiesced, steps)
        scene.check(rental["id"], checksum)
    scene.release(rental["id"])
    case.report(result, f"{what}: quiesce to active elsewhere")
    result.at_most(f"{what}: the longest pause", max(case.seconds), 1, " s")


def _killed(scene: RentedPlatform, runs: int, result: Result) -> None:
    """Kill the worker of one rental with 10 MB, then start it again and wait until it is clean."""
    rental, case = scene.rent(), Case()
    checksum = scene.fill(rental, 100_000)
    scene.await_snapshots([rental["id"]])
    for number in range(runs):
        scene.show_progress("killed", number)
        rental = scene.rental(rental["id"])
        hostname, after = scene.workers()[rental["worker_id"]]["hostname"], scene.last_event()
        began = time.time()
        run(["docker", "kill", hostname], 30)
        commanded = time.time()
        events = scene.await_active(after, {rental["id"]: rental["epoch"] + 1})
        marks = [("docker kill", began), ("the liveness connection ends", at(events, "worker.became_suspect"))]
        marks += [("the worker is proved dead", at(events, "worker.became_down"))]
        marks += [("a placement is made", at(events, "placement.preparing"))]
        time.sleep(1.1)  # the job log is written once a second
        marks += _jobs(scene, rental["id"], rental["epoch"] + 1)
        marks += [("active", at(events, "rental.activated"))]
        steps = {f"{name} -> {to}": end - start for (name, start), (to, end) in pairwise(marks)}
        case.add(marks[-1][1] - began, steps | {"(the command docker kill)": commanded - began})
        scene.check(rental["id"], checksum)
        run(["docker", "start", hostname], 30)
        scene.await_ready()
    scene.release(rental["id"])
    case.report(result, "docker kill to active again elsewhere, 10 MB")
    result.at_most("killed, 10 MB: p50", median(case.seconds), 2, " s")
    result.at_most("killed, 10 MB: p99", summary(case.seconds).p99, 3, " s")


def _jobs(scene: RentedPlatform, rental_id: str, epoch: int) -> list[tuple[str, float]]:
    """Return when the account was made, when its files were restored, and when it was activated, by the job log."""
    log = scene.ask("GET", f"/api/rentals/{rental_id}/log")["items"]
    marks = []
    for entry in sorted((one for one in log if one["epoch"] == epoch and one["ok"]), key=lambda one: str(one["at"])):
        ended = unix(entry["at"])
        if entry["action"] == "prepare_user":
            marks.append(("the account is made", ended))
        elif entry["action"] == "create_user":
            marks += [("the files are restored", ended - entry["seconds"]), ("the account is activated", ended)]
    return marks


def _many_killed(scene: RentedPlatform, runs: int, result: Result) -> None:
    """Kill a worker with 100 rentals of 100 files; all others but one are drained, so that one takes all of them.

    A killed worker stays dead, and the next run kills the worker that took its rentals: so no run waits until a worker
    is clean again.
    """
    ids, case = list(scene.workers()), Case()
    for one in ids[1:]:
        scene.ask("POST", f"/api/workers/{one}/drain")
    rentals = each(lambda _: scene.rent(), range(MANY))
    scene.fill_all(scene.workers()[ids[0]]["hostname"], 1000)
    scene.await_snapshots([one["id"] for one in rentals])
    checksums = {one["id"]: scene.checksum(one["id"]) for one in rentals[:: MANY // CHECKED]}
    for number, killed in enumerate(ids[: min(runs, len(ids) - 1)]):
        target = ids[number + 1]
        scene.ask("POST", f"/api/workers/{target}/resume")
        scene.show_progress("many", number)
        _kill_one_with_many(scene, [one["id"] for one in rentals], killed, target, case)
        each(lambda one: scene.check(*one), checksums.items())
    case.report(result, f"docker kill to all {MANY} active elsewhere")
    result.at_most(f"killed with {MANY} rentals: the slowest", max(case.seconds), 15, " s")


def _kill_one_with_many(scene: RentedPlatform, rental_ids: Sequence[str], killed: str, target: str, case: Case) -> None:
    hosts, after = scene.workers(), scene.last_event()
    manager, other = scene.stack.container("manager_app"), hosts[target]["hostname"]
    counted = {"the manager": manager, "the worker that takes the rentals": other}
    epochs = {one: scene.rental(one)["epoch"] + 1 for one in rental_ids}
    before = {name: processor_s(container) for name, container in counted.items()}
    began = time.time()
    run(["docker", "kill", hosts[killed]["hostname"]], 30)
    events = scene.await_active(after, epochs)
    for name, container in counted.items():
        case.steps[f"(processor time of {name})"].append(processor_s(container) - before[name])
    active = sorted(unix(e["at"]) - began for e in events if e["kind"] == "rental.activated")
    down, prepared = at(events, "worker.became_down"), at(events, "placement.preparing")
    steps = {
        "docker kill -> the worker is proved dead": down - began,
        "the worker is proved dead -> first placements": prepared - down,
    }
    steps |= {"first placements -> first active": began + active[0] - prepared}
    case.add(active[-1], steps | {"first active -> last active": active[-1] - active[0]})
    case.steps["each of the rentals"] += active


def _restarts(scene: RentedPlatform, runs: int, result: Result) -> None:
    """Restart proxy and manager in turn under 50 rentals. No rental may migrate and no worker be declared down."""
    rentals = [rental["id"] for rental in each(lambda _: scene.rent(), range(RESTARTED))]
    before, after = [scene.rental(one) for one in rentals], scene.last_event()
    cases = {"manager_proxy": Case(), "manager_app": Case()}
    for number in range(runs):
        scene.show_progress("restarts", number)
        for service, case in cases.items():
            began = time.time()
            run(["docker", "restart", scene.stack.container(service)], 60)
            commanded = time.time()
            wait_until("the manager answers, and all workers are ready", lambda: _all_ready(scene), BACK_WITHIN_S)
            steps = {"(the command docker restart)": commanded - began}
            case.add(time.time() - began, steps | {"the command -> all are ready": time.time() - commanded})
    time.sleep(2 * Clocks().scaled(TENTH).takeover_after_s)  # a false verdict would have come by then
    scene.await_no_brake()
    kinds = [event["kind"] for event in scene.events(after)]
    faults = sum(kinds.count(kind) for kind in ("worker.became_down", "placement.lost"))
    faults += sum(
        (one["worker_id"], one["epoch"]) != (now["worker_id"], now["epoch"])
        for one, now in zip(before, (scene.rental(rental) for rental in rentals), strict=True)
    )
    each(scene.release, rentals)
    for service, case in cases.items():
        case.report(result, f"docker restart of {service} to all {scene.number} workers ready")
    result.at_most(f"restarts with {RESTARTED} rentals: migrations and false downs", faults, 0)


def _all_ready(scene: RentedPlatform) -> bool:
    try:
        return len(scene.stack.ready_workers()) == scene.number
    except (OSError, RuntimeError):
        return False


def _cut_off(scene: RentedPlatform, runs: int, result: Result) -> None:
    """Cut off CUT_AT_ONCE workers, each with a rental, which must be frozen before it is anywhere else."""
    case = Case()
    rentals = [scene.rent() for _ in range(WORKERS)]  # one on each: the scheduler takes the emptiest worker
    checksums = dict(each(lambda one: (one["id"], scene.fill(one, 1000)), rentals))
    scene.await_snapshots(list(checksums))
    while len(case.seconds) < runs:
        scene.show_progress("cut", len(case.seconds))
        scene.await_no_brake()
        victims = {one["worker_id"]: one for one in map(scene.rental, checksums)}
        _cut(scene, [victims[worker] for worker in sorted(victims)][:CUT_AT_ONCE], case)
        each(lambda one: scene.check(*one), checksums.items())
    each(scene.release, checksums)
    case.report(result, "docker network disconnect to active elsewhere")
    result.at_most("cut off: the slowest", max(case.seconds), Clocks().takeover_after_s + 5, " s")
    margins = case.steps["from the freeze on the old worker to the verdict"]
    result.at_least("cut off: the shortest time from freeze to verdict", min(margins), 0, " s")


def _cut(scene: RentedPlatform, chosen: Sequence[Json], case: Case) -> None:
    """Cut off the workers of these rentals, and wait until all are active elsewhere and the workers are ready again."""
    after, hosts = scene.last_event(), scene.workers()
    began: dict[str, float] = {}
    for one in chosen:
        began[one["id"]] = time.time()
        run(["docker", "network", "disconnect", scene.stack.network, hosts[one["worker_id"]]["hostname"]], 30)
    events = scene.await_active(after, {one["id"]: one["epoch"] + 1 for one in chosen}, BY_LEASE_WITHIN_S)
    for one in chosen:
        start, hostname = began[one["id"]], hosts[one["worker_id"]]["hostname"]
        down = at(events, "worker.became_down", worker_id=one["worker_id"])
        active = at(events, "rental.activated", rental_id=one["id"])
        steps = {"docker network disconnect -> down by its lease": down - start, "down -> active": active - down}
        steps["from the freeze on the old worker to the verdict"] = down - _frozen_at(hostname, start)
        case.add(active - start, steps)
        run(["docker", "network", "connect", scene.stack.network, hostname], 30)
    scene.await_ready()


def _frozen_at(hostname: str, since: float) -> float:
    """Return when the log of its agent says that it has no right to run (worker/orion_worker/agent/fence.py)."""
    log = run(["docker", "logs", "--timestamps", "--since", str(int(since)), hostname], 30)
    return next(unix(line.split()[0]) for line in log.splitlines() if "no right to run" in line)
