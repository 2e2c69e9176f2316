"""A real snapshot service, confined in the manager's image as shipped, for real workers in a network of the tests.

Its container uses the machine's network. The workers take the gateway of their network for the app's address.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rental_support import Rental
from test_manager_image import CAPABILITIES, build
from worker_support import Key, Worker, docker, takes_connections, wait_until

from orion.manager.snapshots.client import SnapshotClient
from orion.manager.snapshots.port import Home
from orion.manager.ssh.port import Host

FILES = 902
SOCKET = "vault.sock"


@dataclass(frozen=True)
class RealSnapshotService:
    """The container of a snapshot service, its volumes' folder and a client."""

    name: str
    folder: Path
    client: SnapshotClient

    @property
    def copies(self) -> Path:
        return self.folder / "copies"

    def copy_of(self, home: Home, generation: str) -> Path:
        return self.copies / home.rental_id / generation / "home"

    def running(self, uid: int) -> str:
        """Return the processes of a uid in the container, except zombies."""
        look = f"grep -l '^Uid:.*{uid}' /proc/[0-9]*/status | xargs -r grep -L '^State:.Z'; true"
        return docker("exec", self.name, "sh", "-c", look)


@contextmanager
def snapshot_service(folder: Path, key: Key) -> Iterator[RealSnapshotService]:
    place = folder / f"v{secrets.token_hex(3)}"
    for directory, owner, mode in (("", 0, 0o711), ("copies", 0, 0o711), ("run", 0, 0o711), ("run/ssh", FILES, 0o700)):
        (place / directory).mkdir(mode=mode)
        (place / directory).chmod(mode)
        os.chown(place / directory, owner, owner)
    shutil.copy(key.file, place / "run/ssh/id_ed25519")
    os.chown(place / "run/ssh/id_ed25519", FILES, FILES)
    (place / "run/ssh/id_ed25519").chmod(0o600)
    name = f"orion-snapshottest-{secrets.token_hex(3)}"
    docker(
        "run", "--detach", "--name", name, "--network", "host", "--read-only", "--init", "--cap-drop", "ALL",
        *(f"--cap-add={capability}" for capability in CAPABILITIES), "--security-opt", "no-new-privileges:true",
        "--volume", f"{place}/copies:/var/lib/orion/copies", "--volume", f"{place}/run:/run/orion-vault",
        "--entrypoint", "/opt/orion/venv/bin/python", build(), "-m", "orion.manager.snapshots.server",
    )  # fmt: skip
    try:
        wait_until(lambda: takes_connections(place / "run" / SOCKET), "the snapshot service listens")
        yield RealSnapshotService(name, place, SnapshotClient(place / "run" / SOCKET))
    finally:
        done = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=False)
        sys.stderr.write(done.stdout + done.stderr)
        docker("rm", "--force", "--volumes", name, check=False)


def host_of(worker: Worker) -> Host:
    return Host(worker_id=worker.worker_id, address=worker.address, host_keys=worker.host_keys)


def home_of(rental: Rental) -> Home:
    return Home(rental_id=rental.rental_id, uid=rental.uid, epoch=rental.epoch, host=host_of(rental.on))
