"""The program that runs the baselines in the manager's container: a worker accepts ssh from nowhere else.

It imports the standard library and orion.ssh_command alone, because it is given to the container's Python as an
argument. Each line of stdin is a request, each line of stdout its answer: {"seconds": ..., "ok": ..., "output": ...}.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orion.ssh_command import pinned_host_arguments

KEY = "/var/lib/orion/secrets/ssh_key"
PLACE = Path("/tmp/orion-bench")  # noqa: S108 - a tmpfs of this container alone
INVENTORY = PLACE / "inventory.json"
LONGEST_SESSION_S = 240.0
"""Seconds: enough for 1 GB on a busy machine too."""
_runs = 0


def open_connection(worker: dict[str, Any]) -> dict[str, Any]:
    """Open a master connection to a worker, which stays open as long as the container runs."""
    PLACE.mkdir(mode=0o700, exist_ok=True)
    return timed([*_ssh(worker, "-M", "-N", "-f", "-o", "ControlPersist=yes"), _target(worker)])


def warm_ssh(worker: dict[str, Any], script: str, stdin: str) -> dict[str, Any]:
    """Run a shell script on the worker over the open connection, with `stdin` as its standard input."""
    return timed([*_ssh(worker), _target(worker), script], stdin)


def stock_playbook(
    worker: dict[str, Any], playbook: str, variables: dict[str, Any], settings: dict[str, str]
) -> dict[str, Any]:
    """Run `ansible-playbook` from cold, with its own process and connection. `settings`: more of its environment."""
    global _runs  # noqa: PLW0603 - one number for one process
    _runs += 1
    host = {
        "ansible_host": worker["address"],
        "ansible_user": "root",
        "ansible_ssh_private_key_file": KEY,
        "ansible_ssh_common_args": shlex.join(pinned_host_arguments(worker["id"], worker["host_keys"])),
    }
    Path("/tmp/orion-bench-empty.cfg").touch()  # noqa: S108 - for baselines.DEFAULTS: Ansible refuses /dev/null
    INVENTORY.write_text(json.dumps({"workers": {"hosts": {worker["id"]: host}}}))
    control = PLACE / f"cold-{_runs}"
    command = ["ansible-playbook", "-i", str(INVENTORY), f"/opt/orion/playbooks/{playbook}.yml"]
    environment = {"ANSIBLE_SSH_CONTROL_PATH_DIR": str(control)} | settings
    assignments = [f"{name}={value}" for name, value in environment.items()]
    return timed(["env", *assignments, *command, "-e", json.dumps(variables)])


def session(command: list[str], environment: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    """Run a command as on a renter's machine, with its files in PLACE. Each way of connecting pays the same for it."""
    for name, content in files.items():
        file = PLACE / name
        file.touch(mode=0o600)
        file.write_text(content)
    assignments = [f"{name}={value}" for name, value in environment.items()]
    return timed(["env", *assignments, *command], timeout_s=LONGEST_SESSION_S)


def timed(command: list[str], stdin: str = "", timeout_s: float = 60) -> dict[str, Any]:
    """Run a command and time it. Its output goes to a file, because a connection that stays open would hold a pipe."""
    with (PLACE / "output").open("w+") as output:
        began = time.perf_counter()
        done = subprocess.run(
            command, input=stdin, stdout=output, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
        )
        seconds = time.perf_counter() - began
        output.seek(0)
        return {"seconds": seconds, "ok": done.returncode == 0, "output": output.read()[-2000:]}


def _ssh(worker: dict[str, Any], *more: str) -> list[str]:
    own = ["-i", KEY, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-S", str(PLACE / f"{worker['id']}.sock")]
    return ["ssh", "-F", "none", *own, *pinned_host_arguments(worker["id"], worker["host_keys"]), *more]


def _target(worker: dict[str, Any]) -> str:
    return f"root@{worker['address']}"


def main() -> None:
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "open": open_connection,
        "warm_ssh": warm_ssh,
        "playbook": stock_playbook,
        "session": session,
    }
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(actions[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    main()
