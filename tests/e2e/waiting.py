"""Waits with a timeout, whose error names the condition that did not come true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from orion.errors import NotFound, Retryable, ServerFault

T = TypeVar("T")

_EVERY_S = 0.1


class TooLate(AssertionError):
    """The awaited condition was not met in time."""


def eventually(what: str, condition: Callable[[], T], within_s: float) -> T:
    """Return the first true value of the condition. Errors of a platform that does not answer are retried."""
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
