"""An owner's share of the disk of the snapshots: beyond it, the owner's own snapshots are removed, and no other's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.harness import Harness
from test_controller_snapshots import copied, snapshot_round
from test_controller_snapshots import files as files_of

from orion import wire
from orion.manager.domain.snapshots import BLOCK_BYTES
from orion.manager.settings import Settings
from orion.manager.store.database import Store

LARGE_BYTES = 10 * BLOCK_BYTES
A_COPY_BYTES = LARGE_BYTES + BLOCK_BYTES


@pytest.fixture
async def harness(store: Store) -> AsyncIterator[Harness]:
    """Return a harness whose disk has room for two and a half snapshots of each owner."""
    async with Harness(store, Settings(database_url=store.url, uncopied_wait_s=0, owner_disk_share=0.25)) as harness:
        harness.snapshot_service.disk_bytes = 10 * A_COPY_BYTES
        for _ in range(2):
            await harness.join(slots=4)
        yield harness


@pytest.fixture
async def ann(harness: Harness) -> httpx.AsyncClient:
    return await harness.new_client("ann")


async def rent(harness: Harness, owner: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    """Return a rental whose home is large."""
    reply = await owner.post("/api/rent", json={"wait_s": 0} | more)
    await harness.settle()
    rental = await harness.rental(reply.json()["id"])
    files_of(harness, rental)["large"] = "x" * LARGE_BYTES
    return rental


async def generations(harness: Harness, rental: dict[str, Any]) -> list[str]:
    return [str(copy.id) for copy in await harness.snapshot_service.snapshots(rental["id"], 0)]


async def test_an_owner_beyond_its_share_sees_the_reason_and_gets_snapshots_again_when_there_is_room(
    harness: Harness, ann: httpx.AsyncClient
) -> None:
    rentals = [await rent(harness, ann) for _ in range(3)]
    other = await rent(harness, await harness.new_client("bob"))
    for _ in range(6):
        await copied(harness, other)
    shown = [await harness.rental(rental["id"]) for rental in (*rentals, other)]
    (short,) = [rental for rental in shown if not rental["last_safe_copy_at"]]
    assert "more than its share" in short["copy_problem"]
    assert [rental["copy_problem"] for rental in shown if rental is not short] == ["", "", ""]
    assert [event["rental_id"] for event in await harness.events("rental.copy_failed")] == [short["id"]]
    first = next(rental for rental in rentals if rental["id"] != short["id"])
    await ann.delete(f"/api/rentals/{first['id']}")
    await harness.settle()
    for _ in range(3):
        shown_again = await copied(harness, short)
    assert (shown_again["copy_problem"], await generations(harness, short)) == ("", ["1-1"])


async def test_other_rentals_of_an_owner_short_of_room_keep_only_their_last_snapshot(
    harness: Harness, ann: httpx.AsyncClient
) -> None:
    first = await rent(harness, ann)
    await copied(harness, first)
    files_of(harness, first)["large"] = "y" * LARGE_BYTES
    await copied(harness, first)
    assert await generations(harness, first) == ["1-1", "1-2"]
    second = await rent(harness, ann)
    for _ in range(3):
        await copied(harness, second)
    assert [await generations(harness, rental) for rental in (first, second)] == [["1-2"], ["1-1"]]
    assert (await harness.rental(first["id"]))["copy_problem"] == ""


async def test_snapshots_of_expired_rentals_are_removed_first_to_make_room(
    harness: Harness, ann: httpx.AsyncClient
) -> None:
    ended = [await rent(harness, ann, ttl_s=120) for _ in range(2)]
    await copied(harness, ended[0])
    harness.clock.now += 120
    for agent in harness.agents:
        await agent.beat()
    await harness.manager.expiry.round()
    await harness.settle()
    await harness.pass_time(61)
    await snapshot_round(harness)
    assert {rental["id"] for rental in ended} == set(harness.snapshot_service.stored), (
        "snapshots of an expired rental are kept for a day"
    )
    living = await rent(harness, ann)
    for _ in range(4):
        shown = await copied(harness, living)
    assert (shown["copy_problem"], set(harness.snapshot_service.stored)) == ("", {living["id"]})


async def test_a_planned_migration_beyond_the_owner_s_share_is_refused_and_its_rental_goes_on(
    harness: Harness, ann: httpx.AsyncClient
) -> None:
    rentals = [await rent(harness, ann) for _ in range(3)]
    for _ in range(3):
        await copied(harness, rentals[0])
    (short,) = [rental for rental in rentals if not (await harness.rental(rental["id"]))["last_safe_copy_at"]]
    assert (await ann.post(f"/api/rentals/{short['id']}/migrate")).status_code == 202
    await harness.settle()
    await harness.pass_time(5)
    stays = await harness.rental(short["id"])
    assert (stays["state"], stays["worker_id"], stays["epoch"]) == ("active", short["worker_id"], 1)
    assert stays["explanation"].startswith(wire.NOT_MOVED)
    assert "more than its share" in stays["explanation"]
