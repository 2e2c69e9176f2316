"""The certificate by which sshd shows renters that this is the worker of their rentals.

The manager signs it, for an hour and for the rentals that are placed here at that time, and sends a new one whenever
that changes. sshd reads it when it starts and on SIGHUP: it then starts itself anew, within milliseconds, and keeps
every session that stands (seen in OpenSSH 10.0). So it is told only once for all certificates that came meanwhile.

Orders cross each other: the one that was signed last stays, whichever arrives last. It is told by its serial number.
"""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orion_worker.records import RequestRefused
from orion_worker.system.files import write_atomically
from orion_worker.system.locks import got_lock, opened_lock

KIND = "ssh-ed25519-cert-v01@openssh.com"
LONGEST_S = 3600.0 + 60.0
"""The manager signs for an hour. What lasts longer was signed while its clock was ahead."""
RELOAD_WITHIN_S = 5.0
LOCK_WAIT_S = 2 * RELOAD_WITHIN_S
"""Seconds that whoever has it begin anew is waited for."""
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
    """Raises ValueError for what is no host certificate of an ed25519 key (PROTOCOL.certkeys of OpenSSH)."""
    kind, _, encoded = line.strip().partition(" ")
    try:
        fields = _Fields(base64.b64decode(encoded.split(" ")[0], validate=True))
        inside, _nonce, _key = (fields.string() for _ in range(3))
        serial, certificate_type = fields.number(8), fields.number(4)
        _key_id, _principals = fields.string(), fields.string()
        signed = CertificateTerms(serial, fields.number(8), fields.number(8))
    except (ValueError, IndexError) as error:
        raise ValueError("this is no certificate") from error
    if kind != KIND or inside != KIND.encode() or certificate_type != 2:
        raise ValueError("this is no certificate of a host with an ed25519 key")
    return signed


class HostCertificate:
    """`root` is another directory in tests, where no sshd runs."""

    def __init__(self, root: Path) -> None:
        self._file = root / "etc/ssh/orion_host_certificate.pub"
        self._taken = root / "run/orion/host_certificate_taken"
        self._sshd = RunningSshd(root)

    def install(self, line: str, now: float) -> bool:
        """True if it is another one than before. `now`: Unix time."""
        new = read_certificate(line)
        with self._sshd.locked():
            before = self._installed()
            # One that is not valid now cannot hold its place: it was signed by a clock that was wrong since.
            if before and before.is_valid(now) and before.serial >= new.serial:
                return False
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, f"{line.strip()}\n", mode=0o644)
            return True

    def show(self) -> None:
        """From now on sshd shows what was installed, or what came later."""
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
    """The daemon that listens, by the file in which it writes its number once it does."""

    def __init__(self, root: Path) -> None:
        self.pid_file = root / "run/sshd.pid"
        self._lock = root / "run/orion/sshd.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from having it begin anew. Raise RequestRefused if they do."""
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with opened_lock(self._lock) as lock:
            if not got_lock(lock, LOCK_WAIT_S):
                raise RequestRefused("busy", "something else has sshd begin anew, and does not end; try again")
            yield

    def started_at_ns(self) -> int:
        """Another number for each time that it began to listen; 0 while it does not."""
        with suppress(FileNotFoundError):
            return self.pid_file.stat().st_mtime_ns
        return 0

    def reload(self) -> None:
        """Have it read its files again. Where none listens there is nothing to do: it reads them when it starts."""
        before = self.started_at_ns()
        with suppress(OSError, ValueError):
            os.kill(int(self.pid_file.read_text()), signal.SIGHUP)
            deadline = time.monotonic() + RELOAD_WITHIN_S
            while self.started_at_ns() in {0, before}:
                if time.monotonic() > deadline:
                    raise RequestRefused("sshd_away", "sshd was told to take a new certificate and did not come back")
                time.sleep(LOOK_EVERY_S)


class _Fields:
    def __init__(self, content: bytes) -> None:
        self._rest = content

    def number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def string(self) -> bytes:
        return self._take(self.number(4))

    def _take(self, size: int) -> bytes:
        if len(self._rest) < size:
            raise ValueError("it is cut")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken
