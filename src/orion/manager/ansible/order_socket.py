"""The socket through which a runner's tasks use the engine's connections to workers (plugins/connection/orion_held.py).

A task sends one order on each connection to the Unix socket, gets one answer, and closes it. Only the engine's own uid
can connect.
"""

from __future__ import annotations

import os
import selectors
import socket
from contextlib import suppress
from pathlib import Path

from orion.manager.ansible.connections import Connections
from orion.manager.channel import SelectorChannel, decode


class OrderSocket:
    """Passes orders of tasks to the worker connections, and answers back."""

    def __init__(self, selector: selectors.BaseSelector, directory: Path, connections: Connections) -> None:
        self._selector = selector
        self._connections = connections
        path = directory / "held.sock"
        path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        self._listening.bind(str(path))
        os.umask(before)
        self._listening.listen(64)
        self._listening.setblocking(False)
        selector.register(self._listening, selectors.EVENT_READ, lambda _: self._accept())

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            accepted, _ = self._listening.accept()
            accepted.setblocking(False)
            SelectorChannel(self._selector, accepted, accepted, self._take, lambda task, _: task.close())

    def _take(self, task: SelectorChannel, line: bytes) -> None:
        order = decode(line)
        connection = self._connections.by_number(order["connection"])
        if connection is None:
            task.send({"broken": "the connection was closed"})
        else:
            connection.ask(order["command"], order["request"], task.send)
