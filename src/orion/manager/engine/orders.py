"""Where a runner's tasks hand in what is to go over a held connection (plugins/connection/orion_held.py).

One order on each connection to the Unix socket, one answer, each one JSON object in a line. Only the engine's own uid
can connect.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from orion.manager.engine.held import Connections

READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 20


@dataclass(eq=False)
class Task:
    """The connection of one task that waits for its answer."""

    socket: socket.socket
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)
    gone: bool = False


class Orders:
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
            task = Task(accepted)
            self._selector.register(accepted, selectors.EVENT_READ, partial(self._serve, task))

    def _serve(self, task: Task, ready: int) -> None:
        try:
            if ready & selectors.EVENT_WRITE:
                self._send(task)
            elif part := task.socket.recv(READ_BYTES):
                task.incoming += part
                self._take(task)
            else:
                self._leave(task)  # its run was killed
        except BlockingIOError:
            pass
        except OSError:
            self._leave(task)

    def _take(self, task: Task) -> None:
        line, end, _ = task.incoming.partition(b"\n")
        if not end:
            if len(line) > MAX_LINE_BYTES:
                self._leave(task)
            return
        order = json.loads(line)
        held = self._connections.numbered(order["connection"])
        reply = partial(self._answer, task)
        if held is None:
            reply({"broken": "the connection was closed"})
        else:
            held.ask(order["command"], order["request"], reply)

    def _answer(self, task: Task, answer: dict[str, Any]) -> None:
        if not task.gone:
            task.outgoing += json.dumps(answer).encode() + b"\n"
            self._serve(task, selectors.EVENT_WRITE)

    def _send(self, task: Task) -> None:
        while task.outgoing:
            try:
                del task.outgoing[: task.socket.send(task.outgoing)]
            except BlockingIOError:
                self._selector.modify(task.socket, selectors.EVENT_WRITE, partial(self._serve, task))
                return
        self._leave(task)

    def _leave(self, task: Task) -> None:
        if not task.gone:
            task.gone = True
            self._selector.unregister(task.socket)
            task.socket.close()
