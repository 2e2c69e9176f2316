"""The SSH connections that the engine keeps open: one for each worker, to a program that stays at its other end.

`orion-rental serve` answers with one JSON object per line (orion_worker/rpc/server.py), so that an order needs neither
a login nor the start of a program. Each connection is a process of OpenSSH with the worker's pinned host key, and the
master of its control socket, which the other tasks of a playbook use.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import Enum
from functools import partial
from itertools import count
from pathlib import Path
from selectors import EVENT_READ, BaseSelector
from subprocess import PIPE, Popen
from typing import Any

from orion.manager.channel import READ_BYTES, BrokenLine, LineTooLong, SelectorChannel, decode
from orion.manager.messages import HostMessage
from orion.manager.ssh.options import control_path, explained, worker_ssh

MAX_COMPLAINT_BYTES = 1 << 12
OPEN_WITHIN_S = 8.0
"""Seconds from the start of ssh to the first line of the program: more than ssh's own timeout to connect."""
IDLE_S = 900.0
MAX_IDLE = 16
"""The number of connections that stay open though they are idle, so that a small pool never waits for ssh."""
MAX_CONNECTIONS = 128
"""The most connections; beyond that, the one that is idle for the longest time is closed."""
OWN_OPTIONS = ("ControlMaster=yes",)
SERVE = "exec /usr/local/sbin/orion-rental serve"

log = logging.getLogger("orion.engine")

Reply = Callable[[dict[str, Any]], None]
"""A function that takes an answer: `status` and `report`, or only `broken` with the reason."""


class State(Enum):
    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"


class WorkerConnection:
    """One connection to a worker. It calls `changed` when its state changes."""

    def __init__(
        self, *, number: int, host: HostMessage, directory: Path, selector: BaseSelector, changed: Callable[[], None]
    ) -> None:
        self.number = number
        self.host = host
        self.state = State.OPENING
        self.was_open = False
        self.complaint = ""
        """The reason why it is closed, for a person."""
        self.used = self._began = time.monotonic()
        self._selector = selector
        self._changed = changed
        self._pending: dict[int, Reply] = {}
        self._numbers = count(1)
        self._errors = bytearray()
        control_path(host.host(), directory).unlink(missing_ok=True)
        command = [*worker_ssh(host.host(), directory, OWN_OPTIONS), SERVE]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True)
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin and stdout and stderr  # noqa: S101, PT018 - all three are pipes
        for stream in (stdin, stdout, stderr):
            os.set_blocking(stream.fileno(), False)
        self._channel = SelectorChannel(
            selector=selector, reading=stdout, writing=stdin, take=self._take, ended=self._end
        )
        self._stderr = stderr
        selector.register(self._stderr, EVENT_READ, lambda _: self._read_stderr())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def opens_until(self) -> float | None:
        return self._began + OPEN_WITHIN_S if self.state is State.OPENING else None

    @property
    def closed(self) -> bool:
        return self.state is State.CLOSED

    @property
    def idle(self) -> bool:
        return self.state is State.OPEN and not self._pending

    def ask(self, command: str, request: object, reply: Reply) -> None:
        """Send a request. `reply` is called once: with the worker's answer, or with `broken` if the connection ends."""
        if self.state is not State.OPEN:
            reply({"broken": self.complaint or "the connection is not open"})
            return
        self.used = time.monotonic()
        number = next(self._numbers)
        self._pending[number] = reply
        self._channel.send({"id": number, "command": command, "request": request})

    def close(self, reason: str) -> None:
        if self.closed:
            return
        self._read_stderr()
        self.complaint = explained(self._errors.decode(errors="replace")) or reason
        self.state = State.CLOSED
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGKILL)  # Popen.kill would reap the process, which the server does
        self._channel.close()
        with suppress(KeyError):
            self._selector.unregister(self._stderr)
        self._stderr.close()
        for reply in self._pending.values():
            reply({"broken": self.complaint})
        self._pending.clear()
        self._changed()

    def reaped(self, status: int) -> None:
        """Close the connection after its process has ended and was reaped with this status."""
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._channel.drain()
        self.close("the connection was closed")

    def _take(self, _: SelectorChannel, line: bytes) -> None:
        """Take an answer, or the program's first line. Raise BrokenLine for any other line."""
        answer = decode(line)
        if self.state is State.OPENING and answer == {"ready": True}:
            self.state, self.was_open = State.OPEN, True
            self._changed()
            return
        number, status, report = answer.get("id"), answer.get("status"), answer.get("report")
        if [type(one) for one in (number, status, report)] != [int, int, dict] or number not in self._pending:
            raise BrokenLine("not an answer to what was asked")
        self._pending.pop(number)({"status": status, "report": report})

    def _end(self, _: SelectorChannel, error: Exception | None) -> None:
        if isinstance(error, LineTooLong):
            self.close("the worker sent more than an answer may hold")
        elif isinstance(error, BrokenLine):
            self.close("the worker sent an invalid answer")
        else:
            self.close("the connection broke" if error else "the connection was closed")

    def _read_stderr(self) -> None:
        """Read the messages of ssh. Do nothing after the end, when the descriptor may be reused."""
        if self.closed:
            return
        try:
            part = os.read(self._stderr.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        self._errors += part
        del self._errors[:-MAX_COMPLAINT_BYTES]
        if not part:
            with suppress(KeyError):
                self._selector.unregister(self._stderr)


class Connections:
    """The connections to all workers. Call `step` after each event, and when `patience` seconds have passed."""

    def __init__(self, selector: BaseSelector, directory: Path) -> None:
        self._selector = selector
        self._directory = directory
        self._numbers = count(1)
        self._connections: dict[HostMessage, WorkerConnection] = {}
        self._ending: dict[int, WorkerConnection] = {}
        """The connections whose processes are not reaped yet, by pid."""

    def to(self, host: HostMessage) -> WorkerConnection:
        """Return the connection that is open or opening, or a new one. Raise OSError if no process can be started."""
        connection = self._connections.get(host)
        if connection is None:
            self._make_room()
            connection = WorkerConnection(
                number=next(self._numbers),
                host=host,
                directory=self._directory,
                selector=self._selector,
                changed=partial(self._forget_closed, host),
            )
            self._connections[host] = self._ending[connection.pid] = connection
        connection.used = time.monotonic()
        return connection

    def by_number(self, number: int) -> WorkerConnection | None:
        return next((connection for connection in self._connections.values() if connection.number == number), None)

    def drop(self, host: HostMessage, reason: str) -> None:
        if host in self._connections:
            self._connections[host].close(reason)

    def close_all(self) -> None:
        for connection in list(self._connections.values()):
            connection.close("the engine ends")

    @property
    def pids(self) -> Collection[int]:
        return self._ending.keys()

    def reaped(self, pid: int, status: int) -> bool:
        """Return whether the process that ended was that of a connection."""
        if pid not in self._ending:
            return False
        self._ending.pop(pid).reaped(status)
        return True

    def patience(self) -> float | None:
        """Return the seconds until an opening takes too long; None if none is opening."""
        deadlines = [c.opens_until for c in self._connections.values() if c.opens_until is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def step(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections.values()):
            if connection.opens_until is not None and connection.opens_until <= now:
                connection.close("nothing answered in time")
        for connection in self._longest_idle()[: max(0, len(self._connections) - MAX_IDLE)]:
            if connection.used + IDLE_S <= now:
                connection.close("it was not used any more")

    def _make_room(self) -> None:
        for connection in self._longest_idle()[: max(0, len(self._connections) - MAX_CONNECTIONS + 1)]:
            connection.close("others are used more")

    def _longest_idle(self) -> list[WorkerConnection]:
        return sorted((c for c in self._connections.values() if c.idle), key=lambda connection: connection.used)

    def _forget_closed(self, host: HostMessage) -> None:
        if host in self._connections and self._connections[host].closed:
            del self._connections[host]
