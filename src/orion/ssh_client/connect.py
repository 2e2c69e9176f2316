"""`orion connect RENTAL_ID`: the ProxyCommand of ssh, which connects stdin and stdout to the rental's worker.

The bytes pass through a WebSocket to the platform, which relays them to the worker's sshd; ssh itself verifies the
worker. ssh starts this program for every session, so it loads only a small part of the standard library. While the
rental is queued or migrating, it waits and says so. At its end it writes a report for `orion ssh` (see REPORT).
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

from orion import errors, login
from orion.errors import ApiError, InvalidInput, OrionError, UnreadableReply
from orion.login import Login
from orion.ssh_client import frames, hosts, stream

OPEN_S = 20.0  # seconds for each step of opening a connection
SAY_EVERY_S = 5.0  # seconds between two lines about the reason for waiting, and for which one request waits
KEEP_TRYING_S = 120.0  # seconds to wait for a rental: a takeover begins 90 s after its worker falls silent, or sooner
PAUSE_S = 1.0  # seconds between two attempts to reach a worker
CHUNK_BYTES = 1 << 18  # bytes that are read or written at once, at most
MAX_BUFFERED = 1 << 20  # bytes that are buffered in each direction before reading pauses
PING_EVERY_S = 20.0
"""Seconds between two pings, which keep the connection alive in gateways. A missing pong is no failure: when a renter
stops reading (Ctrl-S), pongs are not read either. ssh detects a dead worker by its own ServerAliveInterval."""
AFTER_STDIN_S = 5.0
"""Seconds of silence after which a session ends whose stdin has ended. The worker does not learn of that end, as a
WebSocket cannot be closed in one direction alone, and its output is delivered until then."""
LAST_WORD_S = 1.0  # seconds to wait for the last bytes to leave, or for ssh to end
REPORT = "ORION_CONNECT_REPORT"  # the variable that names the file for the report on how the session ended
MOVED = 4001  # the platform's close code for a rental that left its worker, or whose worker is down
NOTICE = "X-Orion-Notice"  # the platform's header with a notice for everybody who opens a session
REMARK = "X-Orion-Remark"  # the platform's header with a remark that is shown at interactive log-ins only
SAID = "ORION_CONNECT_SAID"  # the variable that `orion ssh` sets because it has shown the remark itself
TIDY = (
    "\x1b7\x1b[?1049l"  # save the cursor and leave the alternate screen; without one, that only restores the cursor
    "\x1b[!p\x1b[0m\x1b>"  # margins, insert mode, cursor keys, cursor, colours, keypad
    "\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1006l"  # reports of mouse and focus
    "\x1b[?2004l\x1b[>4m\x1b[=0u"  # bracketed paste, modified keys, the keyboard protocol of kitty
)
"""Escape sequences that reset a terminal after a program on it lost its connection."""


class Lost(OrionError):
    """The error for a session that is lost after the worker sent something."""


class NeverBegan(OrionError):
    """The error for a rental that left its worker before the worker sent anything."""


def main(arguments: Sequence[str]) -> int:
    """Run the program and return its exit status."""
    # ssh and this program share a terminal: Ctrl-C ends both, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        given = list(arguments)
        if given == ["--learn"]:
            hosts.learn(login.load())
        elif given == ["--unknown"]:
            raise InvalidInput("you have no living rental of this name. List your rentals with: orion ls")
        elif given and given[0].startswith("--certify="):
            certify(login.load(), _rental_id([given[0].partition("=")[2]]))
        else:
            relay(login.load(), _rental_id(given))
    except Lost as error:
        if REPORT not in os.environ:  # `orion ssh`, which asks for a report, tells the user itself
            _say(str(error), tidy=True)
        _let_ssh_end()
        return error.exit_code
    except OrionError as error:
        _say(_with_advice(error))
        return error.exit_code
    return 0


def relay(account: Login, rental_id: str) -> None:
    """Carry bytes in both directions until one side ends. Raise OrionError."""
    report: dict[str, object] = {"lost": False, "there": False, "reason": ""}
    patience, sent_by_ssh = Patience(), b""
    try:
        while True:
            connection, early = _open(account, rental_id, patience)
            with connection:
                carrier = Carrier(connection, early, sent_by_ssh)
                try:
                    report["lost"] = not carrier.run()
                    return
                except NeverBegan as error:
                    patience.wait_after(error)
                    sent_by_ssh = carrier.sent_by_ssh
                finally:
                    # If the platform closed the connection, the worker is lost; else the way to the platform broke.
                    report["there"] = carrier.incoming.closed is not None
    except OrionError as error:
        report |= {"lost": True, "reason": str(error)}
        raise
    finally:
        if name := os.environ.get(REPORT):
            with suppress(OSError):  # the folder is gone if `orion ssh` has ended
                Path(name).write_text(json.dumps(report))


def certify(account: Login, rental_id: str) -> None:
    """Get a certificate for a rental whose key this machine does not have. Wait while it is queued or migrating."""
    patience, wait_s = Patience(), 0.0
    while True:
        rental = hosts.look_up(account, rental_id, wait_s)
        state, wait_s = str(rental.get("state")), SAY_EVERY_S
        if state == "active":
            return hosts.certify(account, rental_id, int(rental.get("epoch") or 0))
        reason = f"the rental is {state}: {rental.get('explanation')}"
        if state not in {"queued", "provisioning", "migrating"}:
            raise OrionError(reason)
        patience.wait_after(OrionError(reason), pause_s=0)


class Patience:
    """The waiting for a rental, with its reasons for the user and its end after KEEP_TRYING_S."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said, self._said_at = "", 0.0

    def wait_after(self, error: OrionError, pause_s: float = PAUSE_S) -> None:
        """Tell the user the error and pause. Raise the error instead if KEEP_TRYING_S are over."""
        if time.monotonic() - self._began > KEEP_TRYING_S:
            raise error
        self.say(str(error))
        time.sleep(pause_s)

    def say(self, reason: str) -> None:
        """Tell the user the reason, at once if it is a new one, else every SAY_EVERY_S."""
        now = time.monotonic()
        if reason == self._said and now - self._said_at < SAY_EVERY_S:
            return
        since = f" ({now - self._began:.0f} s)" if self._said else ""
        self._said, self._said_at = reason, now
        _say(f"{reason}; waiting{since}")


def _open(account: Login, rental_id: str, patience: Patience) -> tuple[socket.socket, bytes]:
    """Return the opened WebSocket and the first bytes after its opening. Wait while the rental is not active."""
    wait_s = 0.0  # the first answer comes at once, so that the user soon reads the reason
    while True:
        try:
            return _open_once(account, rental_id, wait_s)
        except ApiError as error:
            wait_s = SAY_EVERY_S
            if error.code == "not_active" and error.retry_after_s is not None:
                patience.wait_after(error, pause_s=0)
            elif error.code == "worker_unreachable" or isinstance(error, errors.ManagerUnreachable | errors.NoAnswer):
                patience.wait_after(error)
            else:
                raise


def _open_once(account: Login, rental_id: str, wait_s: float) -> tuple[socket.socket, bytes]:
    key = frames.new_key()
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key}
    connection = stream.connect(account, OPEN_S)
    try:
        connection.settimeout(OPEN_S + wait_s)
        path = f"/api/rentals/{rental_id}/ssh?wait_s={wait_s:g}"
        head, early = stream.ask(connection, account, path, upgrade)
        if head.status != 101:
            raise errors.refusal(head.status, head, stream.rest_of_refusal(connection, head, early))
        if head.get("sec-websocket-accept") != frames.accept_of(key):
            raise UnreadableReply(f"{account.url} does not take connections to rentals")
        if notice := head.get(NOTICE):
            _say(notice)
        if (remark := head.get(REMARK)) and SAID not in os.environ and _is_log_in():
            _say(remark)
    except OSError as error:
        connection.close()
        raise errors.no_reply(account.url, error) from error
    except OrionError:
        connection.close()
        raise
    return connection, early


class Carrier:
    """The carrier of one connection's bytes in both directions, in one thread as an SSL connection demands."""

    def __init__(self, connection: socket.socket, early: bytes, sent_before: bytes = b"") -> None:
        """Take over the connection and send `sent_before`: the bytes of ssh that an earlier worker never answered."""
        self._connection = connection
        self.incoming = frames.Incoming()
        self.sent_by_ssh = sent_before  # all bytes that ssh has sent, until the worker sends its first ones
        self._has_begun = False
        self._began = time.monotonic()
        self._patience = Patience()
        self._to_send = bytearray(frames.frame(frames.BINARY, sent_before) if sent_before else b"")
        self._to_write = bytearray()
        self._stdin_open = True
        self._reader_gone = False
        self._last_received = self._last_ping = time.monotonic()
        connection.setblocking(False)
        for number in (0, 1):
            if not os.isatty(number):  # a terminal is shared with other programs, which do not expect this mode
                os.set_blocking(number, False)
        self._take(early)

    def run(self) -> bool:
        """Carry bytes until either side ends, and return whether this side did.

        Raise Lost if the connection broke after the worker sent something; before that, raise NeverBegan if the rental
        left the worker, and another OrionError otherwise.
        """
        try:
            while self.incoming.closed is None or self._to_write:
                is_over = not self._stdin_open and time.monotonic() - self._last_received >= AFTER_STDIN_S
                if self._reader_gone or is_over:
                    self._close()
                    return True
                self._step()
            code, reason = self.incoming.closed
            if code == MOVED:
                raise NeverBegan(f"the rental is not on that worker any more: {reason}")
            if code != frames.NORMAL:
                raise OrionError(reason or "the connection to the rental was cut")
            return not self._stdin_open
        except OrionError as error:
            if self._has_begun:
                raise Lost(str(error)) from error
            raise

    def _step(self) -> None:
        """Wait until bytes can be read or written, and carry them."""
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
            wait_s = min(wait_s, self._last_received + AFTER_STDIN_S - now)
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
        """Return the events to wait for, by file descriptor."""
        may_read = self.incoming.closed is None and len(self._to_write) < MAX_BUFFERED
        of_connection = (select.POLLIN if may_read else 0) | (select.POLLOUT if self._to_send else 0)
        wanted = {self._connection.fileno(): of_connection} if of_connection else {}
        if self._stdin_open and len(self._to_send) < MAX_BUFFERED:
            wanted[0] = select.POLLIN
        # poll() reports that the reader of stdout has gone even if no event is asked for.
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
                self.sent_by_ssh += part
        else:
            self._stdin_open, self._last_received = False, time.monotonic()

    def _write_stdout(self) -> None:
        """Write buffered bytes to stdout. If there are none, poll() woke us because the reader has gone."""
        try:
            if self._to_write:
                del self._to_write[: os.write(1, self._to_write[:CHUNK_BYTES])]
            else:
                self._reader_gone = True
        except BlockingIOError:
            pass
        except OSError:
            self._reader_gone = True

    def _write_at_once(self, content: bytes) -> int:
        """Write to stdout without copying into the buffer, and return the number of bytes that were written."""
        try:
            return os.write(1, content)
        except BlockingIOError:
            return 0
        except OSError:
            self._reader_gone = True
            return len(content)

    def _receive(self) -> None:
        while self.incoming.closed is None and len(self._to_write) < MAX_BUFFERED:
            try:
                part = self._connection.recv(CHUNK_BYTES)
            except OSError as error:
                if _must_wait(error):
                    return
                raise OrionError("the connection to the platform broke") from error
            if not part:
                raise OrionError("the connection to the platform was cut")
            self._take(part)

    def _take(self, part: bytes) -> None:
        for content in self.incoming.feed(part):
            self._to_write += content if self._to_write else content[self._write_at_once(content) :]
            self._last_received = time.monotonic()
            self._has_begun = True
        self._to_send += b"".join(self.incoming.to_answer)
        self.incoming.to_answer.clear()

    def _send(self) -> None:
        while self._to_send:
            try:
                del self._to_send[: self._connection.send(self._to_send[:CHUNK_BYTES])]
            except OSError as error:
                if _must_wait(error):
                    return
                self._to_send.clear()  # the platform's close frame, which has the reason, can still be read

    def _close(self) -> None:
        """Send the last bytes of ssh and a close frame."""
        if self._stdin_open and not os.isatty(0):
            self._read_stdin()
        with suppress(OSError):
            self._connection.settimeout(LAST_WORD_S)
            self._connection.sendall(bytes(self._to_send) + frames.closing())


def _must_wait(error: OSError) -> bool:
    return type(error).__name__ in {"BlockingIOError", "SSLWantReadError", "SSLWantWriteError"}


def _with_advice(error: OrionError) -> str:
    """Return the error's text. If the rental is gone, update ssh's configuration: another may have its name now."""
    gone = isinstance(error, ApiError) and error.status in {404, 409}
    if gone and hosts.learn_again():
        return f"{error}. The list of your rentals for ssh was updated: if another rental has the name now, try again"
    return str(error)


def _rental_id(arguments: Sequence[str]) -> str:
    if len(arguments) != 1 or not re.fullmatch(r"[a-z0-9-]{1,64}", arguments[0]):
        raise InvalidInput("usage: orion connect RENTAL_ID (ssh runs this command, see orion config-ssh)")
    return arguments[0]


def _let_ssh_end() -> None:
    """Close stdout, so that ssh ends, and read its last bytes, so that it does not complain about a broken pipe."""
    with suppress(OSError):
        os.set_blocking(0, True)
        os.close(1)
        give_up_at = time.monotonic() + LAST_WORD_S
        while (left_s := give_up_at - time.monotonic()) > 0 and select.select([0], [], [], left_s)[0]:
            if not os.read(0, CHUNK_BYTES):
                return


def _say(text: str, tidy: bool = False) -> None:
    """Write a line to stderr without control characters of the server. `tidy` also resets a terminal that ssh uses."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    start, end = (TIDY if tidy else "", "\r\n") if _is_raw(2) else ("", "\n")
    sys.stderr.write(f"{start}orion: {line}{end}")
    sys.stderr.flush()


def _is_log_in() -> bool:
    """Return whether ssh, our parent, surely reads from a terminal. scp, sftp, rsync and git give it a pipe."""
    try:
        reads = Path(f"/proc/{os.getppid()}/fd/0").readlink()
    except OSError:
        return False
    return str(reads).startswith(("/dev/pts/", "/dev/tty", "/dev/console"))


def _is_raw(number: int) -> bool:
    """Return whether this is a terminal in raw mode, as ssh sets it, in which a line feed needs a carriage return."""
    import termios  # noqa: PLC0415 - only a message needs this module

    try:
        modes = termios.tcgetattr(number)
    except (termios.error, OSError):
        return False
    return not modes[1] & termios.OPOST and not modes[3] & termios.ICANON
