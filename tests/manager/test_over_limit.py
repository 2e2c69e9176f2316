"""A home that holds more than it may: its rental is frozen, an event says so, and its owner can thaw it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from orion_worker.freezer import marks
from orion_worker.freezer.marks import Freezer
from orion_worker.records import RentalRecord, RequestRefused
from support.harness import Agent, Harness
from test_controller_snapshots import copied
from test_controller_snapshots import files as files_of

from orion.manager.domain.snapshot_plan import SnapshotLimits, SnapshotPlan

RECORD = RentalRecord(rental_id="one", username="r-one", uid=3_999_999_001, epoch=2, activated=True)
"""An account whose uid has no processes."""


def test_no_reply_thaws_a_rental_over_its_limit_and_an_order_thaws_it_for_a_time(tmp_path: Path) -> None:
    freezer, now = Freezer(tmp_path), time.clock_gettime(time.CLOCK_BOOTTIME)
    freezer.freeze(RECORD, None, over_limit="too much")
    freezer.freeze(RECORD, now)
    assert freezer.over_limit_reason("one") == "too much", "an order to freeze changes nothing"
    with pytest.raises(RequestRefused) as refused:
        freezer.thaw(RECORD, requested_at=now + 1000)
    assert refused.value.code == "over_limit"
    assert not freezer.is_in_grace(RECORD, now)
    assert freezer.thaw(RECORD, requested_at=None)
    assert not freezer.is_frozen("one")
    assert freezer.is_in_grace(RECORD, now + marks.GRACE_S - 5)
    assert not freezer.is_in_grace(RECORD, now + marks.GRACE_S + 5)
    assert not freezer.is_in_grace(RentalRecord(rental_id="one", username="r-one", uid=RECORD.uid, epoch=3), now)
    freezer.forget_purged("one")
    assert not freezer.is_in_grace(RECORD, now)


def test_a_freeze_mark_of_an_agent_without_limits_is_read(tmp_path: Path) -> None:
    freezer = Freezer(tmp_path)
    freezer.freeze(RECORD, 5.0)
    mark = tmp_path / "run/orion/frozen/one"
    freeze_mark = json.loads(mark.read_text())
    del freeze_mark["over"]
    mark.write_text(json.dumps(freeze_mark))
    assert freezer.over_limit_reason("one") == ""
    assert freezer.thaw(RECORD, requested_at=6.0)


async def test_the_owner_of_a_rental_over_its_limit_is_notified_and_can_thaw_it_to_make_room(harness: Harness) -> None:
    agent: Agent = await harness.join()
    rental = await harness.rent(name="lab")
    harness.manager.snapshots.plan = SnapshotPlan(limits=SnapshotLimits(max_files=100, max_bytes=10_000))
    files_of(harness, rental)["large"] = "x" * 20_000
    shown = await copied(harness, rental)
    assert "frozen" in shown["copy_problem"]
    assert [e["reason"] for e in await harness.events("rental.over_limit")] == [shown["copy_problem"]]
    other = await harness.new_client("bob")
    assert (await other.post(f"/api/rentals/{rental['id']}/thaw")).status_code == 404
    reply = await harness.as_admin.post(f"/api/rentals/{rental['id']}/thaw")
    assert (reply.status_code, agent.node.over) == (200, set())
    assert "make room" in reply.json()["copy_problem"]
    assert "spared" in (await copied(harness, rental))["copy_problem"]
    files_of(harness, rental)["large"] = ""
    assert (await copied(harness, rental))["copy_problem"] == ""
    assert len(await harness.events("rental.thawed")) == 1
    assert (await harness.as_admin.post(f"/api/rentals/{rental['id']}/thaw")).status_code == 200
    assert len(await harness.events("rental.thawed")) == 1, "the rental was not frozen"
    harness.agent_of(rental).die()
    await harness.silence(agent, 91)
    refused = await harness.as_admin.post(f"/api/rentals/{rental['id']}/thaw")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_thawed")


async def test_an_owner_is_warned_before_a_home_is_too_large(harness: Harness) -> None:
    await harness.join()
    rental = await harness.rent(name="lab")
    harness.manager.snapshots.plan = SnapshotPlan(limits=SnapshotLimits(max_files=100, max_bytes=10_000_000))
    for size, warned in ((7_900_000, False), (8_000_000, True), (9_000_000, True), (100, False), (8_500_000, True)):
        files_of(harness, rental)["large"] = "x" * size
        shown = await copied(harness, rental)
        assert (("of 10.0 MB" in shown["home_warning"]), shown["copy_problem"]) == (warned, "")
    reasons = [event["reason"] for event in await harness.events("rental.home_nearly_full")]
    assert ["8.0 MB" in reasons[0], "8.5 MB" in reasons[1], len(reasons)] == [True, True, 2]
