"""The whole manager in one test: real store, real API, virtual time, and a fake world of workers with their agents.

Nothing runs by itself: `settle` runs rounds until nothing is left to do, `pass_time` advances the clocks and lets the
agents send their heartbeats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from fastapi import FastAPI
from sqlalchemy import select
from support.builders import host_key, new_secrets
from support.pools import differences

from orion.manager.api.proxy_guard import SECRET_HEADER
from orion.manager.app import Manager, Ports, application, put_into
from orion.manager.controllers.loop import Loop
from orion.manager.domain.brake import Brake
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.fakes.shell import FakeShells
from orion.manager.fakes.snapshots import FakeSnapshotService
from orion.manager.fakes.workers import FakeEngine, FakeLiveness, FakeReach, FakeWorker, FakeWorld
from orion.manager.settings import Settings
from orion.manager.ssh.port import Host
from orion.manager.store import events, tokens
from orion.manager.store.database import News, Row, Store, rows
from orion.manager.store.pool_index import everything
from orion.manager.store.schema import placements

T = TypeVar("T")
PROXY_SECRET = "the-proxy-s-secret"
START = 1_000.0
WALL_START = 1_800_000_000.0
STEP_S = 4.0
"""Seconds of virtual time between rounds; with more of them the manager would think itself late."""


@dataclass
class VirtualClock:
    """Virtual time."""

    now: float = START
    wall_offset: float = WALL_START - START

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.wall_offset


@dataclass
class FakeProxyProbe:
    """Replaces the ProxyProbe: a test decides whether the manager reaches itself through the proxy."""

    answers: bool = True
    loop: Loop = field(default_factory=lambda: Loop("door", 3600.0, _nothing))


async def _nothing() -> None: ...


@dataclass
class Agent:
    """A worker's agent by the contract of the API: it registers, sends heartbeats, and obeys their replies."""

    harness: Harness
    node: FakeWorker
    hostname: str
    slots: int = 1
    token: str | None = None
    worker_id: str = ""
    session: str = ""
    seq: int = 0
    beating: bool = True
    evacuating: bool = False
    """Whether the worker is about to stop and is being emptied."""
    last_beat: float = 0.0
    last_reply: dict[str, Any] = field(default_factory=dict)
    start_ends: list[dict[str, Any]] = field(default_factory=list)
    """The ends of start commands that its heartbeats report, as wire.StartEnd."""
    agent_version: str = "0.1.0+boot"

    async def register(self) -> httpx.Response:
        body = {
            "hostname": self.hostname,
            "ssh_host_keys": list(self.node.host.host_keys),
            "slots": self.slots,
            "boot_id": self.node.boot_id,
            "agent_version": self.agent_version,
            "inventory": self.inventory(),
        }
        reply = await self._post("/api/register", body, self.token or self.harness.secrets.join_token)
        if reply.status_code == 201:
            answer = reply.json()
            self.token, self.worker_id, self.session = answer["worker_token"], answer["worker_id"], answer["session_id"]
            self.node.host = replace(self.node.host, worker_id=self.worker_id)
            self.seq, self.last_beat, self.last_reply = 0, self.harness.clock.now, answer
            self._obey(answer["placements"])
        return reply

    async def beat(self, **change: Any) -> httpx.Response:
        self.seq += 1
        body = {"session_id": self.session, "seq": self.seq, "inventory": self.inventory(), "lease_s": 75.0} | change
        body |= {"vacating": True} if self.evacuating else {}
        body |= {"start_ends": self.start_ends} if self.start_ends else {}
        reply = await self._post("/api/heartbeat", body, self.token or "")
        if reply.status_code == 200:
            self.last_beat, self.last_reply = self.harness.clock.now, reply.json()
            self._obey(self.last_reply["placements"])
        return reply

    async def exit(self) -> None:
        """End as on SIGTERM: lock everything, and send the last heartbeat."""
        self.node.come_back()
        await self.beat(leaving=True)
        self.die()

    def die(self) -> None:
        self.node.die()
        self.beating = False

    async def come_back(self) -> httpx.Response:
        """Start again as after a restart of the container: lock everything, then register."""
        self.node.come_back()
        self.beating = True
        return await self.register()

    def inventory(self) -> list[dict[str, Any]]:
        return [
            {
                "rental_id": rental_id,
                "username": account.username,
                "uid": account.uid,
                "epoch": account.epoch,
                "state": "running" if account.unlocked else "locked",
            }
            for rental_id, account in self.node.accounts.items()
        ]

    def unlocked(self) -> dict[str, int]:
        """Return the epoch of each rental that a renter could log in to here."""
        return {r: a.epoch for r, a in self.node.accounts.items() if a.unlocked and self.node.alive}

    async def _post(self, path: str, body: dict[str, Any], token: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}", "X-Real-IP": self.node.host.address}
        return await self.harness.http.post(path, json=body, headers=headers)

    def _obey(self, orders: list[dict[str, Any]]) -> None:
        for order in orders:
            account = self.node.accounts.get(order["rental_id"])
            if account and account.epoch == order["epoch"]:
                run = order["want"] == "run"
                self.node.accounts[order["rental_id"]] = replace(account, unlocked=run)
                if run:
                    self.node.frozen.pop(order["rental_id"], None)


@cache
def _routes() -> FastAPI:
    """Return the application, which is made once because FastAPI takes tens of milliseconds for it."""
    return application(PROXY_SECRET)


class ImmediateExecutor(ThreadPoolExecutor):
    """Replaces the store's threads: runs each function when it is submitted, so that the order is always the same."""

    def submit(self, function: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(function(*args, **named))
        except Exception as error:  # as an executor does: the waiting task gets it
            done.set_exception(error)
        return done


class Harness:
    """The manager and its fake workers on virtual time."""

    def __init__(self, store: Store, settings: Settings | None = None) -> None:
        self.store = store
        store._writer = store._readers = ImmediateExecutor(1)
        # A rental that is lost without a snapshot begins empty at once, unless a test is about that wait.
        self.settings = settings or Settings(database_url=store.url, uncopied_wait_s=0)
        self.secrets = new_secrets(PROXY_SECRET)
        self.clock = VirtualClock()
        self.proxy_probe = FakeProxyProbe()
        self.world = FakeWorld()
        self.snapshot_service = FakeSnapshotService(world=self.world, wall=self.clock.wall)
        self.disk_share = 0.1
        self.shells = FakeShells()
        self.liveness: FakeLiveness | None = None
        self.agents: list[Agent] = []
        self._numbers = count(1)
        self.begin()

    def begin(self) -> None:
        """Make a new manager on the same store, as after a restart."""
        proxy_probe: Any = self.proxy_probe
        ports = Ports(
            engine=FakeEngine(self.world),
            reach=FakeReach(self.world),
            snapshot_service=self.snapshot_service,
            proxy_probe=proxy_probe,
            snapshots_disk=lambda: self.disk_share,
            monotonic=self.clock.monotonic,
            wall=self.clock.wall,
            liveness=self.liveness,
            shells=self.shells,
        )
        self.app = _routes()
        self.manager = Manager(settings=self.settings, secrets=self.secrets, store=self.store, ports=ports)
        # Without the sweep, a row that is not looked at in time is noticed.
        self.manager.health.swept_at_once = self.manager.reconciler.swept_at_once = 0
        put_into(self.app, self.manager)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {SECRET_HEADER: PROXY_SECRET, "X-Real-IP": "198.51.100.7"}
        self.http = httpx.AsyncClient(transport=transport, base_url="http://manager", headers=headers)
        self.as_admin = self.client(self.secrets.admin_token)

    def change_services(self, kind: type, **changes: Any) -> None:
        """Change the services of this class that a router uses."""
        self.manager.services[kind] = replace(self.manager.services[kind], **changes)

    async def hold_liveness_connections(self) -> None:
        """Restart the manager with liveness connections to all workers, so that deaths are proved."""
        self.liveness = FakeLiveness(self.world)
        await self.restart()

    async def restart(self) -> None:
        await self._stop()
        self.begin()
        await self.manager.restore()

    async def __aenter__(self) -> Self:
        await self.manager.restore()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await self.manager.snapshots.stop()
        await self.manager.task_runner.stop()
        if self.manager.liveness:
            await self.manager.liveness.stop()

    def client(self, token: str) -> httpx.AsyncClient:
        headers = {SECRET_HEADER: PROXY_SECRET, "X-Real-IP": "198.51.100.7", "Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://manager", headers=headers)

    async def new_client(self, name: str, role: str = "client", ttl_s: float | None = None) -> httpx.AsyncClient:
        ends_at = None if ttl_s is None else self.clock.wall() + ttl_s
        _, token = await self.store.write(tokens.create, "admin", name, role, ends_at)
        return self.client(token)

    async def revoke(self, name: str) -> None:
        """Revoke the only token of this name."""
        found = (await self.as_admin.get("/api/tokens")).json()["items"]
        [identity] = [token["id"] for token in found if token["name"] == name]
        assert (await self.as_admin.delete(f"/api/tokens/{identity}")).is_success

    def new_agent(self, slots: int = 1) -> Agent:
        number = next(self._numbers)
        host = Host(worker_id="", address=f"172.20.128.{number}", host_keys=(host_key(100 + number),))
        agent = Agent(self, self.world.add(host), f"node-{number}", slots)
        self.agents.append(agent)
        return agent

    async def join(self, slots: int = 1) -> Agent:
        agent = self.new_agent(slots)
        reply = await agent.register()
        assert reply.status_code == 201, reply.text
        await self.settle()
        return agent

    async def rent(self, **body: Any) -> dict[str, Any]:
        """Rent, and run the controllers until nothing more happens."""
        reply = await self.as_admin.post("/api/rent", json={"wait_s": 0} | body)
        assert reply.status_code in {201, 202}, reply.text
        await self.settle()
        return await self.rental(reply.json()["id"])

    async def rental(self, rental_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.as_admin.get(f"/api/rentals/{rental_id}")).json()
        return found

    def agent_of(self, rental: dict[str, Any]) -> Agent:
        """Return the agent of the worker that a rental of the API is on."""
        return next(agent for agent in self.agents if agent.worker_id == rental["worker_id"])

    async def worker(self, agent: Agent) -> dict[str, Any]:
        found: dict[str, Any] = (await self.as_admin.get(f"/api/workers/{agent.worker_id}")).json()
        return found

    async def health(self, agent: Agent) -> str:
        return str((await self.worker(agent))["health"])

    async def events(self, kind: str = "") -> list[Row]:
        found = await self.store.read(events.page, None, None, None, 0, 10_000)
        return [event for event in found if event["kind"].startswith(kind)]

    async def placements(self) -> list[Row]:
        return await self.store.read(lambda c: rows(c.execute(select(placements).order_by(placements.c.epoch))))

    async def settle(self, passing: bool = False) -> None:
        """Run rounds, and the tasks that they start, until nothing more happens at this instant.

        `passing`: more time will pass; the pool index is then compared only if something happened.
        """
        hinted = self.manager.reconciler.loop._hinted
        with self.store.news.listen(News.EVERYTHING) as changed:
            for number in range(30):
                changed.clear()
                hinted.clear()
                await self.manager.health.round()
                await self.manager.reconciler.round()
                await self.finish_tasks()
                if not changed.is_set() and not hinted.is_set():
                    if number or not passing:
                        await self.compare_pool_index()
                    return
        raise AssertionError("the platform does not settle")

    async def compare_pool_index(self) -> None:
        """Fail if the pool index differs from the database.

        It is repeated, because a call of the test that is under way may commit between the two reads.
        """
        for _ in range(3):
            anew = PoolIndex()
            anew.apply(await self.store.write(everything), self.clock.now)  # after all earlier writes
            difference = differences(anew, self.manager.pool_index)
            if not difference:
                return
        raise AssertionError(difference)

    async def finish_tasks(self) -> None:
        """Wait until all running tasks have ended; ignore their failures, which are outcomes."""
        await asyncio.gather(*self.manager.task_runner._running.values(), return_exceptions=True)

    async def pass_time(self, seconds: float, step_s: float = STEP_S) -> None:
        """Let virtual time pass, with rounds and with the heartbeats of the agents that are beating."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + step_s)
            for agent in self.agents:
                if agent.beating and self.clock.now - agent.last_beat >= 30.0:
                    await agent.beat()
            await self.settle(passing=self.clock.now < end)

    async def silence(self, agent: Agent, seconds: float) -> None:
        """Let time pass without heartbeats of an agent, until so many seconds after its last one."""
        agent.beating = False
        await self.pass_time(agent.last_beat + seconds - self.clock.now)

    def end_the_brake_of_the_start(self) -> None:
        """Set the brake as if the manager had been running for long."""
        self.manager.health.brake = Brake(disturbed_at=self.clock.now - 1000.0, since=None, reason="")

    def live_copies(self, rental_id: str) -> list[int]:
        """Return the epochs in which a renter could log in to a rental, over all workers that run."""
        return [a.unlocked()[rental_id] for a in self.agents if rental_id in a.unlocked()]
