"""`orion admin`, and what `orion status` says has waited too long, against a real HTTP server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.scripted_platform import Answer, ScriptedPlatform, problem, worker

from orion.cli.app import run

PLAN = {
    "id": "plan1",
    "last_event_at": "2000-01-01T00:00:00Z",
    "rentals": 2,
    "forgotten": [{"id": "a", "name": "since\x1b[31m", "owner": "ada"}],
    "revived": [{"id": "b", "name": "ended", "owner": "bob"}],
}
STATUS = {"version": "1", "brake": None, "workers": {}, "rentals": {}, "slots": 0, "slots_free": 0}


@pytest.fixture(autouse=True)
def _login(platform: ScriptedPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("orion_admin_t1_secret")
    monkeypatch.setenv("ORION_URL", platform.url)
    monkeypatch.setenv("ORION_TOKEN_FILE", str(tmp_path / "token"))


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """Return a file in place of a backup. It contains JSON, because the scripted platform parses every body."""
    file = tmp_path / "orion.db"
    file.write_text("{}")
    return file


def test_a_backup_is_a_file_for_its_owner_alone(platform: ScriptedPlatform, tmp_path: Path) -> None:
    platform.answer("GET", "/api/admin/backup", Answer(body=b"SQLite format 3\x00..."))
    assert run(["admin", "backup", str(tmp_path / "copy.db")]) == 0
    assert (tmp_path / "copy.db").read_bytes() == b"SQLite format 3\x00..."
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600


def test_a_backup_that_breaks_off_leaves_no_file(platform: ScriptedPlatform, tmp_path: Path) -> None:
    platform.answer("GET", "/api/admin/backup", Answer(body=b"half", headers={"Content-Length": "8"}, breaks=True))
    assert run(["admin", "backup", str(tmp_path / "copy.db")]) != 0
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


def test_a_backup_replaces_no_file(platform: ScriptedPlatform, backup: Path) -> None:
    assert run(["admin", "backup", str(backup)]) == 2
    assert backup.read_text() == "{}"


def test_a_restore_shows_what_it_would_do_and_asks(
    platform: ScriptedPlatform, backup: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.answer("POST", "/api/admin/restore", PLAN)
    assert run(["admin", "restore", str(backup)]) == 2, "nobody is there to ask"
    shown = capsys.readouterr().out
    assert "locked on their workers until you decide: since\\x1b[31m of ada" in shown
    assert "made again with empty homes: ended of bob" in shown
    assert [call.path for call in platform.calls] == ["/api/admin/restore"]
    assert platform.calls[0].headers["Content-Type"] == "application/vnd.sqlite3"


def test_a_restore_waits_until_the_manager_is_back(
    platform: ScriptedPlatform, backup: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.answer("POST", "/api/admin/restore", PLAN)
    platform.answer("POST", "/api/admin/restore/plan1", Answer(202, {"kept_as": "orion.db.before-restore"}))
    platform.answer("GET", "/healthz", Answer(), Answer(breaks=True), Answer())
    assert run(["admin", "restore", str(backup), "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_as"] == "orion.db.before-restore"
    assert len([call for call in platform.calls if call.path == "/healthz"]) == 3


def test_a_file_that_is_not_a_backup_is_refused(
    platform: ScriptedPlatform, backup: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.answer("POST", "/api/admin/restore", problem(422, "not_a_backup", "this file cannot be restored: it is"))
    assert run(["admin", "restore", str(backup), "--yes"]) == 2
    assert "cannot be restored" in capsys.readouterr().err
    assert run(["admin", "restore", str(backup) + ".not-there", "--yes"]) == 1


def test_status_shows_what_has_waited_too_long_and_what_to_do(
    platform: ScriptedPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    late = {"kind": "rental", "id": "abcdefgh23", "name": "box", "state": "queued", "since_s": 7200.0}
    late |= {"why": "no worker\x1b]0;x\x07", "what_to_do": "start more workers"}
    platform.answer("GET", "/api/status", STATUS | {"overdue": [late]})
    assert run(["status"]) == 0
    out = capsys.readouterr().out
    assert "rental box (abcdefgh23)" in out
    assert "queued for 2 h: no worker\\x1b]0;x\\x07\n  start more workers\n" in out


def test_giving_up_unknown_rentals_needs_a_confirmation(platform: ScriptedPlatform) -> None:
    platform.answer("GET", "/api/workers", {"items": [worker()], "next": None})
    found = worker()["id"]
    platform.answer("POST", f"/api/workers/{found}/resume", worker())
    assert run(["resume", found, "--give-up"]) == 2
    assert run(["resume", found, "--give-up", "--yes"]) == 0
    assert [call.query for call in platform.calls if call.method == "POST"] == [{"give_up": "true"}]


DOUBTED = "it shows 2030-01-01 00:00:00 UTC, 40.0 days ahead of the expected time"


def test_a_clock_that_is_not_trusted_is_shown_and_confirmed_after_a_yes(
    platform: ScriptedPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.answer("GET", "/api/status", Answer(body=STATUS | {"clock": DOUBTED}))
    platform.answer("POST", "/api/admin/clock", Answer(body={"problem": None}))
    assert run(["status"]) == 0
    assert DOUBTED in capsys.readouterr().out
    assert run(["admin", "confirm-clock"]) == 2, "nobody is there to ask"
    assert [call.path for call in platform.calls if call.method == "POST"] == []
    assert run(["admin", "confirm-clock", "--yes"]) == 0
    assert [call.path for call in platform.calls if call.method == "POST"] == ["/api/admin/clock"]


def test_a_clock_that_is_trusted_is_not_confirmed(platform: ScriptedPlatform) -> None:
    platform.answer("GET", "/api/status", Answer(body=STATUS))
    assert run(["admin", "confirm-clock"]) == 0
    assert [call.method for call in platform.calls] == ["GET"]
