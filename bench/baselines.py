"""The two ways of making an account without Orion-Sec: warm ssh and a stock playbook."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bench.stack import BenchStack

INSIDE = Path(__file__).with_name("inside_app.py")
ADD = """set -e
useradd --create-home --user-group --uid {uid} --shell /bin/bash {name}
umask 077
cat > /etc/orion/keys/{name}
chgrp {name} /etc/orion/keys/{name}
chmod 0640 /etc/orion/keys/{name}"""
REMOVE = "userdel --remove {name} 2>/dev/null; rm -f /etc/orion/keys/{name}"
FIRST_UID = 60_000
"""Below those of rentals: to the worker's own books these accounts are none of theirs."""
FIRST_STOCK_UID = 900_000_000
DEFAULTS = {
    "ANSIBLE_CONFIG": "/tmp/orion-bench-empty.cfg",  # noqa: S108 - in the container; inside_app.py makes it
    "ANSIBLE_LIBRARY": "/opt/orion/playbooks/library",
    "ANSIBLE_ACTION_PLUGINS": "/opt/orion/playbooks/action",
}
"""Ansible as it comes: without the pipelining and the named interpreter of playbooks/ansible.cfg."""

_numbers = itertools.count(1)
"""One count for all: what was purged on a worker does not come back there."""


class Baselines:
    """Orders to inside_app.py, one at a time."""

    def __init__(self, asking: IO[str], answers: IO[str], public_key: str) -> None:
        self._asking = asking
        self._answers = answers
        self._key = public_key

    def open(self, worker: Mapping[str, Any]) -> None:
        self._order(do="open", worker=_known(worker))

    def warm_ssh(self, worker: Mapping[str, Any]) -> float:
        """Seconds of useradd and key over the open connection; the account is removed outside the clock."""
        number = next(_numbers)
        names = {"name": f"bench{number}", "uid": FIRST_UID + number % 5000}
        done = self._order(do="warm_ssh", worker=_known(worker), script=ADD.format(**names), given=self._key + "\n")
        self._order(do="warm_ssh", worker=_known(worker), script=REMOVE.format(**names), given="")
        return float(done["seconds"])

    def stock_playbook(self, worker: Mapping[str, Any], settings: Mapping[str, str]) -> float:
        """Seconds of `ansible-playbook create_user.yml` from cold; its account is purged outside the clock.

        `settings`: of Ansible, on top of playbooks/ansible.cfg or (DEFAULTS) instead of it.
        """
        number = next(_numbers)
        rental = {"rental_id": f"bench{number:05d}", "username": f"r-bench{number:05d}", "epoch": 1}
        rental |= {"uid": FIRST_STOCK_UID + number}
        variables = rental | {"public_keys": [self._key]} | {"rentals": [rental | {"public_keys": [self._key]}]}
        asked = {"playbook": "create_user", "variables": variables, "settings": dict(settings)}
        done = self._order(do="playbook", worker=_known(worker), **asked)
        self._order(
            do="warm_ssh", worker=_known(worker), script="/usr/local/sbin/orion-rental purge", given=json.dumps(rental)
        )
        return float(done["seconds"])

    def module_alone(self, worker: Mapping[str, Any]) -> float:
        """Seconds of a warm ssh that runs the worker's own program for a rental that is not there: its start."""
        asked = json.dumps({"rental_id": "nobody0000", "epoch": 1})
        script = "/usr/local/sbin/orion-rental lock || test $? -eq 3"
        return float(self._order(do="warm_ssh", worker=_known(worker), script=script, given=asked)["seconds"])

    def session(self, command: Sequence[str], environment: Mapping[str, str], files: Mapping[str, str]) -> float:
        """Seconds of a command of a renter, run where a worker takes connections from. `files`: beside it, private."""
        done = self._order(do="session", command=list(command), environment=dict(environment), files=dict(files))
        return float(done["seconds"])

    def nothing(self, worker: Mapping[str, Any]) -> float:
        """Seconds of `true` over the open connection."""
        return float(self._order(do="warm_ssh", worker=_known(worker), script="true", given="")["seconds"])

    def _order(self, **order: Any) -> dict[str, Any]:
        self._asking.write(json.dumps(order) + "\n")
        self._asking.flush()
        line = self._answers.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"ok": False, "said": "the baseline's process ended"}
        if not answer["ok"]:
            raise RuntimeError(f"the baseline {order['do']} failed: {answer['said']}")
        return answer


@contextmanager
def baselines(stack: BenchStack, public_key: str) -> Iterator[Baselines]:
    command = ["docker", "exec", "-i", stack.container("manager_app"), "python", "-c", INSIDE.read_text()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdin and process.stdout:  # both are pipes
                yield Baselines(process.stdin, process.stdout, public_key)
        finally:
            process.kill()


def _known(worker: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": worker["id"], "address": worker["address"], "host_keys": worker["ssh_host_keys"]}
