"""One run of one playbook by Ansible's Python interface, in the process that calls it.

The playbooks are the files that an operator runs by hand. The differences: Ansible is already loaded, the inventory
is the one host of the job, and what came of it is collected instead of printed.

Values from users and workers reach Ansible as plain strings. Since 2.19 it evaluates templates only in strings that
are marked as trusted, which those of its own files are and ours are not: tests/integration/test_engine_playbook.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from orion.manager.engine.pool import RunPlaybook
from orion.manager.engine.port import Host
from orion.manager.engine.protocol import JobLine, OutcomeLine
from orion.ssh import pinned_host_arguments

CONNECT_TIMEOUT_S = 5
CONTROL_PERSIST_S = 60
MAX_MESSAGE = 500
MAX_REPORT_BYTES = 1 << 18
SSH_OPTIONS = (
    "ControlMaster=auto",
    f"ControlPersist={CONTROL_PERSIST_S}",
    f"ConnectTimeout={CONNECT_TIMEOUT_S}",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=2",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    "BatchMode=yes",
)
_IMPOSTOR_SIGNS = (
    "REMOTE HOST IDENTIFICATION HAS CHANGED",
    "Host key verification failed",
    "no matching host key type found",
)
_ANSIBLE_PREFACE = re.compile(
    r"Task failed: |Failed to connect to the host via ssh: "
    r"|Data could not be sent to remote host \S+ Make sure this host can be reached over ssh: "
)
_NOT_REPORTED = frozenset(
    ("failed", "unreachable", "msg", "exception", "invocation", "warnings", "deprecations", "ansible_facts")
)


def load(playbooks: Path, directory: Path) -> RunPlaybook:
    """Load Ansible; what it writes goes to `directory`, where id_ed25519 is. Once in a process, before the forks."""
    settings = {
        "ANSIBLE_CONFIG": playbooks / "ansible.cfg",
        "ANSIBLE_LIBRARY": playbooks / "library",
        "ANSIBLE_HOME": directory / "ansible",
        "ANSIBLE_LOCAL_TEMP": directory / "ansible" / "tmp",
        "ANSIBLE_CALLBACKS_ENABLED": "",
        "ANSIBLE_RETRY_FILES_ENABLED": "no",
    }
    os.environ.update({name: str(value) for name, value in settings.items()})
    from ansible.cli import CLI  # noqa: F401, PLC0415 - importing it is what sets Ansible up in this process
    from ansible.executor import playbook_executor  # noqa: F401, PLC0415
    from ansible.plugins import loader  # noqa: PLC0415
    from ansible.plugins.callback import CallbackBase  # noqa: F401, PLC0415
    from ansible.utils.ssh_functions import check_for_controlpersist  # noqa: PLC0415

    loader.init_plugin_loader([])
    check_for_controlpersist("ssh")  # it remembers
    for plugins in (loader.connection_loader, loader.shell_loader, loader.become_loader, loader.strategy_loader):
        list(plugins.all(class_only=True))

    def run_playbook(job: JobLine, refused_after: float) -> OutcomeLine:
        variables = job.vars.model_dump(mode="json") | {"deadline": int(refused_after)}
        host = job.host.host()
        return play(playbooks / f"{job.action}.yml", host, host_variables(host, directory), variables, job.id)

    return run_playbook


def play(
    path: Path, host: Host, of_host: Mapping[str, Any], variables: Mapping[str, Any], identifier: str = ""
) -> OutcomeLine:
    """Run the playbook on this host, alone in the group `workers`. Never raises for what Ansible makes of it."""
    from ansible import context  # noqa: PLC0415 - see load
    from ansible.errors import AnsibleError  # noqa: PLC0415
    from ansible.executor.playbook_executor import PlaybookExecutor  # noqa: PLC0415
    from ansible.inventory.manager import InventoryManager  # noqa: PLC0415
    from ansible.parsing.dataloader import DataLoader  # noqa: PLC0415
    from ansible.utils.context_objects import CLIArgs  # noqa: PLC0415
    from ansible.vars.manager import VariableManager  # noqa: PLC0415

    context.CLIARGS = CLIArgs({"forks": 1, "syntax": False, "start_at_task": None, "verbosity": 0})
    loader = DataLoader()
    inventory = InventoryManager(loader, parse=False)
    inventory.add_group("workers")
    inventory.add_host(host.worker_id, group="workers")
    for name, value in of_host.items():
        inventory.get_host(host.worker_id).set_variable(name, value)
    try:
        variable_manager = VariableManager(loader, inventory)
        variable_manager.extra_vars.update(variables)
        executor = PlaybookExecutor([str(path)], inventory, variable_manager, loader, passwords={})
        collector = _collector()
        executor._tqm._callback_plugins.append(collector)
        status = executor.run()
    except AnsibleError as error:
        return OutcomeLine(id=identifier, ok=False, message=f"Ansible: {_short(error.message)}")
    return _outcome(identifier, status, collector.results)


def host_variables(host: Host, directory: Path) -> dict[str, Any]:
    """How Ansible reaches this worker: its pinned host key, the engine's key, one kept connection."""
    recognised = "\n".join((host.address, str(host.port), *host.host_keys))
    control = f"{host.worker_id}-{sha256(recognised.encode()).hexdigest()[:12]}"
    options = [argument for option in SSH_OPTIONS for argument in ("-o", option)]
    return {
        "ansible_connection": "ssh",
        "ansible_host": host.address,
        "ansible_port": host.port,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(directory / "id_ed25519"),
        "ansible_ssh_args": shlex.join(["-F", "none", *options]),
        "ansible_ssh_common_args": shlex.join(pinned_host_arguments(host.worker_id, host.host_keys)),
        "ansible_control_path": str(directory / control),
        "ansible_host_key_checking": True,
        "ansible_ssh_timeout": CONNECT_TIMEOUT_S,
        "ansible_ssh_retries": 1,  # a kept connection may have died since: one more try makes a new one
        "ansible_pipelining": True,
        "ansible_python_interpreter": "/usr/bin/python3",
    }


def _collector() -> Any:
    from ansible.plugins.callback import CallbackBase  # noqa: PLC0415 - see load

    class Collector(CallbackBase):  # type: ignore[misc]  # Ansible has no types
        """Keeps (what came of it, the task's result) of each task, in order."""

        def __init__(self) -> None:
            super().__init__()
            self.results: list[tuple[str, Mapping[str, Any]]] = []

        def v2_runner_on_ok(self, result: Any) -> None:
            self.results.append(("ok", result.result))

        def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
            self.results.append(("ignored" if ignore_errors else "failed", result.result))

        def v2_runner_on_unreachable(self, result: Any) -> None:
            self.results.append(("unreachable", result.result))

    collector = Collector()
    collector._init_callback_methods()
    return collector


def _outcome(identifier: str, status: int, results: list[tuple[str, Mapping[str, Any]]]) -> OutcomeLine:
    kind, last = results[-1] if results else ("none", {})
    if kind == "none":
        return OutcomeLine(id=identifier, ok=False, message="the playbook did nothing on the worker")
    if kind == "unreachable":
        return OutcomeLine(id=identifier, ok=False, message=_unreachable(str(last.get("msg", ""))))
    report = _report(results)
    if status or kind == "failed":
        message = _short(str(last.get("msg") or "a task failed without saying why"))
        return OutcomeLine(id=identifier, ok=False, message=message, report=report)
    return OutcomeLine(id=identifier, ok=True, report=report)


def _report(results: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What the tasks said, a later one over an earlier one, without what Ansible adds. `changed` if any task did."""
    report: dict[str, Any] = {}
    for _, result in results:
        report |= {k: v for k, v in result.items() if k not in _NOT_REPORTED and not k.startswith("_ansible")}
    report["changed"] = any(bool(result.get("changed")) for _, result in results)
    plain = json.dumps(report, default=str)
    if len(plain) > MAX_REPORT_BYTES:
        return {"changed": report["changed"], "cut": True}
    return dict(json.loads(plain))


def _unreachable(message: str) -> str:
    if any(sign in message for sign in _IMPOSTOR_SIGNS):
        return "the worker cannot be reached by SSH: it has another host key than the pinned one"
    return f"the worker cannot be reached by SSH: {_short(_ANSIBLE_PREFACE.sub('', message))}"


def _short(message: str) -> str:
    """One line for a person; a worker may have written it, so nothing that moves a cursor."""
    line = re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]+", " ", message).strip()
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 3]}..."
