"""What Ansible makes of values that strangers chose, and what a person reads when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_contract import KEY, OTHER_KEY

from orion.manager.engine.playbook import MAX_MESSAGE, host_variables
from orion.manager.engine.port import Host

TEMPLATE = "{{ 6 * 7 }}"
PLAYBOOK = """
- name: As the real ones, with a module that says what it was given
  hosts: "{{ target | default('workers') }}"
  gather_facts: false
  tasks:
    - name: A value from a user
      say:
        value: "{{ username }}"
      register: said
    - name: A value from a worker
      say:
        value: "{{ said.value }}"
        by_worker: "{{ said.by_worker }}"
"""
MODULE = """
from ansible.module_utils.basic import AnsibleModule

module = AnsibleModule({"value": {"type": "str"}, "by_worker": {"type": "str", "default": "{{ 6 * 7 }}"}})
if module.params["value"] == "fail":
    module.fail_json(msg="first\\x1b[2Jsecond\\nthird " + "x" * 1000, code="because")
module.exit_json(changed=module.params["value"] == "change", **module.params)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a play for each of these user names, in one process, because loading Ansible takes a while."""
    directory = tmp_path_factory.mktemp("playbooks")
    (directory / "library").mkdir()
    (directory / "library" / "say.py").write_text(MODULE)
    (directory / "ansible.cfg").write_text("[defaults]\n")
    (directory / "create_user.yml").write_text(PLAYBOOK)
    names = [TEMPLATE, "fail", "change"]
    variables: list[dict[str, str]] = [*({"username": name} for name in names), {}, {"username": "x", "target": "no"}]
    stub = Path(__file__).with_name("playbook_stub.py")
    done = subprocess.run(
        [sys.executable, stub, directory],
        input=json.dumps(variables),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip([*names, "undefined", "no host"], json.loads(done.stdout), strict=True))


def test_a_template_in_a_value_of_a_user_is_not_evaluated(outcomes: dict[str, Any]) -> None:
    assert outcomes[TEMPLATE]["report"]["value"] == TEMPLATE


def test_a_template_in_a_value_of_a_worker_is_not_evaluated(outcomes: dict[str, Any]) -> None:
    assert outcomes[TEMPLATE]["report"]["by_worker"] == TEMPLATE


def test_a_report_is_what_the_module_said_and_nothing_of_ansible(outcomes: dict[str, Any]) -> None:
    assert outcomes["change"]["report"] == {"changed": True, "value": "change", "by_worker": TEMPLATE}


def test_a_failure_is_one_short_line_that_cannot_move_a_cursor(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["fail"]
    assert not outcome["ok"]
    assert outcome["report"] == {"changed": False, "code": "because"}
    assert outcome["message"].startswith("first [2Jsecond third xxx")
    assert len(outcome["message"]) == MAX_MESSAGE


def test_a_playbook_that_cannot_run_is_a_failure(outcomes: dict[str, Any]) -> None:
    assert not outcomes["undefined"]["ok"]
    assert "username" in outcomes["undefined"]["message"]


def test_a_play_that_meets_no_worker_is_a_failure(outcomes: dict[str, Any]) -> None:
    assert (outcomes["no host"]["ok"], outcomes["no host"]["message"]) == (
        False,
        "the playbook did nothing on the worker",
    )


def test_a_worker_with_another_host_key_or_address_has_another_kept_connection() -> None:
    hosts = [
        Host("w-abcdefgh", "192.0.2.7", (KEY,)),
        Host("w-abcdefgh", "192.0.2.8", (KEY,)),
        Host("w-abcdefgh", "192.0.2.7", (OTHER_KEY,)),
        Host("w-bcdefghi", "192.0.2.7", (KEY,)),
    ]
    paths = {host_variables(host, Path("/run/orion/engine"))["ansible_control_path"] for host in hosts}
    assert len(paths) == len(hosts)
    assert all(len(path) < 108 - 17 for path in paths)  # a socket's path, and what ssh appends while it makes one


def test_host_key_checking_is_never_off() -> None:
    variables = host_variables(Host("w-abcdefgh", "192.0.2.7", (KEY,)), Path("/run/orion/engine"))
    assert variables["ansible_host_key_checking"] is True
    assert "StrictHostKeyChecking=yes" in variables["ansible_ssh_common_args"]
    assert KEY.split()[1] in variables["ansible_ssh_common_args"]
