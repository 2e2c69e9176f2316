"""The directory of a rental's snapshots: bases, preparation, clean-up, and disk use."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from orion_worker.snapshots import scan

from orion.manager.domain.snapshots import BLOCK_BYTES, Snapshot
from orion.manager.snapshots import directory
from orion.manager.snapshots.directory import INCOMING, NewSnapshot, begin, choices, clone, describe, finish, prepare
from orion.manager.snapshots.disk import Usage

LIMITS = 100, 1 << 20


def copy(folder: Path, in_haste: bool = False, choice: int = 0, **written: str) -> Snapshot:
    come(folder, **written)
    return finish(folder, choice=choice, in_haste=in_haste)


def come(folder: Path, limits: tuple[int, int] = LIMITS, **written: str) -> None:
    """Put the files of the next snapshot into `incoming`."""
    base = begin(folder, 1, recovered=False)["generation"]
    clone(folder, base)
    for name, content in written.items():
        file = folder / INCOMING / "home" / name
        file.unlink(missing_ok=True)
        file.write_text(content)
    described(folder, base, limits, *written)


def described(folder: Path, base: str = "", limits: tuple[int, int] = LIMITS, *changed: str) -> None:
    describe(
        folder,
        1,
        NewSnapshot(at=0.0, mark="aa", skipped=(), folders={}),
        limits,
        base,
        [os.fsencode(name) for name in changed],
    )


def brought(folder: Path, fill: Callable[[Path], object], limits: tuple[int, int] = LIMITS) -> Snapshot:
    """Return the first snapshot, of a home that `fill` has filled."""
    begin(folder, 1, recovered=False)
    clone(folder, "")
    fill(folder / INCOMING / "home")
    described(folder, "", limits)
    return finish(folder)


def names(folder: Path) -> set[str]:
    return {place.name for place in folder.iterdir()}


def contents(folder: Path, generation: str) -> dict[str, str]:
    return {file.name: file.read_text() for file in (folder / generation / "home").iterdir()}


def test_a_snapshot_begins_from_the_prepared_files_and_leaves_the_former_one_unchanged(tmp_path: Path) -> None:
    copy(tmp_path, one="1", two="2")
    for _ in range(2):
        prepare(tmp_path, "1-1")
    assert names(tmp_path) == {"1-1", "next-1-1"}
    prepared = (tmp_path / "next-1-1").stat().st_ino
    copy(tmp_path, two="other")
    assert (tmp_path / "1-2/home").stat().st_ino == prepared, "no file is linked again while a renter waits"
    assert names(tmp_path) == {"1-1", "1-2"}
    assert contents(tmp_path, "1-1") == {"one": "1", "two": "2"}
    assert contents(tmp_path, "1-2") == {"one": "1", "two": "other"}


def test_files_prepared_for_an_older_snapshot_or_by_an_aborted_job_are_removed(tmp_path: Path) -> None:
    copy(tmp_path, one="1")
    prepare(tmp_path, "1-1")
    begin(tmp_path, 1, recovered=False)
    assert names(tmp_path) == {"1-1", "next-1-1", INCOMING}, "a prepared base that was not used can still be used"
    copy(tmp_path, one="2")
    (tmp_path / "next-1-1").mkdir()  # left by a job that was killed
    (tmp_path / INCOMING).mkdir()
    begin(tmp_path, 1, recovered=False)
    assert names(tmp_path) == {"1-1", "1-2", INCOMING}
    prepare(tmp_path, "1-2")
    assert names(tmp_path) == {"1-1", "1-2", "next-1-2"}


def test_in_haste_old_snapshots_are_only_renamed_and_removed_with_the_next(tmp_path: Path) -> None:
    for number in range(3):
        copy(tmp_path, one=str(number))
    copy(tmp_path, in_haste=True, one="last")
    assert names(tmp_path) == {"old-1-1", "1-2", "1-3", "1-4"}
    assert [str(each.id) for each in directory.found(tmp_path)] == ["1-2", "1-3", "1-4"]
    prepare(tmp_path, "1-4")
    assert names(tmp_path) == {"1-2", "1-3", "1-4", "next-1-4"}
    copy(tmp_path, in_haste=True, one="later")
    directory.remove(tmp_path, "old-*")
    assert names(tmp_path) == {"1-3", "1-4", "1-5"}


# The disk use of one snapshot and of all


def furnish(home: Path) -> None:
    """Fill a home with an entry of every kind."""
    for number in range(10):
        (home / f"folder-{number}").mkdir()
    (home / "small").write_text("x")
    (home / "other name").hardlink_to(home / "small")
    (home / "link").symlink_to("nowhere")
    os.mkfifo(home / "fifo")
    with (home / "sparse").open("wb") as file:
        file.truncate(300_000)


def test_worker_and_snapshot_service_count_the_size_of_a_home_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = brought(tmp_path, furnish)
    monkeypatch.chdir(tmp_path / "1-1/home")
    there = scan.scan(100, time.monotonic() + 20, strict=True)
    assert (scan.size_of(there), len(there.lines)) == (copied.bytes, copied.files)
    assert scan.BLOCK_BYTES == BLOCK_BYTES


def test_each_name_counts_as_a_file_and_each_inode_takes_room_once(tmp_path: Path) -> None:
    copied = brought(tmp_path, furnish)
    assert copied.files == 1 + 10 + 5
    assert copied.bytes == (1 + 10 + 3) * BLOCK_BYTES + 300_000, "the holes of the sparse file are counted"


def test_a_file_counts_with_its_allocated_blocks_if_they_exceed_its_size(tmp_path: Path) -> None:
    def reserve(home: Path) -> None:
        with (home / "file").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 200_000)
            os.utime(file.fileno())
        taken = (home / "file").stat().st_blocks * 512
        assert taken > 200_000, "whole blocks are counted"

    assert brought(tmp_path, reserve).bytes > 200_000 + BLOCK_BYTES


@pytest.mark.parametrize(("most", "is_refused"), [(51, False), (50, True)])
def test_empty_directories_are_refused_by_their_number(tmp_path: Path, most: int, is_refused: bool) -> None:
    check_refusal(tmp_path, (most, 1 << 30), is_refused)


@pytest.mark.parametrize(("most", "is_refused"), [(51 * BLOCK_BYTES, False), (51 * BLOCK_BYTES - 1, True)])
def test_empty_directories_are_refused_by_the_room_that_they_take(tmp_path: Path, most: int, is_refused: bool) -> None:
    check_refusal(tmp_path, (1000, most), is_refused)


def check_refusal(folder: Path, limits: tuple[int, int], is_refused: bool) -> None:
    """Take a snapshot of a home with fifty directories, and check whether it is refused."""

    def many(home: Path) -> None:
        for number in range(50):
            (home / str(number)).mkdir()

    if not is_refused:
        brought(folder, many, limits)
        return
    with pytest.raises(OSError, match="more than a snapshot may") as error:
        brought(folder, many, limits)
    assert error.value.errno == errno.EFBIG
    assert directory.found(folder) == []


def test_inodes_that_two_snapshots_share_are_counted_once(tmp_path: Path) -> None:
    copy(tmp_path, one="1", two="2", three="3")
    assert choices(tmp_path, None) == [Usage(4, 4 * BLOCK_BYTES)]
    come(tmp_path, two="other")
    assert choices(tmp_path, None)[0] == Usage(4 + 2, 6 * BLOCK_BYTES), "the directory and the other file"


def test_hard_links_within_a_home_are_not_taken_for_inodes_shared_with_another_snapshot(tmp_path: Path) -> None:
    def twice(home: Path) -> None:
        for number in range(10):
            (home / f"{number}").write_text("x")
            (home / f"{number} again").hardlink_to(home / f"{number}")

    copy(tmp_path, one="1")
    base = begin(tmp_path, 1, recovered=False)["generation"]
    clone(tmp_path, base)
    twice(tmp_path / INCOMING / "home")
    described(tmp_path, base)
    assert choices(tmp_path, None)[0] == Usage(2 + 1 + 10, 13 * BLOCK_BYTES)


def test_a_snapshot_counts_whole_when_the_former_one_is_removed(tmp_path: Path) -> None:
    copy(tmp_path, same="x", one="first")
    for number in range(2):
        copy(tmp_path, one=str(number))
    come(tmp_path, one="last")
    all_of = Usage(3, 3 * BLOCK_BYTES)
    assert [usage.inodes for usage in choices(tmp_path, None)] == [3 + 2 + 2, 3 + 2, 3]
    assert choices(tmp_path, None)[-1] == all_of
    assert str(finish(tmp_path, choice=2).id) == "1-4"
    assert names(tmp_path) == {"1-4"}
    assert choices(tmp_path, None) == [all_of]


def test_a_usage_file_of_an_earlier_version_counts_its_snapshots_whole(tmp_path: Path) -> None:
    for content in ("1", "2"):
        copy(tmp_path, one=content)
    for place in (tmp_path / "1-1", tmp_path / "1-2"):
        about = directory._read(place)
        for name in ("whole", "own", "made_from"):
            del about[name]
        directory._write(place, about)
    assert choices(tmp_path, None)[0] == Usage(4, 4 * BLOCK_BYTES)


def test_an_aborted_snapshot_leaves_no_files(tmp_path: Path) -> None:
    copy(tmp_path, one="1")
    come(tmp_path, one="2")
    directory.remove(tmp_path, INCOMING)
    assert names(tmp_path) == {"1-1"}
    assert contents(tmp_path, "1-1") == {"one": "1"}
