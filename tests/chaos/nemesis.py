"""What is done to the platform: planned from a seed as plain data, then done by one thread for each act.

Acts overlap. Two acts with the same grip on one container wait for each other (nobody can pause what is dead); and a
container may be cut off from the network while it is killed, paused or restarted, and drained whatever else happens to
it. A further kind is one more line in KINDS; a planned act is one that asks the platform instead of Docker, until that
answers.
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
from chaos.history import Deed
from chaos.tenants import NOT_NOW
from orion.client.sdk import Orion
from orion.errors import Conflict, NotFound
from orion.wire import RentalState, WorkerIntent

GAP_S = 2.5
"""Between the beginnings of two acts, on average."""
FIRST_ACT_S = 1.0
WORKER, PROXY, MANAGER, KEEPER = "worker", "manager_proxy", "manager_app", "keeper"

ASKED_EVERY_S = 0.5
ANSWERED_WITHIN_S = 90.0
GOODBYE_WITHIN_S = 15
"""A quarter of what docker-compose.yml gives, and several times what it takes, unless somebody is away whom it needs.
Then it is killed in the middle of its goodbye, and the round goes on."""
EMPTY_WITHIN_S = 30
"""A worker that is replaced is told to stop after so long, whatever is on it."""
LIFE, NETWORK, INTENT, DISK, POOL = "life", "network", "intent", "disk", "pool"

Undo = Callable[[], Container | None]
"""Returns the container that has taken its place, where another one has."""
Do = Callable[[Stack, Container], Undo | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """`weight`: how often in a deck. `lasts_s`: shortest and longest, in seconds. `grips`: what it holds."""

    services: tuple[str, ...]
    weight: int
    lasts_s: tuple[float, float]
    do: Do
    grips: tuple[str, ...] = (LIFE,)


@dataclass(frozen=True)
class Act:
    at_s: float
    kind: str
    service: str
    number: int
    lasts_s: float

    def __str__(self) -> str:
        lasting = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.at_s:6.1f} s: {self.kind} of {self.service} {self.number}{lasting}"


def plan(seed: int, seconds: float) -> list[Act]:
    """Kinds are dealt from a shuffled deck, so that also a short round has some of each that is frequent."""
    chance = Random(seed)
    acts: list[Act] = []
    at_s, deck = FIRST_ACT_S, _deck(chance)
    while at_s < seconds:
        name, service = next(deck)
        number = chance.randint(1, WORKERS) if service == WORKER else 1
        lasts_s = min(chance.uniform(*KINDS[name].lasts_s), seconds - at_s)
        acts.append(Act(round(at_s, 2), name, service, number, round(lasts_s, 2)))
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
        """By the number that each had at first: whoever takes its place has another one."""
        self._grips: Mapping[tuple[object, str], threading.Lock] = defaultdict(threading.Lock)
        self.deeds: list[Deed] = []
        self.gone: set[str] = set()
        """Hostnames of workers that were taken away for good."""
        self.faults: list[str] = []
        """What it could not do: then the round is no test."""

    def run(self, acts: Iterable[Act]) -> None:
        """Returns when all is done and undone."""
        began = time.monotonic()
        threads = [threading.Thread(target=self._act, args=(act, began), daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _act(self, act: Act, began: float) -> None:
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
        self.deeds.append(Deed(act.kind, host, began_at, done_at, undone_from, undone_at))

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
    """As docker-compose.yml gives it; a worker gets any other."""
    addresses = {PROXY: "ORION_PROXY_ADDRESS", MANAGER: "ORION_APP_ADDRESS"}
    if container.service not in addresses:
        return []
    return ["--ip", stack.environment()[addresses[container.service]], "--alias", container.service]


def _kill_within(program: str) -> Do:
    """A process inside, by what its command line holds: SIGKILL, as the kernel's when memory runs out."""

    def kill(stack: Stack, container: Container) -> None:
        killed = stack.exec(container.id, "python3", "-c", KILL, program)
        # It may have been about to be started again by itself.
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
    """Whatever is active there, where the platform knows of a place."""

    def ask(orion: Orion) -> None:
        here = orion.find_worker(container.hostname).id
        for rental in orion.rentals():
            if rental.worker_id == here and rental.state is RentalState.ACTIVE:
                with suppress(Conflict):  # it goes on where it is
                    orion.migrate(rental.id, wait_s=0)

    _answered(stack, ask)


def _answered(stack: Stack, ask: Callable[[Orion], T]) -> T | None:
    """None: what it is about is not known, or not any more."""
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
    """As `up --scale worker=N` does it with fewer, but with any of them: SIGTERM, its grace, and it is gone for good.

    With more again there is another one in its place; Compose makes it, and whoever is dead meanwhile stays so.
    """
    _stop_for_good(stack, container)
    return lambda: _another(stack)


def _another(stack: Stack) -> Container:
    """Make one worker more and start it, whatever the others do."""
    before = {one.id for one in stack.containers(WORKER)}
    scale = ("--scale", f"{WORKER}={len(before) + 1}", WORKER)
    stack.compose("up", "--no-start", "--no-build", "--no-recreate", "--no-deps", *scale)
    (newcomer,) = (one for one in stack.containers(WORKER) if one.id not in before)
    stack.docker("start", newcomer.id)
    return newcomer


def _replace(stack: Stack, container: Container) -> Undo:
    """As `make up` does it with a worker of other settings: another one first, then this one is emptied and goes.

    What finds no place in time is parked by the worker's own goodbye, as there.
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
    "kill of the brain or the door": Kind((MANAGER, PROXY), 3, (0.2, 10.0), _kill),
    "pause of the brain or the door": Kind((MANAGER, PROXY), 2, (0.5, 10.0), _pause),
    "cut of the brain or the door": Kind((MANAGER, PROXY), 2, (0.5, 10.0), _cut_off, (NETWORK,)),
    "restart of the brain or the door": Kind((MANAGER, PROXY), 1, (0.0, 0.0), _restart),
    "kill of the engine": Kind((MANAGER,), 2, (0.0, 0.0), _kill_within("orion.manager.ansible.server")),
    "kill of the vault": Kind((MANAGER,), 1, (0.0, 0.0), _kill_within("orion.manager.snapshots")),
    "full disk": Kind((KEEPER,), 2, (2.0, 15.0), _fill_the_disk, (DISK,)),
}
