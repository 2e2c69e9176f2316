"""Runs of playbooks by Ansible's Python interface, in the calling process, over many workers at once.

Values from users and workers reach Ansible as plain strings. Since 2.19 it evaluates templates only in strings that
are marked as trusted, as those of its own files are, and these are not: tests/integration/test_ansible_playbook.py.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from orion.manager.ansible.port import Action
from orion.manager.ansible.protocol import UNREACHABLE, BatchMessage, BatchOrder, HostOrders, ResultMessage
from orion.manager.ansible.runners import Play, ReportResult
from orion.manager.messages import HostMessage
from orion.manager.ssh.options import CONNECT_TIMEOUT_S, IMPOSTOR, control_path, explained, one_line, options
from orion.manager.ssh.port import Host

OPTIONS = {"forks": 16, "syntax": False, "start_at_task": None, "verbosity": 0, "connection": "ssh"}
MAX_REPORT_BYTES = 1 << 18
PLUGINS = Path(__file__).with_name("plugins")


log = logging.getLogger("orion.engine")

OfHost = Callable[[HostOrders], Mapping[str, Any]]
"""A function that returns the variables by which Ansible reaches a worker."""


def load(playbooks: Path, directory: Path) -> Play:
    """Load Ansible, once in a process and before it forks. `directory`: holds id_ed25519 and the files of Ansible."""
    settings = {
        "ANSIBLE_CONFIG": playbooks / "ansible.cfg",
        "ANSIBLE_LIBRARY": playbooks / "library",
        "ANSIBLE_ACTION_PLUGINS": playbooks / "action",
        "ANSIBLE_CONNECTION_PLUGINS": PLUGINS / "connection",
        "ANSIBLE_HOME": directory / "ansible",
        "ANSIBLE_LOCAL_TEMP": directory / "ansible" / "tmp",
        "ANSIBLE_CALLBACKS_ENABLED": "",
        "ANSIBLE_RETRY_FILES_ENABLED": "no",
        "ANSIBLE_DEPRECATION_WARNINGS": "no",
        "ORION_HELD_SOCKET": directory / "held.sock",
    }
    os.environ.update({name: str(value) for name, value in settings.items()})
    from ansible.cli import CLI  # noqa: F401, PLC0415 - importing it is what sets Ansible up in this process
    from ansible.executor import playbook_executor  # noqa: F401, PLC0415
    from ansible.plugins import loader  # noqa: PLC0415
    from ansible.plugins.callback import CallbackBase  # noqa: F401, PLC0415

    loader.init_plugin_loader([])
    for plugins in (loader.connection_loader, loader.shell_loader, loader.become_loader, loader.strategy_loader):
        list(plugins.all(class_only=True))

    def of_host(orders: HostOrders) -> Mapping[str, Any]:
        return host_variables(orders.host.host(), directory) | {"orion_connection": orders.connection}

    def play_batch(batch: BatchMessage, report_result: ReportResult) -> None:
        play(playbooks / f"{batch.action}.yml", batch, of_host, report_result)

    _warm_up(playbooks, directory)
    return play_batch


def _warm_up(playbooks: Path, directory: Path) -> None:
    """Play each playbook once without orders, so that Ansible loads before the forks what it loads at first use."""
    host = HostMessage.model_construct(worker_id="w-none", address=IPv4Address("192.0.2.1"), host_keys=("none none",))
    variables = host_variables(host.host(), directory)
    hosts = (HostOrders.model_construct(host=host, orders=(), connection=0),)
    for action in Action:
        if (path := playbooks / f"{action}.yml").exists():
            play(path, BatchMessage(action=action, hosts=hosts), lambda _: variables, lambda _: None)


def play(path: Path, batch: BatchMessage, of_host: OfHost, report_result: ReportResult) -> None:
    """Run the playbook on these workers, which are the group `workers`. Report one result for each order as soon as its
    worker is done. Errors of Ansible are reported and not raised."""
    from ansible import context  # noqa: PLC0415 - see load
    from ansible.errors import AnsibleError  # noqa: PLC0415
    from ansible.executor.playbook_executor import PlaybookExecutor  # noqa: PLC0415
    from ansible.inventory.manager import InventoryManager  # noqa: PLC0415
    from ansible.parsing.dataloader import DataLoader  # noqa: PLC0415
    from ansible.utils.context_objects import CLIArgs  # noqa: PLC0415
    from ansible.vars.manager import VariableManager  # noqa: PLC0415

    context.CLIARGS = CLIArgs(OPTIONS)
    loader = DataLoader()
    inventory = InventoryManager(loader, parse=False)
    inventory.add_group("workers")
    for orders in batch.hosts:
        name = orders.host.worker_id
        inventory.add_host(name, group="workers")
        for variable, value in {**of_host(orders), "rentals": [order.as_json() for order in orders.orders]}.items():
            inventory.get_host(name).set_variable(variable, value)
    collector = _collector({orders.host.worker_id: orders.orders for orders in batch.hosts}, report_result)
    try:
        executor = PlaybookExecutor([str(path)], inventory, VariableManager(loader, inventory), loader, passwords={})
        executor._tqm._callback_plugins.append(collector)
        executor.run()
    except AnsibleError as error:
        collector.finish(f"Ansible: {one_line(error.message)}")
    else:
        collector.finish("the playbook did nothing on the worker")


def host_variables(host: Host, directory: Path) -> dict[str, Any]:
    """Return the variables by which Ansible reaches this worker: over the engine's connection, or else by ssh with its
    pinned host key and the engine's key."""
    path = f"ControlPath={control_path(host, directory)}"
    return {
        "ansible_connection": "orion_held",
        "ansible_host": host.address,
        "ansible_port": host.port,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(directory / "id_ed25519"),
        "ansible_ssh_args": shlex.join(["-o", "ControlMaster=no", "-o", path]),
        "ansible_ssh_common_args": shlex.join(options(host)),
        "ansible_host_key_checking": True,
        "ansible_ssh_timeout": CONNECT_TIMEOUT_S,
        "ansible_ssh_retries": 0,
        "ansible_pipelining": True,
        "ansible_python_interpreter": "/usr/bin/python3",
    }


def _collector(orders: Mapping[str, tuple[BatchOrder, ...]], report_result: ReportResult) -> Any:
    from ansible.plugins.callback import CallbackBase  # noqa: PLC0415 - see load

    class Collector(CallbackBase):  # type: ignore[misc]  # Ansible has no types
        """Reports the result of each order of a worker after its last task or its first failed one."""

        def __init__(self) -> None:
            super().__init__()
            self.waiting = dict(orders)
            self.results: dict[str, list[Mapping[str, Any]]] = {name: [] for name in orders}
            self.tasks = 0

        def v2_playbook_on_play_start(self, play: Any) -> None:
            blocks = (task for block in play.compile() for task in block.get_tasks())
            self.tasks = sum(task.action not in ("meta", "ansible.builtin.meta") for task in blocks)

        def v2_runner_on_ok(self, result: Any) -> None:
            name = result.host.get_name()
            self.results[name].append(result.result)
            if len(self.results[name]) == self.tasks:
                self._done(name, None)

        def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
            name = result.host.get_name()
            self.results[name].append(result.result)
            if not ignore_errors:
                message = one_line(str(result.result.get("msg") or "a task failed without saying why"))
                # Only some of several rentals may have failed; each report says which.
                self._done(name, None if "rentals" in result.result else {"ok": False, "message": message})

        def v2_runner_on_unreachable(self, result: Any) -> None:
            reason = explained(str(result.result.get("msg", "")))
            unreachable = {"ok": False, "message": f"{UNREACHABLE}{reason}", "unreachable": reason != IMPOSTOR}
            self._done(result.host.get_name(), unreachable)

        def finish(self, otherwise: str) -> None:
            """Report on the workers that are still open: success if they ran tasks, else a failure: `otherwise`."""
            for name in list(self.waiting):
                self._done(name, None if self.results[name] else {"ok": False, "message": otherwise})

        def _done(self, name: str, failure: dict[str, Any] | None) -> None:
            waiting = self.waiting.pop(name, ())
            for place, order in enumerate(waiting):
                report = _report(place, len(waiting), self.results[name])
                error = report.pop("error", None)
                refusal = {} if error is None else {"ok": False, "message": one_line(str(error))}
                report_result(ResultMessage(number=order.number, report=report, **(failure or refusal)))

    collector = Collector()
    collector._init_callback_methods()
    return collector


def _report(place: int, asked: int, results: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the merged reports of the tasks on the rental at this place; `changed` if any task changed something."""
    report: dict[str, Any] = {"changed": False}
    for result in results:
        reports = result.get("rentals")
        if isinstance(reports, list) and len(reports) == asked and isinstance(reports[place], Mapping):
            report = {**report, **reports[place], "changed": report["changed"] or reports[place].get("changed") is True}
    plain = json.dumps(report, default=str)
    return dict(json.loads(plain)) if len(plain) <= MAX_REPORT_BYTES else {"changed": report["changed"], "cut": True}
