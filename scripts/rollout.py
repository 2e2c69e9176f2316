"""How `make up` changes a platform that stands already, so that nobody who rents loses anything.

    rollout.py ask      start what stands there, say what would change, ask
    rollout.py go       do it

New workers first; then the old ones take nothing new, what runs on them goes to others by planned moves, and each is
removed when it is empty, by the word of the manager and of the engine. Interrupted at any point, the same command goes
on where it was. scripts/up.sh calls this; everything is read from the environment that it prepared.
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

from rollout_engine import Failed, compose, docker, is_empty, is_left_over, look
from rollout_plan import WORKER, Container, Plan, Pool, must_ask, number_wanted, plan, shown, stranded, told

from orion.cli.output import plain
from orion.client import ENDED, Orion
from orion.errors import Conflict, NotFound, OrionError
from orion.wire import Rental, RentalState, Worker, WorkerHealth, WorkerIntent

HERE = Path(__file__).resolve().parent
TOKEN_FILE = "/var/lib/orion/secrets/admin_token"  # noqa: S105 - where it is, not what it is
READY_WITHIN_S = float(os.environ.get("ORION_READY_WITHIN_S") or 150)
STALLED_AFTER_S = 900.0
"""Without any progress for so long, the command ends; what is under way goes on by itself."""
STOP_WITHIN_S = 660
"""More than stop_grace_period of docker-compose.yml: what finds no place is parked meanwhile."""
CONTAINER_NAME = re.compile(r"[0-9a-f]{12}")
"""The hostname that Docker gives a container: the beginning of its id."""
TOO_MANY_RESTARTS = 4
LOOK_EVERY_S = 1.0
TAKES = frozenset({WorkerHealth.READY, WorkerHealth.QUARANTINED})
NO_PLACE = "no worker can take one"
"""As api/workers.py says it of a drain."""
IN_PLACE = 0
NOT_READY = 3


class NotReady(Failed):
    """The platform did not come up: up.sh shows the last words of its services."""


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - it is there to tell


class Stage:
    """One line for each stage, as scripts/common.sh writes them; what is noted meanwhile stands on lines of its own."""

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


# What the manager says


def connect(afterwards: ExitStack) -> Orion:
    """Return a connection to the API as the admin. Raise Failed while there is none."""
    token = compose("exec", "-T", "manager_app", "cat", TOKEN_FILE).strip()
    published = compose("port", "manager_proxy", "80").strip().splitlines()
    if not published:
        raise Failed("the proxy publishes no port")
    address, _, port = published[0].rpartition(":")
    host = "localhost" if address in {"0.0.0.0", "[::]", "::", ""} else address  # noqa: S104 - what Docker says of any
    return afterwards.enter_context(Orion.at(f"http://{host}:{port}", token))


def wait_for_manager(afterwards: ExitStack, within_s: float) -> Orion:
    """Return a connection that answers. Raise NotReady when there is none in time."""
    deadline, last = time.monotonic() + within_s, ""
    while time.monotonic() < deadline:
        try:
            orion = connect(afterwards)
            orion.status()
        except (Failed, OrionError) as error:
            last = str(error)
            time.sleep(0.5)
        else:
            return orion
    raise NotReady(f"the manager does not answer after {within_s:.0f} s ({last})")


def living(orion: Orion) -> list[Rental]:
    return [one for one in orion.rentals() if one.state not in ENDED]


def pool_of(orion: Orion) -> Pool:
    workers = {one.id: one for one in orion.workers()}
    rentals: dict[str, list[str]] = {}
    for rental in living(orion):
        holder = workers.get(rental.worker_id or "")
        if holder is not None:
            rentals.setdefault(holder.hostname, []).append(rental.name)
    free = {one.hostname: one.slots_free for one in workers.values() if may_take(one)}
    return Pool(rentals, free)


def may_take(worker: Worker) -> bool:
    return worker.health is WorkerHealth.READY and worker.intent is WorkerIntent.ACTIVE


# Asking


def ask() -> int:
    """Start what stands there, say what would change for those who rent, and ask."""
    containers = look()
    if why := stranded(containers, is_empty, os.environ.get("UP_COMMAND") or "make up"):
        raise Failed(f"nothing was changed: {why}")
    with ExitStack() as afterwards:
        pool = stand_up(containers, afterwards)
    containers = look()
    planned, slots = plan(containers, wanted(containers), pool), int(os.environ.get("ORION_SLOTS") or 1)
    if not must_ask(planned, pool):
        return IN_PLACE
    say("This changes what runs:")
    for line in told(planned, pool, containers, slots):
        say(f"  - {plain(line)}")
    if os.environ.get("CONFIRM") == "yes":
        return IN_PLACE
    again = os.environ.get("UP_COMMAND") or "make up"
    if not sys.stdin.isatty():
        raise Failed(f"nothing was changed, because there is no terminal to ask at; to do it: CONFIRM=yes {again}")
    if not input("Do it? [y/N] ").lower().startswith("y"):
        raise Failed("nothing was changed")
    return IN_PLACE


def stand_up(containers: Sequence[Container], afterwards: ExitStack) -> Pool:
    """Start what stands there and does not run, workers as they are: they may alone hold what was last written."""
    if not containers:
        return Pool({}, {})
    stopped = [one for one in containers if not one.running]
    # What make down has emptied is removed later (go) and need not start for that.
    empty = [one for one in stopped if is_left_over(one)]
    containers = [one for one in containers if one not in empty]
    stopped = [one for one in stopped if one not in empty]
    if any(one.service != WORKER for one in stopped):
        stage = Stage("Starting proxy and manager")
        compose("up", "--detach", "--no-build", "manager_app", "manager_proxy")
        stage.done()
    workers = [one for one in stopped if one.service == WORKER]
    if workers:
        stage = Stage(f"Starting {len(workers)} worker(s) as they were left")
        docker("start", *(one.id for one in workers))
        stage.done()
    try:
        orion = wait_for_manager(afterwards, 60 if stopped else 15)
        declare_the_gone(orion)
        wait_until_heard(orion, [one for one in containers if one.service == WORKER] if stopped else [])
        return pool_of(orion)
    except (NotReady, OrionError):
        return Pool({}, {}, known=False)


def not_in_engine(orion: Orion) -> list[Worker]:
    """Return the workers of which the engine has no container, running or not, of whatever project."""
    ids = docker("ps", "-aq", "--no-trunc").split()
    named = (one for one in orion.workers() if CONTAINER_NAME.fullmatch(one.hostname))
    return [one for one in named if not any(container.startswith(one.hostname) for container in ids)]


def declare_the_gone(orion: Orion) -> None:
    """Hand the engine's word on to the manager: what ran in a container that was removed need not be waited for."""
    for worker in not_in_engine(orion):
        if worker.health is WorkerHealth.DOWN:
            continue
        names = [one.name for one in living(orion) if one.worker_id == worker.id]
        with suppress(Conflict, NotFound):  # it answers, so it is in another engine
            orion.declare_gone(worker.id)
            what = f": {shown(names)} {'goes' if len(names) == 1 else 'go'} on from the last copy" if names else ""
            say(plain(f"The container of worker {worker.id} was removed{what}"))


def forget_the_gone(orion: Orion) -> None:
    """Forget the workers whose container was removed: such a container cannot come back."""
    for worker in not_in_engine(orion):
        if worker.health is WorkerHealth.DOWN:
            with suppress(NotFound, Conflict):
                orion.remove_worker(worker.id)


def wait_until_heard(orion: Orion, workers: Sequence[Container]) -> None:
    """Wait until each of them is ready, as long as that usually takes: what it holds is judged by then."""
    if workers:
        stage = Stage("Waiting until they have shown what they hold")
        names = {one.hostname for one in workers}
        _until(60, lambda: names <= {one.hostname for one in orion.workers() if one.health in TAKES})
        stage.done()


def _until(within_s: float, probe: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with suppress(OrionError):
            if probe():
                return True
        time.sleep(0.5)
    return False


def wanted(containers: Sequence[Container]) -> int:
    return number_wanted(containers, os.environ.get("WORKERS", ""), os.environ.get("ORION_WORKERS", ""))


# Doing it


@dataclass
class Outcome:
    """What became of the rentals and the workers."""

    moved: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Why an old worker is still there, by its hostname."""


def go() -> int:
    containers = look()
    number = wanted(containers)
    left_over = [one for one in containers if is_left_over(one)]
    if left_over:
        docker("rm", *(one.id for one in left_over))
        containers = [one for one in containers if one not in left_over]
    with ExitStack() as afterwards:
        planned = start(containers, number, afterwards)
        if left_over:
            declare_the_gone(wait_for_manager(afterwards, READY_WITHIN_S))
        stage = Stage(f"Waiting until {number} worker(s) are ready")
        orion = wait_for_manager(afterwards, READY_WITHIN_S)
        workers = [one for one in look() if one.service == WORKER]
        retire = [one for one in workers if one.id in {old.id for old in planned.retire}]
        await_ready(orion, [one for one in workers if one not in retire], number)
        stage.done()
        outcome = Emptying(orion, retire).run() if retire else Outcome()
        forget_the_gone(orion)
    report(outcome)
    return 1 if outcome.kept else IN_PLACE


def start(containers: Sequence[Container], number: int, afterwards: ExitStack) -> Plan:
    """Start the services and the new workers; whoever is to go still runs."""
    stage = Stage(f"Starting proxy, manager and {number} worker(s)")
    if not containers:
        compose("up", "--detach", "--no-build", "--scale", f"worker={number}")
        stage.done()
        return plan((), number, Pool({}, {}))
    # docker-compose 1.29 makes anew what stands still while another service changes: so workers are never left to it.
    # Nor is --no-deps used: with it, Compose 2 reckons another hash of the same settings.
    compose("up", "--detach", "--no-build", "manager_app", "manager_proxy")
    workers = [one for one in containers if one.service == WORKER]
    stopped = [one.id for one in workers if not one.running]
    if stopped:
        docker("start", *stopped)
    planned = plan(containers, number, Pool({}, {}))
    if planned.surplus:
        planned = plan(containers, number, pool_of(wait_for_manager(afterwards, READY_WITHIN_S)))
    if planned.create:
        scale = f"worker={len(workers) + planned.create}"
        compose("up", "--detach", "--no-build", "--no-recreate", "--scale", scale, WORKER)
    stage.done()
    return planned


def await_ready(orion: Orion, workers: Sequence[Container], number: int) -> None:
    """Wait until those that stay are ready. Raise NotReady if they are not in time, or restart again and again."""
    names = {one.hostname for one in workers}
    began, ready = time.monotonic(), 0
    while True:
        with suppress(OrionError):
            ready = len(names & {one.hostname for one in orion.workers() if one.health is WorkerHealth.READY})
        waited = time.monotonic() - began
        if ready >= number:
            break
        if waited > READY_WITHIN_S or any(one.restarts >= TOO_MANY_RESTARTS for one in look()):
            raise NotReady(f"{ready} of {number} workers are ready after {waited:.0f} s")
        time.sleep(0.3)


class Emptying:
    """Old workers: they take nothing new, what runs there moves, and each is removed when nothing is on it."""

    def __init__(self, orion: Orion, retire: Sequence[Container]) -> None:
        self._orion = orion
        self._left = {one.hostname: one for one in retire}
        self._outcome = Outcome()
        self._stage = Stage(f"Emptying {len(retire)} old worker(s)")
        self._before: dict[str, Rental] = {}
        self._told = ""
        self._progress_at = time.monotonic()

    def run(self) -> Outcome:
        old = {one.id for one in self._orion.workers() if one.hostname in self._left}
        self._before = {one.id: one for one in living(self._orion) if one.worker_id in old}
        while self._left:
            try:
                self._round()
            except OrionError as error:
                self._tell(f"the manager is away ({error}): waiting for it")
            if time.monotonic() - self._progress_at > STALLED_AFTER_S:
                for hostname in self._left:
                    self._keep(hostname, "what is on it could not be moved yet")
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
            elif worker.intent is WorkerIntent.DRAINED and worker.health in TAKES and is_empty(container):
                empty[hostname] = worker
            elif NO_PLACE in worker.explanation and not moving:
                self._tell(f"nothing can take what is on {worker.id}: it is parked there, files and all")
                self._remove({hostname: worker})
        self._remove(empty)
        names = sorted(one.name for one in on_old)
        what = f"{len(self._left)} to go" + (f"; on them: {shown(names)}" if names else "")
        self._tell(f"{what}; moving now: {shown(moving)}" if moving else what)

    def _rentals_on(self, old: set[str]) -> list[Rental]:
        return [one for one in living(self._orion) if one.worker_id in old]

    def _remove(self, chosen: Mapping[str, Worker | None]) -> None:
        """Stop them; what finds no place is parked meanwhile. Last of all, remove what is empty, and only that."""
        if not chosen:
            return
        ids = [self._left[hostname].id for hostname in chosen]
        docker("stop", "--time", str(STOP_WITHIN_S), *ids, within_s=STOP_WITHIN_S + 60)
        for hostname, worker in chosen.items():
            container = self._left[hostname]
            if not is_empty(container):
                docker("start", container.id)
                self._keep(hostname, "what is on it could not be taken away, and goes on there")
                continue
            docker("rm", container.id)
            del self._left[hostname]
            if worker is not None:
                with suppress(NotFound):
                    self._orion.remove_worker(worker.id)

    def _is_forgotten(self, container: Container) -> bool:
        """Whether the manager does not know a worker there, long after it should have called home, and it is empty."""
        if time.monotonic() - self._progress_at < READY_WITHIN_S:
            return False
        if is_empty(container):
            return True
        self._keep(container.hostname, "the manager does not know it, and a rental's files are in it")
        return False

    def _keep(self, hostname: str, why: str) -> None:
        self._outcome.kept[hostname] = why
        self._left = {name: one for name, one in self._left.items() if name != hostname}

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told, self._progress_at = text, time.monotonic()
            self._stage.note(text)


def report(outcome: Outcome) -> None:
    if outcome.moved:
        say(f"Moved, with every byte: {plain(shown(sorted(outcome.moved)))}")
    if outcome.waiting:
        say(f"Waiting for a place, with all files: {plain(shown(sorted(outcome.waiting)))}; more: WORKERS=N make up")
    for hostname, why in outcome.kept.items():
        say(f"Kept: the old worker {hostname}: {why}. See orion workers; make up again goes on with it")


def main() -> int:
    try:
        return {"ask": ask, "go": go}[sys.argv[1]]()
    except NotReady as error:
        Path(os.environ["ORION_WHY"]).write_text(str(error))
        return NOT_READY
    except (Failed, OrionError) as error:
        print(f"\norion: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\norion: interrupted; what is being moved goes on, and make up goes on with the rest", file=sys.stderr)  # noqa: T201
        return 130


if __name__ == "__main__":
    sys.exit(main())
