"""The engine's process: `python -m orion.manager.ansible.server`, under a uid of its own.

It listens on a Unix socket for jobs (protocol.py), gives them in batches (pool.py, batches.py) to resident processes
(runners.py) that play them with Ansible (playbook.py), and answers each once, in any order. It keeps the connections to
the workers (connections.py), so that they outlive a run that has to be killed. It has one thread and loads Ansible
once, so that a fork is safe and needs to load nothing.

When the manager's connection closes, its jobs are killed. That is safe: the playbooks are idempotent, and the worker's
program refuses lower epochs and passed deadlines, so a killed run cannot overtake a later one.
"""

from __future__ import annotations

import argparse
import logging
import os
import selectors
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orion.manager import channel
from orion.manager.ansible import runners
from orion.manager.ansible.connections import Connections
from orion.manager.ansible.pool import PATIENCE_S, Pool
from orion.manager.ansible.protocol import ExpectMessage, JobMessage, OutcomeMessage
from orion.manager.ansible.runners import Play
from orion.manager.channel import BrokenLine, LineTooLong, SelectorChannel, decode, decode_as

SOCKET = "/run/orion/engine.sock"
DIRECTORY = "/run/orion/engine"
PLAYBOOKS = "/opt/orion/playbooks"

log = logging.getLogger("orion.engine")


class Server:
    """The loop of the engine: its socket, its runners and its connections to workers."""

    def __init__(
        self,
        *,
        listening: socket.socket,
        play: Play,
        most_runners: int,
        directory: Path,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`directory`: holds the SSH key and the sockets of the connections to workers."""
        self._listening = listening
        self._orders = bind(directory / "held.sock", umask=0o177)
        """The socket through which a runner's tasks use the connections to workers (plugins/connection/orion_held.py).
        Only the engine's own uid can connect."""
        self._selector = selectors.DefaultSelector()
        self._connections = Connections(self._selector, directory)
        self._pool = Pool(
            selector=self._selector,
            play=play,
            most_runners=most_runners,
            connections=self._connections,
            patience_s=patience_s,
        )
        self._stopping = False

    def serve(self) -> None:
        """Serve until SIGTERM or SIGINT, and then kill all children."""
        runners.become_subreaper()
        wakeup, wake = socket.socketpair()
        wakeup.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._selector.register(wakeup, selectors.EVENT_READ, lambda _: wakeup.recv(channel.READ_BYTES))
        self._pool.prepare()
        self._listen(self._orders, self._take_order, lambda task, _: task.close())
        self._listen(self._listening, self._take, self._drop_peer)
        while not self._stopping:
            for key, ready in self._selector.select(self._patience()):
                if key.fd in self._selector.get_map():  # an event before this one may have closed it
                    key.data(ready)
            self._reap()
            self._connections.step()
            self._pool.step()
        self._pool.kill_all()
        self._connections.close_all()
        signal.set_wakeup_fd(-1)

    def _patience(self) -> float | None:
        waits = (self._pool.patience(), self._connections.patience())
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _reap(self) -> None:
        a_runner_ended = False
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if not self._connections.reaped(pid, status):
                    a_runner_ended |= self._pool.reaped(pid)
        if a_runner_ended:
            runners.kill_strays([*self._pool.pids, *self._connections.pids])

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _listen(
        self,
        listening: socket.socket,
        take: Callable[[SelectorChannel, bytes], None],
        ended: Callable[[SelectorChannel, Exception | None], None],
    ) -> None:
        def accept(_: int) -> None:
            with suppress(BlockingIOError):
                accepted, _address = listening.accept()
                accepted.setblocking(False)
                SelectorChannel(selector=self._selector, reading=accepted, writing=accepted, take=take, ended=ended)

        listening.setblocking(False)
        self._selector.register(listening, selectors.EVENT_READ, accept)
        listening.listen(64)

    def _take_order(self, task: SelectorChannel, line: bytes) -> None:
        """Send a task's order over its worker's connection, and answer the task, which sends one order only."""
        order = decode(line)
        connection = self._connections.by_number(order["connection"])
        if connection is None:
            task.send({"broken": "the connection was closed"})
        else:
            connection.ask(order["command"], order["request"], task.send)

    def _take(self, peer: SelectorChannel, line: bytes) -> None:
        with suppress(BrokenLine):
            expected = decode_as(ExpectMessage, line).expect
            try:
                self._connections.to(expected)
            except OSError as error:
                log.warning("the engine cannot start a process: %s", error)
            return
        try:
            job = decode_as(JobMessage, line)
        except BrokenLine as error:
            refusal = f"the engine refused the request: {error}" if error.field else "the request is not valid JSON"
            peer.send(OutcomeMessage(id=_identifier(line), ok=False, message=refusal))
            return
        self._pool.submit(job, peer, peer.send)

    def _drop_peer(self, peer: SelectorChannel, error: Exception | None) -> None:
        if isinstance(error, LineTooLong):
            log.warning("a request was longer than %d bytes: its connection is closed", channel.MAX_LINE_BYTES)
        self._pool.abandon(peer)
        peer.close()


def _identifier(line: bytes) -> str:
    """Return the id of a request that is refused, so that its sender gets the answer."""
    try:
        identifier = decode(line).get("id", "")
    except BrokenLine:
        return ""
    return identifier if isinstance(identifier, str) and len(identifier) <= 64 else ""


def bind(path: Path, umask: int = 0o117) -> socket.socket:
    """Return a socket for the owner and the group, which the directory's setgid bit makes the manager's.

    It does not listen yet, so that no client connects before the engine handles signals.
    """
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(umask)
    listening.bind(str(path))
    os.umask(before)
    return listening


def main() -> None:
    parser = argparse.ArgumentParser(description="Orion-Sec's engine: runs playbooks for the manager.")
    parser.add_argument("--socket", type=Path, default=Path(os.environ.get("ORION_ENGINE_SOCKET", SOCKET)))
    parser.add_argument("--directory", type=Path, default=Path(os.environ.get("ORION_ENGINE_DIRECTORY", DIRECTORY)))
    parser.add_argument("--playbooks", type=Path, default=Path(os.environ.get("ORION_PLAYBOOKS", PLAYBOOKS)))
    parser.add_argument("--runners", type=int, default=max(4, 2 * (os.cpu_count() or 1)))
    arguments = parser.parse_args()
    for descriptor in (0, 1, 2):
        # Another process that shares them may have made them non-blocking (ssh does); then Ansible does not start.
        os.set_blocking(descriptor, True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from orion.manager.ansible import playbook  # noqa: PLC0415 - it reads the environment that is set here

    play = playbook.load(arguments.playbooks, arguments.directory)
    listening = bind(arguments.socket)
    log.info("ready on %s, at most %d runs at once", arguments.socket, arguments.runners)
    try:
        Server(listening=listening, play=play, most_runners=arguments.runners, directory=arguments.directory).serve()
    finally:
        arguments.socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
