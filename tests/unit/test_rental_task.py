"""The task orion_rental makes a report of a worker's answer, also where a hostile root wrote the answer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail


@pytest.fixture(scope="module")
def task() -> ModuleType:
    file = Path(__file__).parents[2] / "playbooks/action/orion_rental.py"
    spec = importlib.util.spec_from_file_location("orion_rental_task", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(*reports: Any, **besides: Any) -> bytes:
    return json.dumps({"rentals": reports, **besides}).encode()


def test_a_report_is_the_result_and_for_a_single_rental_its_message_too(task: ModuleType) -> None:
    report = {"changed": True, "epoch": 3, "state": "running"}
    assert task.result_of(said(report), b"", 0, 1) == {**report, "rentals": [report]}
    assert task.result_of(said(report, report), b"", 0, 2) == {"changed": True, "rentals": [report, report]}


def test_no_value_that_ansible_would_act_on_is_taken_from_a_worker(task: ModuleType) -> None:
    evil: dict[str, Any] = {
        "ansible_facts": {"ansible_connection": "local", "ansible_python_interpreter": "/bin/sh"},
        "add_host": {"host_name": "w-other", "host_vars": {"ansible_connection": "local"}},
        "add_group": "workers",
        "ansible_stats": {"data": {}},
        "_ansible_notify": ["handler"],
        "_ansible_delegated_vars": {"ansible_host": "192.0.2.7"},
        "invocation": {"module_args": {}},
        "warnings": ["x"],
        "exception": "x",
        "skipped": True,
        "unreachable": True,
    }
    result = task.result_of(said({"changed": False, **evil}, **evil), b"", 0, 1)
    assert result == {"changed": False, "rentals": [{"changed": False}]}


def test_a_value_of_a_wrong_type_is_left_out(task: ModuleType) -> None:
    report = {"changed": "yes", "epoch": True, "state": {"a": 1}, "left": "all", "killed": 1.5, "error": None}
    assert task.result_of(said(report), b"", 0, 1) == {"changed": False, "rentals": [{}]}
    assert task.result_of(said({"looked": [{"a": [1]}, 2]}), b"", 0, 1)["looked"] == ["{'a': [1]}", "2"]


def test_the_task_fails_with_the_first_error_and_each_rental_keeps_its_own(task: ModuleType) -> None:
    bad = {"changed": False, "error": "too old", "code": "stale_epoch"}
    result = task.result_of(said({"changed": True}, bad), b"", 3, 2)
    assert (result["failed"], result["msg"], result["changed"]) == (True, "too old", True)
    assert [report.get("code") for report in result["rentals"]] == [None, "stale_epoch"]


@pytest.mark.parametrize(
    "output", [b"", b"[]", b"null", b"{", b'{"rentals": 5}', b'{"rentals": [5]}', b"[" * 100_000, said({}, {}), said()]
)
def test_an_answer_that_is_no_report_is_a_failure_with_the_last_output_of_the_program(
    task: ModuleType, output: bytes
) -> None:
    with pytest.raises(AnsibleActionFail, match="orion-rental ended with 1: it broke"):
        task.result_of(output, b"a trace\nit broke\n", 1, 1)


def test_an_answer_larger_than_any_report_is_a_failure(task: ModuleType) -> None:
    with pytest.raises(AnsibleActionFail):
        task.result_of(said({"state": "x" * (1 << 18)}), b"", 0, 1)
