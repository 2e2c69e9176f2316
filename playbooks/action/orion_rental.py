"""The action of the task `orion_rental`: send one order to orion-rental on the worker, and return its report.

/usr/local/sbin/orion-rental, which the agent uses too, does the work, so Ansible copies nothing to the worker. The
task's result holds only the names in REPORTED: a worker cannot return facts, hosts, variables or warnings, on which
Ansible would act.
"""

from __future__ import annotations

import json
from dataclasses import MISSING
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from orion.rental_order import COMMANDS, declared_fields, rule_of

PROGRAM = "/usr/local/sbin/orion-rental"
MAX_REPORT_BYTES = 1 << 18
REPORTED = {
    "changed": bool,
    "epoch": int,
    "state": str,
    "killed": int,
    "left": list,
    "looked": list,
    "unsearched": list,
    "removed_files": int,
    "restored": str,
    "started": bool,
    "start_problem": str,
    "error": str,
    "code": str,
}
"""The names that a report may have, and their types."""
RENTAL = {
    name: {"type": rule_of(each).kind, "required": each.default is MISSING}
    | ({"elements": "str", "no_log": False} if rule_of(each).kind == "list" else {})
    for name, each in declared_fields().items()
}
"""The argument specification of one order. Ansible would hide `public_keys` for its name, hence `no_log`."""
ARGUMENTS = {
    "command": {"type": "str", "required": True, "choices": list(COMMANDS)},
    "rentals": {"type": "list", "elements": "dict", "options": RENTAL},
}


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible has no types
    TRANSFERS_FILES = False

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        if "rentals" not in self._task.args:
            self._task.args["rentals"] = [self._order_of_variables(task_vars or {})]
        _, arguments = self.validate_argument_spec(ARGUMENTS)
        rentals = [{k: v for k, v in one.items() if v is not None} for one in arguments["rentals"]]
        if not rentals:
            return {"changed": False, "rentals": []}
        order = json.dumps({"rentals": rentals}).encode()
        command = f"{PROGRAM} {arguments['command']}"
        status, output, errors = self._connection.exec_command(command, in_data=order, sudoable=False)
        return result_of(output, errors, status, len(rentals))

    def _order_of_variables(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        """Return the order of one rental, whose fields are the variables of the same names that the command uses."""
        command = self._task.args.get("command")
        names = [name for name, each in declared_fields().items() if command in rule_of(each).used_by]
        return {name: self._templar.template(task_vars[name]) for name in names if name in task_vars}


def result_of(output: bytes, errors: bytes, status: int, number: int) -> dict[str, Any]:
    """Return the task's result: a report for each of `number` rentals, and the names of the report if there is one.

    Raise AnsibleActionFail if the output is not such a report.
    """
    reports = _reports(output, number)
    if reports is None:
        raise AnsibleActionFail(f"orion-rental ended with {int(status)}: {_last_line(errors)}")
    failed = [report for report in reports if "error" in report]
    result: dict[str, Any] = {"rentals": reports, "changed": any(report.get("changed") for report in reports)}
    if number == 1:
        result = {name: value for name, value in reports[0].items() if name != "error"} | result
    if failed:
        result |= {"failed": True, "msg": failed[0]["error"]}
    return result


def _reports(output: bytes, number: int) -> list[dict[str, Any]] | None:
    if len(output) > MAX_REPORT_BYTES:
        return None
    try:
        reports = [_allowed(one) for one in json.loads(output)["rentals"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return reports if len(reports) == number else None


def _allowed(report: dict[str, Any]) -> dict[str, Any]:
    kept = {name: report[name] for name, kind in REPORTED.items() if type(report.get(name)) is kind}
    return {name: [str(item) for item in value] if isinstance(value, list) else value for name, value in kept.items()}


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no error output"])[-1]
