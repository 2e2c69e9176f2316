"""The orders that name the worker's boot, and the workers that get such orders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_contract import KEY, deletion, new_job
from orion_worker.agent.node import AGENT_VERSION
from orion_worker.rental.cli import order_from
from support.builders import new_worker

from orion.manager.ansible.port import OF_ONE_BOOT, Action, Job
from orion.manager.ansible.protocol import job_message
from orion.manager.ssh.port import Host

PLAYBOOKS = Path(__file__).parents[2] / "playbooks"
HOST = Host(worker_id="w-abcdefgh", address="192.0.2.7", host_keys=(KEY,), boot_id="boot-0002")


def ordered(job: Job) -> dict[str, Any]:
    """Return the order that playbook.py and the task orion_rental make of the engine's line."""
    return dict(job_message("1", job).model_dump(mode="json")["order"])


@pytest.mark.parametrize("version", [AGENT_VERSION, "0.1.0+boot", "1.0+more.boot"])
def test_a_worker_that_supports_boot_ids_gets_orders_with_one(version: str) -> None:
    assert new_worker(boot_id="boot-0002", agent_version=version).ordered_boot_id == "boot-0002"


@pytest.mark.parametrize("version", ["", "0.1.0", "0.1.0-boot", "boot", "0.1.0+boots"])
def test_a_worker_of_a_former_version_gets_no_field_that_it_would_refuse(version: str) -> None:
    life = new_worker(boot_id="boot-0002", agent_version=version).ordered_boot_id
    assert life == ""
    assert "boot_id" not in ordered(new_job(replace(HOST, boot_id=life)))


@pytest.mark.parametrize("action", list(Action))
def test_orders_that_depend_on_running_processes_name_a_boot(action: Action) -> None:
    order = ordered(replace(new_job(HOST), action=action))
    assert order.get("boot_id", "") == ("boot-0002" if action in OF_ONE_BOOT else "")


def test_the_worker_understands_orders_with_and_without_a_boot_id() -> None:
    assert order_from("create", ordered(new_job(HOST))).boot_id == "boot-0002"
    assert order_from("purge", ordered(deletion(new_job(HOST)))).boot_id == ""
