"""A composition root for simulated workers: the real manager with an engine and a reach that connect to nothing.

`python -m bench.manager` starts like the real manager, with settings in ORION_* and secrets through a pipe. It belongs
to the benchmark: no code of the product imports it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench import pool
from orion.manager.ansible.port import Job, Outcome
from orion.manager.app import Ports
from orion.manager.controllers import reconciler
from orion.manager.fakes.snapshots import FakeSnapshotService
from orion.manager.fakes.workers import FakeWorld
from orion.manager.main import log_as_json, open_store, serve
from orion.manager.settings import Secrets, Settings
from orion.manager.ssh.port import Host, Reached
from orion.manager.store.database import Store

NAME = "decide"
"""The name of the reconciler's decision, which is wrapped here."""


class IdleEngine:
    """Implements `port.Engine`: each job takes the same time and succeeds."""

    def __init__(self, job_s: float) -> None:
        self._job_s = job_s

    async def run(self, job: Job) -> Outcome:
        await asyncio.sleep(self._job_s)
        return Outcome(ok=True, report={"changed": True, "epoch": job.order.epoch, "left": []})


class EverywhereReach:
    """Implements `port.Reach`: each worker answers with its host key."""

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        await asyncio.sleep(0)
        return Reached.YES


def log_decisions() -> None:
    """Write a line to stdout for each decision of the reconciler: its seconds and its number of steps."""
    decide = getattr(reconciler, NAME)

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        decision = decide(*arguments, **named)
        seconds = time.perf_counter() - began
        sys.stdout.write(json.dumps({"bench": "decision", "seconds": seconds, "steps": len(decision.steps)}) + "\n")
        return decision

    setattr(reconciler, NAME, timed)


def main() -> None:
    arguments = _arguments()
    log_as_json()
    settings = Settings()
    secrets = Secrets.from_pipe(int(os.environ["ORION_SECRETS_FD"]))
    if arguments.workers and not Path(settings.database_url.removeprefix("sqlite:///")).exists():
        gateway = str(settings.subnet.network_address + 1)  # of the machine that sends the heartbeats
        pool.fill(settings.database_url, arguments.seed, arguments.workers, 1, gateway, arguments.spare)
    log_decisions()
    store = open_store(settings, Store)
    # A full disk, so no snapshots. No proxy probe, because growth.py has no proxy.
    ports = Ports(
        engine=IdleEngine(arguments.job_s),
        reach=EverywhereReach(),
        snapshot_service=FakeSnapshotService(world=FakeWorld(), wall=time.time),
        proxy_probe=None,
        snapshots_disk=lambda: 1.0,
    )
    serve(settings, secrets, store, ports, arguments.host)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--job-s", type=float, default=0.0, help="seconds of a job")
    parser.add_argument("--workers", type=int, default=0, help="fill a new database with this number of workers")
    parser.add_argument("--spare", type=int, default=0, help="free slots of one more worker")
    parser.add_argument("--seed", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
