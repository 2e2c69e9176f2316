"""The manager's watch on this worker, as its agent sees it: a connection that lasts as long as the manager is there.

The manager holds one SSH connection to each worker, and through it, sshd opens this socket for it. So the agent sees at
once what ends that connection: the manager's death, a cut that sshd notices, the death of sshd's process here. The
manager may take such an end, with silence after it, for this worker's death (engine/watch.py): the agent asks at once
(call_home.py), and lets nothing run without a word that is later (decisions.may_run).

Watching /proc/net/tcp instead would not tell the watch from the manager's other connections. No renter can open the
socket, fake an end or hide one: it is root's, as the process of sshd behind it is.
"""

from __future__ import annotations

import selectors
import socket
import struct
from collections.abc import Callable
from pathlib import Path

LET_GO = b"end\n"
"""The manager's last word when it lets go by itself: it will prove nothing by this end."""
MOST_BYTES = 4096
ROOT = 0


class Watched:
    """`on_end` is told of each watch that ends without its last word."""

    def __init__(self, place: Path, boot_id: str, on_end: Callable[[], None]) -> None:
        self._hello = f"{boot_id}\n".encode()
        self._on_end = on_end
        self._said: dict[socket.socket, bytes] = {}
        self._ready = selectors.DefaultSelector()
        place.unlink(missing_ok=True)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(place))
        place.chmod(0o600)
        self._door.listen(8)
        self._ready.register(self._door, selectors.EVENT_READ)

    def run(self) -> None:
        """For ever."""
        while True:
            self.look(None)

    def look(self, timeout_s: float | None) -> None:
        """Take what has happened since, or happens within that time."""
        for key, _ in self._ready.select(timeout_s):
            place = key.fileobj
            if place is self._door:
                self._welcome()
            elif isinstance(place, socket.socket):
                self._hear(place)

    def _welcome(self) -> None:
        watch, _ = self._door.accept()
        user_id = struct.unpack("3i", watch.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if user_id != ROOT:
            watch.close()
            return
        watch.setblocking(False)
        self._said[watch] = b""
        self._ready.register(watch, selectors.EVENT_READ)
        try:
            watch.send(self._hello)
        except OSError:
            self._end(watch)

    def _hear(self, watch: socket.socket) -> None:
        try:
            said = watch.recv(MOST_BYTES)
        except OSError:
            said = b""
        self._said[watch] = (self._said[watch] + said)[-len(LET_GO) :]
        if not said:
            self._end(watch)

    def _end(self, watch: socket.socket) -> None:
        let_go = self._said.pop(watch) == LET_GO
        self._ready.unregister(watch)
        watch.close()
        if not let_go:
            self._on_end()
