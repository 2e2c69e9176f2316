"""`orion snapshots`, `orion restore`, and the age of a rental's last snapshot in the other commands."""

from __future__ import annotations

import pytest
from support.orion_command import Command
from support.scripted_platform import Answer, ScriptedPlatform, page, problem, rental
from test_cli_commands import EVIL, UP_TO_NOW

RENTAL = "abcdefgh23"


@pytest.fixture(autouse=True)
def _rental(platform: ScriptedPlatform) -> None:
    platform.answer("GET", f"/api/rentals/{RENTAL}", rental())


def test_snapshots_are_listed_with_their_age_and_missing_files(platform: ScriptedPlatform, orion: Command) -> None:
    copy = {"generation": "3-12", "at": UP_TO_NOW, "bytes": 10_500_000, "files": 42, "skipped": [EVIL]}
    platform.answer("GET", f"/api/rentals/{RENTAL}/snapshots", page(copy))
    result = orion("snapshots", RENTAL)
    assert result.status == 0
    for shown in ("3-12", "ago", "10.5 MB", "42", "\\x1b"):
        assert shown in result.out
    assert "\x1b" not in result.out


def test_a_rental_without_a_snapshot_says_so(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", f"/api/rentals/{RENTAL}/snapshots", page())
    result = orion("snapshots", RENTAL)
    assert (result.status, result.out) == (0, "")
    assert "there is no snapshot of box yet" in result.err


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (("--from", "3-12"), {"generation": "3-12", "empty": False, "discard": False}),
        (("--empty", "--discard"), {"generation": None, "empty": True, "discard": True}),
    ],
)
def test_a_restore_requests_the_given_snapshot(
    platform: ScriptedPlatform, orion: Command, options: tuple[str, ...], sent: dict[str, object]
) -> None:
    platform.answer("POST", f"/api/rentals/{RENTAL}/restore", Answer(202, rental(state="migrating")))
    assert orion("restore", RENTAL, *options, "--yes").status == 0
    body = platform.calls[-1].body
    assert {key: body.get(key) for key in sent} == sent


@pytest.mark.parametrize("options", [(), ("--from", "1-1", "--empty"), ("--from", "yesterday"), ("--from", "../1")])
def test_a_restore_without_a_clear_source_is_not_sent(
    platform: ScriptedPlatform, orion: Command, options: tuple[str, ...]
) -> None:
    assert orion("restore", RENTAL, *options, "--yes").status == 2
    assert [call.method for call in platform.calls if call.method != "GET"] == []


def test_a_restore_is_not_begun_without_a_yes(platform: ScriptedPlatform, orion: Command) -> None:
    assert orion("restore", RENTAL, "--empty").status == 2
    assert [call.method for call in platform.calls] == ["GET"]


def test_the_reason_for_a_refused_restore_is_shown(platform: ScriptedPlatform, orion: Command) -> None:
    refused = problem(409, "not_copied", "a snapshot of the present files cannot be taken first: it is too large")
    platform.answer("POST", f"/api/rentals/{RENTAL}/restore", refused)
    result = orion("restore", RENTAL, "--empty", "--yes")
    assert result.status == 6
    assert "cannot be taken first" in result.err


def test_age_size_and_problems_of_snapshots_are_shown_with_a_rental(platform: ScriptedPlatform, orion: Command) -> None:
    ages = {"last_safe_copy_at": UP_TO_NOW, "last_safe_copy_bytes": 999, "copy_problem": "its home holds too much"}
    platform.answer("GET", f"/api/rentals/{RENTAL}", rental(**ages))
    platform.answer("GET", "/api/rentals", page(rental(**ages)))
    for arguments in (("show", RENTAL), ("ls",)):
        out = orion(*arguments).out
        for shown in ("ago", "999 B", "its home holds too much"):
            assert shown in out
