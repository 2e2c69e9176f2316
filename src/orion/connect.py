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
from orion.errors import (
    ApiError,
    InvalidInput,
    ManagerUnreachable,
    NoAnswer,
    OrionError,
    UnreadableReply,
    no_reply,
    refusal,
)
from orion.login import Login

OPEN_S = 20.0
SAY_EVERY_S = 5.0
"""Seconds between the lines that say why it takes so long. The platform is asked to answer within as many."""
KEEP_TRYING_S = 120.0
"""A worker that falls silent is down after 90 s, one that died after 2 s; then its rental is made elsewhere."""
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
NOTICE = "X-Orion-Notice"
"""A header of the platform: what somebody who comes in should know."""
REMARK = "X-Orion-Remark"
"""The same, of what can wait: it is said at a log-in alone."""
SAID = "ORION_CONNECT_SAID"
"""Set by who has said it already."""
TIDY = (
    "\x1b7\x1b[?1049l"  # leave the alternate screen; where there was none, the cursor stays: it was saved just before
    "\x1b[!p\x1b[0m\x1b>"  # margins, insert mode, cursor keys, cursor, colours, keypad
    "\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1006l"  # reports of mouse and focus
    "\x1b[?2004l\x1b[>4m\x1b[=0u"  # bracketed paste, modified keys, the keyboard protocol of kitty
)
"""Puts a terminal right that a program on a lost connection has left as it was."""


class Lost(OrionError):
    """A session that had begun was lost."""


class NeverBegan(OrionError):
    """The rental left its worker before that had said anything."""


def main(arguments: Sequence[str]) -> int:
    # As the child of ssh we share its terminal: Ctrl-C ends both, without a trace.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        given = list(arguments)
        if given == ["--learn"]:
            ssh_rentals.learn(login.load())
        elif given == ["--unknown"]:
            raise InvalidInput("you have no living rental of this name: orion ls shows those you have")
        elif given and given[0].startswith("--certify="):
            certify(login.load(), _rental_id([given[0].partition("=")[2]]))
        else:
            relay(login.load(), _rental_id(given))
    except Lost as error:
        if REPORT not in os.environ:  # whoever asked for a report goes on from there, and says so itself
            _say(str(error), tidy=True)
        _let_ssh_end()
        return error.exit_code
    except OrionError as error:
        _say(_with_advice(error))
        return error.exit_code
    return 0


def relay(account: Login, rental_id: str) -> None:
    """Carry bytes both ways until one side ends. Raises OrionError."""
    report: dict[str, object] = {"lost": False, "there": False, "reason": ""}
    patience = Patience()
    said_by_ssh = b""
    try:
        while True:
            connection, early = _open(account, rental_id, patience)
            with connection:
                carrier = Carrier(connection, early, said_by_ssh)
                try:
                    report["lost"] = not carrier.run()
                    return
                except NeverBegan as error:
                    patience.wait_after(error)
                    said_by_ssh = carrier.said_by_ssh
                finally:
                    report["there"] = carrier.was_closed
    except OrionError as error:
        report |= {"lost": True, "reason": str(error)}
        raise
    finally:
        if name := os.environ.get(REPORT):
            with suppress(OSError):  # whoever asked for it has gone
                Path(name).write_text(json.dumps(report))


def certify(account: Login, rental_id: str) -> None:
    """Have a certificate for a rental of which this machine has no key. Waits for one that is on the move."""
    patience = Patience()
    wait_s = 0.0
    while True:
        rental = ssh_rentals.look_up(account, rental_id, wait_s)
        state, wait_s = str(rental.get("state")), SAY_EVERY_S
        if state == "active":
            return ssh_rentals.certify(account, rental_id, int(rental.get("epoch") or 0))
        reason = f"the rental is {state}: {rental.get('explanation')}"
        if state not in {"queued", "provisioning", "migrating"}:
            raise OrionError(reason)
        patience.wait_after(OrionError(reason), pause_s=0)


class Patience:
    """Says why it takes so long, at once and from time to time, and raises the reason when it has taken too long."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said, self._said_at = "", 0.0

    def wait_after(self, error: OrionError, pause_s: float = PAUSE_S) -> None:
        """Raise the error if that was the last try."""
        if time.monotonic() - self._began > KEEP_TRYING_S:
            raise error
        self.say(str(error))
        time.sleep(pause_s)

    def say(self, reason: str) -> None:
        now = time.monotonic()
        if reason == self._said and now - self._said_at < SAY_EVERY_S:
            return
        since = f" ({now - self._began:.0f} s)" if self._said else ""
        self._said, self._said_at = reason, now
        _say(f"{reason}; waiting{since}")


def _open(account: Login, rental_id: str, patience: Patience) -> tuple[socket.socket, bytes]:
    """The opened WebSocket, and what has come after its opening. Waits where a little later it may succeed."""
    wait_s = 0.0  # what there is to wait for is said at once
    while True:
        try:
            return _open_once(account, rental_id, wait_s)
        except ApiError as error:
            wait_s = SAY_EVERY_S
            if error.code == "not_active" and error.retry_after_s is not None:
                patience.wait_after(error, pause_s=0)
            elif error.code == "worker_unreachable" or isinstance(error, ManagerUnreachable | NoAnswer):
                patience.wait_after(error)
            else:
                raise


def _open_once(account: Login, rental_id: str, wait_s: float) -> tuple[socket.socket, bytes]:
    key = frames.new_key()
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
    }
    connection = stream.connect(account, OPEN_S)
    try:
        connection.settimeout(OPEN_S + wait_s)
        path = f"/api/rentals/{rental_id}/ssh?wait_s={wait_s:g}"
        head, early = stream.ask(connection, account, path, upgrade)
        if head.status != 101:
            raise refusal(head.status, head, stream.rest_of_refusal(connection, head, early))
        if head.get("sec-websocket-accept") != frames.accept_of(key):
            raise UnreadableReply(f"{account.url} does not take connections to rentals")
        if notice := head.get(NOTICE):
            _say(notice)
        if (remark := head.get(REMARK)) and SAID not in os.environ and _is_log_in():
            _say(remark)
    except OSError as error:
        connection.close()
        raise no_reply(account.url, error) from error
    except OrionError:
        connection.close()
        raise
    return connection, early


class Carrier:
    """One thread for both directions: an SSL connection may be used by no more."""

    def __init__(self, connection: socket.socket, early: bytes, said_before: bytes = b"") -> None:
        """`said_before`: what ssh had said to a worker that never answered."""
        self._connection = connection
        self._incoming = frames.Incoming()
        self.said_by_ssh = said_before
        """Everything, as long as the worker has said nothing."""
        self._has_begun = False
        self._began = time.monotonic()
        self._patience = Patience()
        self._to_send = bytearray(frames.frame(frames.BINARY, said_before) if said_before else b"")
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
        """Until either side has ended; whether that was this side. Raises OrionError where it should not have: Lost
        where something had come from the worker, NeverBegan where nothing had and another may be tried.
        """
        try:
            return self._run()
        except OrionError as error:
            if self._has_begun:
                raise Lost(str(error)) from error
            raise

    def _run(self) -> bool:
        while self._incoming.closed is None or self._to_write:
            if self._reader_gone or self._is_over():
                self._say_goodbye()
                return True
            self._step()
        code, reason = self._incoming.closed
        if code == MOVED:
            said = f"the rental is not on that worker any more: {reason}"
            raise OrionError(said) if self._has_begun else NeverBegan(said)
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
        if not self._has_begun:
            wait_s = min(wait_s, SAY_EVERY_S)
            if now - self._began >= SAY_EVERY_S:
                self._patience.say("its worker does not answer yet")
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
            if not self._has_begun:
                self.said_by_ssh += part
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
                self._has_begun = True
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


def _let_ssh_end() -> None:
    """ssh ends by itself when it reads no more. If nobody read what it still says, it would complain of that."""
    with suppress(OSError):
        os.set_blocking(0, True)
        os.close(1)
        give_up_at = time.monotonic() + LAST_WORD_S
        while (left_s := give_up_at - time.monotonic()) > 0 and select.select([0], [], [], left_s)[0]:
            if not os.read(0, CHUNK_BYTES):
                return


def _say(text: str, tidy: bool = False) -> None:
    """The other side's words must not steer the terminal. `tidy`: put right what was left on it, if ssh has it."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    raw = _is_raw(2)
    start, end = (TIDY if tidy and raw else ""), ("\r\n" if raw else "\n")
    sys.stderr.write(f"{start}orion: {line}{end}")
    sys.stderr.flush()


def _is_log_in() -> bool:
    """Return whether ssh, which has started this, reads from a terminal. scp, sftp, rsync and git give it a pipe.

    Where that cannot be seen nobody is told: what copies files must not be disturbed.
    """
    try:
        reads = Path(f"/proc/{os.getppid()}/fd/0").readlink()
    except OSError:
        return False
    return str(reads).startswith(("/dev/pts/", "/dev/tty", "/dev/console"))


def _is_raw(number: int) -> bool:
    """Return whether it is a terminal that ssh has taken over: then a new line does not begin at the left by itself."""
    import termios  # noqa: PLC0415 - nobody needs it where nothing is said

    try:
        modes = termios.tcgetattr(number)
    except (termios.error, OSError):
        return False
    return not modes[1] & termios.OPOST and not modes[3] & termios.ICANON


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
