"""The port between the manager's controllers and the engine, which runs playbooks on workers.

`AnsibleEngine` (client.py) is the real one, `FakeEngine` (fakes/workers.py) the shipped fake;
tests/integration/test_ansible.py and tests/unit/test_ansible_contract.py hold them to one contract.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from orion.manager.ssh.port import Host
from orion.rental_order import RentalOrder


class Action(StrEnum):
    CREATE = "create_user"
    """Make the account at this epoch with these keys, unlocked. Idempotent; also used to change keys."""
    PREPARE = "prepare_user"
    """Make the account locked, so that its home can be filled first. An account that this epoch unlocked stays so."""
    FREEZE = "freeze"
    """Lock the account and stop all its processes; keep its files. Idempotent."""
    THAW = "thaw"
    """Continue a frozen rental of this epoch and unlock its account, unless a later planned migration froze it.
    `changed` in the report says whether it was frozen."""
    CERTIFY = "certify_host"
    """Install this host certificate, unless the worker has one that was signed later. Idempotent."""
    DELETE = "delete_user"
    """Remove the rental, look for residue and report it. Idempotent."""


OF_ONE_BOOT = frozenset({Action.CREATE, Action.PREPARE, Action.FREEZE, Action.THAW})
"""The orders that name the boot id of their worker. They depend on the processes there, which a restart of the
container ends, so a restarted container refuses them. Files and the host key outlive a restart, so a purge and a
certificate are valid after it too."""
OTHER_BOOT = "other_boot"
"""The code of that refusal (orion_worker/records.py). The manager decides again, because the worker registers anew."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One playbook for one rental on one worker."""

    action: Action
    host: Host
    order: RentalOrder
    """The order for the worker, without the boot id and the deadline, which the engine's messages add."""
    deadline_s: float = 60.0
    """Seconds from the job's receipt by the engine, its wait included, after which its run is killed."""
    owner: str = ""
    """The owner of the rental, for its share of engine and snapshot service; empty if only an inventory knows it."""

    def with_order(self, **changes: Any) -> Job:
        """Return the job with these fields of its order changed."""
        return replace(self, order=replace(self.order, **changes))


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
