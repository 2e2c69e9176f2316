"""Workers: containers with the real agent (worker/call_home.py) on a model of their file system.

The model keeps what worker/rental.py keeps, by the same checks of worker/ledger.py: records with epochs, tombstones,
keys that are in place or not. It also has what the agent will have when it freezes: nothing of a rental goes on when
the lease, counted by the agent's own clock from when it sent its last acknowledged call, has run out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING, Any

from call_home import Call, CallHome, Talk
from decisions import Answer, Order, Session
from ledger import Record, Refused, check_create, check_not_newer, check_unlock

from orion.manager.domain.clocks import DRIFT, Clocks
from orion.manager.engine.port import Job

if TYPE_CHECKING:
    from simulation.world import Simulation

JOIN_TOKEN = "the join token"
CLOCKS = Clocks()
STOPPED_AFTER_LEASES = (CLOCKS.freeze_after_s + CLOCKS.door_answer_s + CLOCKS.freeze_budget_s) / CLOCKS.freeze_after_s
"""When everything of a rental stands still, in leases: the same at every scale of the clocks."""


class Container:
    """A file system that outlives a restart, and processes that do not. Its fields are the state of the world."""

    def __init__(self, sim: Simulation, number: int, address: str, slots: int) -> None:
        self.sim = sim
        self.number = number
        self.name = f"node-{number}"
        self.address = address
        self.slots = slots
        self.random = Random(f"container {number} {sim.schedule.seed}")
        self.clock_rate = 1.0 + DRIFT * self.random.uniform(-1.0, 1.0)
        self.host_key = f"ssh-ed25519 key-of-{self.name}"
        self.token: str | None = None
        self.lease_s = 0.0
        """Of the last reply: a manager that was restarted with other clocks gives another one."""
        self.records: dict[str, Record] = {}
        self.tombstones: dict[str, int] = {}
        self.unlocked: set[str] = set()
        self.frozen: set[str] = set()
        self.up = False
        self.exists = True
        self.boots = 0
        self.cut_off = 0
        self.no_ssh = 0
        self.disk_fails = 0
        self.pauses = 0
        self._going = asyncio.Event()
        self._going.set()
        self._agent: asyncio.Task[None] | None = None
        self.home: CallHome | None = None

    # -- what happens to it ----------------------------------------------------------------------------------

    @property
    def boot_id(self) -> str:
        return f"boot-{self.name}-{self.boots}"

    def start(self) -> None:
        self.boots += 1
        self.up = True
        self.unlocked.clear()
        self.frozen.clear()
        self.home = CallHome(self, self, self.clock, self.random.random, lambda line: self.sim.say(self.name, line))  # type: ignore[arg-type]
        self._agent = self.sim.loop.create_task(self._live(self.home))

    def kill(self) -> None:
        self.up = False
        if self._agent:
            self._agent.cancel()

    async def stop(self) -> None:
        """As on SIGTERM: everything locked, a goodbye, the end."""
        home, boots = self.home, self.boots
        if self._agent:
            self._agent.cancel()
        if home is not None:
            home.leave()
            goodbye = home.goodbye()
            if goodbye:
                await self._carry(goodbye)
        if self.boots == boots:
            self.kill()

    def pause(self) -> None:
        self.pauses += 1
        self._going.clear()

    def go_on(self) -> None:
        self.pauses -= 1
        if not self.pauses:
            self._going.set()

    async def going(self) -> None:
        """A paused container's processes wait here, and notice nothing."""
        while not self._going.is_set():
            await self._going.wait()

    @property
    def answers_ssh(self) -> bool:
        """A paused one takes the connection, and does nothing with it until it goes on."""
        return self.up and not self.no_ssh

    # -- the agent -------------------------------------------------------------------------------------------

    def clock(self) -> float:
        return 5000.0 * self.number + self.sim.loop.now * self.clock_rate

    async def _live(self, home: CallHome) -> None:
        await asyncio.sleep(self.random.uniform(0.1, 2.0))
        while True:
            await self.going()
            wait_s = await self._drive(home.talk())
            await asyncio.sleep(max(0.001, wait_s / self.clock_rate))

    async def _drive(self, talk: Talk) -> float:
        try:
            call = next(talk)
            while True:
                answer = await self._carry(call)
                await self.going()
                self.sim.say(self.name, f"{call.path}: {answer}")
                call = talk.send(answer)
        except StopIteration as end:
            wait_s: float = end.value
            return wait_s
        finally:
            self.sim.checker.look_at_copies()

    async def _carry(self, call: Call) -> Answer:
        body, address = dict(call.body), self.address
        return await self.sim.network.call(
            self, lambda manager: manager.answer(call.path, call.token, address, body), call.timeout_s / self.clock_rate
        )

    # -- what the agent sees and changes, as node.Node -------------------------------------------------------

    def own_token(self) -> str | None:
        return self.token

    def join_token(self) -> str:
        return JOIN_TOKEN

    def forget_identity(self) -> None:
        self.token = None

    def keep_identity(self, session: Session) -> None:
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
            "inventory": self.inventory(),
        }

    def inventory(self) -> list[dict[str, Any]]:
        self._freeze_what_has_no_lease()
        return [
            {"rental_id": r.rental_id, "username": r.username, "uid": r.uid, "epoch": r.epoch, "state": self._state(r)}
            for r in self.records.values()
        ]

    def carry_out(self, orders: Iterable[Order], asked_at: float) -> None:
        for order in orders:
            self.sim.say(self.name, f"{order.action}s {order.rental_id} at epoch {order.epoch}")
            try:
                if order.action in {"unlock", "thaw"}:
                    self.unlock(order.rental_id, order.epoch)
                else:
                    self.lock(order.rental_id, order.epoch)
            except Refused as refusal:
                self.sim.say(self.name, f"refuses: {refusal}")

    def lock_all(self, kill: bool = False) -> None:
        self.unlocked.clear()

    # -- what is done to rentals here, as rental.Rentals -----------------------------------------------------

    def create(self, job: Job) -> None:
        record = self.records.get(job.rental_id)
        check_create(record, self.tombstones.get(job.rental_id, 0), job.epoch)
        if record is None or record.epoch < job.epoch:
            self.unlocked.discard(job.rental_id)
            self.records[job.rental_id] = Record(job.rental_id, job.username, job.uid, job.epoch)

    def unlock(self, rental_id: str, epoch: int) -> None:
        check_unlock(self.records.get(rental_id), self.tombstones.get(rental_id, 0), epoch)
        self.unlocked.add(rental_id)
        self.frozen.discard(rental_id)
        self.sim.checker.look_at_copies()

    def lock(self, rental_id: str, epoch: int) -> None:
        check_not_newer(self.records.get(rental_id), epoch)
        self.unlocked.discard(rental_id)

    def begin_purge(self, job: Job) -> None:
        check_not_newer(self.records.get(job.rental_id), job.epoch)
        self.records[job.rental_id] = Record(job.rental_id, job.username, job.uid, job.epoch, ending=True)
        self.unlocked.discard(job.rental_id)

    def end_purge(self, job: Job) -> None:
        check_not_newer(self.records.get(job.rental_id), job.epoch)
        self.records.pop(job.rental_id, None)
        self.tombstones[job.rental_id] = max(job.epoch, self.tombstones.get(job.rental_id, 0))

    # -- what runs here --------------------------------------------------------------------------------------

    def running(self) -> list[tuple[str, int]]:
        """The rentals, with their epochs, in which a renter could be at work at this instant."""
        if not self.up or self.pauses:
            return []
        self._freeze_what_has_no_lease()
        return [(r, self.records[r].epoch) for r in sorted(self.unlocked - self.frozen) if r in self.records]

    def _freeze_what_has_no_lease(self) -> None:
        acknowledged_at = self.home.acknowledged_at if self.home else None
        if self.home and self.home._session:
            self.lease_s = self.home._session.lease_s
        if acknowledged_at is None or self.clock() - acknowledged_at >= self.lease_s * STOPPED_AFTER_LEASES:
            self.frozen |= self.unlocked

    def _state(self, record: Record) -> str:
        if record.rental_id not in self.unlocked:
            return "locked"
        return "frozen" if record.rental_id in self.frozen else "running"
