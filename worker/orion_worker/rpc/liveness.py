"""The manager's watch on this worker, as its agent sees it: a connection that lasts as long as the manager is there.

The manager holds one SSH connection to each worker, and runs `orion-watched` over it: this file as a program, which
hands what sshd gave it as its input and output to the agent, and waits. So the agent sees at once what ends that
connection, whoever is busy: the manager's death, a cut that sshd notices, the death of sshd's process here. The manager
may take such an end, with silence after it, for this worker's death (ssh/liveness.py): the agent asks at once
(call_home.py), and lets nothing run without a word that is later (decisions.may_run).

Watching /proc/net/tcp instead would not tell the watch from the manager's other connections. (sshd itself would open
the agent's socket, without a program, for anybody but root.) No renter can fake an end or hide one: the socket is
root's.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ORDERLY_END = b"end\n"
"""The manager's last word when it lets go by itself: it will prove nothing by this end."""
MOST_BYTES = 4096
ROOT = 0
BLIND_PAUSE_S = 1.0


class LivenessListener:
    """`on_end` is told of each watch that ends without its last word, `on_orderly_end` of each that ends with it."""

    def __init__(
        self, place: Path, boot_id: str, on_end: Callable[[], None], on_orderly_end: Callable[[], None]
    ) -> None:
        self._hello = f"{boot_id}\n".encode()
        self._on_end = on_end
        self._on_orderly_end = on_orderly_end
        self._last_bytes: dict[int, bytes] = {}
        """The end of what came in by each watch that lasts."""
        self._programs: dict[int, socket.socket] = {}
        """The program behind each, which ends when its connection is closed."""
        self._ready = selectors.DefaultSelector()
        place.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(place))
        place.chmod(0o600)
        self._listener.listen(8)
        self._ready.register(self._listener, selectors.EVENT_READ, self._accept)

    def run(self) -> None:
        """For ever. Who cannot look may have missed an end: that is told as one."""
        while True:
            try:
                self.look(None)
            except OSError:
                self._on_end()
                time.sleep(BLIND_PAUSE_S)

    def look(self, timeout_s: float | None) -> None:
        """Take what has happened since, or happens within that time."""
        for key, _ in self._ready.select(timeout_s):
            key.data()

    def _accept(self) -> None:
        program, _ = self._listener.accept()
        user_id = struct.unpack("3i", program.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if user_id != ROOT:
            program.close()
            return
        program.setblocking(False)
        self._ready.register(program, selectors.EVENT_READ, lambda: self._take_over(program))

    def _take_over(self, program: socket.socket) -> None:
        self._ready.unregister(program)
        descriptors: list[int] = []
        with suppress(OSError):
            descriptors = socket.recv_fds(program, 1, 2)[1]
        if len(descriptors) != 2:
            program.close()
            return
        incoming, outgoing = descriptors
        self._last_bytes[incoming], self._programs[incoming] = b"", program
        self._ready.register(incoming, selectors.EVENT_READ, lambda: self._read(incoming))
        with suppress(OSError):  # its end is then the next thing that is incoming
            os.write(outgoing, self._hello)
        os.close(outgoing)

    def _read(self, incoming: int) -> None:
        content = b""
        with suppress(OSError):
            content = os.read(incoming, MOST_BYTES)
        self._last_bytes[incoming] = (self._last_bytes[incoming] + content)[-len(ORDERLY_END) :]
        if content:
            return
        self._ready.unregister(incoming)
        os.close(incoming)
        self._programs.pop(incoming).close()
        if self._last_bytes.pop(incoming) == ORDERLY_END:
            self._on_orderly_end()
        else:
            self._on_end()
