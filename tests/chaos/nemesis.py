"""Inject faults into the platform: planned from a seed as plain data, then done by one thread for each fault.

Faults overlap. Two faults with the same grip on one container wait for each other, because a dead container cannot be
paused. A container may be disconnected while it is killed, paused or restarted, and drained at any time. A new kind is
one more line in KINDS. Some kinds ask the platform instead of Docker, and repeat that until it answers.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from stack import WORKERS, Container, Stack
from support.containers import pause
from waiting import TooLate, eventually

from chaos.checker import PAUSE
from chaos.history import InjectedFault
from chaos.tenants import NOT_NOW
from orion.client.sdk import Orion
from orion.errors import Conflict, NotFound
from orion.wire import RentalState, WorkerIntent

GAP_S = 2.5
"""Seconds between the beginnings of two faults, on average."""
FIRST_ACT_S = 1.0
WORKER, PROXY, MANAGER, KEEPER = "worker", "manager_proxy", "manager_app", "keeper"

ASKED_EVERY_S = 0.5
ANSWERED_WITHIN_S = 90.0
GOODBYE_WITHIN_S = 15
"""Seconds of a worker's grace: a quarter of that in docker-compose.yml, and several times what it needs. If manager or
proxy are away, the worker is killed while it parks its rentals."""
EMPTY_WITHIN_S = 30
"""Seconds after which a worker that is being replaced is stopped, even if it still has rentals."""
LIFE, NETWORK, INTENT, DISK, POOL = "life", "network", "intent", "disk", "pool"

Undo = Callable[[], Container | None]
"""A function that undoes a fault, and returns the container that has replaced the faulty one, if any."""
Do = Callable[[Stack, Container], Undo | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    `weight`: its frequency. `lasts_s`: its shortest and longest duration in seconds. `grips`: what it locks meanwhile.
    """

    services: tuple[str, ...]
    weight: int
    lasts_s: tuple[float, float]
    do: Do
    grips: tuple[str, ...] = (LIFE,)


@dataclass(frozen=True)
class PlannedFault:
    at_s: float
    kind: str
    service: str
    number: int
    lasts_s: float

    def __str__(self) -> str:
        lasting = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.at_s:6.1f} s: {self.kind} of {self.service} {self.number}{lasting}"


def plan(seed: int, seconds: float) -> list[PlannedFault]:
    """Return the faults of a round. Kinds come from a shuffled deck, so that short rounds have all frequent ones."""
    chance = Random(seed)
    acts: list[PlannedFault] = []
    at_s, deck = FIRST_ACT_S, _deck(chance)
    while at_s < seconds:
        name, service = next(deck)
        number = chance.randint(1, WORKERS) if service == WORKER else 1
        lasts_s = min(chance.uniform(*KINDS[name].lasts_s), seconds - at_s)
        acts.append(PlannedFault(round(at_s, 2), name, service, number, round(lasts_s, 2)))
        at_s += chance.expovariate(1 / GAP_S)
    return acts


def _deck(chance: Random) -> Iterator[tuple[str, str]]:
    while True:
        cards = [(name, kind, share) for name, kind in KINDS.items() for share in range(kind.weight)]
        chance.shuffle(cards)
        yield from ((name, chance.choice(kind.services)) for name, kind, _ in cards)


class Nemesis:
    def __init__(self, stack: Stack, now: Callable[[], float], tell: Callable[[str], None]) -> None:
        self._stack = stack
        self._now = now
        self._tell = tell
        self._containers = {(one.service, one.number): one for one in stack.containers()}
        """The containers by service and first number. A replacement keeps the key, though its own number differs."""
        self._grips: Mapping[tuple[object, str], threading.Lock] = defaultdict(threading.Lock)
        self.deeds: list[InjectedFault] = []
        self.gone: set[str] = set()
        """The hostnames of workers that were removed for good."""
        self.faults: list[str] = []
        """The errors of injections, which make the round invalid."""

    def run(self, acts: Iterable[PlannedFault]) -> None:
        """Inject all faults, and return when all are undone."""
        began = time.monotonic()
        threads = [threading.Thread(target=self._act, args=(act, began), daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _act(self, act: PlannedFault, began: float) -> None:
        time.sleep(max(0.0, began + act.at_s - time.monotonic()))
        kind, place = KINDS[act.kind], (act.service, act.number)
        with ExitStack() as held:
            for grip in kind.grips:
                held.enter_context(self._grips[None if grip == POOL else place, grip])
            container = self._containers[place]
            self._tell(f"nemesis: {act}")
            began_at = self._now()
            try:
                undo = kind.do(self._stack, container)
                done_at = undone_from = undone_at = self._now()
                if undo:
                    time.sleep(act.lasts_s)
                    undone_from = self._now()
                    self._replace(place, undo())
                    undone_at = self._now()
            except Exception as error:
                self.faults.append(f"{act}: {error}")
                return
        host = container.hostname if act.service == WORKER else act.service
        self.deeds.append(InjectedFault(act.kind, host, began_at, done_at, undone_from, undone_at))

    def _replace(self, place: tuple[str, int], container: Container | None) -> None:
        if container is not None:
            self.gone.add(self._containers[place].hostname)
            self._containers[place] = container


def _docker(stack: Stack, *arguments: str) -> Undo:
    def do() -> None:
        stack.docker(*arguments)

    return do


def _kill(stack: Stack, container: Container) -> Undo:
    stack.docker("kill", container.id)
    return _docker(stack, "start", container.id)


def _pause(stack: Stack, container: Container) -> Undo:
    pause(container.id)
    return _docker(stack, "unpause", container.id)


def _restart(stack: Stack, container: Container) -> None:
    stack.docker("restart", container.id, timeout_s=120)


def _cut_off(stack: Stack, container: Container) -> Undo:
    stack.docker("network", "disconnect", stack.network, container.id)
    again = ["network", "connect", *_address_of(stack, container), stack.network, container.id]
    return _docker(stack, *again)


def _address_of(stack: Stack, container: Container) -> list[str]:
    """Return Docker's options for the fixed address of a service; a worker gets any free address."""
    addresses = {PROXY: "ORION_PROXY_ADDRESS", MANAGER: "ORION_APP_ADDRESS"}
    if container.service not in addresses:
        return []
    return ["--ip", stack.environment()[addresses[container.service]], "--alias", container.service]


def _kill_within(program: str) -> Do:
    """Return a fault that kills the processes in a container whose command line contains this text."""

    def kill(stack: Stack, container: Container) -> None:
        killed = stack.exec(container.id, "python3", "-c", KILL, program)
        # No process may be found, because it is just being restarted.
        assert killed.returncode in {0, 9}, f"{program}: {killed.stderr}"

    return kill


KILL = """
import os, pathlib, signal, sys
found = []
for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdecimal() and int(entry.name) not in (1, os.getpid()):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\\0", b" ").decode()
        except OSError:
            continue
        if sys.argv[1] in line:
            found.append(int(entry.name))
for pid in found:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
sys.exit(0 if found else 9)
"""


def _fill_the_disk(stack: Stack, keeper: Container) -> Undo:
    filled = stack.exec(keeper.id, "sh", "-c", "cat /dev/zero > /manager/fill")
    assert "No space left" in filled.stderr, f"{filled.returncode}: {filled.stderr}"
    return _docker(stack, "exec", keeper.id, "rm", "/manager/fill")


def _drain(stack: Stack, container: Container) -> Undo | None:
    worker = _answered(stack, lambda orion: orion.drain(orion.find_worker(container.hostname).id))
    if worker is None:
        return None

    def resume() -> None:
        _answered(stack, lambda orion: orion.resume(worker.id))

    return resume


def _migrate(stack: Stack, container: Container) -> None:
    """Migrate the active rentals of a worker, as far as other workers have room."""

    def ask(orion: Orion) -> None:
        here = orion.find_worker(container.hostname).id
        for rental in orion.rentals():
            if rental.worker_id == here and rental.state is RentalState.ACTIVE:
                with suppress(Conflict):  # no worker has room: the rental stays
                    orion.migrate(rental.id, wait_s=0)

    _answered(stack, ask)


def _answered(stack: Stack, ask: Callable[[Orion], T]) -> T | None:
    """Repeat a call until the platform answers, and return the result, or None for an unknown worker or rental."""
    last_moment = time.monotonic() + ANSWERED_WITHIN_S
    while True:
        try:
            with stack.connect() as orion:
                return ask(orion)
        except NotFound:
            return None
        except NOT_NOW:
            if time.monotonic() > last_moment:
                raise
        time.sleep(ASKED_EVERY_S)


def _scale_down(stack: Stack, container: Container) -> Undo:
    """Remove a worker like `up --scale worker=N` with fewer workers: SIGTERM, its grace, and removal.

    To undo it, Compose creates another worker; containers that are dead meanwhile stay dead.
    """
    _stop_for_good(stack, container)
    return lambda: _another(stack)


def _another(stack: Stack) -> Container:
    """Create and start one more worker, without any effect on the others."""
    before = {one.id for one in stack.containers(WORKER)}
    scale = ("--scale", f"{WORKER}={len(before) + 1}", WORKER)
    stack.compose("up", "--no-start", "--no-build", "--no-recreate", "--no-deps", *scale)
    (newcomer,) = (one for one in stack.containers(WORKER) if one.id not in before)
    stack.docker("start", newcomer.id)
    return newcomer


def _replace(stack: Stack, container: Container) -> Undo:
    """Replace a worker like `make up` with other settings: start another one, then empty and remove this one.

    Rentals without a place are parked when the worker stops.
    """
    newcomer = _another(stack)
    worker = _answered(stack, lambda orion: orion.drain(orion.find_worker(container.hostname).id))
    if worker is not None:
        with suppress(TooLate):
            eventually("it is empty", lambda: _is_drained(stack, worker.id), EMPTY_WITHIN_S)
    _stop_for_good(stack, container)
    return lambda: newcomer


def _is_drained(stack: Stack, worker_id: str) -> bool:
    worker = _answered(stack, lambda orion: orion.worker(worker_id))
    return worker is None or worker.intent is WorkerIntent.DRAINED


def _stop_for_good(stack: Stack, container: Container) -> None:
    stack.docker("stop", "--time", str(GOODBYE_WITHIN_S), container.id, timeout_s=GOODBYE_WITHIN_S + 90)
    stack.docker("rm", container.id)


KINDS: dict[str, Kind] = {
    "kill": Kind((WORKER,), 6, (0.2, 8.0), _kill),
    PAUSE: Kind((WORKER,), 5, (0.5, 14.0), _pause),
    "cut": Kind((WORKER,), 5, (0.5, 14.0), _cut_off, (NETWORK,)),
    "restart": Kind((WORKER,), 2, (0.0, 0.0), _restart),
    "drain": Kind((WORKER,), 2, (1.0, 10.0), _drain, (INTENT,)),
    "migrate": Kind((WORKER,), 3, (0.0, 0.0), _migrate, (INTENT,)),
    "scale down": Kind((WORKER,), 2, (0.5, 8.0), _scale_down, (POOL, LIFE, NETWORK)),
    "replacement": Kind((WORKER,), 1, (0.0, 0.0), _replace, (POOL, LIFE, NETWORK, INTENT)),
    "kill of sshd": Kind((WORKER,), 2, (0.0, 0.0), _kill_within("sshd")),
    "kill of manager or proxy": Kind((MANAGER, PROXY), 3, (0.2, 10.0), _kill),
    "pause of manager or proxy": Kind((MANAGER, PROXY), 2, (0.5, 10.0), _pause),
    "cut of manager or proxy": Kind((MANAGER, PROXY), 2, (0.5, 10.0), _cut_off, (NETWORK,)),
    "restart of manager or proxy": Kind((MANAGER, PROXY), 1, (0.0, 0.0), _restart),
    "kill of the engine": Kind((MANAGER,), 2, (0.0, 0.0), _kill_within("orion.manager.ansible.server")),
    "kill of the snapshot service": Kind((MANAGER,), 1, (0.0, 0.0), _kill_within("orion.manager.snapshots.server")),
    "full disk": Kind((KEEPER,), 2, (2.0, 15.0), _fill_the_disk, (DISK,)),
}
