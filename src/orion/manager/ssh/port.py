"""The ports to workers by SSH: whether a worker can be reached, when it is gone, and a renter's shell.

`SshReach`, `SshLiveness` and `SshShells` are the real ones; fakes/workers.py and fakes/shell.py the shipped fakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from orion.manager.domain.model import Worker


@dataclass(frozen=True, kw_only=True)
class Host:
    """The address of a worker, and the keys by which it is recognised."""

    worker_id: str
    address: str
    host_keys: tuple[str, ...]
    port: int = 22
    boot_id: str = ""
    """The boot id that the orders in OF_ONE_BOOT name; empty if they name none. See `Worker.ordered_boot_id`."""

    @staticmethod
    def of(worker: Worker) -> Host:
        return Host(
            worker_id=worker.id, address=worker.address, host_keys=worker.host_keys, boot_id=worker.ordered_boot_id
        )


class Reached(StrEnum):
    YES = "yes"
    """The worker answered with its pinned host key and took the manager's key."""
    NO = "no"
    """Nothing answered, or the worker did not take the manager's key."""
    IMPOSTOR = "impostor"
    """Something answered there with another host key."""


class Reach(Protocol):
    async def reach(self, host: Host, timeout_s: float) -> Reached:
        """Open one SSH connection as root with the manager's key, verify the pinned host key, close the connection."""


class Sign(StrEnum):
    """A change of a liveness connection that has not ended."""

    HELD = "held"
    CLOSED = "closed"
    """The worker's kernel closed the connection, and the manager probes whether the worker is gone."""


class End(StrEnum):
    """How a liveness connection ended."""

    GONE = "gone"
    """The worker's kernel closed the connection, and nothing has answered at the address since: a proof of death."""
    REPLACED = "replaced"
    """The worker's kernel closed the connection, and another host key answers there: a proof of death too."""
    NOT_HELD = "not held"
    """The connection could not be opened, or ended in a way that proves nothing."""


class Liveness(Protocol):
    async def hold(self, host: Host, boot_id: str, on_sign: Callable[[Sign], None]) -> End:
        """Keep one connection to this worker, as long as it has this boot id, and return how it ended.

        `on_sign` is called with each change. A cancelled call sends a last message first, so that the worker's agent
        does not take the end for a failure.
        """


class ShellUnreachable(Exception):
    """The worker gives no shell. A client may see the message."""


@dataclass(frozen=True, kw_only=True)
class ShellLogin:
    """The account and rental of a shell, and the name of the token that asked for it."""

    username: str
    rental_id: str
    epoch: int
    who: str


class Shell(Protocol):
    """A renter's shell in a terminal of its own."""

    async def read(self) -> bytes:
        """Return the next output; empty when the shell has ended or is lost. A shell stops while nothing reads it."""

    async def write(self, data: bytes) -> None:
        """Write input, and return when the worker has room for more. Input of a shell that has ended is dropped."""

    def resize(self, columns: int, rows: int) -> None: ...

    async def how_it_ended(self) -> str | None:
        """Return how the shell ended, in words, after the last read; None if its connection was lost."""

    def close(self) -> None: ...


class Shells(Protocol):
    """Opens shells. `size`: columns and rows."""

    async def open(self, host: Host, login: ShellLogin, size: tuple[int, int]) -> Shell:
        """Open a shell. Raise ShellUnreachable within seconds if that fails."""
