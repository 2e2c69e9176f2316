"""Bounded waits that say what did not happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from orion.errors import NotFound, Retryable, ServerFault

T = TypeVar("T")

_EVERY_S = 0.1


class TooLate(AssertionError):
    """What was waited for did not come."""


def eventually(what: str, condition: Callable[[], T], within_s: float) -> T:
    """The first true value of the condition. A platform that does not answer is one more way of not yet."""
    deadline = time.monotonic() + within_s
    while True:
        last: object
        try:
            value = condition()
            if value:
                return value
            last = value
        except (Retryable, ServerFault, NotFound) as error:
            last = error
        if time.monotonic() >= deadline:
            raise TooLate(f"not within {within_s:g} s: {what}; at the end: {last!r}")
        time.sleep(_EVERY_S)
