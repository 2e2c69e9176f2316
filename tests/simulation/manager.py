"""One life of the manager: real controllers and rules on a state store that outlives it, killed at any await."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from random import Random
from typing import TYPE_CHECKING, Any

from orion_worker.agent.decisions import Answer

from orion.manager.api.call_home import CallHome, CallRefused
from orion.manager.controllers.callbacks import Callbacks
from orion.manager.controllers.expiry import ExpiryController
from orion.manager.controllers.health import HealthController
from orion.manager.controllers.loop import Loop
from orion.manager.controllers.reconciler import Reconciler
from orion.manager.controllers.snapshots import SnapshotController
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.leases import Heartbeat, Leases
from orion.manager.domain.migration import NotMigrated
from orion.manager.domain.model import Item
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.snapshot_plan import SnapshotPlan
from orion.manager.domain.states import Health, Intent
from orion.manager.operations.liveness import LivenessConnections
from orion.manager.operations.migrate import Migrator
from orion.manager.operations.restore import Restorer
from orion.manager.operations.task_runner import TaskRunner
from orion.manager.store.port import Registration
from simulation.agents import JOIN_TOKEN
from simulation.front import Front
from simulation.snapshot_service import SimulatedSnapshotService

if TYPE_CHECKING:
    from simulation.world import Simulation

ROUND_S = 5.0
"""Seconds between the rounds of a controller: too few for the manager to think itself late, enough to be cheap."""
EXPIRY_ROUND_S = 10.0
SNAPSHOT_ROUND_S = 12.0
AWAITS_FILES_S = 120.0
"""Shorter than the default of ORION_UNCOPIED_WAIT_S, so that waits end both ways within a history."""
WRITES = frozenset({"apply", "apply_each", "finish", "register", "accept", "record", "forget"})
"""Methods after which the manager may be killed; a kill after a read is like one before it."""


class SimulatedManager:
    """A manager process: its controllers, its leases and pool index, its routes."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.dead = False
        self.started_at = sim.loop.now
        self.points_left: int | None = None
        """The number of awaits until it is killed; None: it is not to be killed."""
        self.random = Random(f"manager {sim.loop.now} {sim.schedule.seed}")
        self._tasks: set[asyncio.Task[Any]] = set()
        self.leases = leases = Leases(sim.clocks.freeze_after_s)
        state_store: Any = WithPoints(self, sim.state_store)
        engine, reach = sim.engine_of(self), sim.reach_of(self)
        catalog: Any = WithPoints(self, sim.catalog)
        snapshot_service = SimulatedSnapshotService(sim, self)
        restorer = Restorer(engine=engine, snapshot_service=snapshot_service, catalog=catalog)
        migrator = Migrator(
            engine=engine,
            snapshot_service=snapshot_service,
            catalog=catalog,
            limits=SnapshotPlan().limits,
            monotonic=sim.monotonic,
        )
        self.snapshots = SnapshotController(
            catalog=catalog,
            snapshot_service=snapshot_service,
            plan=SnapshotPlan(),
            disk_share=sim.disk_share,
            monotonic=sim.monotonic,
            wall=sim.wall,
            random=self.random,
        )
        self.snapshots.loop = Loop("copies", SNAPSHOT_ROUND_S, self.snapshots.round)
        self.pool_index = pool_index = PoolIndex()
        clock = TrustedClock(now=sim.monotonic, wall=sim.wall)
        worker_changed, task_ended = Callbacks[[]](), Callbacks[[]]()
        self.task_runner = TaskRunner(
            state_store=state_store,
            pool_index=pool_index,
            leases=leases,
            engine=engine,
            reach=reach,
            restorer=restorer,
            migrator=migrator,
            monotonic=sim.monotonic,
            wall=sim.wall,
            counts_from=clock.counts_from,
            wake_reconciler=task_ended,
            on_worker_change=worker_changed,
        )
        self.reconciler = Reconciler(
            state_store=state_store,
            pool_index=pool_index,
            leases=leases,
            task_runner=self.task_runner,
            monotonic=sim.monotonic,
            wall=sim.wall,
            placement_ids=sim.placement_ids,
            awaits_files_s=AWAITS_FILES_S,
        )
        self.reconciler.swept_at_once = 0  # without the sweep, a row that is not looked at in time is noticed
        self.reconciler.loop = Loop("reconciler", ROUND_S, self.reconciler.round)
        hint = self.reconciler.loop.hint
        task_ended.subscribe(hint)
        watch_ended = Callbacks[str]()
        self.watching = LivenessConnections(sim.liveness_of(self), sim.monotonic, watch_ended)
        self.health = HealthController(
            state_store=state_store,
            pool_index=pool_index,
            leases=leases,
            clocks=sim.clocks,
            proxy_answers=sim.proxy_answers,
            monotonic=sim.monotonic,
            on_verdict=hint,
            liveness=self.watching,
        )
        self.health.swept_at_once = 0
        self.health.interval_s = ROUND_S
        self.health.loop = Loop("health", ROUND_S, self.health.round)
        watch_ended.subscribe(self.health.judge_soon)
        worker_changed.subscribe(self.health.loop.hint)
        self.expiry = ExpiryController(state_store=state_store, clock=clock, wall=sim.wall, on_expiry=hint)
        self.expiry.loop = Loop("expiry", EXPIRY_ROUND_S, self.expiry.round)
        self.call_home = CallHome(
            registry=state_store,
            pool_index=pool_index,
            leases=leases,
            reach=reach,
            monotonic=sim.monotonic,
            on_inventory=self.reconciler.compare,
            on_return=self.health.mark_due,
        )
        self.front = Front(sim.state_store, leases, sim.wall)

    def start(self) -> None:
        self.spawn(self._run())

    async def _run(self) -> None:
        """Restore the leases from the database and run the controllers, as app.Manager does."""
        await self.sim.state_store.follow(lambda changes: self.pool_index.apply(changes, self.sim.monotonic()))
        workers = self.pool_index.items()
        known = {w: k.session_id for w, k in workers if k.session_id and k.health is not Health.DOWN}
        self.sim.granted_s = granted_s = max(self.sim.granted_s, self.sim.clocks.freeze_after_s)
        self.leases.restore(known, granted_s)
        for loop in (self.health.loop, self.reconciler.loop, self.expiry.loop, self.snapshots.loop):
            self.spawn(loop.run())
        await asyncio.sleep(2 * granted_s)
        self.sim.granted_s = self.sim.clocks.freeze_after_s

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine that ends with the manager's process."""
        task = self.sim.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def kill(self) -> None:
        """Kill the manager as by SIGKILL: what it has not committed has not happened."""
        self.dead = True
        others = [self.task_runner._writing, self.snapshots._sweeping, *self.snapshots._running.values()]
        liveness = {known.task for known in self.watching._tasks.values()}
        tasks = self._tasks | {*self.task_runner._running.values(), *(task for task in others if task)} | liveness
        for task in sorted(tasks, key=lambda t: t.get_name()):
            task.cancel()
        self.sim.manager_died(self)

    async def point(self) -> None:
        """Await as the real program does: other tasks run meanwhile, or the manager is killed here."""
        if self.points_left is not None and not self.dead:
            self.points_left -= 1
            if self.points_left < 0:
                self.kill()
        if self.dead:
            raise asyncio.CancelledError
        await asyncio.sleep(self._pause_s())
        if self.dead:
            raise asyncio.CancelledError

    def _pause_s(self) -> float:
        chance = self.random.random()
        if self.sim.disk_is_slow:
            return 6.0 * chance * chance
        return chance if chance < 0.05 else 0.0

    # -- the routes ----------------------------------------------------------------------------------------

    async def answer(self, path: str, token: str, address: str, body: Mapping[str, Any]) -> Answer:
        """Answer a call of an agent as api/heartbeat.py does: authenticate, apply the rules, return the status."""
        await self.point()
        own_id = next((w for w, valid in self.sim.state_store.tokens.items() if valid == token), None)
        if own_id is None and (token != JOIN_TOKEN or path != "/api/register"):
            return Answer(status=401, body={"code": "unauthorized"})
        try:
            if path == "/api/register":
                return await self._register(own_id, token, address, body)
            return await self._heartbeat(own_id or "", address, body)
        except CallRefused as refusal:
            return Answer(status=409, body={"code": refusal.code})

    async def _register(self, own_id: str | None, token: str, address: str, body: Mapping[str, Any]) -> Answer:
        claim = Registration(
            address=address,
            hostname=body["hostname"],
            host_keys=(body["host_key"],),
            slots=body["slots"],
            labels={},
            boot_id=body["boot_id"],
            agent_version=body["agent_version"],
        )
        registered, orders = await self.call_home.register(own_id, claim, _items(body))
        self.health.loop.hint()
        self.reconciler.loop.hint()
        reply = {
            "worker_id": registered.worker_id,
            "worker_token": registered.token or token,
            "session_id": registered.session_id,
            "heartbeat_interval_s": self.sim.clocks.heartbeat_s,
            "lease_s": self.sim.clocks.freeze_after_s,
            "door_answer_s": self.sim.clocks.door_answer_s,
            "authorized_keys": [],
            "placements": _orders(orders),
        }
        return Answer(status=201, body=reply)

    async def _heartbeat(self, worker_id: str, address: str, body: Mapping[str, Any]) -> Answer:
        exiting = body.get("leaving", False)
        evacuating = body.get("vacating", False)
        beat = Heartbeat(
            session_id=body["session_id"],
            seq=body["seq"],
            inventory=tuple(_items(body)),
            exiting=exiting,
            lease_s=body["lease_s"],
            evacuating=evacuating,
        )
        found = self.call_home.heartbeat(worker_id, beat, address)
        await self.point()
        self.leases.note(worker_id, self.sim.wall(), {})
        if exiting:
            self.health.loop.hint()
        if evacuating:
            self.reconciler.loop.hint()
        clocks = self.sim.clocks
        next_s = clocks.heartbeat_s * self.random.uniform(0.9, 1.05)
        reply = {
            "lease_s": clocks.freeze_after_s,
            "door_answer_s": clocks.door_answer_s,
            "next_heartbeat_s": next_s,
            "placements": _orders(found),
        }
        return Answer(status=200, body=reply)

    async def rent(self, owner: str, key: str, ttl_s: int) -> Answer:
        await self.point()
        rental_id = self.front.rent(owner, key, ttl_s)
        self.reconciler.loop.hint()
        await self.point()
        return Answer(status=201, body={"id": rental_id})

    async def renew(self, rental_id: str, ttl_s: int) -> Answer:
        await self.point()
        renewed = await self.front.renew(rental_id, ttl_s)
        await self.point()
        return Answer(status=200 if renewed else 409)

    async def migrate(self, rental_id: str) -> Answer:
        await self.point()
        placed = self.sim.state_store.world.live_placement(rental_id)
        try:
            await self.reconciler.begin_migration(rental_id, placed.worker_id if placed else "", "client")
        except NotMigrated as refusal:
            return Answer(status=409, body={"code": refusal.code})
        return Answer(status=202)

    async def release(self, rental_id: str) -> Answer:
        await self.point()
        await self.front.release(rental_id)
        self.reconciler.loop.hint()
        await self.point()
        return Answer(status=202)

    async def set_intent(self, worker_id: str, to: Intent) -> Answer:
        await self.point()
        self.front.set_intent(worker_id, to)
        self.health.loop.hint()
        self.reconciler.loop.hint()
        return Answer(status=200)

    async def remove(self, worker_id: str) -> Answer:
        await self.point()
        return Answer(status=204 if self.front.remove(worker_id) else 409)


class WithPoints:
    """A state store or catalog in one life of the manager, which may be killed before a call and after a write."""

    def __init__(self, manager: SimulatedManager, target: object) -> None:
        self._manager = manager
        self._target = target

    def __getattr__(self, name: str) -> Any:
        transaction = getattr(self._target, name)

        async def with_points(*arguments: Any) -> Any:
            await self._manager.point()
            found = await transaction(*arguments)
            if name in WRITES:
                await self._manager.point()
            return found

        setattr(self, name, with_points)
        return with_points


def _items(body: Mapping[str, Any]) -> list[Item]:
    return [
        Item(rental_id=i["rental_id"], username=i["username"], uid=i["uid"], epoch=i["epoch"])
        for i in body["inventory"]
    ]


def _orders(found: list[tuple[Item, str]]) -> list[dict[str, Any]]:
    return [{"rental_id": item.rental_id, "epoch": item.epoch, "want": want} for item, want in found]
