"""The stored login, and the order of the environment and the file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from orion import login
from orion.errors import InvalidInput, NotLoggedIn
from orion.login import Login

TOKEN = "orion_client_t1_secret"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_stored_login_is_loaded(environment: dict[str, str]) -> None:
    account = Login("http://localhost:8080", TOKEN)
    login.store(account, environment)
    assert login.load(environment) == account


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_only_its_owner_can_read_the_login(environment: dict[str, str], tmp_path: Path, umask: int) -> None:
    (tmp_path / "orion").mkdir(mode=0o755)
    before = os.umask(umask)
    try:
        kept_in = login.store(Login("http://localhost:8080", TOKEN), environment)
    finally:
        os.umask(before)
    assert mode(kept_in) == 0o600
    assert mode(kept_in.parent) == 0o700
    assert sorted(path.name for path in kept_in.parent.iterdir()) == ["config.json"]


def test_a_second_login_replaces_the_first(environment: dict[str, str]) -> None:
    login.store(Login("http://localhost:8080", TOKEN), environment)
    login.store(Login("http://localhost:9090", TOKEN), environment)
    assert login.load(environment).url == "http://localhost:9090"


def test_a_certificate_file_is_copied(environment: dict[str, str], tmp_path: Path) -> None:
    given = tmp_path / "given.pem"
    given.write_text("certificate")
    login.store(Login("https://lab:8443", TOKEN, str(given)), environment)
    given.unlink()
    kept = login.load(environment).ca_file
    assert kept is not None
    assert Path(kept).read_text() == "certificate"


def test_the_environment_goes_before_the_file(environment: dict[str, str], tmp_path: Path) -> None:
    login.store(Login("http://localhost:8080", TOKEN), environment)
    (tmp_path / "token").write_text("orion_admin_admin_other\n")
    here = {**environment, "ORION_URL": "http://manager_proxy", "ORION_TOKEN_FILE": str(tmp_path / "token")}
    assert login.load(here) == Login("http://manager_proxy", "orion_admin_admin_other")


@pytest.mark.parametrize("half", [{"ORION_URL": "http://evil.example"}, {"ORION_TOKEN_FILE": "/dev/null"}])
def test_half_of_the_environments_pair_is_never_completed_by_the_file(
    environment: dict[str, str], half: dict[str, str]
) -> None:
    login.store(Login("http://localhost:8080", TOKEN), environment)
    with pytest.raises(NotLoggedIn, match="set both"):
        login.load({**environment, **half})


def test_without_a_login_the_error_says_how_to_log_in(environment: dict[str, str]) -> None:
    with pytest.raises(NotLoggedIn, match="orion login http://localhost:8080"):
        login.load(environment)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"url": "http://localhost"}', '{"url": 3, "token": null}'])
def test_a_damaged_file_says_how_to_log_in(environment: dict[str, str], tmp_path: Path, text: str) -> None:
    (tmp_path / "orion").mkdir()
    (tmp_path / "orion" / "config.json").write_text(text)
    with pytest.raises(NotLoggedIn, match="orion login"):
        login.load(environment)


@pytest.mark.parametrize("token", ["", "two words", "line\nline", "caf\u00e9"])
def test_a_token_is_one_plain_word(tmp_path: Path, token: str) -> None:
    (tmp_path / "token").write_text(token)
    with pytest.raises(NotLoggedIn):
        login.read_token(tmp_path / "token")


def test_a_token_is_not_shown_by_accident() -> None:
    assert TOKEN not in repr(Login("http://localhost:8080", TOKEN))


def test_the_stored_login_is_readable_json(environment: dict[str, str]) -> None:
    kept_in = login.store(Login("http://localhost:8080", TOKEN), environment)
    assert json.loads(kept_in.read_text()) == {"url": "http://localhost:8080", "token": TOKEN, "ca_file": None}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://localhost:8080/", "http://localhost:8080"),
        ("localhost:8080", "http://localhost:8080"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("lab.example:8443", "https://lab.example:8443"),
        ("https://lab.example/orion/", "https://lab.example/orion"),
        ("http://localhost:8080/api/", "http://localhost:8080"),
        ("https://lab.example/orion/api", "https://lab.example/orion"),
    ],
)
def test_an_address_is_understood(written: str, meant: str) -> None:
    assert login.clean_url(written) == meant


@pytest.mark.parametrize(
    "written",
    ["", "ftp://lab", "http://", "http://user:pass@lab", "http://lab?x=1", "http://lab#x", "http://lab:99999",
     "http://lab:0", "http://lab\n", "http://la b", "http://[::1"],
)  # fmt: skip
def test_a_text_that_is_no_address_is_refused(written: str) -> None:
    with pytest.raises(InvalidInput):
        login.clean_url(written)


def test_a_proxy_of_the_environment_is_used_except_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    assert login.proxy_for("http://lab.example:8080") == "http://proxy.example:3128"
    assert login.proxy_for("http://inside.example:8080") is None
    assert login.proxy_for("http://localhost:8080") is None
    assert login.proxy_for("http://127.0.0.1:8080") is None
