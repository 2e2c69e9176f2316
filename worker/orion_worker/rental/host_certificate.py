"""The certificate by which sshd shows renters that this is the worker of their rentals.

The manager signs it, for an hour and for the rentals that are placed here at that time, and sends a new one whenever
that changes. sshd reads it when it starts and on SIGHUP: it then starts itself anew, within milliseconds, and keeps
every open session (seen in OpenSSH 10.0). So it is signalled once for all certificates that came meanwhile.

Orders may overtake each other: the certificate with the highest serial number, which was signed last, stays.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from orion_worker.records import RequestRefused, locked_or_refused
from orion_worker.system.files import write_atomically

KIND = "ssh-ed25519-cert-v01@openssh.com"
LONGEST_S = 3600.0 + 60.0
"""Seconds that a certificate may last. The manager signs for an hour; a longer one was signed by a wrong clock."""
RELOAD_WITHIN_S = 5.0
LOCK_WAIT_S = 2 * RELOAD_WITHIN_S
"""Seconds to wait for another program that has sshd start anew."""
LOOK_EVERY_S = 0.001


@dataclass(frozen=True)
class CertificateTerms:
    """The fields of a certificate that decide which of two is newer."""

    serial: int
    valid_after: int
    valid_before: int

    def is_valid(self, now: float) -> bool:
        return self.valid_after <= now < self.valid_before <= now + LONGEST_S


def read_certificate(line: str) -> CertificateTerms:
    """Return the terms of a certificate. Raise ValueError unless it is a host certificate of an ed25519 key.

    The form is in PROTOCOL.certkeys of OpenSSH.
    """

    def take(size: int) -> bytes:
        taken = content.read(size)
        if len(taken) < size:
            raise ValueError("it is cut")
        return taken

    def number(size: int) -> int:
        return int.from_bytes(take(size), "big")

    kind, _, encoded = line.strip().partition(" ")
    try:
        content = io.BytesIO(base64.b64decode(encoded.split(" ")[0], validate=True))
        inside, _nonce, _key = (take(number(4)) for _ in range(3))
        serial, certificate_type = number(8), number(4)
        _key_id, _principals = take(number(4)), take(number(4))
        terms = CertificateTerms(serial, number(8), number(8))
    except ValueError as error:
        raise ValueError("this is no certificate") from error
    if kind != KIND or inside != KIND.encode() or certificate_type != 2:
        raise ValueError("this is no certificate of a host with an ed25519 key")
    return terms


class HostCertificate:
    """The certificate of this worker's sshd; `root` is another directory in tests, where no sshd runs."""

    def __init__(self, root: Path) -> None:
        self._file = root / "etc/ssh/orion_host_certificate.pub"
        self._taken = root / "run/orion/host_certificate_taken"
        self._sshd = RunningSshd(root)

    def install(self, line: str, now: float) -> bool:
        """Keep a certificate, unless a newer one is here; return whether that changed anything. `now`: Unix time."""
        new = read_certificate(line)
        with self._sshd.locked():
            before = self._installed()
            # One that is not valid now gives way to any other: it was signed by a wrong clock, or is over.
            if before and before.is_valid(now) and before.serial >= new.serial:
                return False
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, f"{line.strip()}\n", mode=0o644)
            return True

    def show(self) -> None:
        """Have sshd show the installed certificate, or a later one."""
        with self._sshd.locked():
            installed = self._installed()
            serial = str(installed.serial if installed else 0)
            if self._taken.exists() and self._taken.read_text() == serial:
                return
            self._sshd.reload()
            write_atomically(self._taken, serial)

    def _installed(self) -> CertificateTerms | None:
        try:
            return read_certificate(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return None


class RunningSshd:
    """The listening daemon of sshd, known by the file into which it writes its process number once it listens."""

    def __init__(self, root: Path) -> None:
        self.pid_file = root / "run/sshd.pid"
        self._lock = root / "run/orion/sshd.lock"

    def locked(self) -> AbstractContextManager[int]:
        """Keep other programs from having sshd start anew. Raise RequestRefused if one does and does not end."""
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return locked_or_refused(self._lock, LOCK_WAIT_S, "another program has sshd start anew, and does not end")

    def started_at_ns(self) -> int:
        """Return when sshd began to listen, in nanoseconds; 0 while it does not listen."""
        with suppress(FileNotFoundError):
            return self.pid_file.stat().st_mtime_ns
        return 0

    def reload(self) -> None:
        """Have sshd read its files again. A daemon that does not listen yet reads them when it starts."""
        before = self.started_at_ns()
        with suppress(OSError, ValueError):
            os.kill(int(self.pid_file.read_text()), signal.SIGHUP)
            deadline = time.monotonic() + RELOAD_WITHIN_S
            while self.started_at_ns() in {0, before}:
                if time.monotonic() > deadline:
                    raise RequestRefused("sshd_away", "sshd was to take a new certificate and did not come back")
                time.sleep(LOOK_EVERY_S)
