"""The directory of a rental's copies: what is prepared, what is left over, and what a copy is made from."""

from __future__ import annotations

import os
from pathlib import Path

from orion.manager.domain.copies import Copy
from orion.manager.engine.vault import generations
from orion.manager.engine.vault.generations import INCOMING, Made, begin, clone, finish, prepare

LIMITS = 100, 1 << 20


def copy(folder: Path, in_haste: bool = False, **written: str) -> Copy:
    base = begin(folder, 1, salvage=False)["generation"]
    clone(folder, base)
    for name, content in written.items():
        file = folder / INCOMING / "home" / name
        file.unlink(missing_ok=True)
        file.write_text(content)
    made = Made(0.0, "aa", (), {})
    return finish(folder, 1, made, LIMITS, base, [os.fsencode(name) for name in written], in_haste=in_haste)


def names(folder: Path) -> set[str]:
    return {place.name for place in folder.iterdir()}


def contents(folder: Path, generation: str) -> dict[str, str]:
    return {file.name: file.read_text() for file in (folder / generation / "home").iterdir()}


def test_a_copy_begins_from_what_was_prepared_and_leaves_the_one_before_as_it_was(tmp_path: Path) -> None:
    copy(tmp_path, one="1", two="2")
    for _ in range(2):
        prepare(tmp_path, "1-1")
    assert names(tmp_path) == {"1-1", "next-1-1"}
    prepared = (tmp_path / "next-1-1").stat().st_ino
    copy(tmp_path, two="other")
    assert (tmp_path / "1-2/home").stat().st_ino == prepared, "nothing was linked again while a renter waits"
    assert names(tmp_path) == {"1-1", "1-2"}
    assert contents(tmp_path, "1-1") == {"one": "1", "two": "2"}
    assert contents(tmp_path, "1-2") == {"one": "1", "two": "other"}


def test_what_was_prepared_for_an_older_copy_or_was_broken_off_is_removed(tmp_path: Path) -> None:
    copy(tmp_path, one="1")
    prepare(tmp_path, "1-1")
    begin(tmp_path, 1, salvage=False)
    assert names(tmp_path) == {"1-1", "next-1-1", INCOMING}, "what was not used yet is still of use"
    copy(tmp_path, one="2")
    (tmp_path / "next-1-1").mkdir()  # left by a job that was killed
    (tmp_path / INCOMING).mkdir()
    begin(tmp_path, 1, salvage=False)
    assert names(tmp_path) == {"1-1", "1-2", INCOMING}
    prepare(tmp_path, "1-2")
    assert names(tmp_path) == {"1-1", "1-2", "next-1-2"}


def test_in_haste_old_copies_do_not_count_any_more_and_the_next_removes_them(tmp_path: Path) -> None:
    for number in range(3):
        copy(tmp_path, one=str(number))
    copy(tmp_path, in_haste=True, one="last")
    assert names(tmp_path) == {"old-1-1", "1-2", "1-3", "1-4"}
    assert [str(each.generation) for each in generations.found(tmp_path)] == ["1-2", "1-3", "1-4"]
    prepare(tmp_path, "1-4")
    assert names(tmp_path) == {"1-2", "1-3", "1-4", "next-1-4"}
    copy(tmp_path, in_haste=True, one="later")
    generations.tidy(tmp_path)
    assert names(tmp_path) == {"1-3", "1-4", "1-5"}
