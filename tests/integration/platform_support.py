"""The real proxy in front of the real manager, with one fake worker that calls home from this machine.

Attacks meet the code that is shipped, and a rental is active at once and costs nothing.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from proxy_support import SECRET, Proxy, answers, new_proxy, wait_until
from support.builders import host_key, new_secrets
from support.patience import PATIENCE_S

from orion.manager import main
from orion.manager.app import Ports
from orion.manager.fakes.snapshots import FakeSnapshotService
from orion.manager.fakes.workers import FakeEngine, FakeReach, FakeWorld
from orion.manager.gateway.port_connections import end_connections
from orion.manager.settings import Secrets, Settings
from orion.manager.ssh.port import Host
from orion.manager.store.database import Store

PROCESSES = multiprocessing.get_context("forkserver")
SLOTS = 64
BEAT_S = 2.0
WORKER_KEY = host_key(7)


@dataclass(frozen=True)
class ManagerArguments:
    """The arguments of the manager's process."""

    settings: Settings
    secrets: Secrets
    log: Path
    here: str
    """This machine's address in the proxy's network: of the manager, and of the worker."""


def run_manager(start: ManagerArguments) -> None:
    """Run the manager; the main function of its process."""
    with start.log.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    main.log_as_json()
    world = FakeWorld()
    world.add(Host(worker_id="", address=start.here, host_keys=(WORKER_KEY,)))
    store = main.open_store(start.settings, Store)
    ports = Ports(
        engine=FakeEngine(world),
        reach=FakeReach(world),
        snapshot_service=FakeSnapshotService(world=world, wall=time.time),
        proxy_probe=None,
        snapshots_disk=lambda: 0.0,
        end_connections=end_connections,
    )
    main.serve(start.settings, start.secrets, store, ports, start.here)


class Platform:
    """The proxy, the manager's process, and the fake worker."""

    def __init__(self, shipped_proxy: Proxy, folder: Path) -> None:
        self.proxy = shipped_proxy
        self.folder = folder
        self.url = shipped_proxy.url
        self.secrets = new_secrets(SECRET)
        self.log = folder / "manager.log"
        wide = ".".join(shipped_proxy.network.split(".")[:2])
        # Wider than the proxy's network, so that this machine's end of it may be a worker.
        settings = Settings(
            subnet=f"{wide}.0.0/16",
            proxy_address=f"{shipped_proxy.network}.2",
            app_address=f"{shipped_proxy.network}.3",
            database_url=f"sqlite:///{folder / 'orion.db'}",
            lock_file=str(folder / "lock"),
        )
        start = ManagerArguments(settings, self.secrets, self.log, f"{shipped_proxy.network}.1")
        self._process = PROCESSES.Process(target=run_manager, args=(start,), daemon=True)
        self.worker_token = ""
        self.session = ""
        self._seq = 0
        self._stopping = threading.Event()
        self._agent = threading.Thread(target=self._call_home, daemon=True)

    def start(self) -> None:
        self._process.start()
        wait_until(lambda: answers(f"{self.url}/healthz"), "the manager answers")
        self._agent.start()
        wait_until(lambda: self.status()["workers"].get("ready") == 1, "the worker is ready")

    def stop(self) -> None:
        self._stopping.set()
        self._agent.join()
        self._process.terminate()
        self._process.join()

    def client(self, token: str | None = None, **options: Any) -> httpx.Client:
        """Return a client that connects for each call: Nginx closes a connection answered before the request's body."""
        headers = {"Authorization": f"Bearer {token or self.secrets.admin_token}"}
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=60, limits=limits, **options)

    def status(self) -> dict[str, Any]:
        with self.client() as admin:
            return dict(admin.get("/api/status").raise_for_status().json())

    def worker_health(self) -> str:
        with self.client() as admin:
            return str(admin.get("/api/workers").raise_for_status().json()["items"][0]["health"])

    def token(self, name: str, role: str = "client", **fields: Any) -> str:
        with self.client() as admin:
            reply = admin.post("/api/tokens", json={"name": name, "role": role, **fields}).raise_for_status()
            return str(reply.json()["token"])

    def events(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        after = 0
        with self.client() as admin:
            while items := admin.get("/api/events", params={"after": after, "limit": 500}).json()["items"]:
                found += items
                after = items[-1]["id"]
        return found

    def _call_home(self) -> None:
        """Register and send heartbeats by the contract, with empty inventories: only the engine reports rentals."""
        body = {"hostname": "made-up", "ssh_host_keys": [WORKER_KEY], "slots": SLOTS, "boot_id": "boot-0001"}
        with httpx.Client(base_url=self.url, trust_env=False, timeout=10) as http:
            while not self._stopping.is_set():
                try:
                    is_accepted = self._send(http, body)
                except httpx.TransportError:  # as a worker does: it calls again
                    is_accepted = False
                self._stopping.wait(BEAT_S if is_accepted else 0.2)

    def _send(self, http: httpx.Client, body: dict[str, Any]) -> bool:
        """Register, or send a heartbeat; return whether that was taken."""
        headers = {"Authorization": f"Bearer {self.worker_token or self.secrets.join_token}"}
        if not self.session:
            reply = http.post("/api/register", json=body | {"agent_version": "0.1"}, headers=headers)
            if reply.status_code == 201:
                answer, self._seq = reply.json(), 0
                self.worker_token, self.session = answer["worker_token"], answer["session_id"]
        else:
            self._seq += 1
            beat = {"session_id": self.session, "seq": self._seq}
            reply = http.post("/api/heartbeat", json=beat, headers=headers)
            if reply.status_code in {401, 409}:
                self.session = ""
        return reply.is_success


@contextmanager
def platform(folder: Path) -> Iterator[Platform]:
    with new_proxy(app_host=1) as shipped_proxy:
        shipped_proxy.give_secret()
        wait_until(shipped_proxy.answers, "the proxy answers")
        running = Platform(shipped_proxy, folder)
        running.start()
        try:
            yield running
        finally:
            running.stop()


async def raw(
    port: int,
    *parts: bytes,
    pause_s: float = 0.0,
    within_s: float = 5.0,
    ends: bool = False,
    is_answered: bool = False,
) -> bytes:
    """Send these bytes unchanged; return the answer until the peer closes or `within_s` has passed.

    `ends`: close this side of the connection after them. `is_answered`: wait for a first part of the answer, from which
    the time counts.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        async with asyncio.timeout(PATIENCE_S if is_answered else within_s) as limit:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
            if ends:
                writer.write_eof()
            while part := await reader.read(65536):
                if is_answered and not got:
                    limit.reschedule(asyncio.get_running_loop().time() + within_s)
                got += part
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return got
