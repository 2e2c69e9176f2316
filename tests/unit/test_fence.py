"""The fence on a worker in a directory: its effect on marks, keys and the right to run. No process is touched."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

import pytest
from orion_worker.agent.fence import Fence
from orion_worker.freezer import enforcer, marks, stopper
from orion_worker.records import RentalRecord, RequestRefused
from orion_worker.rental import commands
from orion_worker.rental.commands import Rentals
from orion_worker.rental.paths import WorkerPaths
from orion_worker.snapshots.requests import TransferRequest
from orion_worker.snapshots.transfer import record_for

from orion.rental_order import RentalOrder

UID = 100_001


@dataclass
class Kernel:
    """A fake of the kernel's processes: on the real one another rental may have this test's uid."""

    running: set[int] = field(default_factory=set)
    suspended: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    disk_is_full: bool = False

    def uids_from(self, first: int) -> set[int]:
        return {uid for uid in self.running | self.suspended | self.stopped if uid >= first}

    def signal_all(self, uid: int, number: Signals) -> bool:
        if number is Signals.SIGKILL:
            for alive in (self.running, self.suspended, self.stopped):
                alive.discard(uid)
        elif uid in self.running:
            self.running.discard(uid)
            self.stopped.add(uid)
        return True

    def stop(self, uid: int, username: str, within_s: float) -> list[stopper.KernelTask]:
        self.signal_all(uid, Signals.SIGSTOP)
        return []

    def stopped_processes(self, uid: int) -> frozenset[tuple[int, int]]:
        return frozenset({(uid, 1)} if uid in self.suspended | self.stopped else ())

    def wake(self, uid: int, username: str, stay: frozenset[tuple[int, int]]) -> None:
        if uid in self.stopped and (uid, 1) not in stay:
            self.stopped.discard(uid)
            self.running.add(uid)


@dataclass
class House:
    root: Path
    kernel: Kernel
    rentals: Rentals
    fence: Fence
    right: list[bool]
    said: list[str]

    @property
    def shown(self) -> str:
        return str(self.rentals.inventory()[0]["state"])

    def may_run(self, right: bool) -> None:
        self.right[0] = right
        if right:
            self.fence.lease_renewed()
        self.fence.look()

    def activate(self) -> None:
        self.may_run(True)
        self.rentals.unlock(RentalOrder(rental_id="one", epoch=1))
        self.kernel.running.add(UID)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    for name in ("uids_from", "signal_all"):
        monkeypatch.setattr(f"orion_worker.system.processes.{name}", getattr(kernel, name))
    monkeypatch.setattr("orion_worker.agent.fence.stop_parents", lambda uid, last_moment: None)
    monkeypatch.setattr(marks, "stopped_processes", kernel.stopped_processes)
    monkeypatch.setattr(marks, "wake", kernel.wake)
    monkeypatch.setattr(marks, "stop", kernel.stop)
    monkeypatch.setattr(enforcer.Enforcer, "enforce", lambda self: not kernel.signal_all(self._uid, Signals.SIGSTOP))
    return kernel


@pytest.fixture
def house(tmp_path: Path, kernel: Kernel) -> House:
    rentals = Rentals(WorkerPaths(tmp_path), lock_wait_s=0.0)
    rentals.records.save(RentalRecord("one", "r-one", UID, 1))
    (tmp_path / "etc/orion/locked/r-one").write_text("key\n")
    right, said = [False], list[str]()
    fence = Fence(rentals, lambda: right[0], said.append)
    fence.begin()
    return House(tmp_path, kernel, rentals, fence, right, said)


def test_at_its_start_nobody_is_activated_before_there_is_a_lease(house: House) -> None:
    house.fence.look()
    assert house.shown == "locked", "what does not run is not frozen either"
    with pytest.raises(RequestRefused, match="no lease"):
        house.rentals.unlock(RentalOrder(rental_id="one", epoch=1))
    house.activate()
    assert house.shown == "running"


def test_without_a_lease_all_processes_stop_and_the_keys_are_locked(house: House) -> None:
    house.activate()
    house.may_run(False)
    assert house.shown == "frozen"
    assert (house.root / "etc/orion/locked/r-one").exists()
    assert house.kernel.stopped == {UID}
    assert house.said == ["no right to run: 1 rentals frozen"]


def test_the_fence_never_thaws_that_takes_a_reply_and_a_lease(house: House) -> None:
    house.activate()
    house.may_run(False)
    with pytest.raises(RequestRefused, match="no lease"):
        house.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=5.0)
    house.may_run(True)
    assert (house.shown, house.kernel.stopped) == ("frozen", {UID})
    with pytest.raises(RequestRefused, match="thaw it"):
        house.rentals.unlock(RentalOrder(rental_id="one", epoch=1))
    assert house.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=5.0)["state"] == "running"
    assert (house.shown, house.kernel.running) == ("running", {UID})


@pytest.mark.parametrize("epoch", [2, 3])
def test_only_the_epoch_that_is_here_is_thawed(house: House, epoch: int) -> None:
    house.activate()
    house.may_run(False)
    house.may_run(True)
    with pytest.raises(RequestRefused, match="epoch"):
        house.rentals.thaw(RentalOrder(rental_id="one", epoch=epoch))
    assert house.shown == "frozen"


def test_processes_that_were_stopped_before_stay_stopped_over_two_freezes(house: House) -> None:
    house.activate()
    house.kernel.running.clear()
    house.kernel.suspended.add(UID)
    house.may_run(False)
    house.may_run(True)
    house.may_run(False)
    house.may_run(True)
    house.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
    assert (house.kernel.suspended, house.kernel.running) == ({UID}, set())


def test_the_fence_stops_processes_first_and_writes_marks_later_on_a_full_disk(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.activate()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(marks.Freezer, "_write", full)
        house.right[0] = False
        with pytest.raises(OSError, match="No space"):
            house.fence.look()
        assert house.kernel.stopped == {UID}
        assert (house.root / "etc/orion/locked/r-one").exists()
        house.right[0] = True
        with pytest.raises(OSError, match="No space"):
            house.fence.lease_renewed()
        assert not house.rentals.freezer.has_lease, "nobody is let in whose processes would be forgotten"
    house.fence.lease_renewed()
    house.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
    assert house.kernel.running == {UID}


def test_a_rental_that_arrives_without_a_lease_is_frozen_too(house: House) -> None:
    house.activate()
    house.may_run(False)
    house.rentals.records.save(RentalRecord("two", "r-two", UID + 1, 1, activated=True))
    house.kernel.running.add(UID + 1)
    house.fence._repeat_at = 0.0
    house.fence.look()
    assert house.kernel.running == set()
    assert [item["state"] for item in house.rentals.inventory()] == ["frozen", "frozen"]


def test_a_transfer_that_fills_a_home_is_ended_and_its_rental_can_be_made_again(house: House) -> None:
    house.may_run(True)
    house.kernel.running.add(UID)  # rsync, which would hold the rental's lock while it stands
    house.may_run(False)
    assert (house.kernel.running, house.kernel.stopped) == (set(), set())
    assert (house.shown, house.said) == ("locked", ["no right to run: 0 rentals frozen"])
    with pytest.raises(RequestRefused, match="no lease"):
        house.rentals.unlock(RentalOrder(rental_id="one", epoch=1))
    house.may_run(True)
    assert house.rentals.unlock(RentalOrder(rental_id="one", epoch=1))["state"] == "running"


def test_an_order_to_freeze_outlives_a_reply_to_a_call_that_was_sent_before_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.activate()
    monkeypatch.setattr(commands, "_boot_time_s", lambda: 100.0)
    assert house.rentals.freeze(RentalOrder(rental_id="one", epoch=1)) == {
        "changed": True,
        "epoch": 1,
        "state": "frozen",
        "killed": 0,
    }
    assert not house.rentals.freeze(RentalOrder(rental_id="one", epoch=1))["changed"]
    with pytest.raises(RequestRefused, match="since that was asked"):
        house.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=99.9)
    assert house.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=100.1)["changed"]
    assert house.kernel.running == {UID}


def test_an_order_to_freeze_is_not_undone_by_a_lease_that_was_lost_and_came_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.activate()
    monkeypatch.setattr(commands, "_boot_time_s", lambda: 100.0)
    house.rentals.freeze(RentalOrder(rental_id="one", epoch=1))
    house.may_run(False)
    house.may_run(True)
    with pytest.raises(RequestRefused, match="since that was asked"):
        house.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=99.0)


def test_an_older_order_freezes_nothing_newer_and_an_absent_rental_is_no_fault(house: House) -> None:
    house.rentals.records.save(RentalRecord("one", "r-one", UID, 3))
    with pytest.raises(RequestRefused, match="older"):
        house.rentals.freeze(RentalOrder(rental_id="one", epoch=2))
    assert house.rentals.freeze(RentalOrder(rental_id="two", epoch=1))["state"] == "absent"


def test_marks_end_with_the_container(house: House) -> None:
    house.activate()
    house.may_run(False)
    house.fence.begin()
    assert house.shown == "locked"
    assert not house.rentals.freezer.has_lease


def test_the_mark_of_a_rental_that_was_purged_goes(house: House) -> None:
    house.activate()
    house.may_run(False)
    house.rentals.records.bury(RentalRecord("one", "r-one", UID, 1))
    house.fence._repeat_at = 0.0
    house.fence.look()
    assert house.rentals.freezer.frozen() == []


def test_no_order_of_an_earlier_migration_thaws_what_a_later_one_froze(house: House) -> None:
    house.activate()
    house.rentals.freeze(RentalOrder(rental_id="one", epoch=1, move=7))
    house.rentals.freeze(RentalOrder(rental_id="one", epoch=1, move=5))
    for earlier in (0, 5, 6):
        with pytest.raises(RequestRefused, match="planned move 7"):
            house.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=earlier))
    assert (house.shown, house.kernel.stopped) == ("frozen", {UID})
    house.may_run(False)
    house.may_run(True)
    with pytest.raises(RequestRefused, match="planned move 7"):
        house.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=6))
    assert house.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=7))["state"] == "running"


def pause(house: House, seconds: float = 10.0) -> frozenset[stopper.KernelTask] | None:
    (record,) = house.rentals.records.all()
    return house.rentals.freezer.pause(record, time.clock_gettime(time.CLOCK_BOOTTIME) + seconds)


def test_a_pause_stops_a_rental_and_its_end_resumes_what_ran_before(house: House) -> None:
    house.activate()
    house.kernel.suspended.add(UID)
    assert pause(house) == frozenset()
    assert (house.kernel.running, house.shown) == (set(), "running"), "its renter may log in meanwhile"
    house.rentals.freezer.resume("one")
    assert house.kernel.stopped == {UID}, "it was stopped before: so it stays"
    house.kernel.suspended.clear()
    house.kernel.running, house.kernel.stopped = {UID}, set()
    assert pause(house) == frozenset()
    house.rentals.freezer.resume("one")
    house.rentals.freezer.resume("one")
    assert house.kernel.running == {UID}


def test_a_pause_whose_snapshot_died_is_ended_by_the_fence(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orion_worker.agent.fence.AGAIN_EVERY_S", 0.0)
    house.activate()
    pause(house, seconds=60)
    house.fence.look()
    assert house.kernel.running == set(), "there is time left"
    pause(house, seconds=-1)
    house.fence.look()
    assert house.kernel.running == {UID}
    assert "did not end" in house.said[-1]


def test_a_frozen_rental_is_not_paused_and_the_end_of_a_pause_thaws_nothing(house: House) -> None:
    house.activate()
    pause(house)
    house.rentals.freeze(RentalOrder(rental_id="one", epoch=1, move=2))
    house.rentals.freezer.resume("one")
    assert (house.kernel.running, house.shown) == (set(), "frozen")
    assert pause(house) is None
    house.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=2))
    assert house.kernel.running == {UID}, "what the pause had stopped was not taken for stopped by its renter"


def test_a_lease_that_is_lost_in_a_pause_keeps_all_stopped_and_resumes_all_later(house: House) -> None:
    house.activate()
    pause(house)
    house.may_run(False)
    house.rentals.freezer.resume("one")
    assert house.kernel.running == set()
    house.right[0] = True
    house.fence.lease_renewed()
    house.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
    assert house.kernel.running == {UID}


def test_programs_that_cannot_be_stopped_go_on_and_there_is_no_snapshot(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.activate()
    monkeypatch.setattr(
        "orion_worker.freezer.marks.stop", lambda uid, *_: house.kernel.signal_all(uid, Signals.SIGSTOP) and None
    )
    with pytest.raises(RequestRefused) as refused:
        pause(house)
    assert (refused.value.code, house.kernel.running) == ("restless", {UID})


def test_a_rental_that_is_thawed_while_the_fence_looks_stays_activated(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its renter cannot log in until the next reply to a heartbeat corrects that (seen in chaos tests)."""
    monkeypatch.setattr("orion_worker.agent.fence.AGAIN_EVERY_S", 0.0)
    house.activate()
    house.may_run(False)
    house.right[0] = True
    house.fence.lease_renewed()
    seen = house.rentals.freezer.frozen

    def thawed_then() -> list[str]:
        frozen = seen()
        for _ in frozen:
            house.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
        return frozen

    monkeypatch.setattr(house.rentals.freezer, "frozen", thawed_then)
    house.fence.look()
    assert house.shown == "running"
    assert house.kernel.running == {UID}


# What is retired, so that its files can be recovered


@pytest.fixture
def retired(house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    """A house whose one rental has run, and is retired, so that its files can be recovered."""

    def end(renters: dict[int, str], within_s: float = 0.0) -> int:
        return sum(house.kernel.signal_all(uid, Signals.SIGKILL) for uid in renters)

    monkeypatch.setattr("orion_worker.system.processes.kill_all", end)
    house.activate()
    (record,) = house.rentals.records.all()
    house.rentals.retire(record)
    return house


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_retired_rental_is_neither_frozen_nor_activated(retired: House, epoch: int) -> None:
    rentals = retired.rentals
    for order in (rentals.freeze, rentals.thaw, rentals.unlock):
        with pytest.raises(RequestRefused) as refused:
            order(RentalOrder(rental_id="one", epoch=epoch, move=7))
        if epoch == 1 or order == rentals.freeze:
            assert refused.value.code == "laid_down"
    assert (rentals.freezer.frozen(), retired.shown) == ([], "locked")
    assert retired.kernel.running == set()


def test_the_fence_freezes_nothing_that_is_retired_and_ends_what_would_run_of_it(retired: House) -> None:
    retired.kernel.running.add(UID)
    retired.may_run(False)
    assert (retired.rentals.freezer.frozen(), retired.shown) == ([], "locked")
    assert (retired.kernel.running, retired.kernel.stopped) == (set(), set())


def test_a_mark_from_the_moment_of_retiring_is_removed(retired: House) -> None:
    (record,) = retired.rentals.records.all()
    retired.rentals.freezer.mark(record, frozenset())
    retired.fence._repeat_at = 0.0
    retired.fence.look()
    assert retired.rentals.freezer.frozen() == []


def test_a_retired_rental_stays_retired_over_a_restart_and_can_be_recovered_again(retired: House) -> None:
    again = Rentals(WorkerPaths(retired.root), lock_wait_s=0.0)
    with pytest.raises(RequestRefused, match="await their recovery"):
        again.freeze(RentalOrder(rental_id="one", epoch=1))
    request = TransferRequest("one", 1, deadline=time.time() + 60)
    assert record_for("salvage", again.records, request).retired
    with pytest.raises(RequestRefused, match="await their recovery"):
        record_for("send", again.records, request)


def test_a_rental_that_is_made_again_after_a_restored_backup_is_no_longer_retired(
    retired: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    rentals = retired.rentals
    monkeypatch.setattr(rentals, "_make_home", lambda request: False)
    monkeypatch.setattr(rentals, "_write_keys", lambda request, name: False)
    monkeypatch.setattr("orion_worker.rental.accounts.add", lambda etc, username, uid: False)
    monkeypatch.setattr("orion_worker.rental.accounts.taken_by_another", lambda etc, username, uid: False)
    assert rentals.run(RentalOrder(rental_id="one", epoch=1, username="r-one", uid=UID))["state"] == "running"
    assert rentals.freeze(RentalOrder(rental_id="one", epoch=1))["state"] == "frozen"
