"""A manager in a process of its own, that asks at each crash point whether it is to die there.

Its own composition root: the store's transactions and the ports are wrapped here, and nothing of it is in the code
that is shipped. The crash points are not written down anywhere: each commit and each call of a port names itself.
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
    COPY_DEADLINE_S,
    RESTORE_DEADLINE_S,
    SALVAGE_DEADLINE_S,
    Home,
    SnapshotError,
    Taken,
)
from orion.manager.ssh.port import Host, Reached
from orion.manager.store.ballast import Ballast
from orion.manager.store.database import Store


@dataclass(frozen=True)
class Order:
    """What a manager starts with."""

    database: Path
    stage: Path
    """The socket of the world outside: workers, and who decides when to die."""
    port: int
    settings: Settings
    secrets: Secrets
    wall_offset_s: float
    """How far its wall clock is ahead of this machine's."""
    faketime: str = ""
    """Where libfaketime puts the wall clock of the whole process, such as "+40d"; empty: it is this machine's."""


def run(order: Order) -> None:
    """The process: until it is killed."""
    if order.faketime and "FAKETIME" not in os.environ:
        become_one_with_another_clock(order)
    log = os.open(order.database.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    main.log_as_json()
    points = Points(order.stage)
    store = main.open_store(order.settings, lambda url, ballast: PointedStore(url, ballast, points))
    engine, reach = RemoteEngine(order.stage, points), RemoteReach(order.stage, points)
    snapshot_service = RemoteVault(order.stage, points)
    ports = Ports(
        engine,
        reach,
        snapshot_service,
        None,
        lambda: 0.0,
        wall=lambda: time.time() + order.wall_offset_s,
        boot_time=boot_time_s,
        boot_id=boot_id(),
    )
    main.serve(order.settings, order.secrets, store, ports, main.LOOPBACK)


def become_one_with_another_clock(order: Order) -> None:
    """Begin this process anew below libfaketime, which is loaded before all else or not at all."""
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        raise FileNotFoundError("libfaketime is not there: apt-get install faketime")
    told = order.database.with_suffix(".order")
    told.write_bytes(pickle.dumps(order))
    clocks = {"LD_PRELOAD": str(libraries[0]), "FAKETIME": order.faketime, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    environment = os.environ | clocks | {"PYTHONPATH": os.pathsep.join(sys.path)}
    begin = "import pickle, sys; from crash import manager; manager.run(pickle.load(open(sys.argv[1], 'rb')))"
    os.execve(sys.executable, [sys.executable, "-c", begin, str(told)], environment)  # noqa: S606


class Points:
    """Reports each crash point as it is reached, and waits for the answer: go on, or die here."""

    def __init__(self, stage: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(stage))
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


class PointedStore(Store):
    """Each commit is two points: nothing of it is written yet, and it is written but nobody knows."""

    def __init__(self, url: str, ballast: Ballast | None, points: Points) -> None:
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
    """A commit by the function that wrote it and what happened in it."""
    room = function.__module__.rsplit(".", 1)[-1]
    kinds = ", ".join(event.kind for event in recorded)
    return f"{room}.{function.__name__}{f' ({kinds})' if kinds else ''}"


class RemoteEngine:
    """Implements `port.Engine` in another process's world.

    A call is six points: the manager, or the engine's process, is killed before it, while it is under way, when it
    has an answer. What is under way lands later, when the next one is already there.
    """

    def __init__(self, stage: Path, points: Points) -> None:
        self._stage = stage
        self._points = points

    async def run(self, job: Job) -> Outcome:
        self._points.reach(f"before {job.action}")
        if self._points.is_last(f"the engine before {job.action}"):
            return RESTARTED
        outlives_us = self._points.is_last(f"while {job.action} is under way")
        outlives_the_engine = self._points.is_last(f"the engine while {job.action} is under way")
        question = {"job": asdict(job), "late": outlives_us or outlives_the_engine}
        if outlives_the_engine:
            await tell(self._stage, question)
            return RESTARTED
        answer = await ask(self._stage, question, outlives_us)
        if self._points.is_last(f"the engine after {job.action}"):
            return RESTARTED
        self._points.reach(f"after {job.action}")
        return Outcome(**answer)


class RemoteReach:
    """Implements `port.Reach` in another process's world."""

    def __init__(self, stage: Path, points: Points) -> None:
        self._stage = stage
        self._points = points

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        self._points.reach("before reach")
        answer = await ask(self._stage, {"reach": asdict(host), "timeout_s": timeout_s}, and_die=False)
        self._points.reach("after reach")
        return Reached(answer["reached"])


class RemoteVault:
    """Implements `port.Vault` in another process's world."""

    def __init__(self, stage: Path, points: Points) -> None:
        self._stage = stage
        self._points = points

    async def copy(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = COPY_DEADLINE_S,
        spare: SnapshotId | None = None,
        moving: bool = False,
    ) -> Taken:
        done: Taken = await self._ask("copy", home, limits, deadline_s, spare, moving)
        return done

    async def salvage(
        self,
        home: Home,
        limits: SnapshotLimits,
        deadline_s: float = SALVAGE_DEADLINE_S,
        spare: SnapshotId | None = None,
    ) -> Taken:
        done: Taken = await self._ask("salvage", home, limits, deadline_s, spare)
        return done

    async def restore(
        self,
        home: Home,
        generation: SnapshotId | None = None,
        deadline_s: float = RESTORE_DEADLINE_S,
        filled: SnapshotId | None = None,
        again: bool = False,
    ) -> Snapshot | None:
        done: Snapshot | None = await self._ask("restore", home, generation)
        return done

    async def copies(self, rental_id: str, uid: int) -> list[Snapshot]:
        done: list[Snapshot] = await self._ask("copies", rental_id, uid)
        return done

    async def remove(self, rental_id: str, uid: int) -> None:
        await self._ask("remove", rental_id, uid)

    async def rentals(self) -> list[str]:
        done: list[str] = await self._ask("rentals")
        return done

    async def short_of_room(self) -> list[str]:
        done: list[str] = await self._ask("short_of_room")
        return done

    async def _ask(self, call: str, *given: Any) -> Any:
        self._points.reach(f"before {call}")
        outlives_us = self._points.is_last(f"while {call} is under way")
        question = {"vault": call, "given": pickle.dumps(given).hex(), "late": outlives_us}
        answer = pickle.loads(bytes.fromhex((await ask(self._stage, question, outlives_us))["done"]))  # noqa: S301
        self._points.reach(f"after {call}")
        if isinstance(answer, tuple):
            raise SnapshotError(*answer)
        return answer


async def ask(stage: Path, question: dict[str, Any], and_die: bool) -> dict[str, Any]:
    """One question to the world outside. `and_die`: when it is on its way, for ever without an answer."""
    reader, writer = await asyncio.open_unix_connection(stage)
    try:
        writer.write(json.dumps(question).encode() + b"\n")
        await writer.drain()
        if and_die:
            die()
        return dict(json.loads(await reader.readline()))
    finally:
        writer.close()


async def tell(stage: Path, order: dict[str, Any]) -> None:
    """Something for the world outside to do, of which nobody hears again."""
    _, writer = await asyncio.open_unix_connection(stage)
    writer.write(json.dumps(order).encode() + b"\n")
    await writer.drain()
    writer.close()
