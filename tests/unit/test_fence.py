"""The fence of a worker, in a directory: its effect on marks, keys and the right to run. No process is stopped."""

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
class FencedRentals:
    root: Path
    kernel: Kernel
    rentals: Rentals
    fence: Fence
    right: list[bool]
    log: list[str]

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
def fenced(tmp_path: Path, kernel: Kernel) -> FencedRentals:
    rentals = Rentals(WorkerPaths(tmp_path), lock_wait_s=0.0)
    rentals.records.save(RentalRecord(rental_id="one", username="r-one", uid=UID, epoch=1))
    (tmp_path / "etc/orion/locked/r-one").write_text("key\n")
    right, log = [False], list[str]()
    fence = Fence(rentals, lambda: right[0], log.append)
    fence.begin()
    return FencedRentals(tmp_path, kernel, rentals, fence, right, log)


def test_after_the_start_no_rental_is_activated_without_a_lease(fenced: FencedRentals) -> None:
    fenced.fence.look()
    assert fenced.shown == "locked", "a locked rental is not frozen either"
    with pytest.raises(RequestRefused, match="no lease"):
        fenced.rentals.unlock(RentalOrder(rental_id="one", epoch=1))
    fenced.activate()
    assert fenced.shown == "running"


def test_without_the_right_to_run_all_processes_are_stopped_and_the_keys_set_aside(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.may_run(False)
    assert fenced.shown == "frozen"
    assert (fenced.root / "etc/orion/locked/r-one").exists()
    assert fenced.kernel.stopped == {UID}
    assert fenced.log == ["no right to run: 1 rentals frozen"]


def test_the_fence_never_thaws_without_a_reply_and_a_lease(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.may_run(False)
    with pytest.raises(RequestRefused, match="no lease"):
        fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=5.0)
    fenced.may_run(True)
    assert (fenced.shown, fenced.kernel.stopped) == ("frozen", {UID})
    with pytest.raises(RequestRefused, match="thaw it"):
        fenced.rentals.unlock(RentalOrder(rental_id="one", epoch=1))
    assert fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=5.0)["state"] == "running"
    assert (fenced.shown, fenced.kernel.running) == ("running", {UID})


@pytest.mark.parametrize("epoch", [2, 3])
def test_only_the_epoch_of_this_worker_is_thawed(fenced: FencedRentals, epoch: int) -> None:
    fenced.activate()
    fenced.may_run(False)
    fenced.may_run(True)
    with pytest.raises(RequestRefused, match="epoch"):
        fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=epoch))
    assert fenced.shown == "frozen"


def test_a_process_that_was_stopped_before_stays_stopped_over_two_freezes(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.kernel.running.clear()
    fenced.kernel.suspended.add(UID)
    fenced.may_run(False)
    fenced.may_run(True)
    fenced.may_run(False)
    fenced.may_run(True)
    fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
    assert (fenced.kernel.suspended, fenced.kernel.running) == ({UID}, set())


def test_the_fence_stops_processes_even_where_it_cannot_write_marks_yet(
    fenced: FencedRentals, monkeypatch: pytest.MonkeyPatch
) -> None:
    fenced.activate()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(marks.Freezer, "_write", full)
        fenced.right[0] = False
        with pytest.raises(OSError, match="No space"):
            fenced.fence.look()
        assert fenced.kernel.stopped == {UID}
        assert (fenced.root / "etc/orion/locked/r-one").exists()
        fenced.right[0] = True
        with pytest.raises(OSError, match="No space"):
            fenced.fence.lease_renewed()
        assert not fenced.rentals.freezer.has_lease, "a rental is not activated while its processes would be overlooked"
    fenced.fence.lease_renewed()
    fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
    assert fenced.kernel.running == {UID}


def test_a_rental_that_is_made_without_a_lease_is_frozen_too(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.may_run(False)
    fenced.rentals.records.save(RentalRecord(rental_id="two", username="r-two", uid=UID + 1, epoch=1, activated=True))
    fenced.kernel.running.add(UID + 1)
    fenced.fence._repeat_at = 0.0
    fenced.fence.look()
    assert fenced.kernel.running == set()
    assert [item["state"] for item in fenced.rentals.inventory()] == ["frozen", "frozen"]


def test_a_restore_is_ended_by_the_fence_and_its_rental_can_be_made_again(fenced: FencedRentals) -> None:
    fenced.may_run(True)
    fenced.kernel.running.add(UID)  # in place of rsync, which keeps the rental's lock while it is stopped
    fenced.may_run(False)
    assert (fenced.kernel.running, fenced.kernel.stopped) == (set(), set())
    assert (fenced.shown, fenced.log) == ("locked", ["no right to run: 0 rentals frozen"])
    with pytest.raises(RequestRefused, match="no lease"):
        fenced.rentals.unlock(RentalOrder(rental_id="one", epoch=1))
    fenced.may_run(True)
    assert fenced.rentals.unlock(RentalOrder(rental_id="one", epoch=1))["state"] == "running"


def test_a_reply_to_an_earlier_call_does_not_undo_an_order_to_freeze(
    fenced: FencedRentals, monkeypatch: pytest.MonkeyPatch
) -> None:
    fenced.activate()
    monkeypatch.setattr(commands, "_boot_time_s", lambda: 100.0)
    assert fenced.rentals.freeze(RentalOrder(rental_id="one", epoch=1)) == {
        "changed": True,
        "epoch": 1,
        "state": "frozen",
        "killed": 0,
    }
    assert not fenced.rentals.freeze(RentalOrder(rental_id="one", epoch=1))["changed"]
    with pytest.raises(RequestRefused, match="since that was asked"):
        fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=99.9)
    assert fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=100.1)["changed"]
    assert fenced.kernel.running == {UID}


def test_a_lease_that_was_lost_and_regained_does_not_undo_an_order_to_freeze(
    fenced: FencedRentals, monkeypatch: pytest.MonkeyPatch
) -> None:
    fenced.activate()
    monkeypatch.setattr(commands, "_boot_time_s", lambda: 100.0)
    fenced.rentals.freeze(RentalOrder(rental_id="one", epoch=1))
    fenced.may_run(False)
    fenced.may_run(True)
    with pytest.raises(RequestRefused, match="since that was asked"):
        fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1), requested_at=99.0)


def test_an_order_of_an_older_epoch_freezes_nothing_and_an_absent_rental_is_no_failure(fenced: FencedRentals) -> None:
    fenced.rentals.records.save(RentalRecord(rental_id="one", username="r-one", uid=UID, epoch=3))
    with pytest.raises(RequestRefused, match="older"):
        fenced.rentals.freeze(RentalOrder(rental_id="one", epoch=2))
    assert fenced.rentals.freeze(RentalOrder(rental_id="two", epoch=1))["state"] == "absent"


def test_marks_end_with_the_container(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.may_run(False)
    fenced.fence.begin()
    assert fenced.shown == "locked"
    assert not fenced.rentals.freezer.has_lease


def test_the_mark_of_a_rental_that_was_purged_goes(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.may_run(False)
    fenced.rentals.records.bury(RentalRecord(rental_id="one", username="r-one", uid=UID, epoch=1))
    fenced.fence._repeat_at = 0.0
    fenced.fence.look()
    assert fenced.rentals.freezer.frozen() == []


def test_no_order_of_an_earlier_migration_thaws_a_rental_that_a_later_one_froze(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.rentals.freeze(RentalOrder(rental_id="one", epoch=1, move=7))
    fenced.rentals.freeze(RentalOrder(rental_id="one", epoch=1, move=5))
    for earlier in (0, 5, 6):
        with pytest.raises(RequestRefused, match="planned move 7"):
            fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=earlier))
    assert (fenced.shown, fenced.kernel.stopped) == ("frozen", {UID})
    fenced.may_run(False)
    fenced.may_run(True)
    with pytest.raises(RequestRefused, match="planned move 7"):
        fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=6))
    assert fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=7))["state"] == "running"


def pause(fenced: FencedRentals, seconds: float = 10.0) -> frozenset[stopper.KernelTask] | None:
    (record,) = fenced.rentals.records.all()
    return fenced.rentals.freezer.pause(record, time.clock_gettime(time.CLOCK_BOOTTIME) + seconds)


def test_the_end_of_a_pause_continues_only_processes_that_ran_before(fenced: FencedRentals) -> None:
    fenced.activate()
    fenced.kernel.suspended.add(UID)
    assert pause(fenced) == frozenset()
    assert (fenced.kernel.running, fenced.shown) == (set(), "running"), "its renter may log in meanwhile"
    fenced.rentals.freezer.resume("one")
    assert fenced.kernel.stopped == {UID}, "the process was stopped before and stays stopped"
    fenced.kernel.suspended.clear()
    fenced.kernel.running, fenced.kernel.stopped = {UID}, set()
    assert pause(fenced) == frozenset()
    fenced.rentals.freezer.resume("one")
    fenced.rentals.freezer.resume("one")
    assert fenced.kernel.running == {UID}


def test_a_pause_whose_snapshot_died_is_ended_by_the_fence(
    fenced: FencedRentals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orion_worker.agent.fence.AGAIN_EVERY_S", 0.0)
    fenced.activate()
    pause(fenced, seconds=60)
    fenced.fence.look()
    assert fenced.kernel.running == set(), "the pause has time left"
    pause(fenced, seconds=-1)
    fenced.fence.look()
    assert fenced.kernel.running == {UID}
    assert "did not end" in fenced.log[-1]


def test_a_frozen_rental_is_not_paused_and_the_end_of_a_pause_thaws_nothing(fenced: FencedRentals) -> None:
    fenced.activate()
    pause(fenced)
    fenced.rentals.freeze(RentalOrder(rental_id="one", epoch=1, move=2))
    fenced.rentals.freezer.resume("one")
    assert (fenced.kernel.running, fenced.shown) == (set(), "frozen")
    assert pause(fenced) is None
    fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1, move=2))
    assert fenced.kernel.running == {UID}, "processes that the pause stopped are not taken for stopped by their renter"


def test_a_lease_lost_in_a_pause_freezes_the_rental_and_a_later_thaw_continues_all_of_it(
    fenced: FencedRentals,
) -> None:
    fenced.activate()
    pause(fenced)
    fenced.may_run(False)
    fenced.rentals.freezer.resume("one")
    assert fenced.kernel.running == set()
    fenced.right[0] = True
    fenced.fence.lease_renewed()
    fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
    assert fenced.kernel.running == {UID}


def test_programs_that_resist_a_pause_go_on_and_the_snapshot_fails(
    fenced: FencedRentals, monkeypatch: pytest.MonkeyPatch
) -> None:
    fenced.activate()
    monkeypatch.setattr(
        "orion_worker.freezer.marks.stop", lambda uid, *_: fenced.kernel.signal_all(uid, Signals.SIGSTOP) and None
    )
    with pytest.raises(RequestRefused) as refused:
        pause(fenced)
    assert (refused.value.code, fenced.kernel.running) == ("restless", {UID})


def test_a_rental_that_is_thawed_during_a_round_of_the_fence_stays_activated(
    fenced: FencedRentals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its renter is locked out until the next reply to a heartbeat, as a chaos run has shown."""
    monkeypatch.setattr("orion_worker.agent.fence.AGAIN_EVERY_S", 0.0)
    fenced.activate()
    fenced.may_run(False)
    fenced.right[0] = True
    fenced.fence.lease_renewed()
    seen = fenced.rentals.freezer.frozen

    def thawed_then() -> list[str]:
        frozen = seen()
        for _ in frozen:
            fenced.rentals.thaw(RentalOrder(rental_id="one", epoch=1))
        return frozen

    monkeypatch.setattr(fenced.rentals.freezer, "frozen", thawed_then)
    fenced.fence.look()
    assert fenced.shown == "running"
    assert fenced.kernel.running == {UID}


# Retired rentals, whose files can be recovered


@pytest.fixture
def retired(fenced: FencedRentals, monkeypatch: pytest.MonkeyPatch) -> FencedRentals:
    """Return a worker whose one rental has run and is retired, so that its files can be recovered."""

    def end(renters: dict[int, str], within_s: float = 0.0) -> int:
        return sum(fenced.kernel.signal_all(uid, Signals.SIGKILL) for uid in renters)

    monkeypatch.setattr("orion_worker.system.processes.kill_all", end)
    fenced.activate()
    (record,) = fenced.rentals.records.all()
    fenced.rentals.retire(record)
    return fenced


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_retired_rental_is_neither_frozen_nor_activated(retired: FencedRentals, epoch: int) -> None:
    rentals = retired.rentals
    for order in (rentals.freeze, rentals.thaw, rentals.unlock):
        with pytest.raises(RequestRefused) as refused:
            order(RentalOrder(rental_id="one", epoch=epoch, move=7))
        if epoch == 1 or order == rentals.freeze:
            assert refused.value.code == "laid_down"
    assert (rentals.freezer.frozen(), retired.shown) == ([], "locked")
    assert retired.kernel.running == set()


def test_the_fence_freezes_no_retired_rental_and_kills_its_processes(retired: FencedRentals) -> None:
    retired.kernel.running.add(UID)
    retired.may_run(False)
    assert (retired.rentals.freezer.frozen(), retired.shown) == ([], "locked")
    assert (retired.kernel.running, retired.kernel.stopped) == (set(), set())


def test_a_freeze_mark_that_was_made_during_a_retirement_is_removed(retired: FencedRentals) -> None:
    (record,) = retired.rentals.records.all()
    retired.rentals.freezer.mark(record, frozenset())
    retired.fence._repeat_at = 0.0
    retired.fence.look()
    assert retired.rentals.freezer.frozen() == []


def test_a_retired_rental_stays_retired_over_a_restart_and_can_be_recovered_again(retired: FencedRentals) -> None:
    again = Rentals(WorkerPaths(retired.root), lock_wait_s=0.0)
    with pytest.raises(RequestRefused, match="await their recovery"):
        again.freeze(RentalOrder(rental_id="one", epoch=1))
    request = TransferRequest(rental_id="one", epoch=1, deadline=time.time() + 60)
    assert record_for("salvage", again.records, request).retired
    with pytest.raises(RequestRefused, match="await their recovery"):
        record_for("send", again.records, request)


def test_a_rental_that_is_made_again_after_a_restored_backup_is_not_retired(
    retired: FencedRentals, monkeypatch: pytest.MonkeyPatch
) -> None:
    rentals = retired.rentals
    monkeypatch.setattr(rentals, "_make_home", lambda request: False)
    monkeypatch.setattr(rentals, "_write_keys", lambda request, name: False)
    monkeypatch.setattr("orion_worker.rental.accounts.add", lambda etc, username, uid: False)
    monkeypatch.setattr("orion_worker.rental.accounts.taken_by_another", lambda etc, username, uid: False)
    assert rentals.run(RentalOrder(rental_id="one", epoch=1, username="r-one", uid=UID))["state"] == "running"
    assert rentals.freeze(RentalOrder(rental_id="one", epoch=1))["state"] == "frozen"
