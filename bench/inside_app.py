"""The baselines, run where the manager is: the only place from which a worker lets ssh in.

Standard library and orion.ssh_command alone; it goes into the app's container as an argument of its Python. Each line
of stdin is an order, each line of stdout its answer: {"seconds": ..., "ok": ..., "said": ...}.
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
"""1 GB, also where the machine is not ours alone."""
_runs = 0


def open_connection(worker: dict[str, Any]) -> dict[str, Any]:
    """One master connection to a worker, kept as long as the container runs."""
    PLACE.mkdir(mode=0o700, exist_ok=True)
    return timed([*_ssh(worker, "-M", "-N", "-f", "-o", "ControlPersist=yes"), _target(worker)])


def warm_ssh(worker: dict[str, Any], script: str, given: str) -> dict[str, Any]:
    """A shell script on the worker over the kept connection, with `given` on its standard input."""
    return timed([*_ssh(worker), _target(worker), script], given)


def stock_playbook(
    worker: dict[str, Any], playbook: str, variables: dict[str, Any], settings: dict[str, str]
) -> dict[str, Any]:
    """`ansible-playbook` from cold: a process and a connection of its own. `settings`: more of its environment."""
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
    told = [f"{name}={value}" for name, value in environment.items()]
    return timed(["env", *told, *command, "-e", json.dumps(variables)])


def session(command: list[str], environment: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    """A command of a renter's machine, with files of its own in PLACE: here it costs the same either way."""
    for name, content in files.items():
        file = PLACE / name
        file.touch(mode=0o600)
        file.write_text(content)
    told = [f"{name}={value}" for name, value in environment.items()]
    return timed(["env", *told, *command], timeout_s=LONGEST_SESSION_S)


def timed(command: list[str], given: str = "", timeout_s: float = 60) -> dict[str, Any]:
    """Output goes to a file: a connection that is kept would hold a pipe open."""
    with (PLACE / "said").open("w+") as said:
        began = time.perf_counter()
        done = subprocess.run(
            command, input=given, stdout=said, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
        )
        seconds = time.perf_counter() - began
        said.seek(0)
        return {"seconds": seconds, "ok": done.returncode == 0, "said": said.read()[-2000:]}


def _ssh(worker: dict[str, Any], *more: str) -> list[str]:
    own = ["-i", KEY, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-S", str(PLACE / f"{worker['id']}.sock")]
    return ["ssh", "-F", "none", *own, *pinned_host_arguments(worker["id"], worker["host_keys"]), *more]


def _target(worker: dict[str, Any]) -> str:
    return f"root@{worker['address']}"


def main() -> None:
    orders: dict[str, Callable[..., dict[str, Any]]] = {
        "open": open_connection,
        "warm_ssh": warm_ssh,
        "playbook": stock_playbook,
        "session": session,
    }
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(orders[order.pop("do")](**order)), flush=True)


if __name__ == "__main__":
    main()
