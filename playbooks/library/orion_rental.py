#!/usr/bin/python
"""Ansible's way to /usr/local/sbin/orion-rental, which does the work and is the same program that the agent uses."""

from __future__ import annotations

import json

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: orion_rental
short_description: Make, lock, unlock or purge a rental on its worker
description:
  - Passes its arguments to C(orion-rental) on the worker, and returns that program's report.
options:
  command:
    description: What to do.
    type: str
    choices: [create, lock, unlock, purge]
    required: true
  rental_id:
    description: Which rental.
    type: str
    required: true
  epoch:
    description: Which of its placements; the worker refuses one older than it has seen, and one that it has purged.
    type: int
    required: true
  username:
    description: Its account. For create and purge.
    type: str
  uid:
    description: Its uid, which is its gid too. For create and purge.
    type: int
  public_keys:
    description: The keys that open it. For create.
    type: list
    elements: str
  kill:
    description: Also end its processes. For lock.
    type: bool
  deadline:
    description: Unix time in seconds after which the worker refuses.
    type: float
author:
  - Orion-Sec
"""

EXAMPLES = r"""
- name: Nobody can log in to the rental any more
  orion_rental:
    command: lock
    rental_id: abcdefghij
    epoch: 3
    kill: true
"""

RETURN = r"""
left:
  description: What of the rental was found after its purge; empty, or the task has failed.
  type: list
  returned: purge
looked:
  description: Where the purge looked.
  type: list
  returned: purge
removed_files:
  description: Number of files, directories and IPC objects removed.
  type: int
  returned: purge
killed:
  description: Number of processes ended.
  type: int
  returned: purge and lock
code:
  description: Why it was refused, as a stable word.
  type: str
  returned: failure
"""

PROGRAM = "/usr/local/sbin/orion-rental"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "command": {"type": "str", "required": True, "choices": ["create", "lock", "unlock", "purge"]},
            "rental_id": {"type": "str", "required": True},
            "epoch": {"type": "int", "required": True},
            "username": {"type": "str"},
            "uid": {"type": "int"},
            "public_keys": {"type": "list", "elements": "str", "no_log": False},
            "kill": {"type": "bool"},
            "deadline": {"type": "float"},
        }
    )
    request = {name: value for name, value in module.params.items() if value is not None}
    command = request.pop("command")
    status, output, complaint = module.run_command([PROGRAM, command], data=json.dumps(request))
    try:
        report = json.loads(output)
    except ValueError:
        module.fail_json(msg=f"orion-rental {command} failed: {last_line(complaint)}", code="broken")
    if status:
        module.fail_json(msg=report.pop("error"), **report)
    module.exit_json(**report)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


if __name__ == "__main__":
    main()
