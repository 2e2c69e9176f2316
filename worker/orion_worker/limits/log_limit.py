"""A limit for what sshd writes to the container's log, because a renter can have it write thousands of lines.

sshd writes a line for each connection whose forwarding it refuses (4400 a second, 0.8 MB: seen), and the engine keeps
the newest 30 MB. There is room for BURST lines, and one more after each LINE_EVERY_S. Further lines are counted, and
their number is written as soon as there is room again.

sshd never waits for its log: its end of the pipe does not block, and lines that find no room in the pipe are lost.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

BURST = 200
"""Lines for which there is room at once: more than the many simultaneous orders of a manager make."""
LINE_EVERY_S = 0.1
"""Seconds after which there is room for one more line."""
LONGEST_BYTES = 1000
READ_BYTES = 1 << 16


class LimitedLog:
    """The limit: it passes on lines that are written to `input` while there is room; `say` writes one line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._output, self.input = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.input, False)
        self._begun = b""
        self._room = float(BURST)
        self._at = 0.0
        self._left_out = 0

    def take(self, content: bytes, now: float) -> None:
        """Write the complete lines in `content`, as far as there is room for them. `now`: monotonic seconds."""
        self._room = min(BURST, self._room + (now - self._at) / LINE_EVERY_S)
        self._at = now
        *lines, self._begun = (self._begun + content).split(b"\n")
        if len(self._begun) > LONGEST_BYTES:
            lines, self._begun = [*lines, self._begun], b""
        for line in lines:
            if self._room < 1:
                self._left_out += 1
                continue
            self._say_how_many_were_left_out()
            self._room -= 1
            self._say(line[:LONGEST_BYTES].decode(errors="replace").rstrip("\r"))
        if self._room >= 1:
            self._say_how_many_were_left_out()

    def run(self) -> None:
        """Pass on lines for ever."""
        while True:
            ready = select.select([self._output], [], [], LINE_EVERY_S if self._left_out else None)[0]
            self.take(os.read(self._output, READ_BYTES) if ready else b"", time.monotonic())

    def _say_how_many_were_left_out(self) -> None:
        if self._left_out:
            self._room -= 1
            self._say(f"orion-agent: {self._left_out} lines of sshd's were left out: too many at a time")
            self._left_out = 0
