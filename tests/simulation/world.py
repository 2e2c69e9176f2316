"""One simulation: a platform on virtual time, its faults, and its history."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

from orion_worker.agent.decisions import Answer

from orion.manager.controllers import health, loop, snapshots, wall_clock
from orion.manager.domain.clocks import DRIFT, Clocks
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.domain.states import Health, Intent
from orion.manager.domain.steps import Step
from orion.manager.operations import task_runner
from orion.manager.ssh.port import Host
from orion.manager.store.memory import InvariantBroken, MemoryStateStore
from orion.manager.store.snapshots import MemorySnapshotCatalog
from simulation.agents import SimulatedContainer
from simulation.checker import Checker
from simulation.clock import NothingScheduled, VirtualLoop
from simulation.engine import JobRunner, SimulatedEngine, SimulatedLiveness, SimulatedReach
from simulation.faults import Faults
from simulation.manager import AWAITS_FILES_S, SimulatedManager
from simulation.network import Network
from simulation.schedule import Schedule

Request = Callable[[SimulatedManager], Awaitable[Answer]]
WALL_START = 1_800_000_000.0
CHECK_EVERY_S = 10.0
SETTLED_WITHIN_S = 1500.0
"""Seconds in which a world without faults converges: a whole brake, a doubled lease, deadlines of join and clean-up."""


@dataclass(frozen=True)
class Failure:
    """A broken invariant."""

    invariant: str
    story: str
    at_s: float

    def __str__(self) -> str:
        return f"{self.at_s:.3f}: {self.invariant}: {self.story}"


class CheckedStateStore(MemoryStateStore):
    """The state store in memory; each applied step is checked."""

    def __init__(self, sim: Simulation) -> None:
        super().__init__()
        self._sim = sim

    def _apply_one(self, step: Step) -> bool:
        tables: dict[str, dict[str, Any]] = {
            "worker": self.world.workers,
            "rental": self.world.rentals,
            "placement": self.world.placements,
        }
        before = {(w.kind, w.id): tables[w.kind].get(w.id) for w in step.writes}
        try:
            applied = super()._apply_one(step)
        except InvariantBroken as broken:
            self._sim.fail("the rules of the schema", str(broken))
            raise
        if applied:
            self._sim.checker.committed(step, before)
        return applied


class CheckedCatalog(MemorySnapshotCatalog):
    """The snapshot catalog in memory; each choice of a snapshot is checked."""

    def __init__(self, sim: Simulation) -> None:
        super().__init__(sim.state_store)
        self._sim = sim

    async def newest(self, rental_id: str) -> Snapshot | None:
        found = await super().newest(rental_id)
        self._sim.checker.chosen(rental_id, self.snapshots.get(rental_id, ()), found)
        return found


class Simulation:
    """A platform on virtual time; `record` keeps its history."""

    def __init__(self, schedule: Schedule, record: bool = False) -> None:
        self.schedule = schedule
        self.history: list[tuple[float, str, str]] | None = [] if record else None
        self.failure: Failure | None = None
        self.settled_after_s = 0.0
        self.loop = VirtualLoop()
        self.random = Random(f"platform {schedule.seed}")
        self.clocks = self.next_clocks = Clocks()
        """The clocks of the manager, and those of its next life."""
        self.awaits_files_s = AWAITS_FILES_S
        self.granted_s = 0.0
        """The longest lease in seconds that a manager has written as granted."""
        self.placement_ids: Iterator[str] = (f"p-{number:04d}" for number in count(1))
        self.state_store = CheckedStateStore(self)
        self.catalog = CheckedCatalog(self)
        self.stored: dict[str, dict[SnapshotId, Snapshot]] = {}
        """The snapshots that the service keeps, by rental; `at` is also the content: see agents.py."""
        self.network = Network(self)
        self.job_runner = JobRunner(self)
        self.checker = Checker(self)
        self.containers: list[SimulatedContainer] = []
        self.manager: SimulatedManager | None = None
        self.disk_is_slow = 0
        self.wall_offset = 0.0
        self.waiting_clients = 0
        self._manager_rate = 1.0 + DRIFT * self.random.uniform(-1.0, 1.0)
        self._over: asyncio.Future[None] = self.loop.create_future()
        self.faults = Faults(self)

    def run(self) -> Failure | None:
        """Run the simulation to its end; return the first broken invariant, or None."""
        main = self.loop.create_task(self._play())
        main.add_done_callback(lambda _: self._over.done() or self._over.set_result(None))
        with _quiet(self):
            try:
                self.loop.run_until_complete(self._over)
            except NothingScheduled:
                self.failure = self.failure or Failure(
                    "no stuck state", "no task can run and no timer is left", self.loop.now
                )
            finally:
                self._end()
        if not main.cancelled() and main.exception() and not self.failure:
            raise main.exception() or AssertionError
        return self.failure

    # -- for the other modules -----------------------------------------------------------------------------

    def say(self, actor: str, text: str) -> None:
        if self.history is not None:
            self.history.append((self.loop.now, actor, text))

    def fail(self, invariant: str, story: str) -> None:
        if self.failure is None:
            self.failure = Failure(invariant, story, self.loop.now)
            self.say("CHECK", f"{invariant}: {story}")
        if not self._over.done():
            self._over.set_result(None)

    def monotonic(self) -> float:
        return 1000.0 + self.loop.now * self._manager_rate

    def wall(self) -> float:
        return WALL_START + self.loop.now + self.wall_offset

    def proxy_answers(self) -> bool:
        return not self.network.proxy_away

    def disk_share(self) -> float:
        return 0.0

    def engine_of(self, manager: SimulatedManager) -> SimulatedEngine:
        return SimulatedEngine(self, manager)

    def reach_of(self, manager: SimulatedManager) -> SimulatedReach:
        return SimulatedReach(self, manager)

    def liveness_of(self, manager: SimulatedManager) -> SimulatedLiveness:
        return SimulatedLiveness(self, manager)

    def container_at(self, address: str) -> SimulatedContainer | None:
        return next((c for c in self.containers if c.up and c.address == address), None)

    def reachable(self, host: Host) -> SimulatedContainer | None:
        container = self.container_at(host.address)
        return container if container and container.answers_ssh and container.host_key in host.host_keys else None

    def worker_id_of(self, container: SimulatedContainer) -> str:
        return next((w for w, token in self.state_store.tokens.items() if token == container.token), "")

    def new_container(self, slots: int, address: str | None = None) -> SimulatedContainer:
        number = 1 + len(self.containers)
        container = SimulatedContainer(self, number, address or f"172.20.128.{number}", slots)
        self.containers.append(container)
        return container

    def start_container(self, container: SimulatedContainer) -> None:
        """Start a container, with another address if another container has its address now."""
        holder = self.container_at(container.address)
        if holder is not None and holder is not container:
            container.address = f"172.20.129.{container.number + 50 * container.boots}"
        container.start()

    def start_manager(self) -> None:
        if self.manager is None:
            self.clocks = self.next_clocks
            self.say("manager", f"starts, with a lease of {self.clocks.freeze_after_s:g} s")
            self.checker.forget_ages()
            self.manager = SimulatedManager(self)
            self.manager.start()

    def manager_died(self, manager: SimulatedManager) -> None:
        self.say("manager", "is killed")
        if self.manager is manager:
            self.manager = None
        self.faults.manager_died()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(work)

    def client(self, what: str, handler: Request, done: Any = None) -> None:
        """Run a client that repeats its request until it is answered."""
        self.spawn(self._repeat_until_answered(what, handler, done))

    # -- the course of the simulation ----------------------------------------------------------------------

    async def _play(self) -> None:
        self.start_manager()
        for slots in self.schedule.slots:
            self.start_container(self.new_container(slots))
        ticking = self.spawn(self._tick())
        for fault in self.schedule.faults:
            await self._until(fault.at_s)
            self.faults.happen(fault)
        await self._until(self.schedule.length_s)
        self.say("all", "faults stop")
        self.faults.stop()
        quiet_since = self.loop.now
        await self._settle(quiet_since + SETTLED_WITHIN_S)
        self.settled_after_s = self.loop.now - quiet_since
        ticking.cancel()

    async def _settle(self, last_moment: float) -> None:
        while not self._over.done():
            await asyncio.sleep(CHECK_EVERY_S)
            self._operate()
            problem = self.checker.unsettled()
            if not problem:
                return
            if self.loop.now > last_moment:
                self.fail("a world that is left quiet converges", problem)

    def _operate(self) -> None:
        """Resume the workers that are quarantined or drained, as an operator does."""
        for worker in list(self.state_store.world.workers.values()):
            if self.manager and (worker.health is Health.QUARANTINED or worker.intent is not Intent.ACTIVE):
                self.manager.spawn(self.manager.set_intent(worker.id, Intent.ACTIVE))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            self.checker.tick(CHECK_EVERY_S)

    async def _until(self, at_s: float) -> None:
        if at_s > self.loop.now:
            await asyncio.sleep(at_s - self.loop.now)

    async def _repeat_until_answered(
        self, what: str, handler: Callable[[SimulatedManager], Awaitable[Answer]], done: Any
    ) -> None:
        self.waiting_clients += 1
        try:
            while True:
                answer = await self.network.call(None, handler, 20.0)
                self.say("client", f"{what}: {answer}")
                if 200 <= answer.status < 500:
                    break
                await asyncio.sleep(1.0 + 4.0 * self.random.random())
            if done:
                done(answer)
        finally:
            self.waiting_clients -= 1

    def _end(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()


class _FailingLog:
    """Replaces the controllers' log: an exception that they log and survive is a failure here."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim

    def exception(self, what: str, /, **_: Any) -> None:
        self._sim.fail("no round and no task fails by itself", f"{what}: {traceback.format_exc(limit=-4)}")

    def info(self, what: str, /, **about: Any) -> None:
        if self._sim.history is not None and what == "brake":
            self._sim.say("manager", f"brake {'on' if about['on'] else 'off'}: {about['reason']}")

    def warning(self, what: str, /, **_: Any) -> None: ...


@contextmanager
def _quiet(sim: Simulation) -> Iterator[None]:
    modules: list[Any] = [wall_clock, snapshots, health, task_runner, loop]
    logs = [module.log for module in modules]
    for module in modules:
        module.log = _FailingLog(sim)
    try:
        yield
    finally:
        for module, log in zip(modules, logs, strict=True):
            module.log = log
