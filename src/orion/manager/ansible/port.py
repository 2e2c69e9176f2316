"""The port between the manager's controllers and the engine, which runs playbooks on workers.

`AnsibleEngine`, `SshReach` and `SshLiveness` are the real ones, those of fakes/workers.py the shipped fakes;
tests/unit/test_ansible_contract.py holds the fakes to the contract that tests/integration/test_ansible.py holds the
real ones to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from orion.manager.ssh.port import Host


class Action(StrEnum):
    CREATE = "create_user"
    """Make the account at this epoch with these keys, unlocked. Idempotent; also used to change keys."""
    PREPARE = "prepare_user"
    """Make the account locked, so that its home can be filled first. An account that this epoch unlocked stays so."""
    FREEZE = "freeze"
    """Lock the account and stop all its processes; keep its files. Idempotent."""
    THAW = "thaw"
    """Let a frozen rental of this epoch go on and unlock its account, unless a later planned migration froze it.
    `changed` in the report says whether it was frozen."""
    CERTIFY = "certify_host"
    """Have the worker show this host certificate, or one that was signed later. Idempotent."""
    DELETE = "delete_user"
    """Remove the rental, look for residue and report it. Idempotent."""


OF_ONE_BOOT = frozenset({Action.CREATE, Action.PREPARE, Action.FREEZE, Action.THAW})
"""The orders that name the boot id of their worker. They depend on the processes there, which a restart of the
container ends, so a restarted container refuses them.

A purge and a certificate are valid after a restart too, because the files and the host key outlive it.
"""
OTHER_BOOT = "other_boot"
"""The code of that refusal (orion_worker/records.py). The manager decides again, because the worker registers anew."""


@dataclass(frozen=True)
class Job:
    """One playbook for one rental on one worker. `deadline_s`: the run is killed after so many seconds."""

    action: Action
    host: Host
    rental_id: str
    username: str
    uid: int
    epoch: int
    public_keys: tuple[str, ...] = ()
    deadline_s: float = 60.0
    start: str = ""
    start_mark: str = ""
    """To create: the command that the renter's shell runs when it is let in, and the run that it is. A run that it has
    had there already is not had again."""
    rental_name: str = ""
    """The name that the rental's sessions are told; empty: none. For CREATE and PREPARE."""
    user_authority: str = ""
    """The key whose certificates open the rental too; empty: none does. For CREATE and PREPARE."""
    host_certificate: str = ""
    """What its worker shows to renters from now on. For CREATE and CERTIFY."""
    move: int = 0
    """For FREEZE and THAW: the planned move, by a number that only rises for a rental."""
    owner: str = ""
    """The owner of the rental, for its share of engine and vault; empty: of what only an inventory knows."""


@dataclass(frozen=True)
class Outcome:
    """The result of a job. `message` is for a person and holds no secret; `report` comes from the worker's program."""

    ok: bool
    message: str = ""
    report: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    async def run(self, job: Job) -> Outcome:
        """Run the job to its end or its deadline. Failures of workers and playbooks are returned, not raised."""
        ...
