"""Snapshots on a worker, in directories: which files are found changed, and that the staged files existed together.

The renter's programs are functions here that run whenever the worker looks, unless they are stopped; real programs are
in tests/integration/test_snapshots.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from orion_worker.freezer.marks import FreezeMark, Freezer
from orion_worker.freezer.stopper import KernelTask
from orion_worker.records import RentalRecord, RentalRecords, RequestRefused
from orion_worker.snapshots import maker, staging, transfer
from orion_worker.snapshots import scan as scanning
from orion_worker.snapshots.maker import SnapshotMaker
from orion_worker.snapshots.manifests import Manifest, Manifests
from orion_worker.snapshots.requests import TransferRequest
from orion_worker.snapshots.scan import Scan, scan
from orion_worker.snapshots.staging import STAT, StagingTree, access_list
from orion_worker.system.locks import got_lock

UID = os.getuid()
RECORD = RentalRecord(rental_id="one", username="r-one", uid=UID, epoch=2, activated=True)
BASE, MARK = "aa", "bb"


@dataclass
class Programs(Freezer):
    """The renter's programs, which run at each scan and each check of the processes, but not in a pause."""

    root: Path
    work: Callable[[], Any] = lambda: None
    paused: bool = False
    pauses: int = 0
    tasks: list[KernelTask] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.root)

    def run(self) -> None:
        if not self.paused:
            self.work()

    def pause(self, record: RentalRecord, until: float) -> frozenset[KernelTask] | None:
        if self.is_frozen(record.rental_id):
            return None
        self.paused, self.pauses = True, self.pauses + 1
        return frozenset(self.tasks)

    def resume(self, rental_id: str) -> None:
        self.paused = False


@dataclass
class Operations:
    """A fake of rental.commands.Rentals that records what is done to a rental."""

    records: RentalRecords
    freezer: Programs
    manifests: Manifests
    spares: bool = False
    held: str = ""

    def retire(self, record: RentalRecord) -> None: ...

    def freeze_over_limit(self, record: RentalRecord, reason: str) -> bool:
        self.held = "" if self.spares else reason
        return not self.spares


@dataclass
class HomeBench:
    """A worker with one home; `snapshot` returns the report for the manager."""

    root: Path
    operations: Operations
    sent: dict[str, Any] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)

    @property
    def home(self) -> Path:
        return self.root / "home"

    def snapshot(self, base: str = "", mark: str = MARK, asked_s_ago: float = 0.0, **more: Any) -> dict[str, Any]:
        request = TransferRequest(**{"rental_id": "one", "epoch": 2, "deadline": time.time() + 60, "max_files": 1000,
                       "max_bytes": 1 << 30, "base": base, "mark": mark} | more)  # fmt: skip
        home = transfer.open_home(self.home, UID)
        staging_tree = StagingTree(home=home, place=self.root / "aside/one", uid=UID, sender=UID)
        try:
            asked_at = time.monotonic() - asked_s_ago
            made = SnapshotMaker(
                operations=self.operations,
                record=RECORD,
                request=request,
                staging=staging_tree,
                home=home,
                is_salvage=False,
                requested_at=asked_at,
            )
            report = transfer.make_snapshot(made)
            self.sent = {} if report["same"] else tree(staging_tree.tree)
            if not report["same"]:
                self.listed = {os.fsdecode(name) for name in (staging_tree.place / "list").read_bytes().split(b"\0")}
            return report
        finally:
            staging_tree.remove()
            os.close(home)


def tree(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for folder, _, names in os.walk(place):
        for name in names:
            file = Path(folder, name)
            found[str(file.relative_to(place))] = os.readlink(file) if file.is_symlink() else file.read_bytes()  # noqa: PTH115
    return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HomeBench:
    (tmp_path / "home").mkdir()
    (tmp_path / "aside").mkdir()
    programs = Programs(tmp_path)
    records = RentalRecords(tmp_path / "ledger")
    records.save(RECORD)
    here = HomeBench(tmp_path, Operations(records, programs, Manifests(tmp_path)))
    monkeypatch.setattr(scanning, "mapped_inodes", lambda uid: frozenset())
    monkeypatch.setattr(maker, "tasks_of", lambda uid: list(programs.tasks))
    monkeypatch.setattr(maker, "hung_up", programs.run)
    monkeypatch.setattr(os, "nice", lambda by: 0)
    monkeypatch.chdir(tmp_path)
    return here


def aged(folder: Path) -> None:
    """Wait until the file system's clock has gone on, so that files written before are no longer doubtful."""
    newest = max(path.lstat().st_ctime for path in [folder, *folder.rglob("*")])
    while time.time() < newest + scanning.RACY_S + 0.01:
        pass


def test_when_a_snapshot_was_begun_counts_from_its_request(bench: HomeBench) -> None:
    """A snapshot may lack what is written after it was begun, so its time is not that of the answer."""
    for base in ("", MARK):
        began = time.monotonic()
        report = bench.snapshot(base=base, asked_s_ago=7.0)
        took_s = time.monotonic() - began
        assert report["same"] is bool(base)
        assert 7.0 <= report["after_s"] <= 7.0 + took_s - report["age_s"]
        assert report["age_s"] > 0


def test_a_first_snapshot_has_everything_and_an_unchanged_home_is_the_same_without_a_pause(bench: HomeBench) -> None:
    (bench.home / "deep/er").mkdir(parents=True)
    (bench.home / "deep/er/file").write_text("content")
    aged(bench.home)
    report = bench.snapshot(mark=BASE)
    assert (report["same"], report["whole"], report["files"]) == (False, True, 4)
    assert bench.sent == {"deep/er/file": b"content"}
    assert bench.snapshot(base=BASE)["same"]
    assert bench.operations.freezer.pauses == 1


def test_only_what_changed_is_sent_and_what_was_removed_is_listed(bench: HomeBench) -> None:
    for name in ("stays", "grows", "goes", "folder/goes too", "folder/stays", "other/inner/deep"):
        (bench.home / name).parent.mkdir(parents=True, exist_ok=True)
        (bench.home / name).write_text("x")
    aged(bench.home)
    bench.snapshot(mark=BASE)
    (bench.home / "grows").write_text("xx")
    (bench.home / "goes").unlink()
    (bench.home / "folder/goes too").unlink()
    for name in ("other/inner/deep",):
        (bench.home / name).unlink()
    (bench.home / "other/inner").rmdir()
    (bench.home / "other").rmdir()
    (bench.home / "other").write_text("a file now")
    aged(bench.home)
    report = bench.snapshot(base=BASE)
    assert not report["whole"]
    assert bench.sent == {"grows": b"xx", "other": b"a file now"}
    assert bench.listed == {".", "grows", "goes", "folder", "folder/goes too", "other"}


def test_a_change_that_keeps_size_and_time_is_sent(bench: HomeBench) -> None:
    file = bench.home / "file"
    file.write_text("old")
    os.utime(file, ns=(5, 7))
    aged(bench.home)
    bench.snapshot(mark=BASE)
    file.write_text("new")
    os.utime(file, ns=(5, 7))
    aged(bench.home)
    assert not bench.snapshot(base=BASE)["same"]
    assert bench.sent == {"file": b"new"}


def test_a_change_too_soon_after_the_scan_for_its_ctime_to_differ_is_found_by_content(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "RACY_S", 1e9)  # everything is that young
    file = bench.home / "file"
    file.write_text("old")
    bench.snapshot(mark=BASE)
    assert bench.snapshot(base=BASE)["same"]
    known = bench.operations.manifests.read("one", BASE)
    assert known
    assert set(known.doubtful) == {b"./file"}
    file.write_text("new")
    now = known.scan.lines
    monkeypatch.setattr(scanning, "scan", lambda *_, **__: Scan(now, known.scan.at))  # as if no time had been written
    assert not bench.snapshot(base=BASE)["same"]
    assert bench.sent["file"] == b"new"


def test_a_file_mapped_for_writing_is_copied_again_during_the_pause(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bench.home / "mapped"
    file.write_text("old")
    aged(bench.home)
    bench.snapshot(mark=BASE)
    inode = file.stat().st_ino
    known = bench.operations.manifests.read("one", BASE)
    assert known
    monkeypatch.setattr(scanning, "mapped_inodes", lambda uid: frozenset({inode}))
    (bench.home / "other").write_text("x")
    aged(bench.home)
    bench.snapshot(base=BASE)
    assert bench.sent == {"mapped": b"old", "other": b"x"}
    kept = bench.operations.manifests.read("one", MARK)
    assert kept
    assert set(kept.doubtful) == {b"./mapped"}


class Counter:
    """A program that writes a number to `A` and then to `zz_B` each time that it runs, so that A is never behind."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.number = 0

    def __call__(self) -> None:
        if self.number % 2 == 0:
            (self.home / "A").write_text(str(self.number // 2 + 1))
        else:
            (self.home / "zz_B").write_text(str(self.number // 2 + 1))
        self.number += 1


def test_the_files_of_a_snapshot_existed_together(bench: HomeBench) -> None:
    """A snapshot keeps the order in which files were written, however many files change meanwhile."""
    counter = bench.operations.freezer.work = Counter(bench.home)
    for name in ("A", "zz_B"):
        (bench.home / name).write_text("0")
    for number in range(100):
        (bench.home / f"m{number}").write_text("x")
    base = ""
    for mark in ("01", "02", "03"):
        for number in range(100):
            (bench.home / f"m{number}").write_text(f"{mark} {number}")
        before = counter.number
        bench.snapshot(base=base, mark=mark)
        assert counter.number > before + 50, "the program worked while its files were read"
        ahead, behind = (int(bench.sent[name]) for name in ("A", "zz_B"))
        assert behind <= ahead <= behind + 1
        base = mark


def test_a_process_that_ran_in_the_pause_is_noticed_and_the_pause_repeated(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.home / "file").write_text("x")
    comes = KernelTask(pid=7, tid=7, parent=1, started=7, state="S", stopping=False, turns=(1,))
    seen = [[comes], [], []]
    monkeypatch.setattr(maker, "tasks_of", lambda uid: seen.pop(0))
    bench.snapshot(mark=BASE)
    assert bench.operations.freezer.pauses == 2
    monkeypatch.setattr(maker, "tasks_of", lambda uid: [comes])
    (bench.home / "file").write_text("y")
    with pytest.raises(RequestRefused) as refused:
        bench.snapshot(base=BASE)
    assert refused.value.code == "restless"
    assert not bench.operations.freezer.paused


def test_a_pause_ends_after_any_failure_in_it(bench: HomeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.home / "file").write_text("x")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StagingTree, "_copy", full)
    with pytest.raises(RequestRefused) as refused:
        bench.snapshot()
    assert refused.value.code == "no_room"
    assert not bench.operations.freezer.paused
    assert bench.operations.manifests.read("one", MARK) is None


def test_a_pause_that_takes_longer_than_it_may_ends_and_is_refused(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.home / "file").write_text("x")
    look = scanning.scan

    def slow(most_entries: int, last_moment: float, strict: bool) -> scanning.Scan:
        return look(most_entries, 0.0 if strict else last_moment, strict)

    monkeypatch.setattr(scanning, "scan", slow)
    with pytest.raises(RequestRefused) as refused:
        bench.snapshot(pause_s=9)
    assert refused.value.code == "pause_in_vain"
    assert (bench.operations.freezer.pauses, bench.operations.freezer.paused) == (1, False)


def test_no_process_is_stopped_where_the_pause_would_be_too_long(bench: HomeBench) -> None:
    for number in range(200):
        (bench.home / f"m{number}").write_text("x")
    with pytest.raises(RequestRefused) as refused:
        bench.snapshot(pause_s=1e-6)
    assert (refused.value.code, bench.operations.freezer.pauses) == ("pause_too_long", 0)
    bench.snapshot(pause_s=1e-6, for_migration=True)
    assert (len(bench.sent), bench.operations.freezer.pauses) == (200, 1)


@pytest.mark.parametrize("written", [0, 200])
def test_the_length_of_a_pause_is_estimated_from_writes_during_the_transfer(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """The snapshot of 200 files takes half a minute, and `written` of them are written again meanwhile."""
    used = [0.0]
    monkeypatch.setattr(maker, "_processor_s", lambda: used[0])
    keep = StagingTree.stage

    def slowly(staging_tree: StagingTree, entries: Iterable[scanning.HomeEntry], look: Callable[[], None]) -> None:
        keep(staging_tree, entries, look)
        if not bench.operations.freezer.paused:
            used[0] += 30.0
            for number in range(written):
                (bench.home / f"m{number}").write_text("y")

    monkeypatch.setattr(StagingTree, "stage", slowly)
    for number in range(200):
        (bench.home / f"m{number}").write_text("x")
    if written:
        with pytest.raises(RequestRefused, match=r"would have to be stopped for about (29\.9|30\.0) s"):
            bench.snapshot()
    else:
        bench.snapshot()
    assert bench.operations.freezer.pauses == (0 if written else 1)


def test_a_snapshot_of_a_frozen_home_stops_and_resumes_no_process(bench: HomeBench) -> None:
    (bench.home / "file").write_text("x")
    bench.operations.freezer.mark(RECORD, frozenset())
    bench.snapshot(for_migration=True)
    assert bench.sent == {"file": b"x"}
    assert bench.operations.freezer.pauses == 0


def test_a_frozen_home_is_scanned_once_whether_or_not_it_changed(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.home / "file").write_text("x")
    aged(bench.home)
    bench.snapshot(mark=BASE)
    scans: list[bool] = []
    monkeypatch.setattr(scanning, "scan", lambda *arguments, strict: scans.append(strict) or scan(*arguments, strict))
    bench.operations.freezer.mark(RECORD, frozenset())
    assert bench.snapshot(base=BASE, for_migration=True)["same"]
    (bench.home / "other").write_text("y")
    assert not bench.snapshot(base=BASE, for_migration=True)["same"]
    assert bench.sent == {"other": b"y"}
    with pytest.raises(RequestRefused) as refused:
        bench.snapshot(base=BASE, for_migration=True, max_files=2)
    assert refused.value.code == "over_limit"
    assert scans == [True, True, True]


def test_a_snapshot_during_whose_begin_the_rental_is_thawed_is_repeated_without_a_long_pause(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.home / "file").write_text("x")
    was_frozen = iter([True])
    monkeypatch.setattr(bench.operations.freezer, "is_frozen", lambda _rental_id: next(was_frozen, False))
    with pytest.raises(RequestRefused) as refused:
        bench.snapshot(for_migration=True)
    assert refused.value.code == "restless"
    assert (bench.operations.freezer.pauses, bench.operations.freezer.paused) == (1, False)


def test_a_purge_ends_the_transfer_that_stages_files_and_removes_the_staged_files(tmp_path: Path) -> None:
    places = tmp_path / "aside"
    (places / "one").mkdir(parents=True)
    child = os.fork()
    if child == 0:
        try:
            with transfer._lock_of(places, "one") as alone:
                assert got_lock(alone.fileno(), 0)
                alone.write(f"{os.getpid()}\n")
                alone.flush()
                for number in range(10_000_000):  # for minutes, if it is not ended
                    (places / f"one/{number % 5000}/inner").mkdir(parents=True, exist_ok=True)
        finally:
            os._exit(1)
    while not ((places / "one/100").exists() or os.waitpid(child, os.WNOHANG)[0]):
        pass
    transfer.remove_staging(places, "one")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(places.iterdir()) == []
    transfer.remove_staging(places, "another")
    transfer.remove_staging(tmp_path / "nothing was ever set aside here", "one")


def furnish(home: Path) -> None:
    (home / "dir").mkdir()
    (home / "dir/file").write_text("x")
    os.link(home / "dir/file", home / "other name")
    (home / "link").symlink_to("/etc/shadow")
    os.mkfifo(home / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(home / "socket"))
    with (home / "sparse").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
    os.setxattr(home / "dir/file", "user.mine", b"\0value")
    for name in (b"\xff\xfe", b"new\nline", b"-rf", b"a" * 255):
        (home / os.fsdecode(name)).write_bytes(name)
    for path, when in (("link", 5), ("dir/file", 1_000_000_000_123_456_789), ("dir", 77)):
        os.utime(home / path, ns=(when, when), follow_symlinks=False)
    (home / "shut").write_text("secret")
    (home / "shut").chmod(0)
    (home / "closed").mkdir()
    (home / "closed/inside").write_text("x")
    (home / "closed").chmod(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads what a renter has shut; CI is root")
def test_entries_of_every_kind_are_staged_with_their_attributes(bench: HomeBench) -> None:
    furnish(bench.home)
    home = transfer.open_home(bench.home, UID)
    staging_tree = StagingTree(home=home, place=bench.root / "aside/one", uid=UID, sender=12345)
    looked = scan(100, time.monotonic() + 20, strict=True)
    staging_tree.stage([scanning.parse_entry(line) for line in looked.lines], lambda: None)
    staging_tree.keep_only([scanning.path_of(line) for line in looked.lines])
    assert (staging_tree.missing, staging_tree.incomplete, staging_tree.vanished) == ({}, {}, set())
    in_tree = staging_tree.tree
    for path in (bench.home, *sorted(bench.home.rglob("*"))):
        copy, was = in_tree / path.relative_to(bench.home), path.lstat()
        assert copy.lstat().st_uid == 12345
        assert copy.lstat().st_mtime_ns == was.st_mtime_ns
        if path.is_symlink():
            assert copy.readlink() == path.readlink()
            continue
        assert os.getxattr(copy, STAT).decode() == f"{was.st_mode:o} 0,0 {was.st_uid}:{was.st_gid}"
        if path.is_file():
            assert copy.read_bytes() == path.read_bytes()
    assert os.getxattr(in_tree / "dir/file", "user.mine") == b"\0value"
    assert (in_tree / "dir/file").samefile(in_tree / "other name")
    assert (in_tree / "sparse").stat().st_blocks < 1000
    staging_tree.remove()
    assert not in_tree.exists()
    os.close(home)


def test_a_link_in_the_place_of_a_folder_or_a_file_leads_nowhere(bench: HomeBench, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("secret")
    (bench.home / "folder").mkdir()
    (bench.home / "folder/file").write_text("mine")
    (bench.home / "plain").write_text("mine")
    home = transfer.open_home(bench.home, UID)
    looked = scan(100, time.monotonic() + 20, strict=True)
    (bench.home / "folder").rename(bench.home / "away")
    (bench.home / "folder").symlink_to(tmp_path / "secret")
    (bench.home / "plain").unlink()
    (bench.home / "plain").symlink_to(tmp_path / "secret/file")
    staging_tree = StagingTree(home=home, place=bench.root / "aside/one", uid=UID, sender=UID)
    staging_tree.stage([scanning.parse_entry(line) for line in looked.lines], lambda: None)
    assert staging_tree.vanished == {b"./folder/file"}
    assert (staging_tree.tree / "folder").readlink() == tmp_path / "secret"
    assert tree(staging_tree.tree) == {"plain": str(tmp_path / "secret/file")}
    staging_tree.remove()
    os.close(home)


def test_an_entry_that_no_snapshot_can_hold_refuses_a_migration_and_is_listed_by_snapshots(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.home / "theirs").write_text("x")
    (bench.home / "mine").write_text("x")
    aged(bench.home)
    real = os.stat
    inode = (bench.home / "theirs").stat().st_ino

    def foreign(*arguments: Any, **named: Any) -> Any:
        status = real(*arguments, **named)
        return os.stat_result((*status[:4], UID + 1, *status[5:])) if status.st_ino == inode else status

    monkeypatch.setattr(staging.os, "stat", foreign)
    with pytest.raises(RequestRefused, match=r"1 of its files cannot be carried whole: theirs \(it belongs to"):
        bench.snapshot(for_migration=True)
    report = bench.snapshot(mark=BASE)
    assert (report["skipped"], bench.sent) == (["theirs"], {"mine": b"x"})
    assert bench.snapshot(base=BASE)["skipped"] == ["theirs"], "the file is still missing"


@pytest.mark.parametrize("limits", [{"max_files": 5}, {"max_bytes": 49}])
def test_a_rental_whose_home_is_over_its_limits_is_frozen_and_the_refusal_says_what_to_do(
    bench: HomeBench, limits: dict[str, int]
) -> None:
    for number in range(5):
        (bench.home / str(number)).write_text("x" * 10)
    assert bench.snapshot()["files"] == 6
    with pytest.raises(RequestRefused, match="orion thaw") as refused:
        bench.snapshot(**limits)
    assert (refused.value.code, refused.value.details) == ("over_limit", {"held": True})
    assert bench.operations.held.startswith("its home holds more than")
    bench.operations.spares = True
    with pytest.raises(RequestRefused, match="unless it does"):
        bench.snapshot(**limits)
    with pytest.raises(RequestRefused) as moving:
        bench.snapshot(for_migration=True, **limits)
    assert "orion thaw" not in str(moving.value), "a planned migration freezes no rental for that"


@pytest.mark.parametrize("limits", [{"max_files": 100}, {"max_bytes": 100 * scanning.BLOCK_BYTES}])
def test_empty_directories_count_by_number_and_by_the_room_that_they_take(
    bench: HomeBench, limits: dict[str, int]
) -> None:
    for number in range(99):
        (bench.home / str(number)).mkdir()
    assert bench.snapshot(**limits)["files"] == 100
    os.mkfifo(bench.home / "one more")
    with pytest.raises(RequestRefused, match="its home holds more than") as refused:
        bench.snapshot(**limits)
    assert refused.value.code == "over_limit"


def test_newly_allocated_blocks_of_a_file_are_no_change(bench: HomeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may allocate a file's blocks long after the file was written."""
    (bench.home / "file").write_text("x")
    aged(bench.home)
    bench.snapshot(mark=BASE)
    later = tuple(part.replace("%b", "%b0") for part in scanning.FIND)
    monkeypatch.setattr(scanning, "FIND", later)
    assert bench.snapshot(base=BASE)["same"]


def test_a_manifest_is_read_as_it_was_written_and_half_of_one_is_refused(tmp_path: Path) -> None:
    manifests = Manifests(tmp_path)
    manifest = Manifest(Scan(frozenset({b"1 2 ./a\xff", b"3 4 ./b\n"}), 5.0), {b"./a\xff": "f00"}, {b"./c": "why"})
    for mark, stays in (("01", ""), ("02", "01"), ("03", "02")):
        manifests.write("one", mark, manifest, stays)
    assert manifests.read("one", "03") == manifest
    assert manifests.read("one", "02") == manifest
    assert manifests.read("one", "01") is None
    place = tmp_path / "var/lib/orion/manifests/one/03"
    assert place.stat().st_mode & 0o777 == 0o600
    place.write_bytes(place.read_bytes()[:-3])
    assert manifests.read("one", "03") is None
    manifests.forget("one")
    assert manifests.read("one", "02") is None


def acl(entries: Iterable[tuple[int, int, int]]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)


def test_an_access_list_is_written_as_rsync_writes_it(tmp_path: Path) -> None:
    none = 0xFFFFFFFF
    named = [(2, 7, 5), (2, 4, 100_002), (4, 4, none), (8, 5, 7)]
    lists = (
        [(1, 6, none), *named, (16, 7, none), (32, 0, none)],
        [(1, 6, none), (2, 7, 5), (4, 5, none), (16, 5, none), (32, 1, none)],
    )
    for number, entries in enumerate(lists):
        source, copy = tmp_path / f"from{number}", tmp_path / f"to{number}"
        for folder in (source, copy):
            folder.mkdir()
        try:
            os.setxattr(source, "system.posix_acl_access", acl(entries))
            os.setxattr(source, "system.posix_acl_default", acl(entries))
        except OSError as error:
            pytest.skip(f"the file system of the tests keeps no access lists ({error}); CI's does")
        subprocess.run(["rsync", "-rAX", "-M--fake-super", f"{source}/", f"{copy}/"], check=True)
        for kind, name in (("access", "user.rsync.%aacl"), ("default", "user.rsync.%dacl")):
            mine = access_list(os.getxattr(source, f"system.posix_acl_{kind}"), default=kind == "default")
            assert mine == os.getxattr(copy, name), (number, kind)


def test_a_file_that_is_replaced_before_it_is_opened_is_not_read(
    bench: HomeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.home / "file").write_text("mine")
    home = transfer.open_home(bench.home, UID)
    looked = scan(100, time.monotonic() + 20, strict=True)
    staging_tree = StagingTree(home=home, place=bench.root / "aside/one", uid=UID, sender=UID)
    real = os.fstat
    monkeypatch.setattr(staging.os, "fstat", lambda fd: os.stat_result((*real(fd)[:4], UID + 1, *real(fd)[5:])))
    staging_tree.stage(
        [each for line in looked.lines if (each := scanning.parse_entry(line)).kind == b"f"], lambda: None
    )
    monkeypatch.undo()
    assert (staging_tree.vanished, tree(staging_tree.tree)) == ({b"./file"}, {})
    staging_tree.remove()
    os.close(home)


def test_a_rental_frozen_for_its_size_is_not_scanned_again(bench: HomeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.operations.freezer._write(
        "one", FreezeMark(stopped_before=frozenset(), over_limit="its home holds more than 4 files")
    )
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(transfer, "_answer", lambda status, report: said.append(report) or status)
    request = {
        "rental_id": "one",
        "epoch": 2,
        "deadline": time.time() + 60,
        "max_files": 4,
        "max_bytes": 10,
        "mark": MARK,
    }
    monkeypatch.setattr(transfer, "_read_line", lambda: json.dumps(request).encode())
    monkeypatch.setattr(scanning, "scan", lambda *_, **__: pytest.fail("it was looked through"))
    # The kernel's timer would kill this process of tests, two minutes later.
    monkeypatch.setattr(transfer.processes, "be_killed_after", lambda _: True)
    assert transfer.run_transfer("send", bench.operations, bench.root / "aside", bench.root) == 3
    assert "4 files; it is frozen: `orion thaw`" in said[0]["error"]


# A transfer that begins before its account is made


class WaitingClock:
    """The worker's clock, which goes on with each wait, and the events at its times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.happens_at: list[tuple[float, Callable[[], object]]] = []
        monkeypatch.setattr("orion_worker.snapshots.transfer.time.monotonic", lambda: self.now)
        monkeypatch.setattr("orion_worker.snapshots.transfer.time.sleep", self._wait)

    def _wait(self, seconds: float) -> None:
        self.now += seconds
        for at, happens in [each for each in self.happens_at if each[0] <= self.now]:
            self.happens_at.remove((at, happens))
            happens()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> WaitingClock:
    return WaitingClock(monkeypatch)


def test_a_restore_waits_a_moment_for_the_account_of_its_home(tmp_path: Path, machine: WaitingClock) -> None:
    records = RentalRecords(tmp_path)
    machine.happens_at.append((0.9 * transfer.ACCOUNT_WITHIN_S, lambda: records.save(RECORD)))
    transfer.await_account(records, TransferRequest(rental_id="one", epoch=RECORD.epoch, deadline=0.0))
    assert machine.happens_at == []
    assert machine.now < transfer.ACCOUNT_WITHIN_S


def test_a_restore_does_not_wait_for_ever_nor_for_a_purged_rental(tmp_path: Path, machine: WaitingClock) -> None:
    records = RentalRecords(tmp_path)
    transfer.await_account(records, TransferRequest(rental_id="one", epoch=RECORD.epoch, deadline=0.0))
    assert machine.now == pytest.approx(transfer.ACCOUNT_WITHIN_S, abs=0.01)
    with pytest.raises(RequestRefused) as refusal:
        transfer.record_for("receive", records, TransferRequest(rental_id="one", epoch=RECORD.epoch, deadline=0.0))
    assert refusal.value.code == "unknown_rental"
    records.bury(RECORD)
    waited_s = machine.now
    transfer.await_account(records, TransferRequest(rental_id="one", epoch=RECORD.epoch, deadline=0.0))
    assert machine.now == waited_s
