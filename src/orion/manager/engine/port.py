"""The ports between the manager's loops and the world of workers: what runs a playbook, what reaches a worker.

`AnsibleEngine`, `SshReach` and `SshWatch` are the real ones, those of engine/fake.py the shipped fakes;
tests/unit/test_engine_contract.py holds the fakes to the contract that tests/integration/test_engine.py holds the real
ones to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


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
class Host:
    """Where a worker is and how it is recognised."""

    worker_id: str
    address: str
    host_keys: tuple[str, ...]
    port: int = 22
    boot_id: str = ""
    """The boot id that the orders in OF_ONE_BOOT name; empty: they name none. See Worker.ordered_boot_id."""


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


class Reached(StrEnum):
    YES = "yes"
    """The worker answered with its pinned host key and took the manager's key."""
    NO = "no"
    """Nothing answered, or it did not take our key."""
    IMPOSTOR = "impostor"
    """Something answered there with another host key."""


class Reach(Protocol):
    async def reach(self, host: Host, timeout_s: float) -> Reached:
        """Open one SSH connection as root with the manager's key, verify the pinned host key, close it."""
        ...


class Sign(StrEnum):
    """What a watch tells while it goes on."""

    HELD = "held"
    CLOSED = "closed"
    """Its kernel closed the connection; whether it is gone is being found out."""


class End(StrEnum):
    """How a watch ended."""

    GONE = "gone"
    """Its kernel closed the connection, and nothing has answered at its address since: a proof of death."""
    REPLACED = "replaced"
    """The same, but something else answers at its address, with another host key: a proof too."""
    NOT_HELD = "not held"
    """It could not be held, or was lost in a way that proves nothing."""


class Watch(Protocol):
    async def hold(self, host: Host, boot_id: str, told: Callable[[Sign], None]) -> End:
        """Hold one connection to this worker, in this life of its container, until that ends for good.

        Cancelled, it lets go with a word, so that the worker's agent makes nothing of it.
        """
        ...


class ShellUnreachable(Exception):
    """The worker gives no shell. A client may see the message."""


@dataclass(frozen=True)
class Login:
    """Whose shell, and who asked for it."""

    username: str
    rental_id: str
    epoch: int
    who: str


class Shell(Protocol):
    """A renter's shell in a terminal of its own."""

    async def read(self) -> bytes:
        """What it wrote next; empty when it has ended or is lost. Who does not read holds it up."""

    async def write(self, data: bytes) -> None:
        """Returns when the worker has room for more. What the shell does not take any more is dropped."""

    def resize(self, columns: int, rows: int) -> None: ...

    async def how_it_ended(self) -> str | None:
        """After the last read: in words; None when nobody said that it has ended, so that its worker may be gone."""

    def close(self) -> None: ...


class Shells(Protocol):
    """Opens them. `size`: columns and rows."""

    async def open(self, host: Host, login: Login, size: tuple[int, int]) -> Shell:
        """Raises ShellUnreachable, within seconds."""
