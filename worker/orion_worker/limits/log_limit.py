"""What sshd says goes to the container's log, so much a second: a renter has it say thousands of lines.

Each connection that a client asks to have forwarded elsewhere and is refused is a line (4400 a second, 0.8 MB: seen),
and the engine keeps the newest 30 MB. So lines beyond BURST, which come back at EACH_S, are only counted, and how many
there were is said as soon as there is room for a line again.

sshd never waits for its log: its end of the pipe does not block, and what finds no room there is lost.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

BURST = 200
"""Lines at once: more than a manager's many orders at a time make."""
EACH_S = 0.1
LONGEST_BYTES = 1000
READ_BYTES = 1 << 16


class SparingLog:
    """`say` writes one line. `input`: what has sshd's errors as its output."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._output, self.input = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.input, False)
        self._begun = b""
        self._room = float(BURST)
        self._at = 0.0
        self._left_out = 0

    def take(self, content: bytes, now: float) -> None:
        """Say the lines that are whole, as far as there is room for them. `now`: monotonic seconds."""
        self._room = min(BURST, self._room + (now - self._at) / EACH_S)
        self._at = now
        *lines, self._begun = (self._begun + content).split(b"\n")
        if len(self._begun) > LONGEST_BYTES:
            lines, self._begun = [*lines, self._begun], b""
        for line in lines:
            if self._room < 1:
                self._left_out += 1
                continue
            self._tell_of_those_left_out()
            self._room -= 1
            self._say(line[:LONGEST_BYTES].decode(errors="replace").rstrip("\r"))
        if self._room >= 1:
            self._tell_of_those_left_out()

    def run(self) -> None:
        """For ever."""
        while True:
            waits_s = EACH_S if self._left_out else None
            ready = select.select([self._output], [], [], waits_s)[0]
            self.take(os.read(self._output, READ_BYTES) if ready else b"", time.monotonic())

    def _tell_of_those_left_out(self) -> None:
        if self._left_out:
            self._room -= 1
            self._say(f"orion-agent: {self._left_out} lines of sshd's were left out: too many at a time")
            self._left_out = 0
