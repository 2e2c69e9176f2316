"""Plays playbooks of DIRECTORY here, without SSH.

On stdin a list of (file, user names of the rentals, workers), on stdout the results of each play, by number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from orion.manager.ansible import playbook
from orion.manager.ansible.port import Action
from orion.manager.ansible.protocol import BatchMessage, BatchOrder, HostOrders, ResultMessage
from orion.manager.messages import HostMessage
from orion.rental_order import RentalOrder

OF_HERE = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}


def main(directory: Path) -> None:
    playbook.load(directory, directory)
    sys.stdout.write(json.dumps([play(directory / file, *rest) for file, *rest in json.load(sys.stdin)]))


def play(path: Path, usernames: list[str], workers: list[str]) -> list[dict[str, object]]:
    """Report each user name as a rental of the worker. The stub checks nothing: tests examine Ansible's output."""
    results: list[ResultMessage] = []
    numbers = iter(range(len(usernames) * len(workers)))
    hosts = tuple(
        HostOrders.model_construct(
            host=HostMessage.model_construct(worker_id=worker, address="127.0.0.1", port=22, host_keys=()),
            orders=tuple(
                BatchOrder.model_construct(number=next(numbers), order=of_user(name), refused_after=0)
                for name in usernames
            ),
        )
        for worker in workers
    )
    batch = BatchMessage.model_construct(action=Action.CREATE, hosts=hosts)
    playbook.play(path, batch, lambda _: OF_HERE, results.append)
    return [result.model_dump(mode="json") for result in sorted(results, key=lambda result: result.number)]


def of_user(username: str) -> RentalOrder:
    return RentalOrder(rental_id="any", epoch=1, username=username)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
