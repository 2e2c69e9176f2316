"""The stored certificate of this machine's own key: for how long it is used when clocks jump."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orion.login import Login
from orion.ssh_client import hosts
from orion.ssh_client.hosts import CERTIFICATE_S, ENOUGH_S, certify

CERTIFICATE = "ssh-ed25519-cert-v01@openssh.com AAAA"


class Clocks:
    """Two clocks in place of the module `time`: one that may be set, and one that may not."""

    def __init__(self) -> None:
        self.wall, self.going = 1_800_000_000.0, 5000.0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.going

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.going += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(hosts, "time", made)
    return made


@pytest.fixture
def requests_until(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """Return how often the platform has been asked once there is a certificate for this epoch."""
    (tmp_path / "id_ed25519.pub").write_text("ssh-ed25519 AAAA me")
    monkeypatch.setattr(hosts.login, "folder", lambda: tmp_path)
    requests_until: list[str] = []

    def ask(_account: Login, path: str, _body: Any = None) -> dict[str, Any]:
        requests_until.append(path)
        return {"certificate": CERTIFICATE}

    monkeypatch.setattr(hosts, "_ask", ask)

    def now(epoch: int = 1) -> int:
        certify(Login("http://localhost:8080", "token"), "abcdefgh23", epoch)
        assert (tmp_path / "abcdefgh23-cert.pub").read_text().startswith(CERTIFICATE)
        return len(requests_until)

    return now


def test_a_certificate_is_requested_once_for_an_epoch_and_again_before_it_ends(
    clocks: Clocks, requests_until: Callable[..., int]
) -> None:
    assert requests_until() == requests_until() == 1
    clocks.pass_time(CERTIFICATE_S - ENOUGH_S - 1)
    assert requests_until() == 1
    clocks.pass_time(1)
    assert requests_until() == 2
    assert requests_until(2) == 3


@pytest.mark.parametrize("back_s", [60.0, 1800.0, 7200.0, 86_400.0])
def test_a_clock_that_is_set_back_does_not_prolong_a_certificate(
    clocks: Clocks, requests_until: Callable[..., int], back_s: float
) -> None:
    requests_until()
    clocks.wall -= back_s
    clocks.pass_time(CERTIFICATE_S - ENOUGH_S)
    assert requests_until() == 2


def test_after_sleep_or_a_reboot_a_new_certificate_is_requested(
    clocks: Clocks, requests_until: Callable[..., int]
) -> None:
    requests_until()
    clocks.wall += CERTIFICATE_S
    assert requests_until() == 2
    clocks.wall, clocks.going = clocks.wall + 300, 10.0
    assert requests_until() == 3
    assert requests_until() == 3


def test_a_certificate_without_valid_times_is_requested_again(
    clocks: Clocks, requests_until: Callable[..., int], tmp_path: Path
) -> None:
    for kept in ("", CERTIFICATE, f"{CERTIFICATE} 1/{int(clocks.wall) + 3600}", f"{CERTIFICATE} 1/x/y"):
        (tmp_path / "abcdefgh23-cert.pub").write_text(kept)
        before = requests_until()
        assert requests_until() == before
    assert before == 4
