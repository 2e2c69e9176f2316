"""Tests of Ansible with values that attackers chose, and of the messages of its failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_contract import KEY, OTHER_KEY

from orion.manager.ansible.playbook import host_variables
from orion.manager.ssh.options import MAX_MESSAGE, worker_ssh
from orion.manager.ssh.port import Host

TEMPLATE = "{{ 6 * 7 }}"
PLAYBOOK = """
- name: As the real ones, with a module that says what it was given
  hosts: "{{ target | default('workers') }}"
  gather_facts: false
  tasks:
    - name: A value from a user
      say:
        rentals: "{{ rentals }}"
      register: said
    - name: A value from a worker
      say:
        rentals: "{{ said.rentals }}"
"""
MODULE = """
from ansible.module_utils.basic import AnsibleModule

module = AnsibleModule({"rentals": {"type": "list", "elements": "dict"}})
reports = []
for rental in module.params["rentals"]:
    value = rental.get("username", rental.get("value"))
    if value == "crash":
        raise RuntimeError("a fault in the module")
    report = {"changed": value == "change", "value": value, "by_worker": rental.get("by_worker", "{{ 6 * 7 }}")}
    if value == "fail":
        report = {"changed": False, "error": "first\\x1b[2Jsecond\\nthird " + "x" * 1000, "code": "because"}
    reports.append(report)
failed = [report["error"] for report in reports if "error" in report]
module.exit_json(rentals=reports, failed=bool(failed), msg=(failed or ["well"])[0])
"""
FILES = {
    "create_user.yml": PLAYBOOK,
    "undefined.yml": PLAYBOOK.replace('rentals: "{{ rentals }}"', 'rentals: "{{ nobody_said }}"'),
    "nowhere.yml": PLAYBOOK.replace("workers", "nobody"),
    "broken.yml": "- this: is no play\n",
    "half.yml": PLAYBOOK + "    - name: It ends here\n      fail: {msg: enough}\n",
}
PLAYS = {
    "good": ("create_user.yml", [TEMPLATE, "change"], ["w-one", "w-two"]),
    "some fail": ("create_user.yml", ["fail", "change"], ["w-one"]),
    "crash": ("create_user.yml", ["crash", "change"], ["w-one", "w-two"]),
    "undefined": ("undefined.yml", ["change"], ["w-one"]),
    "nowhere": ("nowhere.yml", ["change"], ["w-one"]),
    "broken": ("broken.yml", ["change"], ["w-one"]),
    "half": ("half.yml", ["change"], ["w-one"]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each play, in one process, because loading Ansible takes a while."""
    directory = tmp_path_factory.mktemp("playbooks")
    (directory / "library").mkdir()
    (directory / "library" / "say.py").write_text(MODULE)
    (directory / "ansible.cfg").write_text("[defaults]\n")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    stub = Path(__file__).with_name("playbook_stub.py")
    done = subprocess.run(
        [sys.executable, stub, directory],
        input=json.dumps(list(PLAYS.values())),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    last_line = done.stdout.splitlines()[-1]  # Ansible prints before it
    return dict(zip(PLAYS, json.loads(last_line), strict=True))


Results = dict[str, list[dict[str, Any]]]


def test_a_template_in_a_user_s_value_is_not_evaluated(results: Results) -> None:
    assert [results["good"][number]["report"]["value"] for number in (0, 2)] == [TEMPLATE] * 2


def test_a_template_in_a_worker_s_value_is_not_evaluated(results: Results) -> None:
    assert [result["report"]["by_worker"] for result in results["good"]] == [TEMPLATE] * 4


def test_each_order_has_only_the_report_of_its_own_rental(results: Results) -> None:
    assert [result["ok"] for result in results["good"]] == [True] * 4
    for result in (results["good"][1], results["good"][3]):
        assert result["report"] == {"changed": True, "value": "change", "by_worker": TEMPLATE}


def test_a_failure_is_reported_in_one_short_line_without_control_characters(results: Results) -> None:
    """Check also that the failure of one rental is not reported for another."""
    failed, done = results["some fail"]
    assert not failed["ok"]
    assert failed["report"] == {"changed": False, "code": "because"}
    assert failed["message"].startswith("first [2Jsecond third xxx"), "the message has no control character"
    assert len(failed["message"]) == MAX_MESSAGE
    assert done["ok"]


def test_a_broken_task_is_a_failure_for_all_its_rentals(results: Results) -> None:
    assert [result["ok"] for result in results["crash"]] == [False] * 4
    assert "a fault in the module" in results["crash"][1]["message"]


def test_a_later_task_that_fails_is_a_failure(results: Results) -> None:
    assert (results["half"][0]["ok"], results["half"][0]["message"]) == (False, "enough")


@pytest.mark.parametrize(("play", "message"), [("undefined", "nobody_said"), ("broken", "Ansible: ")])
def test_a_playbook_that_cannot_run_is_a_failure(results: Results, play: str, message: str) -> None:
    assert not results[play][0]["ok"]
    assert message in results[play][0]["message"]


def test_a_play_without_a_matching_worker_is_a_failure(results: Results) -> None:
    assert (results["nowhere"][0]["ok"], results["nowhere"][0]["message"]) == (
        False,
        "the playbook did nothing on the worker",
    )


def test_a_worker_with_another_host_key_or_address_has_another_kept_connection() -> None:
    hosts = [
        Host(worker_id="w-abcdefgh", address="192.0.2.7", host_keys=(KEY,)),
        Host(worker_id="w-abcdefgh", address="192.0.2.8", host_keys=(KEY,)),
        Host(worker_id="w-abcdefgh", address="192.0.2.7", host_keys=(OTHER_KEY,)),
        Host(worker_id="w-bcdefghi", address="192.0.2.7", host_keys=(KEY,)),
    ]
    paths = {next(a for a in worker_ssh(h, Path("/run/orion/engine"), ()) if "ControlPath" in a) for h in hosts}
    assert len(paths) == len(hosts)
    assert all(
        len(path) < 108 - 17 for path in paths
    )  # the limit of a socket's path, less the suffix that ssh appends at first


def test_host_key_checking_is_never_off() -> None:
    host = Host(worker_id="w-abcdefgh", address="192.0.2.7", host_keys=(KEY,))
    variables = host_variables(host, Path("/run/orion/engine"))
    assert variables["ansible_host_key_checking"] is True
    for arguments in (variables["ansible_ssh_common_args"], " ".join(worker_ssh(host, Path("/run/orion/engine"), ()))):
        assert "StrictHostKeyChecking=yes" in arguments
        assert KEY.split()[1] in arguments
