"""Time that passes only when nobody has anything left to do: an event loop without sockets, threads or waiting."""

from __future__ import annotations

import asyncio
from typing import Any


class EverybodyWaits(Exception):
    """Nothing will ever happen again: no timer is left."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Where the real loop waits for sockets until the next timer, this one lets so much time have passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._selector = self

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> tuple[()]:
        if timeout is None:
            raise EverybodyWaits
        if timeout > 0:
            self.now += timeout
        return ()

    def _process_events(self, event_list: Any) -> None:
        """There are none: nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody outside has to wake it."""
