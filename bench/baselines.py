"""The two baselines, which make an account without Orion-Sec: warm ssh and a stock playbook."""

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
"""Below the uids of rentals, so the worker does not count these accounts as rentals."""
FIRST_STOCK_UID = 900_000_000
DEFAULTS = {
    "ANSIBLE_CONFIG": "/tmp/orion-bench-empty.cfg",  # noqa: S108 - in the container; inside_app.py makes it
    "ANSIBLE_LIBRARY": "/opt/orion/playbooks/library",
    "ANSIBLE_ACTION_PLUGINS": "/opt/orion/playbooks/action",
}
"""The settings of Ansible as it is installed: no pipelining, no named interpreter of playbooks/ansible.cfg."""

_numbers = itertools.count(1)
"""One count for all accounts: a worker refuses a rental that was purged there."""


class Baselines:
    """Sends requests to inside_app.py, one at a time."""

    def __init__(self, requests: IO[str], answers: IO[str], public_key: str) -> None:
        self._requests = requests
        self._answers = answers
        self._key = public_key

    def open(self, worker: Mapping[str, Any]) -> None:
        self._request(do="open", worker=_host(worker))

    def warm_ssh(self, worker: Mapping[str, Any]) -> float:
        """Return the seconds of useradd and key over the open connection. The removal of the account is not timed."""
        number = next(_numbers)
        names = {"name": f"bench{number}", "uid": FIRST_UID + number % 5000}
        done = self._request(do="warm_ssh", worker=_host(worker), script=ADD.format(**names), stdin=self._key + "\n")
        self._request(do="warm_ssh", worker=_host(worker), script=REMOVE.format(**names), stdin="")
        return float(done["seconds"])

    def stock_playbook(self, worker: Mapping[str, Any], settings: Mapping[str, str]) -> float:
        """Return the seconds of a cold `ansible-playbook create_user.yml`. The purge of the account is not timed.

        `settings`: Ansible's, in addition to playbooks/ansible.cfg, or (DEFAULTS) instead of it.
        """
        number = next(_numbers)
        rental = {"rental_id": f"bench{number:05d}", "username": f"r-bench{number:05d}", "epoch": 1}
        rental |= {"uid": FIRST_STOCK_UID + number}
        variables = rental | {"public_keys": [self._key]} | {"rentals": [rental | {"public_keys": [self._key]}]}
        request = {"playbook": "create_user", "variables": variables, "settings": dict(settings)}
        done = self._request(do="playbook", worker=_host(worker), **request)
        self._request(
            do="warm_ssh", worker=_host(worker), script="/usr/local/sbin/orion-rental purge", stdin=json.dumps(rental)
        )
        return float(done["seconds"])

    def module_alone(self, worker: Mapping[str, Any]) -> float:
        """Return the seconds of a warm ssh that starts `orion-rental` for a rental that does not exist."""
        request = json.dumps({"rental_id": "nobody0000", "epoch": 1})
        script = "/usr/local/sbin/orion-rental lock || test $? -eq 3"
        return float(self._request(do="warm_ssh", worker=_host(worker), script=script, stdin=request)["seconds"])

    def session(self, command: Sequence[str], environment: Mapping[str, str], files: Mapping[str, str]) -> float:
        """Return the seconds of a renter's command, run in the manager's container. `files`: its private files."""
        done = self._request(do="session", command=list(command), environment=dict(environment), files=dict(files))
        return float(done["seconds"])

    def nothing(self, worker: Mapping[str, Any]) -> float:
        """Return the seconds of `true` over the open connection."""
        return float(self._request(do="warm_ssh", worker=_host(worker), script="true", stdin="")["seconds"])

    def _request(self, **request: Any) -> dict[str, Any]:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"ok": False, "output": "the baseline's process ended"}
        if not answer["ok"]:
            raise RuntimeError(f"the baseline {request['do']} failed: {answer['output']}")
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


def _host(worker: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": worker["id"], "address": worker["address"], "host_keys": worker["ssh_host_keys"]}
