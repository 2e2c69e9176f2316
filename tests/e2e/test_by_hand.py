"""Operations by hand, as in the README: Ansible in the manager's container, and plain curl."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from conftest import Rent
from renter import Renter, make_key
from stack import Stack

from orion.client.sdk import Orion
from orion.wire import Rental

PLAYBOOK_S = 120


class Ansible:
    """Runs `ansible-playbook -i orion-inventory` in the manager's container."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._manager = stack.container("manager_app").id

    def play(self, playbook: str, worker_id: str, **variables: Any) -> dict[str, int]:
        """Run a playbook, which must succeed, and return the figures of its recap for the worker."""
        command = ["ansible-playbook", "-i", "orion-inventory", playbook, "--limit", worker_id]
        played = self._stack.exec(self._manager, *command, "-e", json.dumps(variables), timeout_s=PLAYBOOK_S)
        assert played.returncode == 0, played.stdout + played.stderr
        recap = re.search(rf"^{worker_id}\s*:(.*)$", played.stdout, re.MULTILINE)
        assert recap, f"the play reached no worker: {played.stdout}"
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", recap[1])}


def test_the_playbooks_run_by_hand_and_are_idempotent(stack: Stack, rent: Rent, renter: Renter, tmp_path: Path) -> None:
    rental, ansible = rent("by-hand"), Ansible(stack)
    worker = stack.container_of(rental.worker_id)
    uid = int(renter.inside(rental, "id -u"))
    account = {"rental_id": rental.id, "username": rental.username, "uid": uid, "epoch": rental.epoch}
    second_key = make_key(tmp_path / "second")
    keys = [renter.public_key, second_key.with_suffix(".pub").read_text().strip()]
    assert renter.ssh(rental, "true", second_key).returncode == 255

    created = ansible.play("create_user.yml", str(rental.worker_id), **account, public_keys=_bare(keys))
    assert (created["changed"], created["failed"]) == (1, 0)
    assert renter.ssh(rental, "true", second_key).returncode == 0
    again = ansible.play("create_user.yml", str(rental.worker_id), **account, public_keys=_bare(keys))
    assert (again["changed"], again["failed"]) == (0, 0)

    deleted = ansible.play("delete_user.yml", str(rental.worker_id), **account)
    assert (deleted["changed"], deleted["failed"]) == (1, 0)
    assert stack.exec(worker.id, "getent", "passwd", rental.username).returncode == 2
    again = ansible.play("delete_user.yml", str(rental.worker_id), **account)
    assert (again["changed"], again["failed"]) == (0, 0)


def test_a_worker_with_an_unknown_account_gets_no_placements_until_that_is_removed(
    stack: Stack, orion: Orion, renter: Renter
) -> None:
    worker = next(one for one in orion.workers() if one.slots_free)
    mark, container = stack.mark(), stack.container_of(worker.id)
    stray = {"rental_id": "stray23456", "username": "r-stray23456", "uid": 199_999, "epoch": 1}
    made = stack.exec(
        container.id, "orion-rental", "create", stdin=json.dumps(stray | {"public_keys": _bare([renter.public_key])})
    )
    assert made.returncode == 0, made.stdout
    stack.await_kind(mark, "worker.holds_unknown", 60, worker.id)
    stack.await_kind(mark, "worker.became_quarantined", 60, worker.id)
    assert "(stray23456)" in orion.worker(worker.id).explanation
    assert stack.exec(container.id, "getent", "passwd", "r-stray23456").returncode == 0, "it may be all that is left"

    mark = stack.mark()
    purged = stack.exec(container.id, "orion-rental", "purge", stdin=json.dumps(stray))
    assert purged.returncode == 0, purged.stdout
    stack.await_kind(mark, "worker.became_ready", 60, worker.id)


def test_the_inventory_pins_the_host_key_of_every_worker(stack: Stack, orion: Orion, renter: Renter) -> None:
    inside = stack.exec(stack.container("manager_app").id, "orion", "inventory")
    inventory = json.loads(inside.stdout)
    assert inventory == renter.orion_json("inventory")
    workers = {worker.id: worker for worker in orion.workers()}
    assert inventory["workers"]["hosts"] == sorted(workers)
    for worker_id, variables in inventory["_meta"]["hostvars"].items():
        assert variables["ansible_host"] == workers[worker_id].address
        assert "StrictHostKeyChecking=yes" in variables["ansible_ssh_common_args"]
        assert workers[worker_id].ssh_host_keys[0].split()[1] in variables["ansible_ssh_common_args"]


def test_the_orion_command_in_the_manager_s_container_needs_no_login(stack: Stack, rent: Rent) -> None:
    rental: Rental = rent()
    manager = stack.container("manager_app").id
    listed = stack.exec(manager, "orion", "ls", "--json")
    assert rental.id in {one["id"] for one in json.loads(listed.stdout)}


def _bare(keys: list[str]) -> list[str]:
    """Return the keys without their comments."""
    return [" ".join(key.split()[:2]) for key in keys]
