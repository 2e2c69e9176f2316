"""The parts of the worker that the agent reads and changes: identity, keys, rentals, load."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orion.rental_order import RentalOrder
from orion_worker.agent.decisions import AgentSession, RentalAction
from orion_worker.freezer.marks import OVER_LIMIT
from orion_worker.records import RequestRefused
from orion_worker.rental.commands import Rentals
from orion_worker.rental.paths import WorkerPaths
from orion_worker.system import cgroup, processes
from orion_worker.system.files import write_atomically

AGENT_VERSION = "0.1.0+boot"
"""The version of this agent. The words behind the plus sign, separated by dots, name abilities that workers of earlier
versions lack. `boot`: orders may name the boot id of this worker."""
ENOUGH_FILES = 200_000
"""The number of files up to which homes are counted: more need the longest grace in any case."""
MAX_SLOTS = 256
"""The most slots that the manager accepts of a worker."""

LogLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """The settings of the agent, from ORION_* variables."""

    url: str
    app_address: str
    proxy_address: str = ""
    """The only address from which the port proxy takes requests."""
    slots: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_grace_s: float = 8.0
    """Seconds that the agent may wait after SIGTERM when its rentals hold few files."""
    stop_grace_max_s: float = 8.0
    """The most seconds that the agent may wait after SIGTERM. The sender must wait somewhat longer (Docker: 10 s)."""


def settings_from(environment: Mapping[str, str]) -> AgentSettings:
    """Return the settings. Raise ValueError, which names the wrong variable and its form."""

    def read(name: str, default: str, form: str, meaning: str) -> str:
        text = environment.get(name) or default
        if not re.fullmatch(form, text):
            raise ValueError(f"{name} must be {meaning}, not {text!r}")
        return text

    host, address, seconds = r"http://[A-Za-z0-9._-]+(:\d{1,5})?/?", r"[0-9.]+", r"\d{1,4}(\.\d{1,3})?"
    url = read("ORION_URL", "http://manager_proxy", host, "http://HOST or http://HOST:PORT")
    app_address = read("ORION_APP_ADDRESS", "", address, "the manager's IPv4 address")
    proxy_address = read("ORION_PROXY_ADDRESS", app_address, address, "the proxy's IPv4 address")
    slots = environment.get("ORION_SLOTS") or "1"
    if not (slots.isdigit() and 1 <= int(slots) <= MAX_SLOTS):
        raise ValueError(f"ORION_SLOTS must be a number from 1 to {MAX_SLOTS}, not {slots!r}")
    grace_s = float(read("ORION_STOP_GRACE_S", str(AgentSettings.stop_grace_s), seconds, "a number of seconds"))
    grace_max_s = max(grace_s, float(read("ORION_STOP_GRACE_MAX_S", str(grace_s), seconds, "a number of seconds")))
    labels = _labels(environment.get("ORION_LABELS") or "")
    return AgentSettings(
        url=url.rstrip("/"),
        app_address=app_address,
        proxy_address=proxy_address,
        slots=int(slots),
        labels=labels,
        stop_grace_s=grace_s,
        stop_grace_max_s=grace_max_s,
    )


class Node:
    """This worker. `root` is another directory in tests; `say` writes one line to the log."""

    def __init__(self, settings: AgentSettings, say: LogLine, root: Path = Path("/")) -> None:
        self._settings = settings
        self._say = say
        self._root = root
        self._identity = root / "var/lib/orion/agent/identity.json"
        self._join_token = root / "run/orion-join/token"
        self._acknowledged = root / "run/orion/acknowledged"
        self._session = root / "run/orion/session"
        self.boot_id = uuid.uuid4().hex
        self.rentals = Rentals(WorkerPaths(root), lock_wait_s=0.5)
        self._last_load = (time.monotonic(), cgroup.usage(cgroup.read_file).cpu_s)
        for old in (self._acknowledged, self._session):
            old.unlink(missing_ok=True)
        for file in (self._identity, self._acknowledged):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def describe(self) -> dict[str, Any]:
        """Return the body of a registration."""
        keys = sorted((self._root / "etc/ssh").glob("ssh_host_*_key.pub"))
        return {
            "hostname": socket.gethostname(),
            "ssh_host_keys": [" ".join(key.read_text().split()[:2]) for key in keys],
            "slots": self._settings.slots,
            "labels": dict(self._settings.labels),
            "boot_id": self.boot_id,
            "agent_version": AGENT_VERSION,
            "inventory": self.inventory(),
        }

    def inventory(self) -> list[dict[str, Any]]:
        return self.rentals.inventory()

    def start_ends(self) -> list[dict[str, Any]]:
        """Return how the start commands ended that ran here, in the form of a heartbeat."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        ends = (self.rentals.launcher.ended(record, now) for record in self.rentals.records.all())
        return [end for end in ends if end is not None][:MAX_SLOTS]

    def load(self) -> dict[str, Any]:
        """Return the load in the form of a heartbeat; `cpu`: the average number of processors since the last call."""
        now, use = time.monotonic(), cgroup.usage(cgroup.read_file)
        then, cpu_s = self._last_load
        self._last_load = (now, use.cpu_s)
        return {
            "cpu": round(max(0.0, use.cpu_s - cpu_s) / max(now - then, 0.001), 3),
            "memory_used_bytes": use.memory_used_bytes,
            "memory_limit_bytes": use.memory_limit_bytes,
            "processes": use.processes,
        }

    def to_be_carried(self) -> tuple[int, int]:
        """Return the number and the bytes of the files in all homes here, up to ENOUGH_FILES."""
        return count_files(self._root / "home" / record.username for record in self.rentals.records.all())

    def join_token(self) -> str | None:
        """Return the join token; None until the manager has made it."""
        try:
            return self._join_token.read_text().strip() or None
        except OSError:
            return None

    def own_token(self) -> str | None:
        """Return the token that the manager gave this worker; None if it has none."""
        try:
            token = json.loads(self._identity.read_text())["worker_token"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return token if isinstance(token, str) else None

    def forget_identity(self) -> None:
        """Remove the identity, so that the worker registers as a new one."""
        self._identity.unlink(missing_ok=True)

    def keep_identity(self, session: AgentSession) -> None:
        """Store the identity and the session that a registration gave."""
        identity = json.dumps({"worker_id": session.worker_id, "worker_token": session.worker_token})
        write_atomically(self._identity, identity)
        write_atomically(self._session, session.session_id)  # the port proxy checks tokens with it

    def admit(self, keys: Iterable[str]) -> None:
        """Write the keys that may log in as root: these alone, and from the manager's address alone."""
        lines = [f'from="{self._settings.app_address}" {key}\n' for key in keys]
        write_atomically(self._root / "etc/orion/keys/root", "".join(lines))

    def note_acknowledgement(self) -> None:
        """Touch the file whose age the health check of the image reads."""
        self._acknowledged.touch()

    def carry_out(self, actions: Iterable[RentalAction], requested_at: float) -> None:
        """Carry out and log these actions. `requested_at`: when the call was sent that they answer (CLOCK_BOOTTIME)."""
        for action in actions:
            request = RentalOrder(rental_id=action.rental_id, epoch=action.epoch)
            try:
                if action.action == "unlock":
                    self.rentals.unlock(request)
                elif action.action == "thaw":
                    self.rentals.thaw(request, requested_at)
                else:
                    self.rentals.lock(request)
                self._say(f"{action.action}ed rental {action.rental_id} at epoch {action.epoch}")
            except RequestRefused as refusal:
                if refusal.code == OVER_LIMIT:
                    continue  # the freeze was logged, and each reply asks for the thaw again
                self._say(f"did not {action.action} rental {action.rental_id}: {refusal}")

    def lock_all(self, kill: bool = False) -> None:
        """Lock the log-ins of all rentals; with `kill`, end all processes of renters at once."""
        records = self.rentals.records.all()
        for record in records:
            self.rentals.lock_at_once(record)
        if kill and records:
            killed = processes.kill_all({record.uid: record.username for record in records}, within_s=3.0)
            self._say(f"locked {len(records)} rentals and ended {killed} of their processes")

    def end_all(self, uids: Iterable[int]) -> None:
        """End all processes and log-ins of the renters with these uids."""
        names = {record.uid: record.username for record in self.rentals.records.all()}
        processes.kill_all({uid: names.get(uid, "") for uid in uids})


def count_files(homes: Iterable[Path]) -> tuple[int, int]:
    """Return the number and the bytes of the files in these folders, up to ENOUGH_FILES. No link is followed."""
    files, size, folders = 0, 0, [str(home) for home in homes]
    while folders and files < ENOUGH_FILES:
        with suppress(OSError), os.scandir(folders.pop()) as entries:  # the renter may change the folder
            for entry in entries:
                files += 1
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    size += entry.stat(follow_symlinks=False).st_size
    return files, size


def _labels(text: str) -> dict[str, str]:
    labels = {}
    for pair in filter(None, text.split(",")):
        key, sign, value = pair.strip().partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", key):
            raise ValueError(f"ORION_LABELS must be KEY=VALUE,KEY=VALUE; this is not: {pair!r}")
        if not re.fullmatch(r"[A-Za-z0-9._/-]{0,63}", value):
            raise ValueError(f"ORION_LABELS: the value of {key} may have letters, digits and ._/- only")
        labels[key] = value
    return labels
