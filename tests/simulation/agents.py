"""Workers: containers with the real agent (agent/call_home.py) on a model of their file system.

The model keeps what orion_worker/rental/commands.py keeps, with the same checks of records.py: records with epochs,
tombstones, and whether an account is unlocked. It models the fence: when the agent's own rule (decisions.may_run) has
denied the right to run, by the agent's clock, for as long as freezing may take, no rental runs. The manager's liveness
connections end on both sides or, when SSH is cut, only on the side where the end happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from orion_worker.agent.call_home import Call, HomeCaller, Talk
from orion_worker.agent.decisions import AgentSession, Answer, RentalAction, may_run
from orion_worker.agent.node import AGENT_VERSION
from orion_worker.records import (
    RentalRecord,
    RequestRefused,
    check_boot,
    check_create,
    check_not_newer,
    check_not_retired,
    check_receive,
    check_unlock,
)

from orion.manager.ansible.port import OF_ONE_BOOT, Job
from orion.manager.domain.clocks import DRIFT, Clocks

if TYPE_CHECKING:
    from simulation.world import Simulation

JOIN_TOKEN = "the join token"
FREEZE_BUDGET_LEASES = Clocks().freeze_budget_s / Clocks().freeze_after_s
"""How long freezing may take after the end of a lease, in leases: the same at every scale of the clocks."""
SERVES, CRASHES = "serve", "crash"
"""Start commands: one that runs on, and one that kills its worker."""
FORMER_VERSION = "0.1.0"
"""The version of an agent that refuses an order which names a boot id."""
CRASHES_AFTER_S, RESTARTS_AFTER_S = 3.0, 20.0
STOP_GRACE_S = 55.0
POLL_S = 0.5
FREEZE_BUDGET_S = 0.4
"""How long freezing may take after the end of a liveness connection."""


class SimulatedContainer:
    """A container: files that outlive a restart, and processes that do not."""

    def __init__(self, sim: Simulation, number: int, address: str, slots: int) -> None:
        self.sim = sim
        self.number = number
        self.name = f"node-{number}"
        self.address = address
        self.slots = slots
        self.random = Random(f"container {number} {sim.schedule.seed}")
        self.clock_rate = 1.0 + DRIFT * self.random.uniform(-1.0, 1.0)
        self.host_key = f"ssh-ed25519 key-of-{self.name}"
        self.agent_version = FORMER_VERSION if number % 4 == 0 else AGENT_VERSION
        self.token: str | None = None
        self.records: dict[str, RentalRecord] = {}
        self.homes: dict[str, float] = {}
        """The content of each home: when its renter, which writes all the time, wrote last."""
        self.tombstones: dict[str, int] = {}
        self.unlocked: set[str] = set()
        self.frozen: set[str] = set()
        """Rentals that the fence has frozen."""
        self.quiesced: dict[str, tuple[int, float]] = {}
        """Rentals that an order has quiesced, with the number of the planned migration and the time."""
        self.started: set[tuple[str, int, str]] = set()
        """The runs of start commands since the container was started."""
        self.up = False
        self.exists = True
        self.boots = 0
        # The numbers of the faults that last at present:
        self.cut_off = 0
        self.no_ssh = 0
        self.disk_fails = 0
        self.pauses = 0
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._agent: asyncio.Task[None] | None = None
        self.home: HomeCaller | None = None
        self.liveness_connections: set[asyncio.Future[bool]] = set()
        """The connections that a manager holds; the result says that it noticed the end."""
        self._hurry = asyncio.Event()

    # -- faults --------------------------------------------------------------------------------------------

    @property
    def boot_id(self) -> str:
        return f"boot-{self.name}-{self.boots}"

    def start(self) -> None:
        self.boots += 1
        self.up = True
        self.unlocked.clear()
        self.frozen.clear()
        self.started.clear()
        self.quiesced.clear()
        self.home = HomeCaller(
            node=self,
            post=self,
            clock=self.clock,
            chance=self.random.random,
            say=lambda line: self.sim.say(self.name, line),
        )  # type: ignore[arg-type]
        self._agent = self.sim.loop.create_task(self._live(self.home))

    def kill(self) -> None:
        self._write()
        self.up = False
        if self._agent:
            self._agent.cancel()
        self._close_liveness_connections()

    def kill_sshd(self) -> None:
        """Kill sshd, which is started again at once without its connections."""
        if self.up and not self.pauses and self.liveness_connections:
            self._close_liveness_connections()
            self.liveness_ended()

    def _close_liveness_connections(self) -> None:
        """End all liveness connections; the manager's kernel notices unless SSH is cut."""
        ended, self.liveness_connections = self.liveness_connections, set()
        for connection in ended:
            if not connection.done() and not self.no_ssh:
                connection.set_result(True)

    def manager_process_ended(self, connection: asyncio.Future[bool]) -> None:
        """End a liveness connection because the manager's process has ended."""
        if connection in self.liveness_connections:
            self.liveness_connections.discard(connection)
            if self.up and not self.no_ssh:
                self.liveness_ended()

    def liveness_ended(self) -> None:
        """Tell the agent that a liveness connection has ended; a paused agent notices it when it is resumed."""
        self.sim.spawn(self._notice(self.boots))

    async def _notice(self, boots: int) -> None:
        await self.until_resumed()
        if self.home is not None and self.boots == boots:
            self.sim.say(self.name, "notices the end of the liveness connection")
            self.home.liveness_ended_at = self.clock()
            self._hurry.set()

    async def stop(self) -> None:
        """Stop as on SIGTERM: evacuate while the grace lasts, lock all rentals, send the last heartbeat, end."""
        home, boots = self.home, self.boots
        if home is not None and self.up:
            home.evacuate()
            self._hurry.set()
            last_moment = self.sim.loop.now + STOP_GRACE_S
            while self.boots == boots and self.up and home.is_evacuating() and self.sim.loop.now < last_moment:
                await asyncio.sleep(POLL_S)
                await self.until_resumed()
            if self.boots != boots or not self.up:
                return
        if self._agent:
            self._agent.cancel()
        if home is not None:
            home.begin_exit()
            goodbye = home.goodbye()
            if goodbye:
                await self._carry(goodbye)
        if self.boots == boots:
            self.kill()

    def pause(self) -> None:
        self._write()
        self.pauses += 1
        self._resumed.clear()

    def resume(self) -> None:
        self.pauses -= 1
        if not self.pauses:
            self._resumed.set()

    async def until_resumed(self) -> None:
        """Wait here while the container is paused."""
        while not self._resumed.is_set():
            await self._resumed.wait()

    @property
    def answers_ssh(self) -> bool:
        """Whether the kernel accepts SSH connections; a paused container accepts them and does nothing with them."""
        return self.up and not self.no_ssh

    # -- the agent -----------------------------------------------------------------------------------------

    def clock(self) -> float:
        return 5000.0 * self.number + self.sim.loop.now * self.clock_rate

    async def _live(self, home: HomeCaller) -> None:
        await asyncio.sleep(self.random.uniform(0.1, 2.0))
        while True:
            await self.until_resumed()
            wait_s = await self._drive(home.talk())
            await self._wait(home, wait_s)

    async def _wait(self, home: HomeCaller, wait_s: float) -> None:
        """Wait for the next call, or for a reason to call earlier, as agent/main.py does."""
        while True:
            try:
                async with asyncio.timeout(max(0.001, wait_s / self.clock_rate)):
                    await self._hurry.wait()
            except TimeoutError:
                return
            self._hurry.clear()
            wait_s = min(wait_s, home.due_s())

    async def _drive(self, talk: Talk) -> float:
        try:
            call = next(talk)
            while True:
                answer = await self._carry(call)
                await self.until_resumed()
                self.sim.say(self.name, f"{call.path}: {answer}")
                call = talk.send(answer)
        except StopIteration as end:
            wait_s: float = end.value
            return wait_s
        finally:
            self.sim.checker.check_live_copies()

    async def _carry(self, call: Call) -> Answer:
        body, address = dict(call.body), self.address
        return await self.sim.network.call(
            self, lambda manager: manager.answer(call.path, call.token, address, body), call.timeout_s / self.clock_rate
        )

    # -- the agent's view of its container, as node.Node ---------------------------------------------------

    def own_token(self) -> str | None:
        return self.token

    def join_token(self) -> str:
        return JOIN_TOKEN

    def forget_identity(self) -> None:
        self.token = None

    def keep_identity(self, session: AgentSession) -> None:
        self.token = session.worker_token

    def admit(self, keys: Iterable[str]) -> None: ...

    def note_acknowledgement(self) -> None: ...

    def load(self) -> dict[str, Any]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {
            "hostname": self.name,
            "host_key": self.host_key,
            "slots": self.slots,
            "boot_id": self.boot_id,
            "agent_version": self.agent_version,
            "inventory": self.inventory(),
        }

    def inventory(self) -> list[dict[str, Any]]:
        self._freeze_without_lease()
        return [
            {"rental_id": r.rental_id, "username": r.username, "uid": r.uid, "epoch": r.epoch, "state": self._state(r)}
            for r in self.records.values()
        ]

    def carry_out(self, orders: Iterable[RentalAction], asked_at: float) -> None:
        for order in orders:
            self.sim.say(self.name, f"{order.action}s {order.rental_id} at epoch {order.epoch}")
            try:
                if order.action == "thaw":
                    self.thaw(order.rental_id, order.epoch, asked_at)
                elif order.action == "unlock":
                    self.unlock(order.rental_id, order.epoch)
                else:
                    self.lock(order.rental_id, order.epoch)
            except RequestRefused as refusal:
                self.sim.say(self.name, f"refuses: {refusal}")

    def lock_all(self, kill: bool = False) -> None:
        self.unlocked.clear()

    # -- orders for rentals, as commands.Rentals -----------------------------------------------------------

    def start_command(self, job: Job) -> None:
        """Run a start command once since the start of the container, as launcher.Launcher does."""
        mark = (job.order.rental_id, job.order.epoch, job.order.start_mark)
        if not job.order.start or mark in self.started or job.order.start_mark.partition("@")[2] != self.boot_id:
            return
        if not self._may_run():
            raise RequestRefused("no_lease", "this worker has no lease: nothing may run here")
        self.started.add(mark)
        self.sim.say(self.name, f"runs the start command of {job.order.rental_id}: {job.order.start_mark}")
        self.sim.checker.started(job.order.rental_id, job.order.epoch)
        if job.order.start == CRASHES and not self.sim.schedule.only_outages:
            self.sim.loop.call_later(CRASHES_AFTER_S, self._crash, self.boots)

    def _crash(self, boots: int) -> None:
        """Kill the container because of a renter's start command, and start it again later."""
        if not self.up or self.boots != boots:
            return
        self.sim.say(self.name, "is brought down by a start command")
        self.kill()

        def start_again() -> None:
            if self.exists and not self.up:
                self.sim.start_container(self)

        self.sim.loop.call_later(RESTARTS_AFTER_S, start_again)

    def check_order(self, job: Job) -> None:
        """Refuse an order for another start of the container, as cli.answer_request does."""
        named = job.host.boot_id if job.action in OF_ONE_BOOT else ""
        if named and self.agent_version == FORMER_VERSION:
            self.sim.fail("old and new understand each other", f"{self.name} gets an order with a boot id")
        check_boot(named, self.boot_id)

    def create(self, job: Job) -> None:
        record = self.records.get(job.order.rental_id)
        check_create(record, self.tombstones.get(job.order.rental_id, 0), job.order.epoch)
        if record is not None:
            self.records[job.order.rental_id] = replace(record, retired=False)
        if record is None or record.epoch < job.order.epoch:
            self.unlocked.discard(job.order.rental_id)
            self.records[job.order.rental_id] = RentalRecord(
                rental_id=job.order.rental_id, username=job.order.username, uid=job.order.uid, epoch=job.order.epoch
            )
            self.homes.setdefault(job.order.rental_id, 0.0)

    def unlock(self, rental_id: str, epoch: int) -> None:
        record = self.records.get(rental_id)
        check_unlock(record, self.tombstones.get(rental_id, 0), epoch)
        check_not_retired(record)
        if not self._may_run():
            raise RequestRefused("no_lease", "this worker has no lease: no rental is activated")
        if rental_id in self.quiesced:
            raise RequestRefused("frozen", "it is frozen: thaw it")
        if record is not None and not record.activated:
            self.sim.checker.activated(rental_id, epoch, self.homes[rental_id])
            self.records[rental_id] = replace(record, activated=True)
        self.unlocked.add(rental_id)
        self.frozen.discard(rental_id)
        self.sim.checker.check_live_copies()

    def freeze(self, job: Job) -> None:
        record = self.records.get(job.order.rental_id)
        check_unlock(record, self.tombstones.get(job.order.rental_id, 0), job.order.epoch)
        check_not_retired(record)
        before, _ = self.quiesced.get(job.order.rental_id, (0, 0.0))
        if (job.order.rental_id, job.order.epoch) in self.running():
            self.homes[job.order.rental_id] = self.sim.loop.now
        self.quiesced[job.order.rental_id] = max(before, job.order.move), self.clock()
        self.unlocked.discard(job.order.rental_id)

    def thaw(self, rental_id: str, epoch: int, asked_at: float | None, move: int = 0) -> None:
        """Thaw a rental as marks.Freezer.thaw does, unless by an older reply or an order of an earlier migration."""
        check_unlock(self.records.get(rental_id), self.tombstones.get(rental_id, 0), epoch)
        check_not_retired(self.records.get(rental_id))
        number, ordered_at = self.quiesced.get(rental_id, (0, 0.0))
        if not self._may_run():
            raise RequestRefused("no_lease", "this worker has no lease: nothing may run here")
        if rental_id in self.quiesced and (move < number if asked_at is None else asked_at <= ordered_at):
            raise RequestRefused("frozen_since", "it was frozen since")
        self.quiesced.pop(rental_id, None)
        self.unlock(rental_id, epoch)

    def lock(self, rental_id: str, epoch: int) -> None:
        check_not_newer(self.records.get(rental_id), epoch)
        self.unlocked.discard(rental_id)

    def begin_purge(self, job: Job) -> None:
        check_not_newer(self.records.get(job.order.rental_id), job.order.epoch)
        self.records[job.order.rental_id] = RentalRecord(
            rental_id=job.order.rental_id,
            username=job.order.username,
            uid=job.order.uid,
            epoch=job.order.epoch,
            ending=True,
        )
        self.unlocked.discard(job.order.rental_id)

    def end_purge(self, job: Job) -> None:
        check_not_newer(self.records.get(job.order.rental_id), job.order.epoch)
        self.sim.checker.purged(self, job.order.rental_id, job.order.epoch)
        self.records.pop(job.order.rental_id, None)
        self.quiesced.pop(job.order.rental_id, None)
        self.homes.pop(job.order.rental_id, None)
        self.tombstones[job.order.rental_id] = max(job.order.epoch, self.tombstones.get(job.order.rental_id, 0))

    def _write(self) -> None:
        """Note that the renters of running rentals have written until now."""
        for rental_id, _ in self.running():
            self.homes[rental_id] = self.sim.loop.now

    def read_home(self, rental_id: str, epoch: int) -> float:
        """Return the content of a home for a snapshot, as `orion-rental send` does."""
        check_unlock(self.records.get(rental_id), self.tombstones.get(rental_id, 0), epoch)
        check_not_retired(self.records.get(rental_id))
        if (rental_id, epoch) in self.running():
            self.homes[rental_id] = self.sim.loop.now
        return self.homes[rental_id]

    def recover_home(self, rental_id: str, epoch: int) -> float:
        """Return the content of a home that is recovered, as `orion-rental salvage` does."""
        record = self.records.get(rental_id)
        check_unlock(record, self.tombstones.get(rental_id, 0), epoch)
        if record is None or not record.activated:
            raise RequestRefused("nothing_to_salvage", "it was never activated here at this epoch")
        self.records[rental_id] = replace(record, retired=True)
        self.unlocked.discard(rental_id)
        self.frozen.discard(rental_id)
        self.quiesced.pop(rental_id, None)
        return self.homes[rental_id]

    def fill_home(self, rental_id: str, epoch: int, content: float, snapshot: str) -> None:
        """Fill a home, as `orion-rental receive` does."""
        record = self.records.get(rental_id)
        check_receive(record, self.tombstones.get(rental_id, 0), epoch)
        assert record is not None
        self.records[rental_id] = replace(record, restored=snapshot)
        self.homes[rental_id] = content
        self.sim.checker.origins[rental_id, epoch] = snapshot

    # -- running rentals -----------------------------------------------------------------------------------

    def running(self) -> list[tuple[str, int]]:
        """Return the rentals, with their epochs, in which a renter can work at this instant."""
        if not self.up or self.pauses:
            return []
        self._freeze_without_lease()
        return [(r, self.records[r].epoch) for r in sorted(self.unlocked - self.frozen) if r in self.records]

    def _freeze_without_lease(self) -> None:
        if not self._may_run(FREEZE_BUDGET_S, FREEZE_BUDGET_LEASES):
            self.frozen |= self.unlocked

    def _may_run(self, budget_s: float = 0.0, budget_leases: float = 0.0) -> bool:
        """Return whether rentals may run, or could until so recently that freezing may not be finished."""
        if self.home is None:
            return False
        lease, now = self.home.lease, self.clock()
        by_lease = may_run(lease, None, now - budget_leases * lease.lease_s)
        return by_lease and may_run(lease, self.home.liveness_ended_at, now - budget_s)

    def _state(self, record: RentalRecord) -> str:
        if record.rental_id in self.quiesced:
            return "frozen"
        if record.rental_id not in self.unlocked:
            return "locked"
        return "frozen" if record.rental_id in self.frozen else "running"
