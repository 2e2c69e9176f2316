"""Ansible's connection to a worker over the SSH connection that the engine keeps open.

Orders to orion-rental go to the program at its other end (orion_worker/rpc/server.py). Other commands of a playbook go
by OpenSSH, through the same connection while that is open.
"""

from __future__ import annotations

import json
import os
import re
import socket
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ssh

from orion.manager.channel import BlockingChannel, decode

ORDER = re.compile(r"/usr/local/sbin/orion-rental ([a-z]+)")
DOCUMENTATION = (
    ssh.DOCUMENTATION.replace("    name: ssh\n", "    name: orion_held\n", 1)
    + """
      orion_connection:
        description: The number of the connection that the engine holds.
        type: int
        default: 0
        vars:
          - name: orion_connection
"""
)


class Connection(ssh.Connection):  # type: ignore[misc]  # Ansible has no types
    transport = "orion_held"

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> tuple[int, bytes, bytes]:
        order = ORDER.fullmatch(cmd)
        if not (order and in_data):
            status, output, errors = super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
            return status, output, errors
        number = self.get_option("orion_connection")
        answer = _ask({"connection": number, "command": order[1], "request": json.loads(in_data)})
        if "broken" in answer:
            raise AnsibleConnectionFailure(str(answer["broken"]))
        return int(answer["status"]), json.dumps(answer["report"]).encode(), b""


def _ask(order: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as engine:
        engine.connect(os.environ["ORION_HELD_SOCKET"])
        channel = BlockingChannel(engine, max_line_bytes=None)
        channel.send(order)
        line = channel.receive()
    if line is None:
        raise AnsibleConnectionFailure("the engine does not hold a connection")
    return decode(line)
