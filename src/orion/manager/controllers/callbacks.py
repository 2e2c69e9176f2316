"""Callbacks join objects that call each other, so that no object is changed after its construction.

changed = Callbacks[str]()                  # is made first
liveness = LivenessConnections(changed)     # calls changed("w-1") when a report has changed
health = HealthController(liveness)
changed.subscribe(health.mark_due)          # before anything runs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec

P = ParamSpec("P")


class Callbacks(Generic[P]):
    """Functions that are called together, in the order in which they were subscribed."""

    def __init__(self) -> None:
        self._subscribed: list[Callable[P, None]] = []

    def subscribe(self, callback: Callable[P, None]) -> None:
        self._subscribed.append(callback)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        for callback in self._subscribed:
            callback(*args, **kwargs)
