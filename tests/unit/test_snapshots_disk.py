"""How full a disk is, and how much of it the snapshots of each rental use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orion.manager.controllers.snapshots import disk_share
from orion.manager.snapshots.disk import Disk, Usage, Usages

MOST = Usage(100, 1000)


def statvfs(blocks: int, free: int, for_all: int, files: int, files_free: int) -> os.statvfs_result:
    """Return the status of a file system with blocks of 4 KiB. `for_all`: the free blocks not reserved for root."""
    return os.statvfs_result((4096, 4096, blocks, free, for_all, files, files_free, files_free, 0, 255))


@pytest.mark.parametrize(
    ("status", "share", "scarce"),
    [
        (statvfs(1000, 500, 400, 1000, 900), 500 / 900, "bytes"),
        (statvfs(1000, 500, 400, 1000, 50), 0.95, "inodes"),
        (statvfs(1000, 500, 500, 0, 0), 0.5, "bytes"),
    ],
    ids=["bytes", "inodes", "a file system that makes inodes as it needs them"],
)
def test_a_disk_is_as_full_as_its_scarcer_resource_bytes_or_inodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: os.statvfs_result, share: float, scarce: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    assert Disk.of(tmp_path).scarcest == (pytest.approx(share), scarce)
    assert disk_share(tmp_path) == pytest.approx(share)


def test_a_share_limits_bytes_and_inodes_where_the_file_system_has_them() -> None:
    disk = Disk(size=Usage(50, 1000), used=Usage(0, 0))
    assert disk.share(0.5) == Usage(25, 500)
    assert disk.share(0.001) == Usage(1, 1), "this does not mean that there is no limit"
    without = Disk(size=Usage(0, 1000), used=Usage(0, 0)).share(0.5)
    assert Usage(10**9, 500).fits_in(without)
    assert not Usage(1, 501).fits_in(without)


@pytest.fixture
def usages(tmp_path: Path) -> Usages:
    return Usages(tmp_path / "usages", tmp_path / "lock")


@pytest.mark.parametrize("large", [Usage(1, 600), Usage(60, 1)], ids=["bytes", "inodes"])
def test_the_total_of_an_owner_is_limited_and_other_owners_are_not_affected(usages: Usages, large: Usage) -> None:
    assert usages.choose("one", "ann", [large], MOST) == 0
    assert usages.choose("two", "ann", [large], MOST) is None
    assert usages.choose("three", "bob", [large], MOST) == 0
    assert usages.choose("one", "ann", [large], MOST) == 0, "a rental's own use is not counted against it"
    assert usages.refused() == ["ann"]
    usages.forget("one")
    assert usages.choose("two", "ann", [large], MOST) == 0
    assert usages.refused() == []


def test_the_first_fitting_choice_is_taken_or_the_smallest_while_the_owner_is_short_of_room(
    usages: Usages,
) -> None:
    choices = [Usage(1, 1200), Usage(1, 800), Usage(1, 300)]
    assert usages.choose("one", "ann", choices, MOST) == 1
    assert usages.choose("two", "ann", [Usage(1, 400)], MOST) is None
    assert usages.choose("one", "ann", choices, MOST) == 2
    assert usages.choose("two", "ann", [Usage(1, 400)], MOST) == 0
    assert usages.choose("one", "ann", [Usage(1, 500), Usage(1, 300)], MOST) == 0


def test_a_rental_whose_owner_s_others_use_the_whole_share_is_refused_before_its_transfer(usages: Usages) -> None:
    usages.choose("one", "ann", [MOST], MOST)
    assert usages.is_room("one", "ann", MOST)
    assert usages.is_room("two", "bob", MOST)
    assert usages.refused() == []
    assert not usages.is_room("two", "ann", MOST)
    assert usages.refused() == ["ann"]


def test_a_refused_snapshot_leaves_the_counted_use_unchanged(usages: Usages) -> None:
    usages.choose("one", "ann", [Usage(1, 600)], MOST)
    assert usages.choose("one", "ann", [Usage(1, 1100)], MOST) is None
    assert usages.choose("two", "ann", [Usage(1, 500)], MOST) is None


@pytest.mark.parametrize("content", ["", '{"one": ["ann", [1, 6', "[]", '{"one": 5}', '{"one": ["ann", [1, "x"], 0]}'])
def test_a_half_written_usage_file_counts_as_none(usages: Usages, tmp_path: Path, content: str) -> None:
    (tmp_path / "usages").write_text(content)
    assert usages.refused() == []
    assert usages.choose("two", "ann", [Usage(1, 600)], MOST) == 0
    assert usages.choose("one", "ann", [Usage(1, 600)], MOST) is None


def test_only_root_can_read_the_usage_file(usages: Usages, tmp_path: Path) -> None:
    usages.choose("one", "ann", [MOST], MOST)
    assert (tmp_path / "usages").stat().st_mode & 0o777 == 0o600
