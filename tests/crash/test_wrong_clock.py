"""A real manager process whose wall clock is wrong, while its monotonic clock is right."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

from crash.environment import PATIENCE_S, PAUSE_S, CrashEnvironment, eventually
from support.builders import host_key

HOUR_S = 3600


async def until_two_expiry_rounds(environment: CrashEnvironment) -> None:
    """Wait until this manager has completed two rounds of the expiry controller."""
    rounds = re.compile(r'^orion_loop_rounds_total\{loop="expiry",outcome="ok"\} (\S+)$', re.MULTILINE)
    while True:
        found = rounds.search((await environment.ask("GET", "/metrics")).text)
        if found and float(found[1]) >= 2:
            return
        await asyncio.sleep(PAUSE_S)


async def test_a_manager_that_starts_with_a_clock_forty_days_ahead_ends_no_rental_on_its_own(
    tmp_path: Path,
) -> None:
    environment = CrashEnvironment(tmp_path / "clock")
    async with environment.running(), asyncio.timeout(2 * PATIENCE_S):
        await environment.until_health(environment.new_agent(), "ready")
        lab = await environment.rent("key-1", name="lab", ssh_public_key=host_key(9001), ttl_s=HOUR_S)
        token = (await environment.ask("POST", "/api/tokens", json={"name": "alice", "ttl_s": HOUR_S})).json()["token"]
        assert lab["state"] == "active"

        environment.faketime = "+40d"
        environment.kill()
        await eventually(lambda: environment.exits == [-signal.SIGKILL])
        problem = (await environment.ask("GET", "/api/status")).json()["clock"]
        assert problem is not None
        assert "40.0 days ahead" in problem
        await until_two_expiry_rounds(environment)
        assert (await environment.rental(lab))["state"] not in {"releasing", "expired"}
        assert (await environment.ask("GET", "/api/rentals", token)).status_code == 200

        assert (await environment.ask("POST", "/api/admin/clock")).json() == {"problem": None}
        await environment.until(lambda rental: rental["state"] == "expired", lab)
        assert (await environment.ask("GET", "/api/rentals", token)).status_code == 401
        assert environment.exits == [-signal.SIGKILL]
        assert "exception" not in environment.log()
