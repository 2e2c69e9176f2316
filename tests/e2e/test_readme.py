"""The commands of the README and of docs/usage.md, as they are written there, against the platform.

Only parts that depend on the place are replaced: the address, names that the reader fills in, and Compose (any version,
and no terminal). Output of commands that run until Ctrl-C is read until the rental has migrated.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import Rent
from renter import Renter
from stack import Stack
from support.readme import GUIDE, ROOT, commands, shell_blocks

from orion.client.sdk import Orion
from orion.wire import RentalState

WITHIN_S = 240

BEFORE = r"""
set -euo pipefail
until_moved() {
    rental=$(orion --json show lab | jq -r .id)
    grep --max-count=1 --extended-regexp "rental\.activated.*$rental.*epoch.{1,2}2\b" < <(exec 2>/dev/null; "$@")
}
"""
FOLLOWING = ("orion events -f", "ask -N ")


@pytest.fixture
def home(tmp_path: Path, renter: Renter) -> Path:
    """Return the home of a user with a key, the command `orion`, and a login."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_ed25519.pub").write_text(renter.public_key)
    (tmp_path / ".config").symlink_to(renter.folder / ".config")
    command = tmp_path / "bin/orion"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m orion.cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / ".ssh/config").touch()
    # ssh reads its configuration from the home in the system's list of accounts, whatever HOME is; so does scp.
    for name in ("ssh", "scp"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {shutil.which(name)} -F "$HOME/.ssh/config" "$@"\n')
        program.chmod(0o755)
    return tmp_path


class ReadmeReader:
    """Runs the commands of a block of these pages in the repository's folder."""

    def __init__(self, stack: Stack, home: Path) -> None:
        self._stack = stack
        self._home = home

    def types(self, block_with: str, **filled_in: str) -> list[str]:
        """Run the one block that contains this text, whose commands must succeed, and return the printed lines."""
        (block,) = (block for block in shell_blocks(*GUIDE) if block_with in block)
        script = BEFORE + "\n".join(self._here(command, filled_in) for command in commands(block))
        how = {"cwd": ROOT, "env": self._environment(), "stdin": subprocess.DEVNULL, "start_new_session": True}
        with subprocess.Popen(["bash", "-c", script], stdout=PIPE, stderr=PIPE, text=True, **how) as shell:
            try:
                printed, complaints = shell.communicate(timeout=WITHIN_S)
            finally:
                with suppress(ProcessLookupError):  # a command such as logs -f would not end by itself
                    os.killpg(shell.pid, signal.SIGKILL)
        assert shell.returncode == 0, f"{script}\nended with {shell.returncode}:\n{printed}\n{complaints}"
        return printed.splitlines()

    def _here(self, command: str, filled_in: Mapping[str, str]) -> str:
        if command == "make up":
            return ":"  # the platform runs already
        for there, here in {
            "http://localhost:8080": self._stack.url,
            "https://localhost:8443": f"https://localhost:{self._stack.https_port}",
            "172.20.0.3": self._stack.app_address,
            **filled_in,
        }.items():
            command = command.replace(there, here)
        return f"until_moved {command}" if command.startswith(FOLLOWING) else command

    def _environment(self) -> dict[str, str]:
        ours = {
            name: value for name, value in self._stack.environment().items() if name.startswith(("ORION_", "COMPOSE_"))
        }
        path = f"{self._home / 'bin'}:{os.environ['PATH']}"
        return ours | {"PATH": path, "HOME": str(self._home), "PYTHONPATH": str(ROOT / "src"), "LANG": "C.UTF-8"}


@pytest.fixture
def reader(stack: Stack, home: Path) -> ReadmeReader:
    return ReadmeReader(stack, home)


@pytest.mark.parametrize("block", ["orion rent --name lab", "$API/rent "], ids=["orion", "curl"])
def test_the_full_flow_of_the_readme_works(stack: Stack, orion: Orion, reader: ReadmeReader, block: str) -> None:
    mark, machines = stack.mark(), {one.hostname for one in stack.containers("worker")}
    stack.await_no_brake()
    printed = reader.types(block)
    rented = max(orion.rentals(name="lab", ended=True), key=lambda one: one.created_at)
    activated = [event for event in stack.events(mark, rented.id) if event.kind == "rental.activated"]
    epochs = 3 if "orion" in block else 2  # one for the takeover, one for the planned migration
    assert (rented.state, rented.epoch) == (RentalState.RELEASED, epochs)
    assert len(activated) == epochs
    assert len({event.worker_id for event in activated}) >= 2
    first, *others = [line for line in printed if line in machines]
    assert others, "the machine that was killed and started again was shown"
    if "orion" in block:
        killed, after_takeover, started, after_migration = others
        assert killed == started == first != after_takeover != after_migration


def test_the_tools_of_the_readme_work(stack: Stack, orion: Orion, reader: ReadmeReader, home: Path) -> None:
    machines = {one.hostname for one in stack.containers("worker")}
    printed = reader.types("orion config-ssh")
    assert len([line for line in printed if line in machines]) == 2
    (rented,) = orion.rentals(name="desk", ended=True)
    assert rented.state is RentalState.RELEASED
    assert (home / ".ssh/config").read_bytes() == b""


def test_the_web_port_of_the_readme_works(stack: Stack, reader: ReadmeReader) -> None:
    printed = reader.types("orion open site")
    [opening] = [line for line in printed if "/.orion/open/#" in line]
    [public] = [line for line in printed if line.startswith("Anybody may open http")]
    [listed] = [line for line in printed if line.startswith("8000 ")]
    host = public.rpartition("//")[2].rstrip("/")
    assert host.startswith("8000-")
    assert host.endswith(f".localhost:{stack.http_port}")
    assert host in opening
    assert host in listed


def test_the_playbooks_of_the_readme_work(rent: Rent, renter: Renter, reader: ReadmeReader) -> None:
    rental = rent("by-hand")
    uid = renter.inside(rental, "id -u")
    printed = reader.types(
        "ansible-playbook",
        **{
            "w-abcd2345": str(rental.worker_id),
            "byhand2345": rental.id,
            "199999": uid,
            "ssh-ed25519 AAAA...": " ".join(renter.public_key.split()[:2]),
        },
    )
    recaps = [line for line in printed if line.startswith(str(rental.worker_id)) and "failed=0" in line]
    assert len(recaps) == 2
    assert not renter.can_log_in(rental)


def test_a_connection_that_bypasses_the_proxy_is_refused_as_the_readme_says(reader: ReadmeReader) -> None:
    printed = reader.types("echo refused")  # between them curl's complaint, where Compose passes it on as output
    assert [printed[0], printed[-1]] == ['{"status":"ok"} through the proxy', "refused"]


def test_the_log_in_by_https_of_the_readme_works(stack: Stack, home: Path, reader: ReadmeReader) -> None:
    (home / ".config").unlink()  # the login of another test must not be changed
    printed = reader.types("--ca-file")
    account = json.loads((home / ".config/orion/config.json").read_text())
    assert account["url"] == f"https://localhost:{stack.https_port}"
    assert Path(account["ca_file"]).read_text().startswith("-----BEGIN CERTIFICATE-----")
    assert any(line.startswith("version ") for line in printed)
