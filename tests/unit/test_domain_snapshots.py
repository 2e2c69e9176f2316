"""Snapshots: their ids, which are kept, which one is restored, and what the worker refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orion_worker.records import RentalRecord, RentalRecords, RequestRefused, check_receive
from orion_worker.snapshots import requests, transfer
from support.builders import active_rental, new_placement, new_worker

from orion.manager.domain.model import Origin, Rental
from orion.manager.domain.snapshots import (
    EMPTY,
    MAX_ORIGINS,
    NEWEST_KEPT,
    RECOVERED_KEPT,
    RECOVERED_SHOWN_S,
    Snapshot,
    SnapshotId,
    accepted,
    activated,
    kept,
    may_stay,
    nearly_full,
    newest,
    next_number,
    slowed,
    slower_warning,
    waiting_recovered_snapshot,
)
from orion.manager.domain.states import PlacementState, RentalState

GENERATIONS = st.lists(st.builds(SnapshotId, st.integers(1, 5), st.integers(1, 9)), min_size=1, unique=True)


def copy_of(generation: SnapshotId) -> Snapshot:
    return Snapshot(id=generation, at=5.0, bytes=0, files=1)


@given(GENERATIONS)
def test_the_newest_snapshots_and_the_newest_of_the_former_epoch_are_always_kept(all_: list[SnapshotId]) -> None:
    staying = kept(map(copy_of, all_))
    latest = max(all_)
    assert latest in staying <= set(all_)
    assert staying >= set(sorted(all_)[-NEWEST_KEPT:])
    before = [each for each in all_ if each.epoch < latest.epoch]
    assert not before or max(before) in staying
    assert len(staying) <= NEWEST_KEPT + 1
    assert kept(map(copy_of, staying)) == staying, "a snapshot that was kept is not dropped before a new one exists"


@given(GENERATIONS, st.sets(st.integers(1, 5)))
def test_recovered_and_other_snapshots_do_not_displace_each_other(all_: list[SnapshotId], salvaged: set[int]) -> None:
    copies = [copy_of(each) for each in all_ if each.epoch not in salvaged]
    salvages = [replace(copy_of(each), recovered=True) for each in all_ if each.epoch in salvaged]
    newest_ones = sorted(copy.id for copy in salvages)[-RECOVERED_KEPT:]
    assert kept([*copies, *salvages]) == kept(copies) | set(newest_ones)


@given(
    GENERATIONS, st.sets(st.integers(1, 5)), st.one_of(st.none(), st.builds(SnapshotId, st.integers(1, 5), st.just(1)))
)
def test_for_lack_of_room_only_older_unspared_snapshots_that_are_not_recovered_are_removed(
    all_: list[SnapshotId], salvaged: set[int], spare: SnapshotId | None
) -> None:
    complete = [replace(copy_of(each), recovered=each.epoch in salvaged) for each in all_]
    first, *others = may_stay(complete, spare)
    assert first == kept(complete) | ({spare} & set(all_))
    regular = [copy.id for copy in complete if not copy.recovered]
    least = {spare, max(regular, default=None)} | {copy.id for copy in complete if copy.recovered}
    before = first
    for staying in others:
        assert before - staying == {min(before - least)}, "the oldest of those that may be removed"
        before = staying
    assert before == first & least


def test_a_recovered_snapshot_is_restored_only_if_there_was_no_activation_at_a_later_epoch() -> None:
    copies = [copy_of(SnapshotId(1, 7)), copy_of(SnapshotId(2, 1))]
    salvage = replace(copy_of(SnapshotId(2, 2)), recovered=True)
    second, third = active_rental(activated_epoch=2), active_rental(activated_epoch=3)
    assert newest([*copies, salvage], second) == salvage
    assert newest([*copies, salvage], third) == copies[-1]
    assert newest([salvage], third) is None
    assert newest([*copies, salvage, copy_of(SnapshotId(3, 1))], second) == copy_of(SnapshotId(3, 1))


def test_until_there_is_a_newer_snapshot_a_rental_is_restored_from_the_same_one_again() -> None:
    copies = [copy_of(SnapshotId(1, 7)), copy_of(SnapshotId(2, 1)), replace(copy_of(SnapshotId(2, 2)), recovered=True)]
    for name, copy in (("2-2", copies[2]), ("1-7", copies[0]), ("1-6", copies[1]), ("", copies[1])):
        rental = active_rental(activated_epoch=3, began_with=name)
        assert newest(copies, rental) == copy
        assert newest([*copies, copy_of(SnapshotId(3, 1))], rental) == copy_of(SnapshotId(3, 1))


def salvage_of(epoch: int, number: int) -> Snapshot:
    return replace(copy_of(SnapshotId(epoch, number)), recovered=True)


FIRST, LATER, OF_SECOND, OF_THIRD = copy_of(SnapshotId(1, 3)), salvage_of(1, 4), salvage_of(2, 1), salvage_of(3, 1)
CHAIN = (Origin(1, "", False), Origin(2, "1-3", False), Origin(3, "1-3", False), Origin(4, "1-3", False))


def lineage(*origins: Origin, **change: Any) -> Rental:
    """Return a rental that was last activated at the epoch of the last of these."""
    return active_rental(lineage=origins, activated_epoch=origins[-1].epoch, began_with=origins[-1].snapshot, **change)


@pytest.mark.parametrize(
    ("there", "begins"),
    [
        ([FIRST], FIRST),
        ([FIRST, LATER], LATER),
        ([FIRST, OF_SECOND], OF_SECOND),
        ([FIRST, OF_SECOND, OF_THIRD], OF_THIRD),
        ([FIRST, LATER, OF_SECOND, OF_THIRD], LATER),
        ([LATER], LATER),
        ([FIRST, LATER, copy_of(SnapshotId(4, 1))], copy_of(SnapshotId(4, 1))),
    ],
)
def test_a_snapshot_that_contains_the_last_restored_one_is_preferred_to_it(
    there: list[Snapshot], begins: Snapshot
) -> None:
    assert newest(there, lineage(*CHAIN)) == begins


def test_a_snapshot_that_descends_from_the_origin_over_several_epochs_counts_too() -> None:
    deeper = (*CHAIN[:2], Origin(3, "2-1", False), Origin(4, "1-3", False))
    assert newest([FIRST, OF_SECOND, OF_THIRD], lineage(*deeper)) == OF_THIRD


def test_a_requested_restore_gives_up_later_snapshots_of_that_home_but_none_that_began_with_it() -> None:
    asked = (Origin(1, "", False), Origin(2, "1-3", True))
    assert newest([FIRST, LATER], lineage(*asked)) == FIRST
    begun_again = lineage(*asked)
    for epoch in (3, 4):
        begun_again = replace(begun_again, **activated(begun_again, epoch, "1-3"))
    assert [origin.requested for origin in begun_again.lineage] == [False, True, True, True]
    assert newest([FIRST, LATER], begun_again) == FIRST
    assert newest([FIRST, LATER, OF_SECOND], begun_again) == OF_SECOND
    assert not activated(begun_again, 5, "4-1")["lineage"][-1].requested


def test_a_recovered_snapshot_is_the_newest_for_an_empty_home_unless_the_owner_chose_empty() -> None:
    by_itself = lineage(Origin(1, "", False), Origin(2, "", False))
    assert newest([salvage_of(1, 1)], by_itself) == salvage_of(1, 1)
    asked = lineage(Origin(1, "", False), Origin(2, "", True))
    assert newest([salvage_of(1, 1)], asked) is None
    assert activated(active_rental(restore_from=EMPTY), 2, "")["lineage"] == (Origin(2, "", True),)


def test_a_lineage_with_a_cycle_is_followed_to_an_end() -> None:
    assert newest([FIRST, OF_SECOND], lineage(Origin(2, "2-1", False), Origin(3, "2-1", False))) == OF_SECOND


def test_the_latest_origins_of_a_rental_are_kept() -> None:
    rental = active_rental()
    for epoch in range(1, 100):
        rental = replace(rental, **activated(rental, epoch, f"{epoch}-1"))
    assert [origin.epoch for origin in rental.lineage] == list(range(100 - MAX_ORIGINS, 100))


def test_a_recovered_snapshot_is_shown_until_it_is_restored_or_for_a_week() -> None:
    there = [FIRST, LATER, OF_SECOND]
    runs = lineage(*CHAIN)
    assert waiting_recovered_snapshot(there, runs, wall=10.0) == OF_SECOND
    assert waiting_recovered_snapshot(there, runs, wall=5.0 + RECOVERED_SHOWN_S) is None
    assert waiting_recovered_snapshot([FIRST], runs, wall=10.0) is None
    has_both = lineage(*CHAIN[:2], Origin(3, "2-1", False))
    assert waiting_recovered_snapshot([FIRST, OF_SECOND], has_both, wall=10.0) is None
    assert waiting_recovered_snapshot(there, has_both, wall=10.0) == LATER
    queued = replace(runs, state=RentalState.QUEUED)
    assert waiting_recovered_snapshot([FIRST, LATER], queued, wall=10.0) is None, "the rental begins with that snapshot"
    assert waiting_recovered_snapshot([FIRST, LATER], replace(queued, restore_from="1-3"), wall=10.0) == LATER
    assert waiting_recovered_snapshot(there, replace(runs, state=RentalState.RELEASED), wall=10.0) is None


def test_a_home_has_an_event_each_time_that_it_becomes_nearly_full() -> None:
    worker, rental = new_worker(1), active_rental(1)
    runs = new_placement(rental, worker, PlacementState.RUNNING)
    reasons: list[str] = []
    for size, files_ in ((799, 1), (800, 1), (900, 79), (100, 80), (799, 79), (1000, 100)):
        copy = replace(copy_of(SnapshotId(1, 1)), bytes=size, files=files_)
        step = accepted(rental, runs, copy, nearly_full(copy, 1000, 100))
        rental = replace(rental, **{k: v for k, v in step.writes[1].change.items() if hasattr(rental, k)})
        reasons += [f"{size}: {event.reason}" for event in step.events if event.kind == "rental.home_nearly_full"]
        assert bool(rental.home_warning) is (size >= 800 or files_ >= 80)
    assert [reason.partition(":")[0] for reason in reasons] == ["800", "1000"]
    assert "100 of 100 files" in reasons[-1]


def test_the_warnings_of_rare_snapshots_and_of_a_nearly_full_home_do_not_hide_each_other() -> None:
    worker, rental = new_worker(1), active_rental(1)
    runs = new_placement(rental, worker, PlacementState.RUNNING)
    rarely, copy = slower_warning(120.0, 30.0), replace(copy_of(SnapshotId(1, 1)), bytes=900)
    full = nearly_full(copy, 1000, 100)
    for before, warning, slower, shown in (
        ("", "", rarely, rarely),
        (rarely, full, rarely, f"{full}; {rarely}"),
        (f"{full}; {rarely}", full, "", full),
        (rarely, "", "", ""),
    ):
        step = accepted(replace(rental, home_warning=before), runs, copy, warning, slower)
        assert step.writes[1].change["home_warning"] == shown
        notices = [event.kind for event in step.events if event.kind == "rental.home_nearly_full"]
        assert bool(notices) is (bool(warning) and full not in before)
    for before, shown in (("", rarely), (full, f"{full}; {rarely}"), (f"{full}; {rarely}", f"{full}; {rarely}")):
        step = slowed(replace(rental, home_warning=before), runs, "it would stand still", rarely)
        assert step.writes[1].change["home_warning"] == shown


@given(GENERATIONS, st.integers(1, 5))
def test_a_new_snapshot_has_the_highest_number_of_its_epoch(all_: list[SnapshotId], epoch: int) -> None:
    new = SnapshotId(epoch, next_number(all_, epoch))
    assert all(new > each for each in all_ if each.epoch <= epoch)


def test_a_snapshot_id_is_parsed_as_it_is_formatted_and_no_other_text_is_one() -> None:
    assert SnapshotId.parse(str(SnapshotId(12, 345))) == SnapshotId(12, 345)
    for wrong in ("", "1", "1-", "-1", "0-1", "1-0", "01-1", "1-1\n", "../1-1", "incoming", "1-1-1", "1e3-1"):
        assert SnapshotId.parse(wrong) is None
    assert SnapshotId(2, 1) > SnapshotId(1, 999)


# The worker's side


REQUEST: dict[str, Any] = {"rental_id": "one", "epoch": 3, "deadline": 2000.0}
RECORD = RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rental_id": "../etc"},
        {"rental_id": ""},
        {"rental_id": 7},
        {"epoch": 0},
        {"epoch": True},
        {"epoch": "3"},
        {"generation": "../../etc"},
        {"base": "../../etc"},
        {"mark": "A/"},
        {"folders": {"2e2f": 0o700}},
        {"folders": {"2f657463": 0o700}},
        {"folders": {"2e": 0o100000}},
        {"unknown": 1},
    ],
)
def test_harmful_snapshot_requests_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        requests.parse_request(json.dumps(REQUEST | wrong).encode(), now=1000.0)


def test_a_passed_deadline_is_refused() -> None:
    assert requests.parse_request(json.dumps(REQUEST).encode(), now=1000.0).epoch == 3
    with pytest.raises(RequestRefused, match="deadline"):
        requests.parse_request(json.dumps(REQUEST).encode(), now=2000.0)


def test_only_a_home_of_this_epoch_that_was_never_activated_is_restored() -> None:
    check_receive(RECORD, 0, 3)
    for record, purged, epoch, code in (
        (RECORD, 0, 2, "stale_epoch"),
        (RECORD, 0, 4, "stale_epoch"),
        (None, 0, 3, "unknown_rental"),
        (None, 3, 3, "purged"),
        (RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3, ending=True), 0, 3, "purged"),
        (
            RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3, activated=True, restored="2-7"),
            0,
            3,
            "let_in",
        ),
    ):
        with pytest.raises(RequestRefused) as refusal:
            check_receive(record, purged, epoch)
        assert refusal.value.code == code
    assert refusal.value.details == {"restored": "2-7"}


def test_the_record_remembers_what_its_home_was_filled_with(tmp_path: Path) -> None:
    records = RentalRecords(tmp_path)
    records.save(RECORD)
    request = requests.TransferRequest(rental_id="one", epoch=3, deadline=2000.0, snapshot_id="2-7")
    assert transfer.record_for("receive", records, request).restored == "2-7"
    assert records.find("one") == RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3, restored="2-7")


def test_a_home_that_is_a_link_or_anothers_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    here = os.getcwd()  # noqa: PTH109
    for place, uid in (("link", os.getuid()), ("absent", os.getuid()), ("real", os.getuid() + 1)):
        with pytest.raises(RequestRefused) as refusal:
            transfer.open_home(tmp_path / place, uid)
        assert refusal.value.code == "no_home"
    assert os.getcwd() == here  # noqa: PTH109
