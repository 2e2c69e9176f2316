"""The RPC server at the worker's end of an SSH connection of the manager: an order costs neither a log-in nor a start.

Requests are lines `{"id": 1, "command": "run", "request": {...}}`, and answers are lines
`{"id": 1, "status": 0, "report": {...}}`, in the order in which they are ready. The first line, `{"ready": true}`, says
that the server reads. Each request has a process of its own, so that a slow or broken one delays no other. When the
connection ends, requests under way run to their end: epoch and deadline make an order void, not that end.

The server also does the transfers of files that the shim hands to it from other SSH sessions (shim.py), because it has
everything loaded. Each has a process of its own too.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import socket
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from orion_worker.system.processes import be_killed_after

SOCKET_PATH = "/run/orion/transfers"
TRANSFERS = ("send", "salvage", "receive")
TAKEN = b"!"
MOST_AT_ONCE = 16
"""The most requests that are carried out at once; further ones wait in the connection."""
LONGEST_S = 3600.0
"""Seconds after which the process of a request is killed; no order has a longer deadline."""
MAX_LINE_BYTES = 1 << 20
READ_BYTES = 1 << 16


class RpcServer:
    """The server of the connection whose ends are `incoming` and `outgoing`.

    `answer` returns the status and the report of a command. `transfer` does one of TRANSFERS over standard input and
    output, and returns its status.
    """

    def __init__(
        self,
        answer: Callable[[str, str], tuple[int, dict[str, Any]]],
        commands: Collection[str],
        transfer: Callable[[str], int],
        *,
        socket_path: Path = Path(SOCKET_PATH),
        incoming: int = 0,
        outgoing: int = 1,
    ) -> None:
        self._answer = answer
        self._commands = commands
        self._transfer = transfer
        self._incoming = incoming
        self._outgoing = outgoing
        self._selector = selectors.DefaultSelector()
        self._received = b""
        self._ended = False
        self._requests: dict[int, tuple[int, object, bytearray]] = {}
        """Each request's process, id and output so far, by the pipe from its process."""
        self._listening = _listen(socket_path)
        self._transfer_pids: dict[int, int] = {}
        """The processes of transfers, by their pidfds."""

    def run(self) -> None:
        """Serve until `incoming` ends and all requests are answered."""
        gc.freeze()  # so that collections in forks do not copy the shared pages
        for readable in (self._listening, self._incoming):
            self._selector.register(readable, selectors.EVENT_READ)
        self._write(b'{"ready": true}\n')
        while not self._ended or self._requests:
            for key, _ in self._selector.select():
                if key.fd == self._incoming:
                    self._read()
                elif key.fileobj is self._listening:
                    self._begin_transfer()
                elif key.fd in self._transfer_pids:
                    self._end_transfer(key.fd)
                else:
                    self._collect(key.fd)
            while len(self._requests) < MOST_AT_ONCE and b"\n" in self._received:
                line, _, self._received = self._received.partition(b"\n")
                self._start(line)

    def _read(self) -> None:
        part = os.read(self._incoming, READ_BYTES)
        self._received += part
        if not part or (len(self._received) > MAX_LINE_BYTES and b"\n" not in self._received):
            self._selector.unregister(self._incoming)
            self._ended = True

    def _start(self, line: bytes) -> None:
        try:
            payload = json.loads(line)
            identifier, command, request = payload["id"], payload["command"], json.dumps(payload["request"])
            if command not in self._commands:
                raise ValueError(command)
        except (ValueError, KeyError, TypeError):
            self._write(_line(None, 2, {"changed": False, "error": "this is no request", "code": "invalid_request"}))
            return
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._work(writing, identifier, command, request)
        os.close(writing)
        self._selector.register(reading, selectors.EVENT_READ)
        self._requests[reading] = pid, identifier, bytearray()

    def _work(self, writing: int, identifier: object, command: str, request: str) -> None:
        """Carry out a request in its own process, which always ends here; report a fault on standard error too."""
        try:
            be_killed_after(LONGEST_S)
            status, report = self._answer(command, request)
            _write_all(writing, _line(identifier, status, report))
        except BaseException as error:
            with suppress(OSError):
                _write_all(writing, _line(identifier, 1, _broken(error)))
                sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(0)

    def _collect(self, pipe: int) -> None:
        pid, identifier, output = self._requests[pipe]
        part = os.read(pipe, READ_BYTES)
        output += part
        if part:
            return
        self._selector.unregister(pipe)
        os.close(pipe)
        os.waitpid(pid, 0)
        del self._requests[pipe]
        if not output.endswith(b"\n"):  # it was killed
            output = bytearray(_line(identifier, 1, _broken(ChildProcessError("its process ended without an answer"))))
        self._write(bytes(output))

    def _begin_transfer(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except BlockingIOError:
            return
        with connection:
            pid = os.fork()
            if pid == 0:
                self._run_transfer(connection)
        ended = os.pidfd_open(pid)
        self._transfer_pids[ended] = pid
        self._selector.register(ended, selectors.EVENT_READ)

    def _run_transfer(self, connection: socket.socket) -> None:
        """Do a transfer in this process, which ends here or becomes rsync. The shim waits until `connection` ends."""
        status = 1
        try:
            connection.setblocking(True)
            command, ends, _, _ = socket.recv_fds(connection, len(max(TRANSFERS, key=len)), 3)
            if len(ends) == 3 and command.decode() in TRANSFERS:
                for standard, end in enumerate(ends):
                    os.dup2(end, standard)
                    os.close(end)
                connection.sendall(TAKEN)
                connection.set_inheritable(True)
                status = self._transfer(command.decode())
                connection.sendall(bytes([status]))
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(status)

    def _end_transfer(self, ended: int) -> None:
        self._selector.unregister(ended)
        os.close(ended)
        os.waitpid(self._transfer_pids.pop(ended), 0)

    def _write(self, whole_lines: bytes) -> None:
        """Write lines to the manager, unless it has closed the connection."""
        with suppress(OSError):
            _write_all(self._outgoing, whole_lines)


def _listen(socket_path: Path) -> socket.socket:
    """Listen on a socket that root alone can open. An earlier server keeps its transfers, and gets no new ones."""
    socket_path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listening.bind(str(socket_path))
    finally:
        os.umask(before)
    listening.listen(64)
    listening.setblocking(False)
    return listening


def _line(identifier: object, status: int, report: dict[str, Any]) -> bytes:
    return json.dumps({"id": identifier, "status": status, "report": report}).encode() + b"\n"


def _broken(error: BaseException) -> dict[str, Any]:
    return {"changed": False, "error": f"orion-rental broke: {type(error).__name__}: {error}", "code": "broken"}


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
