"""orion-rental: its rules, and its changes in a directory. Tests with root and sshd: tests/integration."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from orion_worker.records import (
    RentalRecord,
    RentalRecords,
    RequestRefused,
    check_create,
    check_not_newer,
    check_unlock,
)
from orion_worker.rental import accounts, residue
from orion_worker.rental.cli import answer_request, order_from
from orion_worker.rental.commands import Rentals
from orion_worker.rental.paths import WorkerPaths
from orion_worker.system import processes

from orion.rental_order import RentalOrder

KEY = "ssh-ed25519 " + "A" * 68
CREATE: dict[str, Any] = {
    "rental_id": "one",
    "username": "r-one",
    "uid": 100_001,
    "epoch": 1,
    "public_keys": [KEY],
}
RECORD = RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (folder / "group").write_text("root:x:0:\n")
    (folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")
    return folder


# Epochs


def test_no_epoch_is_made_that_is_older_than_recorded_or_purged_or_half_purged() -> None:
    check_create(None, 0, 1)
    check_create(RECORD, 0, 3)
    check_create(RECORD, 0, 4)
    check_create(None, 3, 4)
    for record, purged, epoch, code in (
        (RECORD, 0, 2, "stale_epoch"),
        (None, 3, 3, "purged"),
        (None, 3, 2, "purged"),
        (RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3, ending=True), 0, 4, "purge_unfinished"),
    ):
        with pytest.raises(RequestRefused) as refusal:
            check_create(record, purged, epoch)
        assert refusal.value.code == code


def test_only_the_recorded_epoch_is_unlocked() -> None:
    check_unlock(RECORD, 0, 3)
    for record, purged, epoch, code in (
        (RECORD, 0, 2, "stale_epoch"),
        (RECORD, 0, 4, "stale_epoch"),
        (None, 0, 1, "unknown_rental"),
        (None, 3, 3, "purged"),
        (RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=3, ending=True), 0, 3, "purged"),
    ):
        with pytest.raises(RequestRefused) as refusal:
            check_unlock(record, purged, epoch)
        assert refusal.value.code == code


def test_an_old_order_to_lock_or_purge_leaves_a_newer_epoch() -> None:
    check_not_newer(None, 1)
    check_not_newer(RECORD, 3)
    check_not_newer(RECORD, 9)
    with pytest.raises(RequestRefused):
        check_not_newer(RECORD, 2)


def test_a_record_from_before_rental_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"rental_id": "one", "username": "r-one", "uid": 100001, "epoch": 3}')
    records = RentalRecords(tmp_path)
    assert records.find("one") == RECORD
    records.save(replace(RECORD, rental_name="lab"))
    assert records.find("one") == RentalRecord(
        rental_id="one", username="r-one", uid=100_001, epoch=3, rental_name="lab"
    )


def test_a_tombstone_outlives_a_crash_between_it_and_the_record(tmp_path: Path) -> None:
    records = RentalRecords(tmp_path)
    records.save(RECORD)
    (tmp_path / "tombstones/one").write_text("3")
    assert records.find("one") is None
    assert records.all() == []
    records.save(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=4))
    assert [record.epoch for record in records.all()] == [4]


def test_the_epoch_of_a_tombstone_never_falls(tmp_path: Path) -> None:
    records = RentalRecords(tmp_path)
    records.bury(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=5))
    records.bury(RentalRecord(rental_id="one", username="r-one", uid=100_001, epoch=2))
    assert records.purged_epoch("one") == 5


def test_one_command_at_a_time_for_a_rental_and_another_rental_does_not_wait(tmp_path: Path) -> None:
    records, other_process = RentalRecords(tmp_path), RentalRecords(tmp_path)
    with records.locked("one", wait_s=0):
        with pytest.raises(RequestRefused, match="still at work"), other_process.locked("one", wait_s=0):
            pass
        with other_process.locked("two", wait_s=0):
            pass
    with other_process.locked("one", wait_s=0):
        pass


# Requests


def test_a_request_is_read() -> None:
    request = order_from("create", CREATE | {"deadline": None})
    assert request == RentalOrder(rental_id="one", epoch=1, username="r-one", uid=100_001, public_keys=(KEY,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rental_id": "../etc"},
        {"rental_id": ""},
        {"username": "root"},
        {"username": "r-one\nroot:x:0"},
        {"username": "r-one:x"},
        {"uid": 0},
        {"uid": 99_999},
        {"uid": "100001"},
        {"uid": True},
        {"epoch": 0},
        {"epoch": 1.5},
        {"public_keys": []},
        {"public_keys": [f'command="x" {KEY}']},
        {"public_keys": [f"{KEY}\n{KEY}"]},
        {"rental_name": 'a",command="b'},
        {"rental_name": "Lab"},
        {"rental_name": "a\n"},
        {"unknown": 1},
    ],
)
def test_a_harmful_request_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    status, report = answer_request("create", json.dumps(CREATE | wrong), Rentals(WorkerPaths(tmp_path)), now=0)
    assert (status, report["code"], report["changed"]) == (2, "invalid_request", False)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "{}"])
def test_a_text_that_is_no_request_is_refused(text: str, tmp_path: Path) -> None:
    assert answer_request("purge", text, Rentals(WorkerPaths(tmp_path)), now=0)[0] == 2


def test_a_passed_deadline_is_refused_by_every_command(tmp_path: Path) -> None:
    rentals = Rentals(WorkerPaths(tmp_path))
    for command in ("create", "unlock", "lock", "purge"):
        status, report = answer_request(command, json.dumps(CREATE | {"deadline": 99.0}), rentals, now=100.0)
        assert (status, report["code"]) == (3, "deadline_passed")


# The boot id that an order names


@pytest.mark.parametrize("command", ["run", "create", "lock", "unlock", "freeze", "thaw", "purge"])
def test_an_order_for_another_boot_of_the_container_is_refused(command: str, tmp_path: Path) -> None:
    rentals = Rentals(WorkerPaths(tmp_path))
    rentals.records.save(RECORD)
    rentals.launcher.set_boot_id("boot-0002")
    request = CREATE | {"epoch": 3, "boot_id": "boot-0001"}
    for order in (request, {"rentals": [request]}):
        status, report = answer_request(command, json.dumps(order), rentals, now=0)
        assert (status, report["code"], report["changed"]) == (3, "other_boot", False)
    assert rentals.records.all() == [RECORD]


@pytest.mark.parametrize("named", [{"boot_id": "boot-0002"}, {"boot_id": None}, {}])
def test_an_order_for_this_boot_or_without_a_boot_id_is_done(named: dict[str, Any], tmp_path: Path) -> None:
    rentals = Rentals(WorkerPaths(tmp_path))
    rentals.records.save(RECORD)
    rentals.launcher.set_boot_id("boot-0002")
    assert answer_request("lock", json.dumps({"rental_id": "one", "epoch": 3} | named), rentals, now=0)[0] == 0


def test_a_boot_id_that_is_no_text_is_refused(tmp_path: Path) -> None:
    request = {"rental_id": "one", "epoch": 3, "boot_id": 5}
    assert answer_request("lock", json.dumps(request), Rentals(WorkerPaths(tmp_path)), now=0)[0] == 2


# Several rentals in one order


def test_each_rental_of_an_order_succeeds_or_fails_alone_and_the_worst_is_the_exit_status(tmp_path: Path) -> None:
    rentals = Rentals(WorkerPaths(tmp_path))
    rentals.records.save(RECORD)
    request = [{"rental_id": "one", "epoch": 3}, {"rental_id": "one", "epoch": 2}, {"rental_id": "?", "epoch": 1}]
    status, report = answer_request("lock", json.dumps({"rentals": request}), rentals, now=0)
    assert status == 3
    assert report["error"] == "epoch 2 is older than epoch 3, which was seen here"
    assert [one.get("code") for one in report["rentals"]] == [None, "stale_epoch", "invalid_request"]
    assert answer_request("lock", json.dumps({"rentals": request[:1]}), rentals, now=0)[0] == 0


@pytest.mark.parametrize("rentals", [[], {}, "one", None])
def test_an_empty_list_of_rentals_is_refused(rentals: Any, tmp_path: Path) -> None:
    status, report = answer_request("lock", json.dumps({"rentals": rentals}), Rentals(WorkerPaths(tmp_path)), now=0)
    assert (status, report["code"]) == (2, "invalid_request")


def test_a_list_of_rentals_has_no_other_fields_beside_it(tmp_path: Path) -> None:
    request = {"rentals": [{"rental_id": "one", "epoch": 3}], "epoch": 4}
    assert answer_request("lock", json.dumps(request), Rentals(WorkerPaths(tmp_path)), now=0)[0] == 2


def test_a_refused_rental_of_a_purge_of_several_is_reported_in_its_place(tmp_path: Path) -> None:
    rentals = Rentals(WorkerPaths(tmp_path))
    rentals.records.save(RECORD)
    old = {"rental_id": "one", "username": "r-one", "uid": 100_001, "epoch": 2}
    late = {"rental_id": "two", "username": "r-two", "uid": 100_002, "epoch": 1, "deadline": 5.0}
    status, report = answer_request("purge", json.dumps({"rentals": [late, old, {"rental_id": "?"}]}), rentals, now=9)
    assert status == 3
    assert [one["code"] for one in report["rentals"]] == ["deadline_passed", "stale_epoch", "invalid_request"]


# Keys


def test_unlocking_and_locking_move_the_keys_and_may_be_repeated(tmp_path: Path) -> None:
    rentals = Rentals(WorkerPaths(tmp_path))
    rentals.records.save(RECORD)
    aside, in_place = tmp_path / "etc/orion/locked/r-one", tmp_path / "etc/orion/keys/r-one"
    aside.write_text("key\n")
    assert [rentals.unlock(RentalOrder(rental_id="one", epoch=3))["changed"] for _ in range(2)] == [True, False]
    assert (in_place.read_text(), aside.exists()) == ("key\n", False)
    assert rentals.inventory()[0]["state"] == "running"
    assert [rentals.lock(RentalOrder(rental_id="one", epoch=3))["changed"] for _ in range(2)] == [True, False]
    assert (aside.read_text(), in_place.exists()) == ("key\n", False)


def test_a_rental_without_keys_here_cannot_be_unlocked(tmp_path: Path) -> None:
    rentals = Rentals(WorkerPaths(tmp_path))
    rentals.records.save(RECORD)
    with pytest.raises(RequestRefused, match="not created"):
        rentals.unlock(RentalOrder(rental_id="one", epoch=3))


def test_locking_an_absent_rental_is_no_failure(tmp_path: Path) -> None:
    assert Rentals(WorkerPaths(tmp_path)).lock(RentalOrder(rental_id="one", epoch=3))["state"] == "absent"


# Accounts


def test_an_account_is_added_once_with_a_password_that_nothing_matches(etc: Path) -> None:
    assert accounts.add(etc, "r-one", 100_001)
    assert not accounts.add(etc, "r-one", 100_001)
    assert "r-one:x:100001:100001::/home/r-one:/bin/bash\n" in (etc / "passwd").read_text()
    assert "r-one:*:" in (etc / "shadow").read_text()
    assert (etc / "passwd").read_text().startswith("root:x:0:0:")


def test_a_half_made_account_is_completed(etc: Path) -> None:
    accounts.add(etc, "r-one", 100_001)
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
    assert accounts.add(etc, "r-one", 100_001)
    assert accounts.found(etc, "r-one", 100_001) == [str(etc / name) for name in ("group", "passwd", "shadow")]


def test_a_removed_account_leaves_no_line_and_all_others(etc: Path) -> None:
    before = {name: (etc / name).read_text() for name in accounts.FILES}
    accounts.add(etc, "r-one", 100_001)
    assert accounts.remove(etc, "r-one", 100_001)
    assert {name: (etc / name).read_text() for name in accounts.FILES} == before
    assert not accounts.remove(etc, "r-one", 100_001)
    assert accounts.found(etc, "r-one", 100_001) == []


def test_an_account_that_another_order_adds_meanwhile_is_no_residue(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A purge looks for residue without the lock, while orders for other rentals replace the files."""
    read, others = accounts._read, itertools.count(100_002)

    def read_and_add_another(file: Path) -> list[str]:
        lines, uid = read(file), next(others)
        file.write_text("".join(f"{line}\n" for line in [*lines, accounts.lines_for(f"r-{uid}", uid)[file.name]]))
        return lines

    monkeypatch.setattr(accounts, "_read", read_and_add_another)
    assert accounts.found(etc, "r-one", 100_001) == []


def test_the_modes_of_the_account_files_are_kept(etc: Path) -> None:
    (etc / "shadow").chmod(0o640)
    accounts.add(etc, "r-one", 100_001)
    assert (etc / "shadow").stat().st_mode & 0o777 == 0o640


def test_a_name_with_another_uid_belongs_to_another_account(etc: Path) -> None:
    accounts.add(etc, "r-one", 100_001)
    assert not accounts.taken_by_another(etc, "r-one", 100_001)
    assert accounts.taken_by_another(etc, "r-one", 100_002)
    assert accounts.taken_by_another(etc, "r-two", 100_001)


# Residue


def test_a_tree_is_removed_however_deep_and_its_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    doomed = tmp_path / "doomed"
    doomed.mkdir()
    (doomed / "link").symlink_to(tmp_path / "kept")
    (doomed / "many").mkdir()
    for number in range(1500):
        (doomed / f"many/{number}").mkdir()
    here = os.open(doomed, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep", dir_fd=here)
        inner = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    parent = os.open(tmp_path, os.O_RDONLY)
    removed = residue.remove_entry(parent, "doomed")
    os.close(parent)
    assert removed == 1 + 1 + 1 + 1500 + 1500
    assert [place.name for place in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/file").read_text() == "x"


def test_an_entry_that_replaced_a_found_directory_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    found = os.lstat(tmp_path / "place")
    (tmp_path / "place").rename(tmp_path / "away")
    (tmp_path / "place").mkdir()
    (tmp_path / "place/file").write_text("the neighbour's")
    parent = os.open(tmp_path, os.O_RDONLY)
    assert residue.remove_entry(parent, "place", found) == 0
    os.close(parent)
    assert (tmp_path / "place/file").exists()


def test_a_search_finds_entries_of_the_uid_and_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("x")
    (tmp_path / "link").symlink_to("/etc")
    ours = os.getuid()
    found = {found.path.removeprefix(str(tmp_path)) for found in residue.find_owned(str(tmp_path), [ours], [])}
    assert found == {"/folder", "/link"}
    assert list(residue.find_owned(str(tmp_path), [4_000_000_001], [])) == []


def test_directories_of_others_that_are_too_deep_are_named(tmp_path: Path) -> None:
    here = tmp_path
    for _ in range(residue.DEEPEST + 2):
        here /= "d"
        here.mkdir()
    unsearched: list[str] = []
    list(residue.find_owned(str(tmp_path), [4_000_000_001], unsearched))
    assert unsearched == [str(tmp_path) + "/d" * residue.DEEPEST]


def test_the_mounts_to_search_are_the_writable_ones(tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    (tmp_path / "read-only").mkdir()
    (tmp_path / "file").write_text("")
    mountinfo = "\n".join(
        [
            f"1 0 0:1 / {tmp_path} rw,relatime - overlay overlay rw",
            f"2 1 0:2 / {tmp_path}/with\\040space rw master:1 - tmpfs tmpfs rw",
            f"3 1 0:3 / {tmp_path}/read-only ro,relatime - tmpfs tmpfs rw",
            f"4 1 0:4 / {tmp_path}/file rw - ext4 /dev/vda rw",
            "5 1 0:5 / /proc rw - proc proc rw",
            "6 1 0:6 / /sys rw - sysfs sysfs rw",
        ]
    )
    assert residue.writable_mounts(mountinfo) == [str(tmp_path), f"{tmp_path}/with space"]


SHARED_MEMORY = """\
       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime
      4369          7  1600                  4096    10    10      1 100001 100001 100001 100001          0
      4370          8   600                  4096    10    10      0 100001 100001 100001 100001          0
      4371          9   600                  4096    10    10      0 100002 100002 100001 100001          0
      4372         10   600                  4096    10    10      0 100002 100002 100002 100002          0
"""


def test_ipc_objects_of_a_renter_are_those_that_it_owns_or_created_and_not_destroyed_ones() -> None:
    assert residue.ipc_ids_of(SHARED_MEMORY, 100_001) == [8, 9]


# Processes


def test_a_process_belongs_to_all_four_of_its_uids_and_a_zombie_to_none() -> None:
    status = "Name:\tsh\nState:\tS (sleeping)\nUid:\t0\t100001\t0\t100002\nGid:\t0\t0\t0\t0\n"
    assert processes.owners(status) == {0, 100_001, 100_002}
    assert processes.owners(status.replace("S (sleeping)", "Z (zombie)")) == set()
    assert processes.owners("") == set()


def test_ending_no_processes_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "orion_worker.system.processes.time.sleep", lambda _: pytest.fail("there is nobody to wait for")
    )
    assert processes.kill_all({}) == 0
