"""When a job must end: at its deadline, or when its client disconnects."""

from __future__ import annotations

import select
import selectors
import socket
import time

from orion.manager.snapshots.port import SnapshotError


class Abandoned(Exception):
    """The client has disconnected, so the job ends."""


class Lifetime:
    """The deadline and the client of a job. Each of its waits ends early by raising SnapshotError or Abandoned."""

    def __init__(self, client: socket.socket, deadline_s: float) -> None:
        self._client = client
        self._ends_at = time.monotonic() + deadline_s

    @property
    def left_s(self) -> float:
        return self._ends_at - time.monotonic()

    def wait_for(self, descriptor: int, within_s: float = float("inf")) -> bool:
        """Wait until the descriptor is readable; return False if it is not within `within_s` seconds."""
        waits_s = max(0.0, min(self.left_s, within_s))
        ready, _, _ = select.select([descriptor, self._client.fileno()], [], [], waits_s)
        self._check(self._client.fileno() in ready)
        return descriptor in ready

    def ready_keys(self, selector: selectors.BaseSelector) -> list[selectors.SelectorKey]:
        """Wait for a second at most; return the keys that are ready. `register` must have added the client before."""
        found = [key for key, _ in selector.select(max(0.0, min(self.left_s, 1.0)))]
        self._check(any(key.fileobj is self._client for key in found))
        return found

    def register(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._client, selectors.EVENT_READ)

    def _check(self, client_is_readable: bool) -> None:
        """Raise Abandoned if the client is gone. It sends nothing after its request, so readable means disconnected."""
        if client_is_readable:
            raise Abandoned
        if self.left_s <= 0:
            raise SnapshotError("timed_out", "it took longer than it may")
