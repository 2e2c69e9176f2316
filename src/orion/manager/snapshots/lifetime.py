"""What every wait of a job ends by: its deadline, and whoever asked for it going away."""

from __future__ import annotations

import select
import selectors
import socket
import time

from orion.manager.snapshots.port import SnapshotError


class Abandoned(Exception):
    """Nobody waits for the job any more."""


class Lifetime:
    def __init__(self, client: socket.socket, deadline_s: float) -> None:
        self._client = client
        self._ends_at = time.monotonic() + deadline_s

    @property
    def left_s(self) -> float:
        return self._ends_at - time.monotonic()

    def unix_deadline(self) -> float:
        return time.time() + self.left_s

    def wait_for(self, descriptor: int, within_s: float = float("inf")) -> bool:
        """Wait until it can be read from; return False if that is not so within so many seconds."""
        waits_s = max(0.0, min(self.left_s, within_s))
        ready, _, _ = select.select([descriptor, self._client.fileno()], [], [], waits_s)
        self._look(self._client.fileno() in ready)
        return descriptor in ready

    def events(self, selector: selectors.BaseSelector) -> list[tuple[selectors.SelectorKey, int]]:
        """The next events of a selector in which `register` put the asker."""
        found = selector.select(max(0.0, min(self.left_s, 1.0)))
        self._look(any(key.fileobj is self._client for key, _ in found))
        return [(key, ready) for key, ready in found if key.fileobj is not self._client]

    def register(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._client, selectors.EVENT_READ)

    def _look(self, heard: bool) -> None:
        """Whoever asked has nothing more to say: what can be heard is that it has gone."""
        if heard:
            raise Abandoned
        if self.left_s <= 0:
            raise SnapshotError("timed_out", "it took longer than it may")
