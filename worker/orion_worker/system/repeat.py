"""The loop of the guards that look at the worker again and again."""

from __future__ import annotations

import time
from collections.abc import Callable


def look_for_ever(look: Callable[[], object], every_s: float, say: Callable[[str], None], name: str) -> None:
    """Call `look` every so many seconds. Whatever fails, such as a write to a full disk, is said and tried again."""
    while True:
        try:
            look()
        except Exception as fault:
            say(f"{name}: {fault!r}; looking again")
        time.sleep(every_s)
