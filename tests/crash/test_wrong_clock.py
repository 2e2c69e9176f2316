"""A manager's process whose wall clock is wrong, as a machine's is: the process is real, and so are its two clocks."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

from crash.stage import PATIENCE_S, PAUSE_S, Stage, eventually
from support.builders import host_key

HOUR_S = 3600


async def until_it_has_looked_twice(stage: Stage) -> None:
    """Wait until this manager has looked for rentals whose time is over, and then once more."""
    rounds = re.compile(r'^orion_loop_rounds_total\{loop="expiry",outcome="ok"\} (\S+)$', re.MULTILINE)
    while True:
        found = rounds.search((await stage.ask("GET", "/metrics")).text)
        if found and float(found[1]) >= 2:
            return
        await asyncio.sleep(PAUSE_S)


async def test_a_manager_that_starts_with_a_clock_forty_days_ahead_ends_nothing_before_an_operator_says_so(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path / "clock")
    async with stage.running(), asyncio.timeout(2 * PATIENCE_S):
        await stage.until_health(stage.new_agent(), "ready")
        lab = await stage.rent("key-1", name="lab", ssh_public_key=host_key(9001), ttl_s=HOUR_S)
        token = (await stage.ask("POST", "/api/tokens", json={"name": "alice", "ttl_s": HOUR_S})).json()["token"]
        assert lab["state"] == "active"

        stage.faketime = "+40d"
        stage.kill()
        await eventually(lambda: stage.exits == [-signal.SIGKILL])
        problem = (await stage.ask("GET", "/api/status")).json()["clock"]
        assert problem is not None
        assert "40.0 days ahead" in problem
        await until_it_has_looked_twice(stage)
        assert (await stage.rental(lab))["state"] not in {"releasing", "expired"}
        assert (await stage.ask("GET", "/api/rentals", token)).status_code == 200

        assert (await stage.ask("POST", "/api/admin/clock")).json() == {"problem": None}
        await stage.until(lambda rental: rental["state"] == "expired", lab)
        assert (await stage.ask("GET", "/api/rentals", token)).status_code == 401
        assert stage.exits == [-signal.SIGKILL]
        assert "exception" not in stage.log()
