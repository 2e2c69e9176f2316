"""A manager in a process of its own, which asks the test at each crash point whether to die there.

The module has a composition root of its own, which wraps the store's transactions and the ports; the code that is
shipped has no crash points. There is no list of crash points: each commit and each call of a port is one.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event

from orion.manager import main
from orion.manager.ansible.client import RESTARTED
from orion.manager.ansible.port import Job, Outcome
from orion.manager.app import Ports
from orion.manager.controllers.wall_clock import boot_id, boot_time_s
from orion.manager.domain.snapshot_plan import SnapshotLimits
from orion.manager.domain.snapshots import Snapshot, SnapshotId
from orion.manager.domain.steps import Event
from orion.manager.settings import Secrets, Settings
from orion.manager.snapshots.port import (
    RECOVER_DEADLINE_S,
    RESTORE_DEADLINE_S,
    SNAPSHOT_DEADLINE_S,
    Home,
    SnapshotError,
    Taken,
)
from orion.manager.ssh.port import Host, Reached
from orion.manager.store.ballast import Ballast
from orion.manager.store.database import Store


@dataclass(frozen=True)
class ManagerStart:
    """The arguments with which a manager's process starts."""

    database: Path
    environment: Path
    """The socket of the test, which simulates the workers and decides when the manager dies."""
    port: int
    settings: Settings
    secrets: Secrets
    wall_offset_s: float
    """Seconds by which the manager's wall clock is ahead of this machine's."""
    faketime: str = ""
    """The offset of the process's wall clock for libfaketime, such as "+40d", or an empty string for none."""


def run(order: ManagerStart) -> None:
    """Run the manager until it is killed."""
    if order.faketime and "FAKETIME" not in os.environ:
        restart_with_faketime(order)
    log = os.open(order.database.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    main.log_as_json()
    points = CrashPoints(order.environment)
    store = main.open_store(order.settings, lambda url, ballast: CrashingStore(url, ballast, points))
    engine, reach = RemoteEngine(order.environment, points), RemoteReach(order.environment, points)
    snapshot_service = RemoteVault(order.environment, points)
    ports = Ports(
        engine=engine,
        reach=reach,
        snapshot_service=snapshot_service,
        proxy_probe=None,
        snapshots_disk=lambda: 0.0,
        wall=lambda: time.time() + order.wall_offset_s,
        boot_time=boot_time_s,
        boot_id=boot_id(),
    )
    main.serve(order.settings, order.secrets, store, ports, main.LOOPBACK)


def restart_with_faketime(order: ManagerStart) -> None:
    """Replace this process by one with libfaketime, which can only be loaded when a process starts."""
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        raise FileNotFoundError("libfaketime is missing: apt-get install faketime")
    file = order.database.with_suffix(".order")
    file.write_bytes(pickle.dumps(order))
    clocks = {"LD_PRELOAD": str(libraries[0]), "FAKETIME": order.faketime, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    environment = os.environ | clocks | {"PYTHONPATH": os.pathsep.join(sys.path)}
    begin = "import pickle, sys; from crash import manager; manager.run(pickle.load(open(sys.argv[1], 'rb')))"
    os.execve(sys.executable, [sys.executable, "-c", begin, str(file)], environment)  # noqa: S606


class CrashPoints:
    """Reports each crash point when it is reached, and waits for the answer: continue or die."""

    def __init__(self, environment: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(environment))
        self._file = self._socket.makefile("rw")
        self._one_at_a_time = threading.Lock()

    def reach(self, name: str) -> None:
        if self.is_last(name):
            die()

    def is_last(self, name: str) -> bool:
        with self._one_at_a_time:
            self._file.write(json.dumps({"point": name}) + "\n")
            self._file.flush()
            return bool(json.loads(self._file.readline())["die"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class CrashingStore(Store):
    """A store with two crash points for each commit: before it is written, and before its caller gets the result."""

    def __init__(self, url: str, ballast: Ballast | None, points: CrashPoints) -> None:
        super().__init__(url, ballast)
        self._points = points

    def migrate(self) -> None:
        def about_to_commit(_: Connection) -> None:
            self._points.reach("before the commit of migrate")

        event.listen(self._engine, "commit", about_to_commit)
        super().migrate()
        event.remove(self._engine, "commit", about_to_commit)
        self._points.reach("after the commit of migrate")

    def _transact(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[Event], Any]:
        name = ""

        def and_then(connection: Connection, *args: Any, **kwargs: Any) -> Any:
            nonlocal name
            result = function(connection, *args, **kwargs)
            name = described(function, connection.info["recorded"])
            self._points.reach(f"before the commit of {name}")
            return result

        done = super()._transact(and_then, args, kwargs)
        self._points.reach(f"after the commit of {name}")
        return done


def described(function: Callable[..., Any], recorded: list[Event]) -> str:
    """Return the name of a commit: the function that made it, and the kinds of its events."""
    module = function.__module__.rsplit(".", 1)[-1]
    kinds = ", ".join(event.kind for event in recorded)
    return f"{module}.{function.__name__}{f' ({kinds})' if kinds else ''}"


class RemoteEngine:
    """An implementation of `port.Engine` that runs jobs in the process of the test.

    A call has six crash points: the manager or the engine's process is killed before it, during it, and after its
    answer. A job in progress takes effect later, when the next manager or engine already runs.
    """

    def __init__(self, environment: Path, points: CrashPoints) -> None:
        self._environment = environment
        self._points = points

    async def run(self, job: Job) -> Outcome:
        self._points.reach(f"before {job.action}")
        if self._points.is_last(f"the engine before {job.action}"):
            return RESTARTED
        manager_dies = self._points.is_last(f"during {job.action}")
        engine_dies = self._points.is_last(f"the engine during {job.action}")
        request = {"job": asdict(job), "late": manager_dies or engine_dies}
        if engine_dies:
            await send(self._environment, request)
            return RESTARTED
        answer = await ask(self._environment, request, manager_dies)
        if self._points.is_last(f"the engine after {job.action}"):
            return RESTARTED
        self._points.reach(f"after {job.action}")
        return Outcome(**answer)


class RemoteReach:
    """An implementation of `port.Reach` that checks workers in the process of the test."""

    def __init__(self, environment: Path, points: CrashPoints) -> None:
        self._environment = environment
        self._points = points

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        self._points.reach("before reach")
        answer = await ask(self._environment, {"reach": asdict(host), "timeout_s": timeout_s}, and_die=False)
        self._points.reach("after reach")
        return Reached(answer["reached"])


class RemoteVault:
    """An implementation of `port.SnapshotService` that keeps snapshots in the process of the test."""

    def __init__(self, environment: Path, points: CrashPoints) -> None:
        self._environment = environment
        self._points = points

    async def take(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SNAPSHOT_DEADLINE_S,
        protected: SnapshotId | None = None,
        for_migration: bool = False,
    ) -> Taken:
        done: Taken = await self._ask("take", home, limits, deadline_s, protected, for_migration)
        return done

    async def recover(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = RECOVER_DEADLINE_S,
        protected: SnapshotId | None = None,
    ) -> Taken:
        done: Taken = await self._ask("recover", home, limits, deadline_s, protected)
        return done

    async def restore(
        self,
        home: Home,
        snapshot_id: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        previous: SnapshotId | None = None,
        precopy: bool = False,
    ) -> Snapshot | None:
        done: Snapshot | None = await self._ask("restore", home, snapshot_id)
        return done

    async def snapshots(self, rental_id: str, uid: int) -> list[Snapshot]:
        done: list[Snapshot] = await self._ask("snapshots", rental_id, uid)
        return done

    async def remove(self, rental_id: str, uid: int) -> None:
        await self._ask("remove", rental_id, uid)

    async def rentals(self) -> list[str]:
        done: list[str] = await self._ask("rentals")
        return done

    async def short_of_room(self) -> list[str]:
        done: list[str] = await self._ask("short_of_room")
        return done

    async def _ask(self, call: str, *arguments: Any) -> Any:
        self._points.reach(f"before {call}")
        manager_dies = self._points.is_last(f"during {call}")
        request = {"vault": call, "given": pickle.dumps(arguments).hex(), "late": manager_dies}
        answer = pickle.loads(bytes.fromhex((await ask(self._environment, request, manager_dies))["done"]))  # noqa: S301
        self._points.reach(f"after {call}")
        if isinstance(answer, tuple):
            raise SnapshotError(*answer)
        return answer


async def ask(environment: Path, request: dict[str, Any], and_die: bool) -> dict[str, Any]:
    """Send a request to the test, and return its answer. `and_die`: die after sending it."""
    reader, writer = await asyncio.open_unix_connection(environment)
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        await writer.drain()
        if and_die:
            die()
        return dict(json.loads(await reader.readline()))
    finally:
        writer.close()


async def send(environment: Path, request: dict[str, Any]) -> None:
    """Send a request to the test without waiting for an answer."""
    _, writer = await asyncio.open_unix_connection(environment)
    writer.write(json.dumps(request).encode() + b"\n")
    await writer.drain()
    writer.close()
