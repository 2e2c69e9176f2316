"""Rentals on a real worker, for the tests of playbooks and of a renter's confinement."""

from __future__ import annotations

import itertools
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker_support import Key, Played, Worker, make_key

_uids = itertools.count(100_000 + secrets.randbelow(10**9))
"""Uids that differ between runs: the kernel counts a uid's processes over all containers of a machine."""


@dataclass
class Rental:
    """A rental, its worker, and the key of its renter."""

    on: Worker
    key: Key
    rental_id: str
    uid: int
    epoch: int = 1

    @property
    def username(self) -> str:
        return f"r-{self.rental_id}"

    @property
    def variables(self) -> dict[str, Any]:
        return {
            "rental_id": self.rental_id,
            "username": self.username,
            "uid": self.uid,
            "epoch": self.epoch,
        }

    def create(self, **other: Any) -> Played:
        return self.on.playbook("create_user", **{**self.variables, "public_keys": [self.key.public], **other})

    def create_quickly(self) -> Rental:
        """Create and activate the rental with `orion-rental`, without a playbook."""
        status, report = self.on.rental("create", **self.variables, public_keys=[self.key.public])
        assert status == 0, report
        status, report = self.on.rental("unlock", rental_id=self.rental_id, epoch=self.epoch)
        assert status == 0, report
        return self

    def delete(self, **other: Any) -> Played:
        return self.on.playbook("delete_user", **{**self.variables, **other})

    def ssh(self, command: str, text: str = "", *options: str) -> subprocess.CompletedProcess[str]:
        return self.on.ssh(self.username, self.key, command, text, *options)

    def log_in(self, command: str) -> subprocess.Popen[bytes]:
        """Begin a session in which a command runs, and discard its output."""
        silence = subprocess.DEVNULL  # inherited, it would stay non-blocking: a killed ssh does not put that right
        arguments = [*self.on.ssh_command(self.username, self.key), command]
        return subprocess.Popen(arguments, stdin=silence, stdout=silence, stderr=silence)

    def python(self, program: str) -> str:
        """Return the output of a Python program of the renter."""
        done = self.ssh("python3 -", program)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def accepts(self, key: Key | None = None) -> bool:
        """Return whether the key opens a session of the renter."""
        done = self.on.ssh(self.username, key or self.key, "id -u")
        assert done.returncode == 0 or "Permission denied" in done.stderr, done.stderr
        return done.stdout.strip() == str(self.uid)

    def traces(self) -> str:
        """Return the residue that `find`, `ps`, IPC tables and account files show, without the worker's program."""
        script = f"""
            find / -path /proc -prune -o '(' -uid {self.uid} -o -gid {self.uid} ')' -print
            ps -eo pid,ruid,euid,args | grep -w {self.uid}
            grep -rlF {self.username} /etc /run /var
            cat /proc/sysvipc/* | grep -w {self.uid}
            ls -d /home/{self.username} /etc/orion/*/{self.username} /var/mail/{self.username}
        """
        return self.on.run("sh", "-c", f"({script}) 2>/dev/null | grep -v 'grep -w' || true").strip()


def new_rental(on: Worker, folder: Path) -> Rental:
    name = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz234567") for _ in range(10))
    return Rental(on, make_key(folder), name, next(_uids))


def placement(rental: Rental, want: str, epoch: int | None = None) -> dict[str, Any]:
    return {"rental_id": rental.rental_id, "epoch": epoch or rental.epoch, "want": want}
