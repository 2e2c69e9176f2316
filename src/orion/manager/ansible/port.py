"""The ports between the manager's loops and the world of workers: what runs a playbook, what reaches a worker.

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
    """The account exists at this epoch with these keys and is unlocked. Idempotent: also used to change keys."""
    PREPARE = "prepare_user"
    """The same, and locked, unless this very epoch was unlocked before: so that its home can be filled first."""
    FREEZE = "freeze"
    """Nobody is let in and nothing of it goes on, whatever went on before; its files are kept. Idempotent."""
    THAW = "thaw"
    """What is frozen at this epoch goes on and its renter is let in, unless it was frozen for a later planned move than
    this order's; `changed` in the report says whether it was."""
    CERTIFY = "certify_host"
    """The worker shows this host certificate to the rental's renter, or one that was signed later. Idempotent."""
    DELETE = "delete_user"
    """Nothing of the rental is left; the report says so after looking. Idempotent."""


OF_ONE_BOOT = frozenset({Action.CREATE, Action.PREPARE, Action.FREEZE, Action.THAW})
"""The orders that name the boot id of their worker: they are decided from what runs there, and a restart of its
container ends that. The next life of the container refuses them.

A purge is for whatever life has something of its epoch: that is over, and a restart leaves files. A certificate is for
the host key, which a restart leaves too.
"""
OTHER_BOOT = "other_boot"
"""The code of that refusal (orion_worker/records.py). Who gets it looks again: the worker is about to
register, or has."""


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
    """What became of a job. `message` is for a person and holds no secret; `report` is the module's own account."""

    ok: bool
    message: str = ""
    report: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    async def run(self, job: Job) -> Outcome:
        """Run the job to its end or its deadline. Never raises for what a worker or a playbook does."""
        ...
