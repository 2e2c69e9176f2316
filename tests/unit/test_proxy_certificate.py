"""The certificate that the proxy makes for itself: the lines of its entrypoint, with this machine's openssl."""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).parents[2] / "manager_proxy" / "entrypoint.sh"
DAY_S = 86_400
LONGEST_S = 825 * DAY_S
"""Seconds for which a certificate may be valid: some clients refuse one that is valid for longer."""


class Tls:
    """The directories of a proxy, and its entrypoint without the command that ends it."""

    def __init__(self, folder: Path) -> None:
        self.tls, run = folder / "tls", folder / "run"
        functions = ENTRYPOINT.read_text().partition("\ntrap 'exit 0'")[0]
        self._functions = functions.replace("/etc/orion-tls", str(self.tls)).replace("/run/", f"{run}/")
        for directory in (self.tls, run):
            directory.mkdir()

    def see_to_it(self, **settings: str) -> str:
        """Run the entrypoint; return its output."""
        command = ["sh", "-c", f"{self._functions}\nremove_unfinished_certificate\nensure_certificate"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def verifies(self, at: float, *more: str) -> bool:
        """Return whether a client that trusts the certificate accepts it when its clock shows `at`."""
        file = str(self.tls / "tls.crt")
        trust = ["-x509_strict", "-purpose", "sslserver", "-attime", str(int(at)), *more, "-CAfile", file]
        return subprocess.run(["openssl", "verify", *trust, file], capture_output=True, check=False).returncode == 0

    def lasts(self) -> tuple[float, float]:
        """Return the begin and the end of the certificate's validity, in Unix seconds."""
        command = ["openssl", "x509", "-in", str(self.tls / "tls.crt"), "-noout", "-dates"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        dates = dict(line.split("=", 1) for line in shown.splitlines())
        return ssl.cert_time_to_seconds(dates["notBefore"]), ssl.cert_time_to_seconds(dates["notAfter"])


@pytest.fixture
def proxy(tmp_path: Path) -> Tls:
    return Tls(tmp_path)


def test_a_client_whose_clock_is_late_accepts_a_new_certificate(proxy: Tls) -> None:
    proxy.see_to_it()
    made_at = (proxy.tls / "tls.crt").stat().st_mtime
    begins, ends = proxy.lasts()
    assert begins <= made_at - DAY_S
    assert ends - begins <= LONGEST_S
    assert ends > made_at + LONGEST_S - 3 * DAY_S
    assert proxy.verifies(made_at - 3600)
    assert not proxy.verifies(made_at - 2 * DAY_S)


def test_the_certificate_is_only_for_servers_with_the_given_names(proxy: Tls) -> None:
    output = proxy.see_to_it(ORION_TLS_NAMES="lab.example,192.0.2.7", ORION_APPS_DOMAIN="apps.example")
    assert "DNS:lab.example" in output
    now = (proxy.tls / "tls.crt").stat().st_mtime
    for name in ("localhost", "manager_proxy", "lab.example", "x.apps.example"):
        assert proxy.verifies(now, "-verify_hostname", name), name
    for address in ("127.0.0.1", "192.0.2.7"):
        assert proxy.verifies(now, "-verify_ip", address), address
    assert not proxy.verifies(now, "-verify_hostname", "other.example")
    assert not proxy.verifies(now, "-purpose", "sslclient")


def test_a_certificate_is_made_once_and_only_its_owner_can_read_the_key(proxy: Tls) -> None:
    proxy.see_to_it()
    made = [(proxy.tls / name).read_bytes() for name in ("tls.crt", "tls.key")]
    assert proxy.see_to_it() == ""
    assert [(proxy.tls / name).read_bytes() for name in ("tls.crt", "tls.key")] == made
    assert (proxy.tls / "tls.key").stat().st_mode & 0o077 == 0
    assert sorted(file.name for file in proxy.tls.iterdir()) == ["made-by-orion", "tls.crt", "tls.key"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(proxy.tls / "tls.crt", proxy.tls / "tls.key")


@pytest.mark.parametrize("left", ["a key alone", "an empty key", "another key", "an empty certificate"])
def test_an_unfinished_certificate_of_a_stopped_proxy_is_made_anew(proxy: Tls, left: str) -> None:
    proxy.see_to_it()
    key, certificate = proxy.tls / "tls.key", proxy.tls / "tls.crt"
    if left == "a key alone":
        certificate.unlink()
    elif left == "another key":
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True)
    else:
        (key if "key" in left else certificate).write_bytes(b"")
    assert "made a certificate" in proxy.see_to_it()
    assert proxy.verifies(certificate.stat().st_mtime)
    assert "made a certificate" not in proxy.see_to_it()


def test_an_operator_s_own_certificate_is_not_replaced(proxy: Tls) -> None:
    proxy.see_to_it()
    key, certificate = proxy.tls / "tls.key", proxy.tls / "tls.crt"
    own = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "3", "-subj", "/CN=example.org"]
    subprocess.run([*own, "-keyout", str(key), "-out", str(certificate)], capture_output=True, check=True)
    before = key.read_bytes(), certificate.read_bytes()
    assert "made a certificate" not in proxy.see_to_it()
    assert (key.read_bytes(), certificate.read_bytes()) == before
