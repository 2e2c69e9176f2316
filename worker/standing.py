"""A program that stays at the other end of one SSH connection, so that an order costs neither a login nor a start.

Requests come one a line, `{"id": 1, "command": "run", "request": {...}}`, answers go one a line,
`{"id": 1, "status": 0, "report": {...}}`, in the order in which they are ready. The first line, `{"ready": true}`, says
that it listens. Each request is answered by a process of its own, so that one that takes long, or breaks, is no other's
trouble. When the connection ends, what is at work goes on to its end: an order is void by its epoch and its deadline,
not by who still listens.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

MOST_AT_ONCE = 16
"""More requests than so many wait in the connection."""
MAX_LINE_BYTES = 1 << 20
READ_BYTES = 1 << 16

Answer = Callable[[str, str], tuple[int, dict[str, Any]]]


def serve(answer: Answer, commands: Collection[str], incoming: int, outgoing: int) -> None:
    """Until `incoming` ends and all that was asked is answered. `answer`: the status and the report of a command."""
    _Standing(answer, commands, incoming, outgoing).run()


class _Standing:
    def __init__(self, answer: Answer, commands: Collection[str], incoming: int, outgoing: int) -> None:
        self._answer = answer
        self._commands = commands
        self._incoming = incoming
        self._outgoing = outgoing
        self._selector = selectors.DefaultSelector()
        self._received = b""
        self._ended = False
        self._at_work: dict[int, tuple[int, object, bytearray]] = {}
        """By the pipe to its process: that process, the id of its request, and what it has said."""

    def run(self) -> None:
        gc.freeze()  # what the forks share stays shared
        self._selector.register(self._incoming, selectors.EVENT_READ)
        self._write(b'{"ready": true}\n')
        while not self._ended or self._at_work:
            for key, _ in self._selector.select():
                if key.fd == self._incoming:
                    self._read()
                else:
                    self._collect(key.fd)
            self._start_what_waits()

    def _read(self) -> None:
        part = os.read(self._incoming, READ_BYTES)
        self._received += part
        if not part or (len(self._received) > MAX_LINE_BYTES and b"\n" not in self._received):
            self._selector.unregister(self._incoming)
            self._ended = True

    def _start_what_waits(self) -> None:
        while len(self._at_work) < MOST_AT_ONCE and b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            self._start(line)

    def _start(self, line: bytes) -> None:
        try:
            asked = json.loads(line)
            identifier, command, request = asked["id"], asked["command"], json.dumps(asked["request"])
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
        self._at_work[reading] = pid, identifier, bytearray()

    def _work(self, writing: int, identifier: object, command: str, request: str) -> None:
        """In a process of its own, which ends here whatever happens; what breaks is told on stderr."""
        try:
            status, report = self._answer(command, request)
            _write_all(writing, _line(identifier, status, report))
        except BaseException as error:
            with suppress(OSError):
                _write_all(writing, _line(identifier, 1, _broken(error)))
                sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(0)

    def _collect(self, pipe: int) -> None:
        pid, identifier, said = self._at_work[pipe]
        part = os.read(pipe, READ_BYTES)
        said += part
        if part:
            return
        self._selector.unregister(pipe)
        os.close(pipe)
        os.waitpid(pid, 0)
        del self._at_work[pipe]
        if not said.endswith(b"\n"):  # it was killed
            said = bytearray(_line(identifier, 1, _broken(ChildProcessError("its process ended without an answer"))))
        self._write(bytes(said))

    def _write(self, whole_lines: bytes) -> None:
        """Nobody may be there any more to read it."""
        with suppress(OSError):
            _write_all(self._outgoing, whole_lines)


def _line(identifier: object, status: int, report: dict[str, Any]) -> bytes:
    return json.dumps({"id": identifier, "status": status, "report": report}).encode() + b"\n"


def _broken(error: BaseException) -> dict[str, Any]:
    return {"changed": False, "error": f"orion-rental broke: {type(error).__name__}: {error}", "code": "broken"}


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
