"""A renter with a home directory, a key, the command `orion`, and this machine's ssh."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stack import ROOT

from orion.cli.shell import SshRequest, ssh_arguments
from orion.client.sdk import Orion
from orion.wire import Rental

COMMAND = (sys.executable, "-m", "orion.cli")
Done = subprocess.CompletedProcess[str]


class Renter:
    def __init__(self, folder: Path, url: str, token: str) -> None:
        """Make a key, and log in with the command `orion`."""
        self.folder = folder
        self.token = token
        self.url = url
        self.key = make_key(folder / "id_ed25519")
        self.token_file = folder / "token"
        self.token_file.write_text(token)
        self.orion("login", url, "--token-file", str(self.token_file))

    @property
    def public_key(self) -> str:
        return self.key.with_suffix(".pub").read_text().strip()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT / "src"),
            "LANG": "C.UTF-8",
        }

    def orion(self, *arguments: str, status: int = 0, timeout_s: float = 120) -> Done:
        """Run `orion`, and assert that it ends with this status."""
        done = self._run([*COMMAND, *arguments], timeout_s)
        assert done.returncode == status, f"orion {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def orion_json(self, *arguments: str) -> Any:
        return json.loads(self.orion("--json", *arguments).stdout)

    def following(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `orion` in the background, with a pipe for its output."""
        return subprocess.Popen(
            [*COMMAND, *arguments], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ssh(self, rental: Rental, command: str, key: Path | None = None, **environment: str) -> Done:
        """Run a command in a rental by ssh, with the arguments of `orion ssh`. The rental may be an invented one."""
        return self._run(self.arguments(rental, command, key), 120, environment)

    def arguments(self, rental: Rental, command: str, key: Path | None = None) -> list[str]:
        return ssh_arguments(rental, self.authority, SshRequest(command=(command,), identity=key or self.key))

    @cached_property
    def authority(self) -> str:
        """The line of known_hosts by which ssh verifies workers."""
        with Orion.at(self.url, self.token) as orion:
            return orion.ssh_authority().known_hosts

    def receives(self, rental: Rental, command: str) -> str:
        """Return the SHA-256 of the output of a command in the rental."""
        arguments = self.arguments(rental, command)
        sent = subprocess.run(
            arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=120, check=True
        )
        return hashlib.sha256(sent.stdout).hexdigest()

    def inside(self, rental: Rental, command: str) -> str:
        """Return the output of a command in the rental, which must succeed."""
        done = self.ssh(rental, command)
        assert done.returncode == 0, f"{command!r} in {rental.name}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def can_log_in(self, rental: Rental) -> bool:
        return self.ssh(rental, "true").returncode == 0

    def at_a_terminal(self, arguments: Sequence[str], rows: int, columns: int, typed: str) -> tuple[int, str]:
        """Run `orion` in a terminal, type `typed` at the first prompt, and return its status and its screen."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = self.environment | {"TERM": "xterm"}
        child = subprocess.Popen(
            [*COMMAND, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        try:
            screen = _read_until(ours, b"$ ", 60)
            os.write(ours, typed.encode())
            screen += _read_until(ours, None, 60)
            return child.wait(timeout=60), screen.decode(errors="replace")
        finally:
            child.kill()
            child.wait()
            os.close(ours)

    def run(self, command: Sequence[str]) -> Done:
        """Run any command with this renter's home."""
        return self._run(command, 120)

    def _run(self, command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> Done:
        return subprocess.run(
            command,
            env=self.environment | dict(environment or {}),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def make_key(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "renter", "-f", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def _read_until(terminal: int, awaited: bytes | None, within_s: float) -> bytes:
    """Return the terminal's output until it contains `awaited`, or until its program ends if that is None."""
    seen, deadline = b"", time.monotonic() + within_s
    while awaited is None or awaited not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"not within {within_s} s: {awaited!r}, but {seen!r}"
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the terminal has no writer any more
            part = b""
        if not part:
            break
        seen += part
    return seen
