"""Which certificate a worker shows: the one that was signed last. Tests with sshd: tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest
from orion_worker.rental.host_certificate import HostCertificate, read_certificate
from support.builders import AUTHORITIES, host_key

from orion.manager.domain.host_certificates import BACKDATED_S, LIFETIME_S, NothingToSign
from orion.manager.ssh.authority import Authority

NOW = 1_800_000_000.0


def authority(now: float = NOW) -> Authority:
    return Authority(*AUTHORITIES, lambda: now)


def certificate(serial: int, now: float = NOW, *rental_ids: str) -> str:
    return authority(now).host_certificate(serial, "w-one", [host_key(1)], rental_ids or ["abcdefghij"]).line


def installed(root: Path) -> int:
    return read_certificate((root / "etc/ssh/orion_host_certificate.pub").read_text()).serial


def test_a_certificate_of_the_authority_is_parsed_as_it_was_signed() -> None:
    read = read_certificate(certificate(7))
    assert read.serial == 7
    assert read.is_valid(NOW)
    assert read.is_valid(NOW + LIFETIME_S - 1)
    assert not read.is_valid(NOW + LIFETIME_S)


def test_no_certificate_without_principals_is_signed() -> None:
    with pytest.raises(NothingToSign):
        authority().host_certificate(1, "w-one", [host_key(1)], [])


@pytest.mark.parametrize("key", ["ssh-ed25519 AAAA", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAAWE=", "ssh-rsa AAAA"])
def test_no_certificate_is_signed_for_an_invalid_host_key(key: str) -> None:
    """A worker's own claim about its keys is checked when the worker is reached."""
    with pytest.raises(NothingToSign):
        authority().host_certificate(1, "w-one", [key], ["abcdefghij"])


def test_a_user_certificate_is_not_a_host_certificate() -> None:
    line, _ = authority().user_certificate(host_key(2), "abcdefghij", 3, "alice", "172.20.0.3", 60)
    with pytest.raises(ValueError, match="of a host"):
        read_certificate(line)


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAA", f"{certificate(1)[:300]}", "x " * 20, host_key(1)])
def test_only_a_certificate_is_installed(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="this is no certificate"):
        HostCertificate(tmp_path).install(line, NOW)


def test_orders_in_the_wrong_sequence_leave_the_certificate_that_was_signed_last(tmp_path: Path) -> None:
    shown = HostCertificate(tmp_path)
    assert shown.install(certificate(2), NOW)
    assert not shown.install(certificate(1), NOW)
    assert not shown.install(certificate(2), NOW)
    assert installed(tmp_path) == 2
    assert shown.install(certificate(3), NOW)
    assert installed(tmp_path) == 3


@pytest.mark.parametrize("now", [NOW + LIFETIME_S + 1, NOW - 3600, NOW - 120, NOW - 2 * BACKDATED_S])
def test_a_certificate_that_is_not_valid_now_is_replaced(tmp_path: Path, now: float) -> None:
    """The certificate has ended, or was signed by a clock that was ahead."""
    shown = HostCertificate(tmp_path)
    shown.install(certificate(9), NOW)
    assert shown.install(certificate(2, now), now)
    assert installed(tmp_path) == 2


def test_without_a_listening_sshd_there_is_no_wait(tmp_path: Path) -> None:
    shown = HostCertificate(tmp_path)
    shown.install(certificate(1), NOW)
    shown.show()
    (tmp_path / "run/sshd.pid").write_text("no number")
    shown.install(certificate(2), NOW)
    shown.show()
