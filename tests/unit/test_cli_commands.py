"""`orion` against a real HTTP server: its output, on which stream, and its exit status."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.orion_command import Command
from support.readme import ROOT
from support.scripted_platform import (
    HOST_KEY,
    Answer,
    ScriptedPlatform,
    event,
    page,
    problem,
    rental,
    stream,
    token,
    worker,
)

from orion.cli import keys
from orion.client.sdk import Orion
from orion.wire import NOT_MOVED, RentReply

EVIL = "\x1b]0;owned\x07\x1b[31m[red]x[/red]\u202e\u009b2J"
UP_TO_NOW = "2000-01-01T00:00:00Z"


@pytest.fixture
def public_key(tmp_path: Path) -> Path:
    file = tmp_path / "mine.pub"
    file.write_text(f"{HOST_KEY} ada@lab\n")
    return file


def test_rent_prints_how_to_log_in(platform: ScriptedPlatform, orion: Command, public_key: Path) -> None:
    platform.answer("POST", "/api/rent", Answer(201, rental()))
    result = orion("rent", "--name", "box", "--ttl", "2h", "--key", str(public_key), "--label", "team=blue")
    assert result.status == 0
    assert "orion ssh box" in result.out
    assert platform.calls[0].body == {
        "name": "box",
        "ssh_public_key": f"{HOST_KEY} ada@lab",
        "ttl_s": 7200,
        "labels": {"team": "blue"},
        "wait_s": 30,
    }


def test_rent_without_a_key_makes_one_once_and_says_so(
    platform: ScriptedPlatform, orion: Command, tmp_path: Path
) -> None:
    platform.answer("POST", "/api/rent", Answer(201, rental()))
    first, second = orion("rent"), orion("rent")
    made = tmp_path / "orion" / "id_ed25519"
    assert str(made) in first.err
    assert str(made) not in second.err
    assert made.stat().st_mode & 0o777 == 0o600
    sent = {call.body["ssh_public_key"] for call in platform.calls}
    assert sent == {made.with_suffix(".pub").read_text().strip()}
    assert keys.identity_of("abcdefgh23") == made


def test_a_chosen_key_is_remembered_until_the_release(
    platform: ScriptedPlatform, orion: Command, public_key: Path
) -> None:
    public_key.with_suffix("").write_text("private")
    platform.answer("POST", "/api/rent", Answer(201, rental()))
    orion("rent", "--key", str(public_key.with_suffix("")))
    assert keys.identity_of("abcdefgh23") == public_key.with_suffix("")
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("DELETE", "/api/rentals/abcdefgh23", rental(state="released"))
    assert orion("release", "box", "--yes").status == 0
    assert keys.identity_of("abcdefgh23") is None


def test_a_private_key_is_never_sent(platform: ScriptedPlatform, orion: Command, tmp_path: Path) -> None:
    private = tmp_path / "private.pub"
    private.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    result = orion("rent", "--key", str(private))
    assert result.status == 2
    assert platform.calls == []
    assert "secret" not in result.err


def test_a_queued_rental_has_its_own_exit_status(platform: ScriptedPlatform, orion: Command, public_key: Path) -> None:
    platform.answer("POST", "/api/rent", Answer(202, rental(state="queued", explanation="no worker has a free slot.")))
    result = orion("rent", "--key", str(public_key), "--wait", "0")
    assert result.status == 7
    assert "no worker has a free slot" in result.err
    assert "orion ssh box" in result.err
    assert platform.calls[0].body["wait_s"] == 0


def test_a_long_wait_goes_on_after_the_first_answer(
    platform: ScriptedPlatform, orion: Command, public_key: Path
) -> None:
    platform.answer("POST", "/api/rent", Answer(202, rental(state="queued")))
    platform.answer("GET", "/api/rentals/abcdefgh23", rental())
    result = orion("rent", "--key", str(public_key), "--wait", "10m")
    assert result.status == 0
    assert platform.calls[0].body["wait_s"] == 55
    assert platform.calls[1].query["state"] == "active"


def test_json_of_a_rental_is_as_the_api_s(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    assert json.loads(orion("show", "box", "--json").out) == rental()
    assert json.loads(orion("--json", "show", "box").out) == rental()


def test_show_names_the_command_that_prints_the_start_log(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental(start="./serve"), rental())
    assert "orion logs box" in orion("show", "box").out
    assert "orion logs" not in orion("show", "box").out


def test_json_of_a_list_is_an_array(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals", page(rental(name="one")), page())
    assert [one["name"] for one in json.loads(orion("ls", "--json").out)] == ["one"]
    assert json.loads(orion("ls", "--json").out) == []


def test_show_with_log_lists_the_provisioning_jobs(platform: ScriptedPlatform, orion: Command) -> None:
    entry = {"at": "2030-01-01T00:00:00Z", "action": "create_user", "worker_id": "w-aaaa2222", "epoch": 2}
    entry |= {"ok": False, "seconds": 0.0421, "message": f"timed out {EVIL}"}
    for _ in range(2):
        platform.answer("GET", "/api/rentals/box", rental())
        platform.answer("GET", "/api/rentals/abcdefgh23/log", page(entry))
    shown = orion("show", "box", "--log")
    assert shown.status == 0
    for word in ("create_user", "w-aaaa2222", "failed", "0.042", "timed out"):
        assert word in shown.out
    assert "\x1b" not in shown.out
    assert json.loads(orion("show", "box", "--log", "--json").out) == [entry]


def test_show_with_log_says_if_there_were_no_jobs(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("GET", "/api/rentals/abcdefgh23/log", page())
    assert "there were no provisioning jobs yet" in orion("show", "box", "--log").err


def test_ls_shows_why_a_rental_is_not_active(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer(
        "GET", "/api/rentals", page(rental(), rental(name="late", state="queued", explanation="pool is full"))
    )
    result = orion("ls")
    assert result.out.splitlines()[0].split() == ["NAME", "ID", "STATE", "WORKER", "ENDS", "SNAPSHOT", "SIZE"]
    assert "late: pool is full" in result.out
    assert "OWNER" not in result.out


SALVAGE = {
    "generation": "1-4",
    "at": "2030-01-01T00:00:00Z",
    "bytes": 12_000,
    "files": 3,
    "skipped": [],
    "salvage": True,
}


@pytest.mark.parametrize("arguments", [("ls",), ("show", "box"), ("ssh", "box", "true")])
def test_a_nearly_full_home_and_a_recovered_snapshot_are_shown(
    platform: ScriptedPlatform, orion: Command, arguments: tuple[str, ...]
) -> None:
    shown_rental = rental(home_warning="its home holds 9.0 MB of 10.0 MB", salvage=SALVAGE)
    platform.answer("GET", "/api/rentals", page(shown_rental))
    result = orion(*arguments)
    for words in ("its home holds 9.0 MB of 10.0 MB", "1-4, 12 kB, ", "orion restore box --from 1-4"):
        assert words in result.out + result.err


def test_a_home_over_its_limit_is_not_called_nearly_full(platform: ScriptedPlatform, orion: Command) -> None:
    shown_rental = rental(home_warning="its home holds 9.0 MB of 10.0 MB", copy_problem="it is frozen")
    platform.answer("GET", "/api/rentals", page(shown_rental))
    output = orion("ls").out
    assert ("it is frozen" in output, "9.0 MB" in output) == (True, False)


@pytest.mark.parametrize(
    ("end", "short", "whole"),
    [
        ("status 3", "active (start: status 3)", "ended with status 3, "),
        ("signal 9", "active (start: signal 9)", "was ended by signal 9, "),
        ("unseen", "active (start: ended)", "has ended, "),
    ],
)
def test_the_end_of_a_start_command_is_shown_with_the_next_commands(
    platform: ScriptedPlatform, orion: Command, end: str, short: str, whole: str
) -> None:
    shown_rental = rental(start="./serve", start_end=end, start_ended_at="2020-01-01T00:00:00Z")
    platform.answer("GET", "/api/rentals", page(shown_rental))
    platform.answer("GET", "/api/rentals/box", shown_rental)
    assert short in orion("ls").out
    shown = orion("show", "box").out
    for words in (whole, "to see its output: orion logs box", "to run it again: orion start box"):
        assert words in shown
    assert json.loads(orion("ls", "--json").out)[0]["start_end"] == end


def test_a_running_start_command_has_no_end(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals", page(rental(start="./serve")))
    platform.answer("GET", "/api/rentals/box", rental(start="./serve"))
    assert "(start" not in orion("ls").out
    assert "ended" not in orion("show", "box").out


def test_ls_shows_the_owner_where_there_are_several(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals", page(rental(), rental(owner="bob")))
    assert "OWNER" in orion("ls").out


@pytest.mark.parametrize(
    "arguments", [("ls",), ("workers",), ("events",), ("token", "ls"), ("show", "box"), ("status",)]
)
def test_texts_of_the_server_cannot_control_the_terminal(
    platform: ScriptedPlatform, orion: Command, arguments: tuple[str, ...]
) -> None:
    evil = rental(state="queued", explanation=EVIL, owner=EVIL, labels={EVIL: EVIL}, worker_id=EVIL, start=EVIL)
    evil |= {"start_end": EVIL}
    platform.answer("GET", "/api/rentals", page(evil, rental()))
    platform.answer("GET", "/api/rentals/box", evil)
    platform.answer(
        "GET", "/api/workers", page(worker(hostname=EVIL, health="suspect", explanation=EVIL, labels={"a": EVIL}))
    )
    platform.answer("GET", "/api/events", page(event(1, kind=EVIL, reason=EVIL, actor=EVIL)))
    platform.answer("GET", "/api/tokens", page(token(name=EVIL)))
    counts = {"ready": 1}
    status = {"version": EVIL, "brake": EVIL, "workers": counts, "rentals": {}, "slots": 1, "slots_free": 1}
    platform.answer("GET", "/api/status", status)
    result = orion(*arguments)
    assert result.status == 0
    assert_harmless(result.out)
    assert "[red]x[/red]" in result.out


def test_texts_of_an_error_cannot_control_the_terminal(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/status", problem(500, EVIL, EVIL, {"X-Request-ID": "req1"}))
    assert_harmless(orion("status").err)
    assert_harmless(orion("status", "--json").err)


def assert_harmless(text: str) -> None:
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_tables_fit_a_terminal_of_80_columns(
    platform: ScriptedPlatform, orion: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    long = rental(name="a" * 40, state="provisioning", last_safe_copy_at=UP_TO_NOW)
    platform.answer("GET", "/api/rentals", page(long))
    loaded = worker(health="quarantined", intent="draining", labels={"zone": "somewhere-far-away", "disk": "ssd"})
    platform.answer("GET", "/api/workers", page(loaded))
    for command in ("ls", "workers"):
        lines = [_without_colours(line) for line in orion(command).out.splitlines()]
        assert max(len(line.rstrip()) for line in lines) <= 80
        assert not any("\u2026" in line for line in lines)


@pytest.mark.parametrize("columns", [30, 60])
def test_a_narrow_terminal_cuts_no_text_that_has_to_be_typed(
    platform: ScriptedPlatform, orion: Command, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    late = rental(name="my-second-lab", state="provisioning", last_safe_copy_at=UP_TO_NOW)
    platform.answer("GET", "/api/rentals", page(rental(name="my-lab"), late))
    platform.answer("GET", "/api/workers", page(worker(health="quarantined", labels={"zone": "far-away"})))
    for command, typed in (
        ("ls", ["my-lab", "my-second-lab", "abcdefgh23"]),
        ("workers", ["w-aaaa2222", "0123456789ab"]),
    ):
        lines = [_without_colours(line) for line in orion(command).out.splitlines()]
        assert max(len(line.rstrip()) for line in lines) <= columns
        assert set(typed) <= {word for line in lines for word in line.split()}


def _without_colours(line: str) -> str:
    return "".join(part.partition("m")[2] if index else part for index, part in enumerate(line.split("\x1b[")))


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (problem(401, "unauthorized", "no"), 4),
        (problem(403, "forbidden", "no"), 4),
        (problem(404, "not_found", "no"), 3),
        (problem(409, "worker_in_use", "no"), 6),
        (problem(422, "invalid_request", "no"), 2),
        (problem(429, "rate_limited", "no"), 1),
        (problem(502, "manager_unreachable", "no", {"X-Orion-Manager": "unreachable"}), 5),
        (Answer(breaks=True), 5),
        (Answer(body=b"<html>"), 1),
    ],
)
def test_each_failure_has_its_exit_status_as_text_and_as_json(
    platform: ScriptedPlatform, orion: Command, answer: Answer, status: int
) -> None:
    platform.answer("GET", "/api/status", answer)
    in_words, in_json = orion("status"), orion("status", "--json")
    assert (in_words.status, in_json.status) == (status, status)
    assert in_words.err.startswith("orion: ")
    assert json.loads(in_json.err)["error"]["exit_code"] == status
    assert in_words.out == in_json.out == ""


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("rent", "--nonsense"), ("rent", "--ttl", "soon"), ("rent", "--label", "x"), ("show",), ()],
)
def test_wrong_usage_is_status_2(orion: Command, arguments: tuple[str, ...]) -> None:
    result = orion(*arguments)
    assert result.status == 2
    assert result.err


def test_wrong_usage_is_json_where_json_was_asked_for(orion: Command) -> None:
    assert json.loads(orion("rent", "--nonsense", "--json").err)["error"]["exit_code"] == 2


def test_help_lists_the_exit_statuses(orion: Command) -> None:
    result = orion("--help")
    assert result.status == 0
    for line in ("3  not found", "7  still waiting", "5  the platform cannot be reached"):
        assert line in result.out


def test_an_ambiguous_name_lists_the_candidates(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals", page(rental(id="one"), rental(id="two", owner="bob")))
    result = orion("show", "box", "--json")
    assert result.status == 6
    assert json.loads(result.err)["error"]["candidates"] == ["one", "two"]


def test_release_asks_and_a_script_must_say_yes(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    result = orion("release", "box")
    assert result.status == 2
    assert "--yes" in result.err
    assert [call.method for call in platform.calls] == ["GET"]


def test_a_release_that_is_still_in_progress_has_its_own_exit_status(
    platform: ScriptedPlatform, orion: Command
) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("DELETE", "/api/rentals/abcdefgh23", Answer(202, rental(state="releasing")))
    assert orion("release", "box", "--yes", "--wait", "0").status == 7


def test_a_release_is_repeatable(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental(state="released"))
    platform.answer("DELETE", "/api/rentals/abcdefgh23", rental(state="released"))
    assert orion("release", "box").status == 0


@pytest.mark.parametrize(("state", "status"), [("queued", 7), ("released", 6), ("failed", 6), ("releasing", 6)])
def test_ssh_says_why_a_rental_cannot_be_reached(
    platform: ScriptedPlatform, orion: Command, state: str, status: int
) -> None:
    platform.answer("GET", "/api/rentals/box", rental(state=state, explanation="that is so"))
    platform.answer("GET", "/api/rentals/abcdefgh23", rental(state=state, explanation="that is so"))
    result = orion("ssh", "--wait", "0", "box")
    assert result.status == status
    assert f"box is {state}: that is so" in result.err


def test_the_address_of_a_terminal_has_its_ticket_after_the_hash(
    platform: ScriptedPlatform, orion: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened.append(url))  # type: ignore[func-returns-value]
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("POST", "/api/rentals/abcdefgh23/terminal", Answer(201, {"ticket": "t-_1", "expires_in_s": 60.0}))
    url = f"{platform.url}/terminal/#abcdefgh23/t-_1"
    assert orion("terminal", "box").out == f"{url}\n"
    assert json.loads(orion("terminal", "box", "--json").out) == {"url": url}
    assert opened == []
    assert orion("terminal", "box", "--open").status == 0
    assert opened == [url]
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    assert "no browser" in orion("terminal", "box", "--open").err


WEB_PORT = {"port": 8000, "public": True, "path": "/r/abcdefgh23/8000/"}


def test_the_address_of_a_web_port_has_its_ticket_after_the_hash(
    platform: ScriptedPlatform, orion: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened.append(url))  # type: ignore[func-returns-value]
    platform.answer("GET", "/api/rentals/box", rental())
    ticket = WEB_PORT | {"host": "8000-abcdefgh23.localhost", "ticket": "t-_1", "expires_in_s": 60.0}
    platform.answer("POST", "/api/rentals/abcdefgh23/ports/8000/ticket", Answer(201, ticket))
    behind = "/.orion/open/#abcdefgh23/8000/t-_1"
    own = platform.url.replace("127.0.0.1", "8000-abcdefgh23.localhost")
    assert orion("open", "box", "8000").out == f"{own}{behind}\n"
    assert json.loads(orion("open", "box", "8000", "--json").out) == {"url": own + behind}
    assert opened == []
    assert orion("open", "box", "8000").err == ""
    assert orion("open", "box", "8000", "--path", "--browser").out == f"{platform.url}{behind}\n"
    assert opened == [platform.url + behind]
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    assert "no browser" in orion("open", "box", "8000", "--browser").err


@pytest.mark.parametrize("host", [None, "8000-abcdefgh23.localhost"])
@pytest.mark.parametrize("further", [(), ("--browser",)])
def test_the_limits_of_an_address_with_a_path_are_shown_with_an_alternative(
    platform: ScriptedPlatform,
    orion: Command,
    monkeypatch: pytest.MonkeyPatch,
    host: str | None,
    further: tuple[str, ...],
) -> None:
    """Jupyter stays blank at such an address, and Vite's scripts are blocked."""
    monkeypatch.setattr("webbrowser.open", lambda _url: True)
    platform.answer("GET", "/api/rentals/box", rental())
    ticket = WEB_PORT | {"host": host, "ticket": "t-_1", "expires_in_s": 60.0}
    platform.answer("POST", "/api/rentals/abcdefgh23/ports/8000/ticket", Answer(201, ticket))
    result = orion("open", "box", "8000", *(["--path"] if host else []), *further)
    assert result.status == 0
    assert result.err.count("\n") == 1
    for words in ("sandbox", "Jupyter", "Vite", "ssh -L 8000:127.0.0.1:8000 box.orion", "http://127.0.0.1:8000/"):
        assert words in result.err
    assert ("leave out --path" in result.err) is (host is not None)
    assert orion("open", "box", "8000", "--path", "--json").err == "", "no warning is printed for programs"


def test_a_web_port_is_made_public_and_private_and_is_shown(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental(public_ports=[8000]))
    platform.answer("PUT", "/api/rentals/abcdefgh23/ports/8000", WEB_PORT, WEB_PORT | {"public": False})
    assert f"{platform.url}/r/abcdefgh23/8000/" in orion("expose", "box", "8000", "--public").out
    assert "orion open box 8000" in orion("expose", "box", "8000", "--private").out
    assert [call.body for call in platform.calls if call.method == "PUT"] == [{"public": True}, {"public": False}]
    assert orion("expose", "box", "8000").status == 2
    assert orion("expose", "box", "22", "--public").status == 2
    platform.answer("GET", "/api/rentals/abcdefgh23/ports", page(WEB_PORT), page())
    assert f"{platform.url}/r/abcdefgh23/8000/" in orion("ports", "box").out
    assert "orion open box PORT" in orion("ports", "box").err
    assert "public ports" in orion("show", "box").out


@pytest.mark.parametrize("host", ["evil.example/x", "a@evil.example", "evil.example:1", "-x\n"])
def test_an_invalid_host_is_not_opened(platform: ScriptedPlatform, orion: Command, host: str) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    ticket = WEB_PORT | {"host": host, "ticket": "t", "expires_in_s": 60.0}
    platform.answer("POST", "/api/rentals/abcdefgh23/ports/8000/ticket", Answer(201, ticket))
    assert orion("open", "box", "8000").status == 1


def test_a_rental_is_reported_even_if_its_key_cannot_be_recorded(
    platform: ScriptedPlatform, orion: Command, public_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/nowhere")
    platform.answer("POST", "/api/rent", Answer(201, rental()))
    result = orion("rent", "--key", str(public_key))
    assert result.status == 0
    assert f"-i {public_key}" in result.err
    assert orion("rent").status == 1  # orion cannot make its own key without the folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("rent", "--ttl", "31d"),
        ("rent", "--ttl", "0"),
        ("renew", "box", "--ttl", "5w"),
        ("token", "create", "a", "--ttl", "0"),
    ],
)
def test_a_time_out_of_bounds_is_refused_and_nothing_is_sent(
    platform: ScriptedPlatform, orion: Command, arguments: tuple[str, ...]
) -> None:
    result = orion(*arguments)
    assert result.status == 2
    assert result.err.startswith("orion: --ttl is ")
    assert "must be at least 1m and at most" in result.err
    assert platform.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "Lab"), "name must be lowercase letters, digits and hyphens"),
        (("--label", "team=two words"), "labels.team must be letters, digits and . _ / -"),
        (("--start", " "), "start must be a command"),
    ],
)
def test_an_invalid_rent_is_refused_with_the_reason(
    platform: ScriptedPlatform, orion: Command, public_key: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = orion("rent", "--key", str(public_key), *arguments)
    assert (result.status, platform.calls) == (2, [])
    assert message in result.err


def test_ctrl_c_while_renting_shows_the_rental_that_stays(
    platform: ScriptedPlatform, orion: Command, public_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rent = Orion.rent

    def interrupted(self: Orion, **asked: Any) -> RentReply:
        monkeypatch.setattr(Orion, "rent", rent)
        rent(self, **asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(Orion, "rent", interrupted)
    platform.answer("POST", "/api/rent", Answer(202, rental(state="queued", explanation="no worker has a free slot")))
    result = orion("rent", "--key", str(public_key))
    assert result.status == 130
    assert "box is queued: no worker has a free slot. It stays rented. To log in, run: orion ssh box" in result.err
    assert "orion release box" in result.err
    first, again = platform.calls
    assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"]
    assert again.body["wait_s"] == 0
    assert keys.identity_of("abcdefgh23") is not None


def test_ctrl_c_while_renting_without_a_platform_says_where_to_look(
    platform: ScriptedPlatform, orion: Command, public_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Orion, **asked: Any) -> RentReply:
        raise KeyboardInterrupt

    monkeypatch.setattr(Orion, "rent", interrupted)
    result = orion("rent", "--key", str(public_key))
    assert result.status == 130
    assert "the rental may have been made; see: orion ls" in result.err


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("migrate", ("migrate", "box"), "the migration of box has begun, it continues"),
        ("release", ("release", "box", "--yes"), "the release of box has begun, it continues"),
        ("restore_files", ("restore", "box", "--empty", "--yes"), "box may start again with an empty home"),
        ("wait_until_drained", ("drain", "w-aaaa2222"), "to end it, run: orion resume w-aaaa2222"),
        ("wait_until_ready", ("resume", "w-aaaa2222"), "w-aaaa2222 is resumed, and its check continues"),
    ],
)
def test_ctrl_c_says_what_continues(
    platform: ScriptedPlatform,
    orion: Command,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Orion, call, interrupted)
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("GET", "/api/workers", page(worker()))
    for what in ("drain", "resume"):
        platform.answer("POST", f"/api/workers/w-aaaa2222/{what}", worker())
    result = orion(*arguments)
    assert result.status == 130
    assert message in result.err


def test_an_admins_own_rental_goes_before_others_of_its_name(platform: ScriptedPlatform, orion: Command) -> None:
    own, other = rental(id="own", owner="admin"), rental(id="other", owner="bob")
    platform.answer("GET", "/api/rentals", page(other, own), page(own))
    assert json.loads(orion("show", "box", "--json").out)["id"] == "own"
    assert platform.calls[-1].query == {"name": "box", "mine": "true"}
    platform.answer("GET", "/api/rentals", page(), page(other, own), page(own))
    assert json.loads(orion("show", "box", "--json").out)["id"] == "own"


THAWED = "it was thawed to make room, and is frozen again unless it does within ten minutes"


@pytest.mark.parametrize("problem", ["", "the worker cannot be asked", THAWED])
def test_a_rental_that_was_not_frozen_is_not_called_thawed(
    platform: ScriptedPlatform, orion: Command, problem: str
) -> None:
    platform.answer("GET", "/api/rentals/box", rental(copy_problem=problem))
    platform.answer("POST", "/api/rentals/abcdefgh23/thaw", rental(copy_problem=problem))
    first, *rest = orion("thaw", "box").out.splitlines()
    assert first == "box was not frozen: nothing has changed."
    assert rest == ([f"no snapshot of box can be made: {problem}"] if problem else [])


def test_a_thawed_rental_is_shown_with_the_time_that_it_has(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental(copy_problem="its home holds too much; it is frozen"))
    platform.answer("POST", "/api/rentals/abcdefgh23/thaw", rental(copy_problem=THAWED))
    output = orion("thaw", "box").out
    assert f"box runs again: {THAWED}." in output
    assert "Remove files" in output


@pytest.mark.usefixtures("no_pauses")
def test_resume_waits_until_the_worker_was_checked(platform: ScriptedPlatform, orion: Command) -> None:
    quarantined, joining = worker(health="quarantined"), worker(health="joining")
    platform.answer("GET", "/api/workers", page(quarantined))
    platform.answer("POST", "/api/workers/w-aaaa2222/resume", quarantined)
    platform.answer("GET", "/api/workers/w-aaaa2222", quarantined, joining, worker())
    result = orion("resume", "w-aaaa2222")
    assert (result.status, result.out) == (0, "w-aaaa2222 is ready.\n")
    platform.answer("GET", "/api/workers/w-aaaa2222", joining, worker(health="quarantined", explanation="it is dirty."))
    result = orion("resume", "w-aaaa2222")
    assert result.status == 7
    assert "w-aaaa2222 is quarantined: it is dirty. It is resumed, and its check continues" in result.err
    assert orion("resume", "w-aaaa2222", "--wait", "0").status == 7


def test_without_a_login_no_key_is_made(orion: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORION_URL")
    monkeypatch.delenv("ORION_TOKEN_FILE")
    for arguments in (("rent",), ("keys", "box", "add")):
        result = orion(*arguments)
        assert result.status == 4
        assert "not logged in" in result.err
    assert not (tmp_path / "orion").exists()


OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMJmT9oQyXJXw1cMyxGBLCFfEDPrgh2TyT2PnTrEFpGr"


def test_a_file_of_keys_may_contain_comments_and_several_keys(
    platform: ScriptedPlatform, orion: Command, tmp_path: Path
) -> None:
    file = tmp_path / "keys.pub"
    file.write_text(f"# of the laptop\n\n{HOST_KEY} ada@lab\n")
    platform.answer("POST", "/api/rent", Answer(201, rental()))
    assert orion("rent", "--key", str(file)).status == 0
    assert platform.calls[-1].body["ssh_public_key"] == f"{HOST_KEY} ada@lab"
    file.write_text(f"{HOST_KEY} ada@lab\n# and of the desk\n{OTHER_KEY}\n")
    refused = orion("rent", "--key", str(file))
    assert refused.status == 2
    assert "holds 2 keys" in refused.err
    assert "orion keys RENTAL add" in refused.err
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("POST", "/api/rentals/abcdefgh23/keys", Answer(201, page()))
    platform.calls.clear()
    assert orion("keys", "box", "add", str(file)).status == 0
    sent = [call.body["ssh_public_key"] for call in platform.calls if call.method == "POST"]
    assert sent == [f"{HOST_KEY} ada@lab", OTHER_KEY]
    file.write_text("# nothing\n")
    assert "must be one OpenSSH public key" in orion("keys", "box", "add", str(file)).err


@pytest.mark.parametrize("before", [None, "", "Host other\n"])
def test_removing_config_ssh_restores_the_former_file(
    platform: ScriptedPlatform, orion: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ssh/config"
    if before is not None:
        file.parent.mkdir()
        file.write_text(before)
    authority = f"@cert-authority *.orion {HOST_KEY}"
    platform.answer("GET", "/api/ssh-authority", {"public_key": HOST_KEY, "known_hosts": authority})
    platform.answer("GET", "/api/rentals", page(rental()))
    for _ in range(2):  # it may be repeated
        assert orion("config-ssh").status == 0
        assert "Include" in file.read_text()
    assert orion("config-ssh", "--remove").status == 0
    assert (file.read_text() if file.exists() else None) == before
    assert not (tmp_path / "orion/ssh").exists()


def test_the_list_of_keys_says_which_of_them_this_machine_has(
    platform: ScriptedPlatform, orion: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_ed25519.pub").write_text(f"{HOST_KEY} ada@lab\n")
    (tmp_path / ".ssh/broken.pub").write_bytes(b"\xff")
    platform.answer("GET", "/api/rentals/box", rental())
    found = [{"id": id_, "fingerprint": f"SHA256:{id_}", "public_key": key, "in_place": True,
              "comment": comment} for id_, key, comment in
             (("mine", HOST_KEY, ""), ("other", OTHER_KEY, "bob's desk"))]  # fmt: skip
    platform.answer("GET", "/api/rentals/abcdefgh23/keys", page(*found))
    listed = orion("keys", "box", "ls").out
    mine, other = (line for line in listed.splitlines() if "SHA256" in line)
    assert "ada@lab" in mine, "a platform that does not know its name"
    assert mine.split()[-1] == f"{tmp_path}/.ssh/id_ed25519"
    assert "bob's desk" in other
    assert other.split()[-1] == "-"
    assert_harmless(listed)


def test_removing_an_unknown_key_fails_with_not_found(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("GET", "/api/rentals/abcdefgh23/keys", page())
    result = orion("keys", "box", "rm", "nothing", "--yes")
    assert result.status == 3
    assert "List its keys with: orion keys box ls" in result.err


def test_renew_says_when_it_ends_now(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("POST", "/api/rentals/abcdefgh23/renew", rental())
    result = orion("renew", "box", "--ttl", "7d")
    assert "box ends in" in result.out
    assert platform.calls[-1].body == {"ttl_s": 604800}


def test_workers_can_be_named_by_hostname(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/workers", page(worker()))
    platform.answer("POST", "/api/workers/w-aaaa2222/drain", worker(intent="draining"))
    platform.answer("POST", "/api/workers/w-aaaa2222/resume", worker())
    platform.answer("DELETE", "/api/workers/w-aaaa2222", Answer(204))
    assert "draining" in orion("drain", "0123456789ab", "--no-wait").out
    assert "ready" in orion("resume", "w-aaaa2222").out
    assert orion("remove", "w-aaaa2222", "--yes").status == 0
    assert platform.calls[-1].method == "DELETE"


def test_prune_names_the_forgotten_and_the_kept_workers(platform: ScriptedPlatform, orion: Command) -> None:
    kept = {"id": "w-bbbb3333", "why": "it may still have what was written last in desk"}
    platform.answer("POST", "/api/workers/prune", {"forgotten": ["w-aaaa2222"], "kept": [kept]})
    output = orion("workers", "prune").out
    assert "Forgotten: w-aaaa2222." in output
    assert "Kept: w-bbbb3333: it may still have what was written last in desk" in output
    assert json.loads(orion("workers", "prune", "--json").out)["kept"] == [kept]


def test_a_worker_is_declared_gone_only_after_a_yes(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/workers", page(worker()))
    platform.answer("POST", "/api/workers/w-aaaa2222/gone", worker(health="down"))
    assert "add --yes" in orion("workers", "gone", "0123456789ab").err
    assert [call.method for call in platform.calls] == ["GET"]
    assert "its rentals continue elsewhere" in orion("workers", "gone", "0123456789ab", "--yes").out


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orion.client.sdk.MIGRATION_POLL_S", 0.0)


@pytest.mark.usefixtures("no_pauses")
def test_a_drain_says_what_it_waits_for_once_and_ends_when_it_is_drained(
    platform: ScriptedPlatform, orion: Command
) -> None:
    waits = worker(intent="draining", explanation="1 rental is to be migrated, and no worker can take one")
    cleaning = worker(intent="draining")
    stays = rental(explanation=f"{NOT_MOVED}its home holds too much {EVIL}")
    platform.answer("GET", "/api/workers", page(worker()))
    platform.answer("POST", "/api/workers/w-aaaa2222/drain", waits)
    platform.answer("GET", "/api/workers/w-aaaa2222", waits, waits, cleaning, worker(intent="drained"))
    platform.answer("GET", "/api/rentals", page(stays, rental(name="elsewhere", worker_id="w-bbbb3333")))
    result = orion("drain", "w-aaaa2222")
    assert (result.status, result.out) == (0, "w-aaaa2222 is drained.\n")
    assert result.err.count("no worker can take one") == 1
    assert result.err.count("box: could not be moved: its home holds too much") == 1
    assert "\x1b" not in result.err


@pytest.mark.usefixtures("no_pauses")
def test_a_drain_that_is_ended_by_a_resume_is_not_reported_as_done(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/workers", page(worker()))
    platform.answer("POST", "/api/workers/w-aaaa2222/drain", worker(intent="draining"))
    platform.answer("GET", "/api/workers/w-aaaa2222", worker())
    assert orion("drain", "w-aaaa2222").status == 6


def test_migrate_names_the_new_worker(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("POST", "/api/rentals/abcdefgh23/migrate", rental(worker_id="w-bbbb3333", epoch=2))
    result = orion("migrate", "box", "--wait", "30s")
    assert (result.status, result.out) == (0, "box is on worker w-bbbb3333 now.\n")
    assert platform.calls[-1].query == {"wait_s": "30"}


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (problem(409, "nowhere_to_go", "no other worker can take it"), 6, "no other worker can take it"),
        (Answer(202, rental(moving_to="w-bbbb3333")), 7, "The migration continues by itself"),
        (rental(explanation="could not be moved: no"), 6, "stays on its worker: could not be moved: no"),
    ],
)
def test_migrate_says_why_the_rental_is_not_on_another_worker(
    platform: ScriptedPlatform, orion: Command, answer: Answer | dict[str, Any], status: int, message: str
) -> None:
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("POST", "/api/rentals/abcdefgh23/migrate", answer)
    result = orion("migrate", "box", "--wait", "1s")
    assert result.status == status
    assert message in result.err


@pytest.mark.usefixtures("no_pauses")
def test_migrate_waits_beyond_one_answer_of_the_server(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("POST", "/api/rentals/abcdefgh23/migrate", Answer(202, rental(moving_to="w-bbbb3333")))
    moved = rental(worker_id="w-bbbb3333", epoch=2)
    platform.answer("GET", "/api/rentals/box", rental())
    platform.answer("GET", "/api/rentals/abcdefgh23", rental(moving_to="w-bbbb3333"), rental(state="migrating"), moved)
    assert orion("migrate", "box", "--wait", "2m").out == "box is on worker w-bbbb3333 now.\n"


def test_a_new_token_is_alone_on_stdout(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("POST", "/api/tokens", Answer(201, token() | {"token": "orion_client_t9_shown"}))
    result = orion("token", "create", "ada", "--ttl", "7d")
    assert result.out == "orion_client_t9_shown\n"
    assert platform.calls[0].body == {"name": "ada", "role": "client", "ttl_s": 604800}


def test_a_token_is_revoked_by_name(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/tokens", page(token()))
    platform.answer("DELETE", "/api/tokens/t1", Answer(204))
    assert orion("token", "revoke", "ada", "-y").status == 0


def test_events_shows_the_last_ones_and_follows_from_there(platform: ScriptedPlatform, orion: Command) -> None:
    refused = problem(401, "unauthorized", "revoked")
    past = page(event(3), event(2), event(1, reason="first"), following="1")
    platform.answer("GET", "/api/events", past, stream(event(3), event(4, reason="latest")), refused)
    result = orion("events", "-f", "-n", "2")
    assert result.status == 4  # the third answer of the scripted platform ends the command
    assert "first" not in result.out
    assert result.out.count("rental.activated") == 3
    assert platform.calls[0].query == {"newest_first": "true", "limit": "2"}
    assert platform.calls[1].headers["Last-Event-ID"] == "3"


def test_events_requests_no_more_pages_than_it_shows(platform: ScriptedPlatform, orion: Command) -> None:
    pages = [page(*(event(n) for n in range(end, end - 500, -1)), following=str(end - 499)) for end in (2000, 1500)]
    platform.answer("GET", "/api/events", *pages)
    shown = [json.loads(line)["id"] for line in orion("events", "-n", "700", "--json").out.splitlines()]
    assert shown == list(range(1301, 2001))
    assert [call.query.get("after") for call in platform.calls] == [None, "1501"]
    platform.calls.clear()
    platform.answer("GET", "/api/events", page(event(7), following="7"))
    assert orion("events", "-n", "0").out == ""
    assert len(platform.calls) == 1


def test_events_as_json_are_one_object_per_line(platform: ScriptedPlatform, orion: Command) -> None:
    platform.answer("GET", "/api/events", page(event(2), event(1)))
    assert [json.loads(line)["id"] for line in orion("events", "--json").out.splitlines()] == [1, 2]


def test_the_inventory_pins_the_host_key_of_each_worker_that_is_not_down(
    platform: ScriptedPlatform, orion: Command
) -> None:
    platform.answer("GET", "/api/workers", page(worker(), worker(id="w-down", health="down")))
    printed: dict[str, Any] = json.loads(orion("inventory", "--list").out)
    assert printed["workers"]["hosts"] == ["w-aaaa2222"]
    variables = printed["_meta"]["hostvars"]["w-aaaa2222"]
    assert variables["ansible_host"] == "172.20.128.2"
    arguments = shlex.split(variables["ansible_ssh_common_args"])
    assert "StrictHostKeyChecking=yes" in arguments
    assert f"KnownHostsCommand=/bin/echo w-aaaa2222 {HOST_KEY}" in arguments
    assert json.loads(orion("inventory", "--host", "w-aaaa2222").out) == variables
    assert orion("inventory", "--host", "w-down").status == 3


@pytest.mark.parametrize(
    "change",
    [
        {"id": "w; touch /tmp/x"},
        {"address": "-oProxyCommand=x"},
        {"ssh_host_keys": []},
        {"ssh_host_keys": ["ssh-ed25519 AAAA%h;reboot"]},
    ],
)
def test_the_inventory_holds_nothing_that_ssh_would_obey(
    platform: ScriptedPlatform, orion: Command, change: dict[str, Any]
) -> None:
    platform.answer("GET", "/api/workers", page(worker(**change)))
    assert json.loads(orion("inventory").out)["workers"]["hosts"] == []


def test_login_stores_nothing_before_the_token_is_accepted(
    platform: ScriptedPlatform, orion: Command, tmp_path: Path
) -> None:
    platform.answer("GET", "/api/rentals", problem(401, "unauthorized", "unknown token"), page())
    arguments = ("login", platform.url, "--token-file", str(tmp_path / "token"))
    assert orion(*arguments).status == 4
    assert not (tmp_path / "orion").exists()
    assert orion(*arguments).status == 0
    assert "orion_client_t1_secret" in (tmp_path / "orion" / "config.json").read_text()


def test_not_logged_in_says_how(orion: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORION_URL")
    monkeypatch.delenv("ORION_TOKEN_FILE")
    result = orion("ls")
    assert result.status == 4
    assert "orion login http://localhost:8080" in result.err


def by_itself(arguments: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run `orion ARGUMENTS` as a process of its own, whose output is buffered as for a user."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "orion.cli", *arguments]
    return subprocess.run(command, env=environment, text=True, check=False, **streams)


@pytest.mark.parametrize("arguments", [["events", "--json"], ["ls", "--json"], ["ls"], ["--help"]])
def test_a_closed_pipe_ends_the_command_without_output(
    platform: ScriptedPlatform, orion: Command, arguments: list[str]
) -> None:
    platform.answer("GET", "/api/events", page(*(event(number) for number in range(500))))
    platform.answer("GET", "/api/rentals", page(rental()))
    reading, writing = os.pipe()
    os.close(reading)
    done = by_itself(arguments, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_connect_is_shown(option: str) -> None:
    done = by_itself(["connect", option], capture_output=True)
    assert done.returncode == 0
    assert "This is what ssh runs for each session" in done.stdout


def test_the_list_of_commands_cuts_no_sentence(orion: Command) -> None:
    for arguments in (("--help",), ("keys", "box", "--help"), ("token", "--help"), ("admin", "--help")):
        listed = orion(*arguments).out.partition("Commands:")[2]
        assert listed
        assert "..." not in listed
