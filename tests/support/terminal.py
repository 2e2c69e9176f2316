"""A program at a terminal: its input and its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass
class Terminal:
    """A running program and its terminal."""

    program: subprocess.Popen[bytes]
    screen: int
    seen: bytes = b""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def shows(self, awaited: str, within_s: float) -> str:
        """Wait until the screen shows a text after the last awaited one; return everything before it."""
        deadline = time.monotonic() + within_s
        while awaited.encode() not in self.seen:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, (
                f"not within {within_s} s: {awaited!r}, the screen shows {self.seen.decode(errors='replace')!r}"
            )
            try:
                part = os.read(self.screen, 4096)
            except OSError:  # a terminal without writers raises this
                part = b""
            assert part, f"the program ended without {awaited!r}: {self.seen.decode(errors='replace')!r}"
            self.seen += part
        shown, _, self.seen = self.seen.partition(awaited.encode())
        return shown.decode(errors="replace")

    def ends(self, within_s: float) -> int:
        """Return the exit status. Its output is read meanwhile, or the program could not end."""
        deadline = time.monotonic() + within_s
        while self.program.poll() is None:
            assert time.monotonic() < deadline, f"the program does not end: {self.seen.decode(errors='replace')!r}"
            if select.select([self.screen], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.screen, 4096)
                except OSError:
                    continue
        return int(self.program.returncode)

    def rest(self) -> bytes:
        """Return the output that is left after the program has ended."""
        with suppress(OSError):  # a terminal without writers raises this
            while part := os.read(self.screen, 4096):
                self.seen += part
        return self.seen


@contextmanager
def at_a_terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = subprocess.Popen(
        command, env={**environment, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(program, ours)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, 9)
        program.wait()
        os.close(ours)
