"""`orion connect RENTAL_ID`: stdin and stdout become one SSH connection to the rental's worker.

This is ssh's ProxyCommand: the bytes go through a WebSocket to the platform, which relays them to the worker's sshd.
It knows nothing of SSH and decides nothing: ssh itself verifies the worker. It is started for every session, so it
starts fast: the standard library only, and little of that.

Where the rental is on the move it waits for it, and says so. How it ended is written to the file that
ORION_CONNECT_REPORT names, for `orion ssh`, which goes on from there.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orion import frames, login, ssh_rentals, stream
from orion.errors import ApiError, InvalidInput, ManagerUnreachable, OrionError, UnreadableReply, no_reply, refusal
from orion.login import Login

OPEN_S = 20.0
WAIT_S = 50
"""The platform waits for so long for a rental that is queued, being made or on the move."""
KEEP_TRYING_S = 90.0
"""A worker that does not answer is found to be gone, and its rental made elsewhere, within less."""
PAUSE_S = 1.0
CHUNK_BYTES = 1 << 18
MOST_WAITING = 1 << 20
"""Bytes in either direction that were taken and not given on."""
PING_EVERY_S = 20.0
"""Keeps the connection alive in gateways on the way. No answer is no failure: a renter who stops reading (Ctrl-S, a
suspended ssh) also stops the reading of pongs. ssh has its own ServerAliveInterval."""
AFTER_STDIN_S = 5.0
"""A WebSocket cannot be closed in one direction alone. When stdin has ended, what still comes is delivered until
the other side closes, or was silent for so long."""
LAST_WORD_S = 1.0
REPORT = "ORION_CONNECT_REPORT"
MOVED = 4001
"""The platform's close code when the rental left its worker, or its worker it."""


def main(arguments: Sequence[str]) -> int:
    # As the child of ssh we share its terminal: Ctrl-C ends both, without a trace.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if list(arguments) == ["--learn"]:
            ssh_rentals.learn(login.load())
            return 0
        if list(arguments) == ["--unknown"]:
            raise InvalidInput("you have no living rental of this name: orion ls shows those you have")
        rental_id = _rental_id(arguments)
        relay(login.load(), rental_id)
    except OrionError as error:
        _say(_with_advice(error))
        return error.exit_code
    return 0


def relay(account: Login, rental_id: str) -> None:
    """Carry bytes both ways until one side ends. Raises OrionError."""
    report: dict[str, object] = {"lost": False, "there": False, "reason": ""}
    try:
        connection, early = _open(account, rental_id)
        with connection:
            carrier = Carrier(connection, early)
            try:
                report["lost"] = not carrier.run()
            finally:
                report["there"] = carrier.was_closed
    except OrionError as error:
        report |= {"lost": True, "reason": str(error)}
        raise
    finally:
        if name := os.environ.get(REPORT):
            with suppress(OSError):  # whoever asked for it has gone
                Path(name).write_text(json.dumps(report))


def _open(account: Login, rental_id: str) -> tuple[socket.socket, bytes]:
    """The opened WebSocket, and what has come after its opening. Waits where a little later it may succeed."""
    give_up_at = time.monotonic() + KEEP_TRYING_S
    said = ""
    while True:
        try:
            return _open_once(account, rental_id)
        except ApiError as error:
            passing = error.code == "worker_unreachable" or isinstance(error, ManagerUnreachable)
            if not passing or time.monotonic() > give_up_at:
                raise
            if said != str(error):
                said = str(error)
                _say(f"{said}; trying again")
            time.sleep(PAUSE_S)


def _open_once(account: Login, rental_id: str) -> tuple[socket.socket, bytes]:
    key = frames.new_key()
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
    }
    connection = stream.connect(account, OPEN_S)
    try:
        connection.settimeout(OPEN_S + WAIT_S)
        path = f"/api/rentals/{rental_id}/ssh?wait_s={WAIT_S}"
        head, early = stream.ask(connection, account, path, upgrade)
        if head.status != 101:
            raise refusal(head.status, head, stream.rest_of_refusal(connection, head, early))
        if head.get("sec-websocket-accept") != frames.accept_of(key):
            raise UnreadableReply(f"{account.url} does not take connections to rentals")
    except OSError as error:
        connection.close()
        raise no_reply(account.url, error) from error
    except OrionError:
        connection.close()
        raise
    return connection, early


class Carrier:
    """One thread for both directions: an SSL connection may be used by no more."""

    def __init__(self, connection: socket.socket, early: bytes) -> None:
        self._connection = connection
        self._incoming = frames.Incoming()
        self._to_send = bytearray()
        self._to_write = bytearray()
        self._stdin_open = True
        self._reader_gone = False
        self._last_sound = self._last_ping = time.monotonic()
        connection.setblocking(False)
        for number in (0, 1):
            if not os.isatty(number):  # the other end would be changed with it
                os.set_blocking(number, False)
        self._take(early)

    def run(self) -> bool:
        """Until either side has ended; whether that was this side. Raises OrionError where it should not have."""
        while self._incoming.closed is None or self._to_write:
            if self._reader_gone or self._is_over():
                self._say_goodbye()
                return True
            self._step()
        code, reason = self._incoming.closed
        if code == MOVED:
            raise OrionError(f"the rental is not on that worker any more: {reason}")
        if code != frames.NORMAL:
            raise OrionError(reason or "the connection to the rental was cut")
        return not self._stdin_open

    @property
    def was_closed(self) -> bool:
        """By the platform, because of what happened at the rental's worker; else it broke on the way."""
        return self._incoming.closed is not None

    def _is_over(self) -> bool:
        """Nothing more comes from stdin, and for a while nothing came from the other side."""
        return not self._stdin_open and time.monotonic() - self._last_sound >= AFTER_STDIN_S

    def _step(self) -> None:
        """Wait for something, and do it."""
        now = time.monotonic()
        if now - self._last_ping >= PING_EVERY_S:
            self._last_ping = now
            self._to_send += frames.frame(frames.PING, b"")
        wait_s = self._last_ping + PING_EVERY_S - now
        if not self._stdin_open:
            wait_s = min(wait_s, self._last_sound + AFTER_STDIN_S - now)
        poll = select.poll()
        for number, events in self._wanted().items():
            poll.register(number, events)
        ready = {number for number, _ in poll.poll(max(0.0, wait_s) * 1000 + 1)}
        if 0 in ready:
            self._read_stdin()
        if 1 in ready:
            self._write_stdout()
        self._receive()
        self._send()

    def _wanted(self) -> dict[int, int]:
        of_connection = 0
        if self._incoming.closed is None and len(self._to_write) < MOST_WAITING:
            of_connection |= select.POLLIN
        if self._to_send:
            of_connection |= select.POLLOUT
        wanted = {self._connection.fileno(): of_connection} if of_connection else {}
        if self._stdin_open and len(self._to_send) < MOST_WAITING:
            wanted[0] = select.POLLIN
        # Without an event asked for, the end of its reader is told all the same.
        wanted[1] = select.POLLOUT if self._to_write else 0
        return wanted

    def _read_stdin(self) -> None:
        try:
            part = os.read(0, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if part:
            self._to_send += frames.frame(frames.BINARY, part)
        else:
            self._stdin_open, self._last_sound = False, time.monotonic()

    def _write_stdout(self) -> None:
        """Where it is ready without anything to write, nobody reads it any more."""
        try:
            if self._to_write:
                del self._to_write[: os.write(1, self._to_write[:CHUNK_BYTES])]
            else:
                self._reader_gone = True
        except BlockingIOError:
            pass
        except OSError:
            self._reader_gone = True

    def _written(self, content: bytes) -> int:
        """How much of it stdout took at once, without a copy."""
        try:
            return os.write(1, content)
        except BlockingIOError:
            return 0
        except OSError:
            self._reader_gone = True
            return len(content)

    def _receive(self) -> None:
        while self._incoming.closed is None and len(self._to_write) < MOST_WAITING:
            try:
                part = self._connection.recv(CHUNK_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if _is_tls_waiting(error):
                    return
                raise OrionError("the connection to the platform broke") from error
            if not part:
                raise OrionError("the connection to the platform was cut")
            self._take(part)

    def _take(self, part: bytes) -> None:
        try:
            for content in self._incoming.feed(part):
                self._to_write += content if self._to_write else content[self._written(content) :]
                self._last_sound = time.monotonic()
        except frames.ProtocolError as error:
            raise UnreadableReply(str(error)) from error
        for answer in self._incoming.to_answer:
            self._to_send += answer
        self._incoming.to_answer.clear()

    def _send(self) -> None:
        while self._to_send:
            try:
                del self._to_send[: self._connection.send(self._to_send[:CHUNK_BYTES])]
            except BlockingIOError:
                return
            except OSError as error:
                if _is_tls_waiting(error):
                    return
                self._to_send.clear()  # what it said last is still to be read, and says why

    def _say_goodbye(self) -> None:
        """What ssh said last is still sent."""
        if self._stdin_open and not os.isatty(0):
            self._read_stdin()
        with suppress(OSError):
            self._connection.settimeout(LAST_WORD_S)
            self._connection.sendall(bytes(self._to_send) + frames.closing())


def _is_tls_waiting(error: OSError) -> bool:
    return type(error).__name__ in {"SSLWantReadError", "SSLWantWriteError"}


def _with_advice(error: OrionError) -> str:
    """What ssh knew of this rental may be of yesterday: its name may be another's now."""
    gone = isinstance(error, ApiError) and error.status in {404, 409}
    if gone and ssh_rentals.learn_again():
        return f"{error}. What ssh knows of your rentals was renewed: if another has its name now, try again"
    return str(error)


def _rental_id(arguments: Sequence[str]) -> str:
    if len(arguments) != 1 or not re.fullmatch(r"[a-z0-9-]{1,64}", arguments[0]):
        raise InvalidInput("usage: orion connect RENTAL_ID (it is what ssh runs: see orion config-ssh)")
    return arguments[0]


def _say(text: str) -> None:
    """The other side's words must not steer the terminal."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    print(f"orion: {line}", file=sys.stderr, flush=True)  # noqa: T201 - this is a program


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
