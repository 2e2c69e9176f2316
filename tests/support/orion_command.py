"""Fixtures: the scripted platform, and `orion` in this process with a login from the environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.scripted_platform import ScriptedPlatform

from orion.cli.app import run


class CommandResult(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[ScriptedPlatform]:
    server = ScriptedPlatform()
    yield server
    server.stop()


@pytest.fixture
def platform(scripted_server: ScriptedPlatform) -> ScriptedPlatform:
    """Return the scripted platform without the answers and calls of earlier tests."""
    scripted_server.forget()
    return scripted_server


@pytest.fixture
def orion(
    platform: ScriptedPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Return a function that runs `orion ARGUMENTS`."""
    (tmp_path / "token").write_text("orion_client_t1_secret")
    monkeypatch.setenv("ORION_URL", platform.url)
    monkeypatch.setenv("ORION_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("ORION_CA_FILE", raising=False)

    def command(*arguments: str) -> CommandResult:
        status = run(arguments)
        return CommandResult(status, *capsys.readouterr())

    return command
