"""The operator's settings, and those that are refused before anything starts."""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Network

import pytest
from pydantic import ValidationError

from orion.manager.domain.clocks import Clocks
from orion.manager.settings import Secrets, Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ORION_")]:
        monkeypatch.delenv(name)


def test_without_settings_the_clocks_are_the_defaults() -> None:
    assert Settings().clocks == Clocks()


def test_clocks_come_from_the_environment_and_an_empty_variable_means_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ORION_HEARTBEAT_S", "20")
    monkeypatch.setenv("ORION_TAKEOVER_AFTER_S", "")
    monkeypatch.setenv("ORION_CLOCK_SCALE", "0.1")
    clocks = Settings().clocks
    assert clocks.heartbeat_s == pytest.approx(2)
    assert clocks.takeover_after_s == pytest.approx(9)


def test_unsafe_clocks_are_refused_with_a_message_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_FREEZE_AFTER_S", "85")
    with pytest.raises(ValidationError, match="raise takeover_after_s or lower freeze_after_s"):
        Settings()


@pytest.mark.parametrize("scale", ["0", "-1", "11", "nan"])
def test_an_invalid_scale_is_refused(monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    monkeypatch.setenv("ORION_CLOCK_SCALE", scale)
    with pytest.raises(ValidationError):
        Settings()


def test_a_setting_of_an_earlier_version_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    without = Settings()
    monkeypatch.setenv("ORION_ENGINE_STRATEGY", "linear")
    assert Settings() == without


@pytest.mark.parametrize("name", ["ORION_PROXY_ADDRESS", "ORION_APP_ADDRESS"])
def test_an_address_outside_the_subnet_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "10.0.0.2")
    with pytest.raises(ValidationError, match=f"{name} must be inside ORION_SUBNET 172.20.0.0/16"):
        Settings()


def test_another_subnet_is_taken_with_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_SUBNET", "10.77.0.0/16")
    monkeypatch.setenv("ORION_PROXY_ADDRESS", "10.77.0.2")
    monkeypatch.setenv("ORION_APP_ADDRESS", "10.77.0.3")
    settings = Settings()
    assert settings.subnet == IPv4Network("10.77.0.0/16")
    assert settings.door_url == "http://10.77.0.2/healthz"
    assert settings.may_be_a_worker("10.77.128.1")
    assert not settings.may_be_a_worker("172.20.128.1")


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("172.20.128.1", True),
        ("172.20.0.1", False),
        ("172.20.0.2", False),
        ("172.20.0.3", False),
        ("172.21.0.9", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("", False),
        ("172.20.128.1, 10.0.0.1", False),
    ],
)
def test_a_worker_s_address_is_in_the_subnet_and_not_one_of_the_platform_s_own(address: str, may: bool) -> None:
    assert Settings().may_be_a_worker(address) is may


def test_settings_do_not_change_afterwards() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_secrets_come_once_through_a_pipe_and_are_not_shown() -> None:
    reading, writing = os.pipe()
    sent = {
        "admin_token": "orion_admin_admin_x",
        "join_token": "orion_join_join_x",
        "proxy_secret": "door",
        "ssh_private_key": "private",
        "ssh_public_key": "public",
        "host_authority": "private",
        "user_authority": "private",
    }
    os.write(writing, json.dumps(sent).encode())
    os.close(writing)
    secrets = Secrets.from_pipe(reading)
    assert vars(secrets) == sent
    assert not any(value in repr(secrets) for value in sent.values())
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(reading)
