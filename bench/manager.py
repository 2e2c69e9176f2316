"""A composition root for simulated workers: the real manager, with an engine and a reach that touch nothing.

`python -m bench.manager`, started like the real one (its settings in ORION_*, its secrets through a pipe). It is part
of the benchmark alone: nothing that is shipped knows of it.
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
"""What the reconciler calls its decision, where it is wrapped."""


class IdleEngine:
    """Implements `port.Engine`: every job takes the same time and succeeds."""

    def __init__(self, job_s: float) -> None:
        self._job_s = job_s

    async def run(self, job: Job) -> Outcome:
        await asyncio.sleep(self._job_s)
        return Outcome(ok=True, report={"changed": True, "epoch": job.order.epoch, "left": []})


class EverywhereReach:
    """Implements `port.Reach`: every worker is where it should be."""

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        await asyncio.sleep(0)
        return Reached.YES


def tell_decisions() -> None:
    """One line on stdout for each decision of the reconciler: how long it took and how many steps came of it."""
    decide = getattr(reconciler, NAME)

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        decision = decide(*given, **named)
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
    tell_decisions()
    store = open_store(settings, Store)
    # No copies: their disk is full. No door: it would ask itself through a proxy that growth does not have.
    ports = Ports(
        IdleEngine(arguments.job_s), EverywhereReach(), FakeSnapshotService(FakeWorld(), time.time), None, lambda: 1.0
    )
    serve(settings, secrets, store, ports, arguments.host)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--job-s", type=float, default=0.0, help="how long a job of the engine takes")
    parser.add_argument("--workers", type=int, default=0, help="fill an absent database with so many")
    parser.add_argument("--spare", type=int, default=0, help="free slots of one worker more")
    parser.add_argument("--seed", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
