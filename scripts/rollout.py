"""Change an existing platform for `make up`, without a loss for any rental.

    rollout.py ask      start the existing containers, print what would change, and ask
    rollout.py apply    make the change

New workers start first. Then the old ones are drained, their rentals are migrated to other workers, and each old worker
is removed when both the manager and the engine report it empty. After an interruption at any point the same command
continues. scripts/up.sh runs this program and prepares its environment.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rollout_engine import RolloutError, compose, docker, find_containers, is_emptied_by_down, is_empty
from rollout_plan import (
    WORKER,
    PlatformContainer,
    PoolState,
    RolloutPlan,
    describe,
    incompatible_workers,
    needs_confirmation,
    plan,
    shorten,
    wanted_number,
)

from orion.cli.output import plain
from orion.client.sdk import ENDED, Orion
from orion.errors import Conflict, NotFound, OrionError
from orion.wire import Rental, RentalState, Worker, WorkerHealth, WorkerIntent

HERE = Path(__file__).resolve().parent
TOKEN_FILE = "/var/lib/orion/secrets/admin_token"  # noqa: S105 - the path of the token, not the token
READY_WITHIN_S = float(os.environ.get("ORION_READY_WITHIN_S") or 150)
STALLED_AFTER_S = 900.0
"""Seconds without progress after which the command ends. Migrations in progress continue without it."""
STOP_WITHIN_S = 660
"""Seconds within which a worker parks its rentals and stops: more than stop_grace_period of docker-compose.yml."""
CONTAINER_NAME = re.compile(r"[0-9a-f]{12}")
"""The form of a hostname that Docker gives a container: the beginning of its id."""
TOO_MANY_RESTARTS = 4
LOOK_EVERY_S = 1.0
REACHABLE = frozenset({WorkerHealth.READY, WorkerHealth.QUARANTINED})
NO_PLACE = "no worker can take one"
"""The words of api/workers.py in the explanation of a drain that has no target worker."""
SUCCEEDED = 0
NOT_READY = 3


class NotReady(RolloutError):
    """The platform did not become ready. up.sh shows the last log lines of its services."""


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the command prints its progress


class ProgressLine:
    """Prints one line for a stage, like scripts/common.sh, and notes meanwhile on lines of their own."""

    def __init__(self, what: str) -> None:
        self._began = time.monotonic()
        self._open = True
        print(f"{what:<58}", end="", flush=True)  # noqa: T201

    def note(self, text: str) -> None:
        if self._open:
            say("")
        self._open = False
        say(f"  {plain(text)}")

    def done(self) -> None:
        say(f"{'' if self._open else f'{chr(32) * 58}'}{time.monotonic() - self._began:4.0f} s")


# The manager's view


def connect(afterwards: ExitStack) -> Orion:
    """Return a connection to the API as the admin. Raise RolloutError while there is none."""
    token = compose("exec", "-T", "manager_app", "cat", TOKEN_FILE).strip()
    published = compose("port", "manager_proxy", "80").strip().splitlines()
    if not published:
        raise RolloutError("the proxy publishes no port")
    address, _, port = published[0].rpartition(":")
    host = "localhost" if address in {"0.0.0.0", "[::]", "::", ""} else address  # noqa: S104 - Docker's word for any
    return afterwards.enter_context(Orion.at(f"http://{host}:{port}", token))


def wait_for_manager(afterwards: ExitStack, within_s: float) -> Orion:
    """Return a connection to the API as soon as the manager answers. Raise NotReady if it does not answer in time."""
    deadline, last = time.monotonic() + within_s, ""
    while time.monotonic() < deadline:
        try:
            orion = connect(afterwards)
            orion.status()
        except (RolloutError, OrionError) as error:
            last = str(error)
            time.sleep(0.5)
        else:
            return orion
    raise NotReady(f"the manager did not answer within {within_s:.0f} s ({last})")


def live_rentals(orion: Orion) -> list[Rental]:
    return [one for one in orion.rentals() if one.state not in ENDED]


def read_pool(orion: Orion) -> PoolState:
    workers = {one.id: one for one in orion.workers()}
    rentals: dict[str, list[str]] = {}
    for rental in live_rentals(orion):
        holder = workers.get(rental.worker_id or "")
        if holder is not None:
            rentals.setdefault(holder.hostname, []).append(rental.name)
    free = {one.hostname: one.slots_free for one in workers.values() if accepts_rentals(one)}
    return PoolState(rentals, free)


def accepts_rentals(worker: Worker) -> bool:
    return worker.health is WorkerHealth.READY and worker.intent is WorkerIntent.ACTIVE


# Asking


def ask() -> int:
    """Start the existing containers, print what would change for rentals, and ask."""
    containers = find_containers()
    if why := incompatible_workers(containers, is_empty, os.environ.get("UP_COMMAND") or "make up"):
        raise RolloutError(f"nothing was changed: {why}")
    with ExitStack() as afterwards:
        pool = start_existing(containers, afterwards)
    containers = find_containers()
    planned, slots = plan(containers, wanted(containers), pool), int(os.environ.get("ORION_SLOTS") or 1)
    if not needs_confirmation(planned, pool):
        return SUCCEEDED
    say("These changes affect rentals:")
    for line in describe(planned, pool, containers, slots):
        say(f"  - {plain(line)}")
    if os.environ.get("CONFIRM") == "yes":
        return SUCCEEDED
    again = os.environ.get("UP_COMMAND") or "make up"
    if not sys.stdin.isatty():
        raise RolloutError(f"nothing was changed, because there is no terminal to ask at; run: CONFIRM=yes {again}")
    if not input("Continue? [y/N] ").lower().startswith("y"):
        raise RolloutError("nothing was changed")
    return SUCCEEDED


def start_existing(containers: Sequence[PlatformContainer], afterwards: ExitStack) -> PoolState:
    """Start the stopped containers, and return the manager's view of the workers.

    Workers start unchanged, because a worker may have the only copy of the files that were last written on it.
    """
    if not containers:
        return PoolState({}, {})
    stopped = [one for one in containers if not one.running]
    # Workers that make down has emptied are removed later (apply) and need not start for that.
    empty = [one for one in stopped if is_emptied_by_down(one)]
    containers = [one for one in containers if one not in empty]
    stopped = [one for one in stopped if one not in empty]
    if any(one.service != WORKER for one in stopped):
        stage = ProgressLine("Starting proxy and manager")
        compose("up", "--detach", "--no-build", "manager_app", "manager_proxy")
        stage.done()
    workers = [one for one in stopped if one.service == WORKER]
    if workers:
        stage = ProgressLine(f"Starting {len(workers)} stopped worker(s) unchanged")
        docker("start", *(one.id for one in workers))
        stage.done()
    try:
        orion = wait_for_manager(afterwards, 60 if stopped else 15)
        declare_removed_workers_gone(orion)
        wait_until_reported(orion, [one for one in containers if one.service == WORKER] if stopped else [])
        return read_pool(orion)
    except (NotReady, OrionError):
        return PoolState({}, {}, known=False)


def workers_without_container(orion: Orion) -> list[Worker]:
    """Return the workers for which the engine has no container, running or not, in any project."""
    ids = docker("ps", "-aq", "--no-trunc").split()
    named = (one for one in orion.workers() if CONTAINER_NAME.fullmatch(one.hostname))
    return [one for one in named if not any(container.startswith(one.hostname) for container in ids)]


def declare_removed_workers_gone(orion: Orion) -> None:
    """Declare the workers gone whose container was removed, so that their rentals are taken over at once."""
    for worker in workers_without_container(orion):
        if worker.health is WorkerHealth.DOWN:
            continue
        names = [one.name for one in live_rentals(orion) if one.worker_id == worker.id]
        with suppress(Conflict, NotFound):  # a worker that answers runs in another engine
            orion.declare_gone(worker.id)
            what = f"; from their last snapshots continue: {shorten(names)}" if names else ""
            say(plain(f"The container of worker {worker.id} was removed{what}"))


def remove_gone_workers(orion: Orion) -> None:
    """Remove the workers from the manager whose container was removed: such a worker cannot come back."""
    for worker in workers_without_container(orion):
        if worker.health is WorkerHealth.DOWN:
            with suppress(NotFound, Conflict):
                orion.remove_worker(worker.id)


def wait_until_reported(orion: Orion, workers: Sequence[PlatformContainer]) -> None:
    """Wait up to 60 s until each of these workers is ready: by then the manager has compared its rentals."""
    if workers:
        stage = ProgressLine("Waiting until the workers have reported their rentals")
        names = {one.hostname for one in workers}
        _until(60, lambda: names <= {one.hostname for one in orion.workers() if one.health in REACHABLE})
        stage.done()


def _until(within_s: float, probe: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with suppress(OrionError):
            if probe():
                return True
        time.sleep(0.5)
    return False


def wanted(containers: Sequence[PlatformContainer]) -> int:
    return wanted_number(containers, os.environ.get("WORKERS", ""), os.environ.get("ORION_WORKERS", ""))


# Applying


@dataclass
class RolloutResult:
    """The effects of a rollout on rentals and workers."""

    moved: list[str] = field(default_factory=list)
    """The names of the rentals that run on another worker now."""
    waiting: list[str] = field(default_factory=list)
    """The names of the rentals that are parked."""
    kept: dict[str, str] = field(default_factory=dict)
    """The reasons why old workers still exist, by hostname."""


def apply() -> int:
    """Make the change. Return 1 if an old worker could not be removed."""
    containers = find_containers()
    number = wanted(containers)
    emptied = [one for one in containers if is_emptied_by_down(one)]
    if emptied:
        docker("rm", *(one.id for one in emptied))
        containers = [one for one in containers if one not in emptied]
    with ExitStack() as afterwards:
        planned = start(containers, number, afterwards)
        if emptied:
            declare_removed_workers_gone(wait_for_manager(afterwards, READY_WITHIN_S))
        stage = ProgressLine(f"Waiting until {number} worker(s) are ready")
        orion = wait_for_manager(afterwards, READY_WITHIN_S)
        workers = [one for one in find_containers() if one.service == WORKER]
        retire = [one for one in workers if one.id in {old.id for old in planned.retire}]
        await_ready(orion, [one for one in workers if one not in retire], number)
        stage.done()
        outcome = WorkerRetirement(orion, retire).run() if retire else RolloutResult()
        remove_gone_workers(orion)
    report(outcome)
    return 1 if outcome.kept else SUCCEEDED


def start(containers: Sequence[PlatformContainer], number: int, afterwards: ExitStack) -> RolloutPlan:
    """Start the services and the new workers, and return the plan. The old workers still run."""
    stage = ProgressLine(f"Starting proxy, manager and {number} worker(s)")
    if not containers:
        compose("up", "--detach", "--no-build", "--scale", f"worker={number}")
        stage.done()
        return plan((), number, PoolState({}, {}))
    # docker-compose 1.29 recreates stopped containers when another service changes, so it never starts workers here.
    # --no-deps is not used, because Compose 2 computes another hash of the same settings with it.
    compose("up", "--detach", "--no-build", "manager_app", "manager_proxy")
    workers = [one for one in containers if one.service == WORKER]
    stopped = [one.id for one in workers if not one.running]
    if stopped:
        docker("start", *stopped)
    planned = plan(containers, number, PoolState({}, {}))
    if planned.surplus:
        planned = plan(containers, number, read_pool(wait_for_manager(afterwards, READY_WITHIN_S)))
    if planned.create:
        scale = f"worker={len(workers) + planned.create}"
        compose("up", "--detach", "--no-build", "--no-recreate", "--scale", scale, WORKER)
    stage.done()
    return planned


def await_ready(orion: Orion, workers: Sequence[PlatformContainer], number: int) -> None:
    """Wait until `number` of these workers are ready. Raise NotReady after a timeout or too many restarts."""
    names = {one.hostname for one in workers}
    began, ready = time.monotonic(), 0
    while True:
        with suppress(OrionError):
            ready = len(names & {one.hostname for one in orion.workers() if one.health is WorkerHealth.READY})
        waited = time.monotonic() - began
        if ready >= number:
            break
        if waited > READY_WITHIN_S or any(one.restarts >= TOO_MANY_RESTARTS for one in find_containers()):
            raise NotReady(f"{ready} of {number} workers are ready after {waited:.0f} s")
        time.sleep(0.3)


class WorkerRetirement:
    """Drains old workers, waits until their rentals have migrated, and removes each worker when it is empty."""

    def __init__(self, orion: Orion, retire: Sequence[PlatformContainer]) -> None:
        self._orion = orion
        self._left = {one.hostname: one for one in retire}
        self._outcome = RolloutResult()
        self._stage = ProgressLine(f"Emptying {len(retire)} old worker(s)")
        self._before: dict[str, Rental] = {}
        self._last_note = ""
        self._progress_at = time.monotonic()

    def run(self) -> RolloutResult:
        old = {one.id for one in self._orion.workers() if one.hostname in self._left}
        self._before = {one.id: one for one in live_rentals(self._orion) if one.worker_id in old}
        while self._left:
            try:
                self._round()
            except OrionError as error:
                self._note(f"the manager does not answer ({error}): waiting for it")
            if time.monotonic() - self._progress_at > STALLED_AFTER_S:
                for hostname in self._left:
                    self._keep(hostname, "its rentals could not be migrated yet")
                break
            time.sleep(LOOK_EVERY_S)
        self._stage.done()
        after = {one.id: one for one in self._orion.rentals() if one.id in self._before}
        for rental in after.values():
            moved = rental.state is RentalState.ACTIVE and rental.worker_id != self._before[rental.id].worker_id
            if moved:
                self._outcome.moved.append(rental.name)
            elif rental.state is RentalState.QUEUED:
                self._outcome.waiting.append(rental.name)
        return self._outcome

    def _round(self) -> None:
        workers = {one.hostname: one for one in self._orion.workers()}
        on_old = self._rentals_on({one.id for name, one in workers.items() if name in self._left})
        moving = sorted(one.name for one in on_old if one.moving_to)
        known = [workers[name] for name in self._left if name in workers]
        active = [worker.id for worker in known if worker.intent is WorkerIntent.ACTIVE]
        if active:
            self._orion.drain_together(active)
        empty: dict[str, Worker | None] = {}
        for hostname, container in list(self._left.items()):
            worker = workers.get(hostname)
            if worker is None and self._is_forgotten(container):
                empty[hostname] = None
            elif worker is None:
                continue
            elif worker.intent is WorkerIntent.DRAINED and worker.health in REACHABLE and is_empty(container):
                empty[hostname] = worker
            elif NO_PLACE in worker.explanation and not moving:
                self._note(f"no worker has room for the rentals of {worker.id}: parking them, with all files")
                self._remove({hostname: worker})
        self._remove(empty)
        names = sorted(one.name for one in on_old)
        what = f"{len(self._left)} left" + (f"; rentals on them: {shorten(names)}" if names else "")
        self._note(f"{what}; migrating now: {shorten(moving)}" if moving else what)

    def _rentals_on(self, old: set[str]) -> list[Rental]:
        return [one for one in live_rentals(self._orion) if one.worker_id in old]

    def _remove(self, chosen: Mapping[str, Worker | None]) -> None:
        """Stop these workers, which parks the rentals still on them, then remove the empty ones, and only those."""
        if not chosen:
            return
        ids = [self._left[hostname].id for hostname in chosen]
        docker("stop", "--time", str(STOP_WITHIN_S), *ids, within_s=STOP_WITHIN_S + 60)
        for hostname, worker in chosen.items():
            container = self._left[hostname]
            if not is_empty(container):
                docker("start", container.id)
                self._keep(hostname, "its rentals could not be parked, and continue on it")
                continue
            docker("rm", container.id)
            del self._left[hostname]
            if worker is not None:
                with suppress(NotFound):
                    self._orion.remove_worker(worker.id)

    def _is_forgotten(self, container: PlatformContainer) -> bool:
        """Return whether the container is empty and its worker has not registered, long after it should have."""
        if time.monotonic() - self._progress_at < READY_WITHIN_S:
            return False
        if is_empty(container):
            return True
        self._keep(container.hostname, "the manager does not know it, and it has files of a rental")
        return False

    def _keep(self, hostname: str, why: str) -> None:
        self._outcome.kept[hostname] = why
        self._left = {name: one for name, one in self._left.items() if name != hostname}

    def _note(self, text: str) -> None:
        if text != self._last_note:
            self._last_note, self._progress_at = text, time.monotonic()
            self._stage.note(text)


def report(outcome: RolloutResult) -> None:
    if outcome.moved:
        say(f"Migrated, with all files: {plain(shorten(sorted(outcome.moved)))}")
    if outcome.waiting:
        say(f"Parked, with all files: {plain(shorten(sorted(outcome.waiting)))}; add workers with WORKERS=N make up")
    for hostname, why in outcome.kept.items():
        say(f"Kept the old worker {hostname}: {why}. See orion workers; make up continues with it")


def main() -> int:
    try:
        return {"ask": ask, "apply": apply}[sys.argv[1]]()
    except NotReady as error:
        Path(os.environ["ORION_WHY"]).write_text(str(error))
        return NOT_READY
    except (RolloutError, OrionError) as error:
        print(f"\norion: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\norion: interrupted; migrations in progress continue, and make up does the rest", file=sys.stderr)  # noqa: T201
        return 130


if __name__ == "__main__":
    sys.exit(main())
