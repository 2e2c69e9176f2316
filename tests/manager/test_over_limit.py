"""A home that holds more than it may: its rental stands still, says so, and has a way out."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import files
import freezing
import pytest
from files import Wish, look_through, measured_by_the_renter
from freezing import Freezer
from ledger import Ledger, Record, Refused
from support.house import Agent, House
from test_loops_copies import copied, holder
from test_loops_copies import files as files_of

from orion.manager.engine.vault.port import Limits
from orion.manager.loops.copies import Plan

RECORD = Record("one", "r-one", 3_999_999_001, epoch=2, let_in=True)
"""Of a uid that nobody has: there is nothing to stop."""


@dataclass
class Keeper:
    """In place of rental.Rentals: what it does to a rental is written down."""

    ledger: Ledger
    freezer: Freezer
    spares: bool = False
    held: str = ""

    def lay_down(self, record: Record) -> None: ...

    def hold_over(self, record: Record, what: str) -> bool:
        self.held = "" if self.spares else what
        return not self.spares


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keeper:
    home = tmp_path / "home"
    home.mkdir()
    for number in range(5):
        (home / str(number)).write_text("x" * 10)
    monkeypatch.chdir(home)
    monkeypatch.setattr(files, "become", lambda _uid, gently: None)  # it needs root
    return Keeper(Ledger(tmp_path / "ledger"), Freezer(tmp_path))


def wish(max_files: int = 10, max_bytes: int = 1000, within_s: float = 20.0) -> Wish:
    return Wish("one", 2, time.time() + within_s, max_files, max_bytes)


def test_what_is_within_its_limits_is_counted_and_goes_on(keeper: Keeper) -> None:
    assert look_through("send", keeper, RECORD, wish()) == {"files": 5, "bytes": 50}
    assert keeper.held == ""


@pytest.mark.parametrize("limits", [{"max_files": 4}, {"max_bytes": 49}])
def test_what_is_over_is_frozen_and_the_way_out_is_said(keeper: Keeper, limits: dict[str, int]) -> None:
    with pytest.raises(Refused, match="orion thaw") as refused:
        look_through("send", keeper, RECORD, wish(**limits))
    assert refused.value.code == "over_limit"
    assert keeper.held.startswith("its home holds more than")


def test_what_was_thawed_to_make_room_goes_on_and_is_not_copied(keeper: Keeper) -> None:
    keeper.spares = True
    with pytest.raises(Refused, match="unless it does"):
        look_through("send", keeper, RECORD, wish(max_files=1))
    assert keeper.held == ""


def test_what_is_frozen_for_its_size_is_not_counted_again(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper.freezer.freeze(RECORD, None, over="its home holds more than 4 files")
    monkeypatch.setattr(files, "measure", lambda _: pytest.fail("it was counted"))
    with pytest.raises(Refused, match="4 files; it is frozen: `orion thaw`"):
        look_through("send", keeper, RECORD, wish(max_files=4))


def test_counting_that_its_renter_ends_or_holds_up_is_a_failure_in_time(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "measure", lambda _: os._exit(0))
    with pytest.raises(Refused, match="could not be measured"):
        measured_by_the_renter(RECORD.uid, wish())
    monkeypatch.setattr(files, "measure", lambda _: time.sleep(1000))
    with pytest.raises(Refused, match="could not be measured"):
        measured_by_the_renter(RECORD.uid, wish(within_s=0.1))


def test_no_reply_thaws_what_is_over_and_an_order_gives_it_time(tmp_path: Path) -> None:
    freezer, now = Freezer(tmp_path), time.clock_gettime(time.CLOCK_BOOTTIME)
    freezer.freeze(RECORD, None, over="too much")
    freezer.freeze(RECORD, now)
    assert freezer.is_over("one") == "too much", "an order to freeze changes nothing about that"
    with pytest.raises(Refused) as refused:
        freezer.thaw(RECORD, asked_at=now + 1000)
    assert refused.value.code == "over_limit"
    assert not freezer.is_spared(RECORD, now)
    assert freezer.thaw(RECORD, asked_at=None)
    assert not freezer.is_frozen("one")
    assert freezer.is_spared(RECORD, now + freezing.SPARED_S - 5)
    assert not freezer.is_spared(RECORD, now + freezing.SPARED_S + 5)
    assert not freezer.is_spared(Record("one", "r-one", RECORD.uid, epoch=3), now)
    freezer.forget_purged("one")
    assert not freezer.is_spared(RECORD, now)


def test_a_mark_of_an_agent_from_before_there_were_limits_is_read(tmp_path: Path) -> None:
    freezer = Freezer(tmp_path)
    freezer.freeze(RECORD, 5.0)
    mark = tmp_path / "run/orion/frozen/one"
    told = json.loads(mark.read_text())
    del told["over"]
    mark.write_text(json.dumps(told))
    assert freezer.is_over("one") == ""
    assert freezer.thaw(RECORD, asked_at=6.0)


async def test_its_owner_is_told_and_lets_it_go_on_to_make_room(house: House) -> None:
    agent: Agent = await house.join()
    rental = await house.rent(name="lab")
    house.manager.copies._plan = Plan(limits=Limits(max_files=100, max_bytes=100))
    files_of(house, rental)["large"] = "x" * 200
    shown = await copied(house, rental)
    assert "frozen" in shown["copy_problem"]
    assert [e["reason"] for e in await house.events("rental.over_limit")] == [shown["copy_problem"]]
    other = await house.new_client("bob")
    assert (await other.post(f"/api/rentals/{rental['id']}/thaw")).status_code == 404
    reply = await house.as_admin.post(f"/api/rentals/{rental['id']}/thaw")
    assert (reply.status_code, agent.node.over) == (200, set())
    assert "make room" in reply.json()["copy_problem"]
    assert "spared" in (await copied(house, rental))["copy_problem"]
    files_of(house, rental)["large"] = ""
    assert (await copied(house, rental))["copy_problem"] == ""
    assert len(await house.events("rental.thawed")) == 1
    assert (await house.as_admin.post(f"/api/rentals/{rental['id']}/thaw")).status_code == 200
    assert len(await house.events("rental.thawed")) == 1, "there was nothing to thaw"
    holder(house, rental).die()
    await house.silence(agent, 91)
    refused = await house.as_admin.post(f"/api/rentals/{rental['id']}/thaw")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_thawed")


async def test_its_owner_is_warned_before_its_home_is_too_large(house: House) -> None:
    await house.join()
    rental = await house.rent(name="lab")
    house.manager.copies._plan = Plan(limits=Limits(max_files=100, max_bytes=10_000_000))
    for size, warned in ((7_900_000, False), (8_000_000, True), (9_000_000, True), (100, False), (8_500_000, True)):
        files_of(house, rental)["large"] = "x" * size
        shown = await copied(house, rental)
        assert (("of 10.0 MB" in shown["home_warning"]), shown["copy_problem"]) == (warned, "")
    reasons = [event["reason"] for event in await house.events("rental.home_nearly_full")]
    assert ["8.0 MB" in reasons[0], "8.5 MB" in reasons[1], len(reasons)] == [True, True, 2]
