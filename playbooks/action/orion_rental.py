"""What the task `orion_rental` does: one order to /usr/local/sbin/orion-rental on the worker, and its report.

The work is done by that program, which is the same that the agent uses. So nothing is copied to the worker for a task,
and nothing that a worker answers is taken for more than a report: of what it says, names that are listed here become
the task's result, and no facts, hosts, variables or warnings, which Ansible would act upon.
"""

from __future__ import annotations

import json
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

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
"""What a report may hold, and of which type."""
RENTAL = {
    "rental_id": {"type": "str", "required": True},
    "epoch": {"type": "int", "required": True},
    "username": {"type": "str"},
    "uid": {"type": "int"},
    "public_keys": {"type": "list", "elements": "str", "no_log": False},
    "rental_name": {"type": "str"},
    "user_authority": {"type": "str"},
    "host_certificate": {"type": "str"},
    "kill": {"type": "bool"},
    "start": {"type": "str"},
    "start_mark": {"type": "str"},
    "move": {"type": "int"},
    "boot_id": {"type": "str"},
    "deadline": {"type": "float"},
}
ARGUMENTS = {
    "command": {
        "type": "str",
        "required": True,
        "choices": ["run", "create", "certify", "lock", "unlock", "freeze", "thaw", "purge"],
    },
    "rentals": {"type": "list", "elements": "dict", "required": True, "options": RENTAL},
}


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible has no types
    TRANSFERS_FILES = False

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(ARGUMENTS)
        rentals = [{k: v for k, v in one.items() if v is not None} for one in arguments["rentals"]]
        if not rentals:
            return {"changed": False, "rentals": []}
        order = json.dumps({"rentals": rentals}).encode()
        command = f"{PROGRAM} {arguments['command']}"
        status, output, complaint = self._connection.exec_command(command, in_data=order, sudoable=False)
        return result_of(output, complaint, status, len(rentals))


def result_of(output: bytes, complaint: bytes, status: int, asked: int) -> dict[str, Any]:
    """The task's result: of several rentals a report for each, of one rental its report besides. Raises
    AnsibleActionFail for what is no report."""
    reports = _reports(output, asked)
    if reports is None:
        raise AnsibleActionFail(f"orion-rental ended with {int(status)}: {_last_line(complaint)}")
    failed = [report for report in reports if "error" in report]
    result: dict[str, Any] = {"rentals": reports, "changed": any(report.get("changed") for report in reports)}
    if asked == 1:
        result = {name: value for name, value in reports[0].items() if name != "error"} | result
    if failed:
        result |= {"failed": True, "msg": failed[0]["error"]}
    return result


def _reports(output: bytes, asked: int) -> list[dict[str, Any]] | None:
    if len(output) > MAX_REPORT_BYTES:
        return None
    try:
        said = json.loads(output)["rentals"]
        reports = [_plain(one) for one in said]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return reports if len(reports) == asked else None


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    kept = {name: report[name] for name, kind in REPORTED.items() if type(report.get(name)) is kind}
    return {name: [str(item) for item in value] if isinstance(value, list) else value for name, value in kept.items()}


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
