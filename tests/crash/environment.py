"""The environment of a manager that is killed: it restarts the manager, and simulates workers and clients."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import re
import socket
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from crash import manager
from crash.proxy import CrashingProxy
from support.builders import host_key, new_secrets
from support.harness import PROXY_SECRET, Agent

from orion.manager.ansible.port import Action, Job
from orion.manager.api.proxy_guard import SECRET_HEADER
from orion.manager.domain.snapshots import SnapshotId
from orion.manager.fakes.snapshots import FakeSnapshotService
from orion.manager.fakes.workers import FakeEngine, FakeReach, FakeWorld
from orion.manager.main import LOOPBACK
from orion.manager.settings import Settings
from orion.manager.snapshots.port import SnapshotError
from orion.manager.ssh.port import Host
from orion.rental_order import RentalOrder

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([manager.__name__])  # so that a restarted manager need not import its modules again
PATIENCE_S = 120.0
"""Seconds of a timeout that no scenario reaches, even on a busy machine."""
BEAT_S, PAUSE_S, LATE_S = 0.3, 0.03, 0.3
CHECK_S = 0.1
"""Seconds between two checks of a condition: many runs check at the same time, and must not load the machine."""
NEVER_S = 36_000.0
CLOCKS = {
    "heartbeat_s": BEAT_S,
    "suspect_after_s": 0.4,
    "freeze_after_s": 0.5,
    "door_answer_s": 0.4,
    "freeze_budget_s": 0.01,
    "takeover_after_s": 0.95,
    "wake_budget_s": 0.01,
    "slack_s": 0.01,
    "brake_max_s": 3.0,
    "goodbye_after_s": 0.1,
    "flap_window_s": 0.001,  # no worker is quarantined because the machine is busy
}

VICTIMS = ("manager", "engine", "proxy")
CRASH_POINTS = "crash points"
"""The property in which a test records its numbers of crash points, for the summary over all processes of pytest."""


class Point(NamedTuple):
    """A crash point that was reached."""

    name: str
    time: int
    """The number of times that a point of this name was reached, this time included."""

    @property
    def kills(self) -> str:
        """The process that is killed at this point."""
        return next((victim for victim in VICTIMS if self.name.startswith(f"the {victim} ")), "manager")


class MonotonicClock:
    @property
    def now(self) -> float:
        return time.monotonic()


class CrashEnvironment:
    """One run: a database, a manager that is restarted whenever it dies, and workers that keep running."""

    def __init__(
        self,
        folder: Path,
        dies_at: Point | None = None,
        snapshot_interval_s: float = NEVER_S,
        ignored_points: str = "",
        slower: float = 1.0,
    ) -> None:
        """`slower`: a factor for all clocks, for tests in which a busy machine must not cost a worker."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database = folder / "orion.db"
        self.dies_at = dies_at
        self._passes_over = ignored_points
        self._lease_s = slower * CLOCKS["freeze_after_s"]
        self.reached: Counter[str] = Counter()
        self.points: list[Point] = []
        self._armed = False
        self.exits: list[int] = []
        self.wall_offset_s = 0.0
        self.faketime = ""
        self.secrets = new_secrets(PROXY_SECRET)
        self._kept_port = keep_port()
        self.settings = Settings(
            database_url=f"sqlite:///{self.database}",
            lock_file=str(folder / "lock"),
            port=self._kept_port.getsockname()[1],
            snapshot_interval_s=snapshot_interval_s,
            uncopied_wait_s=0,  # a scenario may lose a worker before the first snapshot
            ballast_bytes=0,
            clock_scale=slower,
            **CLOCKS,
        )
        self.clock = MonotonicClock()
        self.world = FakeWorld()
        self.snapshot_service = FakeSnapshotService(world=self.world, wall=time.time)
        self.agents: list[Agent] = []
        headers = {SECRET_HEADER: PROXY_SECRET, "X-Real-IP": "198.51.100.7"}
        self.http = httpx.AsyncClient(
            base_url=f"http://{LOOPBACK}:{self.settings.port}",
            headers=headers,
            timeout=PATIENCE_S,
            transport=CrashingProxy(self._is_last),
        )
        self._process: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def killed(self) -> bool:
        """Whether a process was killed at the chosen crash point."""
        return self.dies_at is not None and self.dies_at in self.points

    @asynccontextmanager
    async def running(self) -> AsyncIterator[CrashEnvironment]:
        start_forkserver()
        server = await asyncio.start_unix_server(self._serve, self.folder / "environment", limit=2**20)
        self._tasks.append(asyncio.create_task(self._keep_it_running()))
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._process:
                self._process.kill()
                await _end_of(self._process)
            await self.http.aclose()
            server.close()
            self._kept_port.close()

    def arm(self) -> None:
        """Count crash points from now on."""
        self._armed = True

    def disarm(self) -> None:
        self._armed = False

    # The manager's process

    async def _keep_it_running(self) -> None:
        while True:
            where = (self.database, self.folder / "environment", self.settings.port)
            order = manager.ManagerStart(*where, self.settings, self.secrets, self.wall_offset_s, self.faketime)
            self._process = PROCESSES.Process(target=manager.run, args=(order,), daemon=True)
            self._process.start()
            await _end_of(self._process)
            self.exits.append(self._process.exitcode)

    def kill(self) -> None:
        """Kill the manager like `docker kill`, at any instant."""
        self._process.kill()

    # Requests of the manager's process

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                answer = await self._answer(json.loads(line))
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if "point" in question:
            return {"die": self._is_last(question["point"])}
        if "reach" in question:
            return {"reached": await FakeReach(self.world).reach(_host(question["reach"]), question["timeout_s"])}
        if question["late"]:
            await asyncio.sleep(LATE_S)
        if "vault" in question:
            return {"done": pickle.dumps(await self._ask_vault(question["vault"], question["given"])).hex()}
        fields = question["job"]
        kinds = {"action": Action(fields["action"]), "host": _host(fields["host"])}
        job = Job(**fields | kinds | {"order": RentalOrder.from_json(fields["order"])})
        return vars(await FakeEngine(self.world).run(job))

    async def _ask_vault(self, call: str, given: str) -> Any:
        """Return the result of a call, or code, message and `restored` of its error."""
        try:
            return await getattr(self.snapshot_service, call)(*pickle.loads(bytes.fromhex(given)))  # noqa: S301
        except SnapshotError as error:
            return error.code, str(error), error.restored

    def _is_last(self, name: str) -> bool:
        if not self._armed or (self._passes_over and re.search(self._passes_over, name)):
            return False
        self.reached[name] += 1
        point = Point(name, self.reached[name])
        self.points.append(point)
        return point == self.dies_at

    # The workers

    def new_agent(self, slots: int = 1) -> Agent:
        number = len(self.agents) + 1
        host = Host(worker_id="", address=f"172.20.128.{number}", host_keys=(host_key(100 + number),))
        agent = Agent(self, self.world.add(host), f"node-{number}", slots)  # type: ignore[arg-type]
        self.agents.append(agent)
        self._tasks.append(asyncio.create_task(self._call_home(agent)))
        return agent

    async def _call_home(self, agent: Agent) -> None:
        """Send heartbeats like a worker's agent, without end and in spite of any error."""
        while True:
            pause_s = PAUSE_S
            if agent.beating:
                with suppress(httpx.TransportError):
                    pause_s = await self._call_once(agent)
            await asyncio.sleep(pause_s)

    async def _call_once(self, agent: Agent) -> float:
        reply = await (agent.beat(lease_s=self._lease_s) if agent.session else agent.register())
        if reply.status_code in {200, 201}:
            return BEAT_S
        if not agent.session and agent.token and reply.status_code in {401, 409}:
            agent.token = None  # the manager does not accept this identity any more
        agent.session = ""
        return PAUSE_S

    def return_of(self, agent: Agent) -> None:
        """Start a worker like after a restart of its container: its files are kept, and every account is locked."""
        agent.node.come_back()
        agent.session = ""
        agent.beating = True

    def holder(self, rental: dict[str, Any]) -> Agent:
        return next(agent for agent in self.agents if agent.worker_id == rental["worker_id"])

    async def holder_of(self, rental: dict[str, Any]) -> Agent:
        """Wait until the rental is active, and return its worker."""
        while True:
            found = await self.rental(rental)
            if found["state"] == "active":
                return self.holder(found)
            await asyncio.sleep(CHECK_S)

    def kept(self, rental: dict[str, Any]) -> dict[str, str] | None:
        """Return the files of the newest snapshot in the manager's catalog, or None if there is none."""
        known = self.rows(f"SELECT epoch, number FROM copies WHERE rental_id = '{rental['id']}'")  # noqa: S608
        newest = max((SnapshotId(row["epoch"], row["number"]) for row in known), default=None)
        return self.snapshot_service.stored[rental["id"]][newest][1] if newest else None

    # Clients, which repeat a request without an answer, like the command line

    async def ask(self, method: str, path: str, token: str = "", **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token or self.secrets.admin_token}"} | request.pop("headers", {})
        while True:
            try:
                return await self.http.request(method, path, headers=headers, **request)
            except httpx.TransportError:
                await asyncio.sleep(PAUSE_S)

    async def rent(self, key: str, token: str = "", **body: Any) -> dict[str, Any]:
        headers = {"Idempotency-Key": key}
        reply = await self.ask("POST", "/api/rent", token, json={"wait_s": 20} | body, headers=headers)
        assert reply.status_code in {201, 202}, reply.text
        return dict(reply.json())

    async def release(self, rental: dict[str, Any]) -> None:
        reply = await self.ask("DELETE", f"/api/rentals/{rental['id']}?wait_s=20")
        assert reply.status_code in {200, 202}, reply.text

    async def rental(self, rental: dict[str, Any]) -> dict[str, Any]:
        return dict((await self.ask("GET", f"/api/rentals/{rental['id']}")).json())

    async def until(self, check: Callable[[dict[str, Any]], bool], rental: dict[str, Any]) -> None:
        """Wait until `check` accepts the rental."""
        while True:
            if check(await self.rental(rental)):
                return
            await asyncio.sleep(CHECK_S)

    async def home(self, rental: dict[str, Any]) -> dict[str, str]:
        """Return the files of the rental's home while the rental is active.

        On a busy machine its worker may be lost meanwhile, so the rental is read before and after its files.
        """
        while True:
            before = await self.rental(rental)
            agent = self.holder(before) if before["state"] == "active" else None
            found = dict(agent.node.homes.get(rental["id"], {})) if agent else {}
            after = await self.rental(rental)
            if agent and (after["state"], after["epoch"]) == ("active", before["epoch"]):
                return found
            await asyncio.sleep(CHECK_S)

    async def until_worker(self, agent: Agent, check: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the worker is registered and `check` accepts it."""
        while True:
            if agent.worker_id:
                reply = await self.ask("GET", f"/api/workers/{agent.worker_id}")
                if reply.status_code == 200 and check(reply.json()):
                    return
            await asyncio.sleep(CHECK_S)

    async def until_health(self, agent: Agent, health: str) -> None:
        await self.until_worker(agent, lambda worker: bool(worker["health"] == health))

    # The state at the end

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query on the database's file."""
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query)]

    def log(self) -> str:
        return self.database.with_suffix(".log").read_text()


def start_forkserver() -> None:
    """Start the process from which managers are forked. It finds the modules to preload by $PYTHONPATH only."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


async def _end_of(process: Any) -> None:
    """Wait until a process ends. No thread waits for it, because two waiters would take its status from each other."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(process.sentinel)
    process.join()


async def eventually(check: Callable[[], bool]) -> None:
    while True:
        if is_true(check):
            return
        await asyncio.sleep(CHECK_S)


def is_true(check: Callable[[], bool]) -> bool:
    """Return the result of `check`, or False if the database cannot be read because a manager is being restarted."""
    with suppress(sqlite3.OperationalError):
        return check()
    return False


def _host(fields: dict[str, Any]) -> Host:
    return Host(**fields | {"host_keys": tuple(fields["host_keys"])})


def keep_port() -> socket.socket:
    """Return a socket that reserves a port, on which only a process with SO_REUSEADDR, like a manager, may listen.

    Without it, the kernel could give the port to another run between two managers, whose manager would then answer.
    """
    kept = socket.socket()
    kept.bind((LOOPBACK, 0))
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # set after the bind, so no bind to port 0 gets the port
    return kept
