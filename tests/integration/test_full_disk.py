"""A test on a really full disk: the manager's store continues, and later there is room for snapshots again."""

from __future__ import annotations

from test_manager_image import build
from worker_support import docker

PROGRAM = r"""
import asyncio, os
from pathlib import Path
from orion.manager.domain.steps import Event
from orion.manager.store import events
from orion.manager.store.ballast import Ballast
from orion.manager.store.database import Store, record

url = "sqlite:////data/orion.db"
store = Store(url, Ballast.of(url, 8 << 20))
store.migrate()

async def go():
    event = lambda number: Event(kind="takeover", actor="test", reason=str(number))
    write = lambda number: store.write(lambda connection: record(connection, event(number)))
    await write(0)
    assert Path("/data/orion.db.ballast").exists()
    with open("/data/fill", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as full:
            assert full.errno == 28, full
    for number in range(1, 2000):
        await write(number)
    kept = await store.read(events.page, None, None, None, 0, 3000)
    print(len(kept), Path("/data/orion.db.ballast").exists())

asyncio.run(go())
store.close()
"""


def test_two_thousand_commits_succeed_on_a_full_disk() -> None:
    done = docker(
        "run", "--rm", "--tmpfs", "/data:size=24m", "--entrypoint", "/opt/orion/venv/bin/python", build(), "-c", PROGRAM
    )
    assert done.split() == ["2000", "False"]
