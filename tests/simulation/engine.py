"""The simulated engine, reach and liveness connection.

Jobs outlive the manager, are lost, and come late or twice. A liveness connection ends when the worker's kernel says so
and SSH is not cut; then the real rule (Silence) decides what that proves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from orion_worker.records import RequestRefused

from orion.manager.ansible.port import Action, Job, Outcome
from orion.manager.ssh.liveness import ATTEMPT_EVERY_S, CONNECT_TIMEOUT_S, PROBE_AT_MOST_S, SILENCE_S, OnSign, Silence
from orion.manager.ssh.port import End, Host, Reached, Sign
from simulation.agents import FORMER_VERSION

if TYPE_CHECKING:
    from simulation.agents import SimulatedContainer
    from simulation.manager import SimulatedManager
    from simulation.world import Simulation

BROKEN = Outcome(False, "the connection broke")
MARGIN_S = 2.0


@dataclass
class SimulatedEngine:
    """Implements `port.Engine` for one life of the manager."""

    sim: Simulation
    manager: SimulatedManager

    async def run(self, job: Job) -> Outcome:
        await self.manager.point()
        outcome: asyncio.Future[Outcome] = self.sim.loop.create_future()
        self.sim.job_runner.start(job, outcome)
        late = self.sim.loop.call_later(job.deadline_s + MARGIN_S, _settle, outcome, Outcome(False, "timed out"))
        try:
            found = await outcome
        finally:
            late.cancel()
        await self.manager.point()
        return found


class JobRunner:
    """Runs jobs, also when the manager ends meanwhile."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._random = Random(f"engine {sim.schedule.seed}")

    def start(self, job: Job, outcome: asyncio.Future[Outcome]) -> None:
        random, bad = self._random, self._sim.network.bad
        chance = random.random() if bad else 1.0
        void_at = self._sim.wall() + job.deadline_s
        delay_s = 0.05 + 0.4 * random.random()
        if chance < 0.2:
            self._sim.loop.call_later(delay_s * 20, _settle, outcome, BROKEN)
            return
        if chance < 0.4:
            delay_s = random.uniform(0.0, 40.0)
        answered = chance >= 0.6 or chance < 0.4
        self._sim.spawn(self._do(job, delay_s, void_at, outcome, answered))
        if 0.6 <= chance < 0.75:
            again: asyncio.Future[Outcome] = self._sim.loop.create_future()
            self._sim.spawn(self._do(job, random.uniform(0.0, 40.0), void_at, again, answered))

    async def _do(
        self, job: Job, delay_s: float, void_at: float, outcome: asyncio.Future[Outcome], answered: bool
    ) -> None:
        boots_before = {container.name: container.boots for container in self._sim.containers}
        await asyncio.sleep(delay_s)
        found = await self._play(job, void_at, boots_before)
        self._sim.say(
            "engine",
            f"{job.action} {job.order.rental_id} epoch {job.order.epoch} on {job.host.worker_id}: "
            f"{found.message or 'done'}",
        )
        _settle(outcome, found if answered else BROKEN)

    async def _play(self, job: Job, void_at: float, boots_before: Mapping[str, int]) -> Outcome:
        """Run the modules of a playbook one after the other; each checks deadline and worker for itself.

        `boots_before`: how often each container had been started when the order was given. A worker of a former
        version cannot refuse an order for another start, and gets none: the promises do not hold there.
        """
        container = self._sim.reachable(job.host)
        if container is None:
            return BROKEN
        if container.agent_version == FORMER_VERSION and container.boots != boots_before.get(container.name):
            return BROKEN
        await container.until_resumed()
        steps: dict[Action, tuple[Callable[[Job], None], ...]] = {
            Action.PREPARE: (container.create,),
            Action.CREATE: (
                container.create,
                lambda j: container.unlock(j.order.rental_id, j.order.epoch),
                container.start_command,
            ),
            Action.FREEZE: (container.freeze,),
            Action.THAW: (lambda j: container.thaw(j.order.rental_id, j.order.epoch, None, j.order.move),),
            Action.DELETE: (container.begin_purge, container.end_purge),
        }
        try:
            container.check_order(job)
        except RequestRefused as refusal:
            return Outcome(False, str(refusal), {"code": refusal.code})
        boots = container.boots
        for step in steps[job.action]:
            if container.boots != boots or self._sim.reachable(job.host) is not container:
                return BROKEN
            if container.disk_fails:
                return Outcome(False, "no space left")
            if self._sim.wall() > void_at:
                return Outcome(False, "its deadline has passed")
            try:
                step(job)
            except RequestRefused as refusal:
                return Outcome(False, str(refusal), {"code": refusal.code})
            await asyncio.sleep(0.02)
        state = "running" if job.order.rental_id in container.unlocked else "locked"
        state = "frozen" if job.order.rental_id in container.quiesced else state
        record = container.records.get(job.order.rental_id)
        restored = {"restored": record.restored} if record and record.restored else {}
        return Outcome(True, report={"left": [], "state": state, "epoch": job.order.epoch} | restored)


@dataclass
class SimulatedReach:
    """Implements `port.Reach` for one life of the manager."""

    sim: Simulation
    manager: SimulatedManager

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        await self.manager.point()
        container = self.sim.container_at(host.address)
        if container is None or not container.answers_ssh or container.pauses:
            await asyncio.sleep(timeout_s)
            found = Reached.NO
        else:
            found = Reached.YES if container.host_key in host.host_keys else Reached.IMPOSTOR
        await self.manager.point()
        return found


@dataclass
class SimulatedLiveness:
    """Implements `port.Liveness` for one life of the manager."""

    sim: Simulation
    manager: SimulatedManager

    async def hold(self, host: Host, boot_id: str, on_sign: OnSign) -> End:
        await self.manager.point()
        container = self._there(host)
        if container is None or host.host_keys != (container.host_key,) or container.pauses:
            await asyncio.sleep(CONNECT_TIMEOUT_S)
            return End.NOT_HELD
        while container.boot_id == boot_id:
            await self._until_closed(container, on_sign)
            found = await self._probe(host, self.sim.loop.now)
            if isinstance(found, End):
                return found
            container = found
        return End.NOT_HELD

    async def _until_closed(self, container: SimulatedContainer, on_sign: OnSign) -> None:
        connection: asyncio.Future[bool] = self.sim.loop.create_future()
        container.liveness_connections.add(connection)
        on_sign(Sign.HELD)
        try:
            await connection
        finally:
            if self.manager.dead:
                container.manager_process_ended(connection)
            container.liveness_connections.discard(connection)
        await self.manager.point()
        on_sign(Sign.CLOSED)

    async def _probe(self, host: Host, closed_at: float) -> SimulatedContainer | End:
        silence = Silence(closed_at)
        while self.sim.loop.now - closed_at < PROBE_AT_MOST_S:
            silence.begun()
            await asyncio.sleep(ATTEMPT_EVERY_S)
            container = self._there(host)
            if container is not None:
                silence.broken(self.sim.loop.now)
                if container.host_key not in host.host_keys:
                    await asyncio.sleep(max(0.0, closed_at + SILENCE_S - self.sim.loop.now))
                    return End.REPLACED
                if not container.pauses:
                    return container
            if silence.proves(self.sim.loop.now):
                return End.GONE
        return End.NOT_HELD

    def _there(self, host: Host) -> SimulatedContainer | None:
        container = self.sim.container_at(host.address)
        return container if container is not None and container.answers_ssh else None


def _settle(outcome: asyncio.Future[Outcome], found: Outcome) -> None:
    if not outcome.done():
        outcome.set_result(found)
