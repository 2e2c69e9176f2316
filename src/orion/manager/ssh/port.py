"""The ports to workers by SSH: whether one can be reached, when one is gone, and a renter's shell.

`SshReach`, `SshLiveness` and `SshShells` are the real ones; fakes/workers.py and fakes/shell.py the shipped fakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


@dataclass(frozen=True)
class Host:
    """Where a worker is and how it is recognised."""

    worker_id: str
    address: str
    host_keys: tuple[str, ...]
    port: int = 22
    boot_id: str = ""
    """The boot id that the orders in OF_ONE_BOOT name; empty: they name none. See Worker.ordered_boot_id."""


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


class Liveness(Protocol):
    async def hold(self, host: Host, boot_id: str, on_sign: Callable[[Sign], None]) -> End:
        """Hold one connection to this worker, in this life of its container, until that ends for good.

        Cancelled, it lets go with a word, so that the worker's agent makes nothing of it.
        """
        ...


class ShellUnreachable(Exception):
    """The worker gives no shell. A client may see the message."""


@dataclass(frozen=True)
class ShellLogin:
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

    async def open(self, host: Host, login: ShellLogin, size: tuple[int, int]) -> Shell:
        """Raises ShellUnreachable, within seconds."""
