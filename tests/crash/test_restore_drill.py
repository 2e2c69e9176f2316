"""A backup is taken while everything runs, the world goes on, and the operator goes back to it: the whole drill."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

from crash.stage import PATIENCE_S, Stage, eventually
from support.builders import host_key

from orion.manager.store.backup import EPOCH_GAP, UID_GAP

SLOWER = 5.0
"""How many times as long as elsewhere the clocks are: a worker that comes late on a busy machine adds an epoch."""


async def rent(stage: Stage, name: str) -> dict[str, Any]:
    return await stage.rent(f"key-{name}", name=name, ssh_public_key=host_key(9001))


async def epoch_of(stage: Stage, rental: dict[str, Any]) -> int:
    return int((await stage.rental(rental))["epoch"])


async def restore(stage: Stage, backup: bytes) -> dict[str, Any]:
    reply = await stage.ask("POST", "/api/admin/restore", content=backup)
    assert reply.status_code == 200, reply.text
    plan: dict[str, Any] = reply.json()
    assert (await stage.ask("POST", f"/api/admin/restore/{plan['id']}")).status_code == 202
    await eventually(lambda: stage.exits == [-signal.SIGTERM])  # as uvicorn ends when it is told to
    return plan


async def test_going_back_to_a_backup_keeps_what_it_knows_and_destroys_nothing_that_it_does_not(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "drill", slower=SLOWER)
    async with stage.running(), asyncio.timeout(2 * PATIENCE_S):
        for agent in [stage.new_agent() for _ in range(3)]:
            await stage.until_health(agent, "ready")
        kept, moved, ended = [await rent(stage, name) for name in ("kept", "moved", "ended")]
        token = (await stage.ask("POST", "/api/tokens", json={"name": "alice"})).json()
        backup = (await stage.ask("GET", "/api/admin/backup")).content

        # The world goes on: one is ended, one moves, one is new, a token is revoked.
        first, other = await stage.holder_of(moved), await stage.holder_of(ended)
        await stage.release(ended)
        first.die()
        await stage.until(lambda r: r["state"] == "active" and r["worker_id"] == other.worker_id, moved)
        stage.return_of(first)
        await stage.until_health(first, "ready")
        since = await rent(stage, "since")
        assert await stage.holder_of(since) is first
        await stage.ask("DELETE", f"/api/tokens/{token['id']}")
        last_event = stage.rows("SELECT max(id) AS id FROM events")[0]["id"]
        uids = {row["uid"] for row in stage.rows("SELECT uid FROM rentals")}

        plan = await restore(stage, backup)
        assert [one["name"] for one in plan["forgotten"]] == ["since"]
        assert [one["name"] for one in plan["revived"]] == ["ended"]

        # What the backup knows and the worker has goes on as it was.
        await stage.until(lambda r: r["state"] == "active", kept)
        holder = await stage.holder_of(kept)
        await stage.until_health(holder, "ready")
        await eventually(lambda: holder.unlocked() == {kept["id"]: 1})

        # What it does not know is kept, locked, until the operator decides.
        for agent, rental, epoch in ((first, since, 1), (other, moved, 2)):
            await stage.until_health(agent, "quarantined")
            assert rental["id"] in (await stage.ask("GET", f"/api/workers/{agent.worker_id}")).json()["explanation"]
            assert agent.node.accounts[rental["id"]].epoch == epoch
            assert agent.unlocked() == {}
        status = (await stage.ask("GET", "/api/status")).json()
        assert {item["id"] for item in status["overdue"]} == {first.worker_id, other.worker_id}

        # What it believes to run where it does not waits, and is made anew beyond every epoch that was given.
        for rental in (moved, ended):
            await stage.until(lambda r: r["state"] == "queued", rental)
        for agent in [stage.new_agent(), stage.new_agent()]:
            await stage.until_health(agent, "ready")
        for rental in (moved, ended):
            await stage.until(lambda r: r["state"] == "active", rental)
            assert await epoch_of(stage, rental) > EPOCH_GAP

        # The operator decides.
        for agent in (first, other):
            reply = await stage.ask("POST", f"/api/workers/{agent.worker_id}/resume?give_up=true")
            assert reply.status_code == 200, reply.text
            await stage.until_health(agent, "ready")
            assert agent.node.accounts == {}

        # No number comes back, and what was revoked stays so.
        assert (await stage.ask("GET", "/api/rentals", token["token"])).status_code == 401
        new = await rent(stage, "new")
        (row,) = stage.rows(f"SELECT uid FROM rentals WHERE id = '{new['id']}'")  # noqa: S608
        assert row["uid"] > max(uids) + UID_GAP / 2
        restored = stage.rows("SELECT id FROM events WHERE kind = 'platform.restored'")[0]["id"]
        assert restored > last_event
        assert "exception" not in stage.log()
