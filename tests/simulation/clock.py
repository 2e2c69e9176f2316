"""An event loop on virtual time, which passes only when no task can run: without sockets, threads or waiting."""

from __future__ import annotations

import asyncio
from typing import Any


class NothingScheduled(Exception):
    """No task can run and no timer is left."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Advances its time to the next timer, where a real loop waits for sockets."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._selector = self

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> tuple[()]:
        if timeout is None:
            raise NothingScheduled
        if timeout > 0:
            self.now += timeout
        return ()

    def _process_events(self, event_list: Any) -> None:
        """Do nothing: there are no events from outside."""

    def _write_to_self(self) -> None:
        """Do nothing: no other thread has to wake the loop."""
