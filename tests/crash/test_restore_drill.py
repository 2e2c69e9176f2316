"""A backup is made while the platform runs, the platform changes, and an operator restores the backup."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

from crash.environment import PATIENCE_S, CrashEnvironment, eventually
from support.builders import host_key

from orion.manager.store.backup import EPOCH_GAP, UID_GAP

SLOWER = 5.0
"""The factor of all clocks. With shorter ones a late heartbeat on a busy machine would cause a takeover."""


async def rent(environment: CrashEnvironment, name: str) -> dict[str, Any]:
    return await environment.rent(f"key-{name}", name=name, ssh_public_key=host_key(9001))


async def epoch_of(environment: CrashEnvironment, rental: dict[str, Any]) -> int:
    return int((await environment.rental(rental))["epoch"])


async def restore(environment: CrashEnvironment, backup: bytes) -> dict[str, Any]:
    reply = await environment.ask("POST", "/api/admin/restore", content=backup)
    assert reply.status_code == 200, reply.text
    plan: dict[str, Any] = reply.json()
    assert (await environment.ask("POST", f"/api/admin/restore/{plan['id']}")).status_code == 202
    await eventually(lambda: environment.exits == [-signal.SIGTERM])  # uvicorn's status when it was asked to end
    return plan


async def test_a_restored_backup_keeps_known_rentals_and_destroys_no_unknown_one(tmp_path: Path) -> None:
    environment = CrashEnvironment(tmp_path / "drill", slower=SLOWER)
    async with environment.running(), asyncio.timeout(2 * PATIENCE_S):
        for agent in [environment.new_agent() for _ in range(3)]:
            await environment.until_health(agent, "ready")
        kept, migrated, ended = [await rent(environment, name) for name in ("kept", "migrated", "ended")]
        token = (await environment.ask("POST", "/api/tokens", json={"name": "alice"})).json()
        backup = (await environment.ask("GET", "/api/admin/backup")).content

        # After the backup: one rental is released, one is taken over, one is new, and a token is revoked.
        first, other = await environment.holder_of(migrated), await environment.holder_of(ended)
        await environment.release(ended)
        first.die()
        await environment.until(lambda r: r["state"] == "active" and r["worker_id"] == other.worker_id, migrated)
        environment.return_of(first)
        await environment.until_health(first, "ready")
        since = await rent(environment, "since")
        assert await environment.holder_of(since) is first
        await environment.ask("DELETE", f"/api/tokens/{token['id']}")
        last_event = environment.rows("SELECT max(id) AS id FROM events")[0]["id"]
        uids = {row["uid"] for row in environment.rows("SELECT uid FROM rentals")}

        plan = await restore(environment, backup)
        assert [one["name"] for one in plan["forgotten"]] == ["since"]
        assert [one["name"] for one in plan["revived"]] == ["ended"]

        # A rental that both the backup and its worker know continues.
        await environment.until(lambda r: r["state"] == "active", kept)
        holder = await environment.holder_of(kept)
        await environment.until_health(holder, "ready")
        await eventually(lambda: holder.unlocked() == {kept["id"]: 1})

        # A placement that the backup does not know is kept on its worker, locked, until the operator decides.
        for agent, rental, epoch in ((first, since, 1), (other, migrated, 2)):
            await environment.until_health(agent, "quarantined")
            assert (
                rental["id"] in (await environment.ask("GET", f"/api/workers/{agent.worker_id}")).json()["explanation"]
            )
            assert agent.node.accounts[rental["id"]].epoch == epoch
            assert agent.unlocked() == {}
        status = (await environment.ask("GET", "/api/status")).json()
        assert {item["id"] for item in status["overdue"]} == {first.worker_id, other.worker_id}

        # A rental that does not run where the backup says waits, and is created again with a higher epoch than ever.
        for rental in (migrated, ended):
            await environment.until(lambda r: r["state"] == "queued", rental)
        for agent in [environment.new_agent(), environment.new_agent()]:
            await environment.until_health(agent, "ready")
        for rental in (migrated, ended):
            await environment.until(lambda r: r["state"] == "active", rental)
            assert await epoch_of(environment, rental) > EPOCH_GAP

        # The operator decides.
        for agent in (first, other):
            reply = await environment.ask("POST", f"/api/workers/{agent.worker_id}/resume?give_up=true")
            assert reply.status_code == 200, reply.text
            await environment.until_health(agent, "ready")
            assert agent.node.accounts == {}

        # No uid or event number is used again, and the revoked token stays revoked.
        assert (await environment.ask("GET", "/api/rentals", token["token"])).status_code == 401
        new = await rent(environment, "new")
        (row,) = environment.rows(f"SELECT uid FROM rentals WHERE id = '{new['id']}'")  # noqa: S608
        assert row["uid"] > max(uids) + UID_GAP / 2
        restored = environment.rows("SELECT id FROM events WHERE kind = 'platform.restored'")[0]["id"]
        assert restored > last_event
        assert "exception" not in environment.log()
