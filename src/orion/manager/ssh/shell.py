"""Shells of renters that the manager opens by SSH, for terminals in a browser.

The worker's host key is pinned. The manager logs in as the renter and never as root, with a key that is in memory for
one log-in. The certificate of that key names this rental and epoch, is valid from the manager's address alone, and
expires after a minute.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncssh

from orion.manager.ssh.authority import ED25519, Authority
from orion.manager.ssh.port import Host, Shell, ShellLogin, ShellUnreachable
from orion.manager.ssh.reach import pinned

CERTIFICATE_S = 60.0
OPEN_TIMEOUT_S = 10.0
CLOSED_WITHIN_S = 5.0
TERMINAL = "xterm-256color"
WINDOW_BYTES = 128 << 10
"""Bytes that a worker may send unread, which limits the share of the event loop that one shell takes."""
READ_BYTES = 32 << 10
CIPHERS = ["aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"]
"""AES by the processor first: it takes a third of the time of asyncssh's default cipher."""
ALIVE_EVERY_S, ALIVE_MISSED = 30, 4
"""Seconds between keep-alive messages, and the number of lost ones that end the connection, later than a takeover."""


class SshShells:
    """The real `port.Shells`. `source`: the address from which the manager reaches workers."""

    def __init__(self, authority: Authority, source: str) -> None:
        self._authority = authority
        self._source = source

    async def open(self, host: Host, login: ShellLogin, size: tuple[int, int]) -> Shell:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                return await self._open(host, login, size)
        except asyncssh.HostKeyNotVerifiable as error:
            raise ShellUnreachable("another machine answers in the worker's place") from error
        except asyncssh.PermissionDenied as error:
            raise ShellUnreachable("the worker refuses every log-in to the rental at present") from error
        except asyncssh.ChannelOpenError as error:
            raise ShellUnreachable("the worker starts no shell: has the rental as many processes as it may?") from error
        except (OSError, asyncssh.Error, ValueError) as error:
            raise ShellUnreachable("the worker does not answer") from error

    async def _open(self, host: Host, login: ShellLogin, size: tuple[int, int]) -> Shell:
        keys = [self._credentials(login)]
        more = {"keepalive_interval": ALIVE_EVERY_S, "keepalive_count_max": ALIVE_MISSED, "encryption_algs": CIPHERS}
        connection = await asyncssh.connect(
            host.address, host.port, username=login.username, client_keys=keys, **more, **pinned(host)
        )
        try:
            process = await connection.create_process(
                term_type=TERMINAL, term_size=size, encoding=None, stderr=asyncssh.STDOUT, window=WINDOW_BYTES
            )
        except BaseException:
            connection.abort()
            raise
        return SshShell(connection, process)

    def _credentials(self, login: ShellLogin) -> tuple[Any, Any]:
        key: Any = asyncssh.generate_private_key(ED25519)
        public_key, who = key.export_public_key("openssh").decode(), f"{login.who}, in a browser,"
        line, _ = self._authority.user_certificate(
            public_key, login.rental_id, login.epoch, who, self._source, CERTIFICATE_S
        )
        return key, asyncssh.import_certificate(line)


class SshShell:
    """The real `port.Shell`."""

    def __init__(self, connection: asyncssh.SSHClientConnection, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._connection = connection
        self._process = process

    async def read(self) -> bytes:
        try:
            return await self._process.stdout.read(READ_BYTES)
        except (OSError, asyncssh.Error):
            return b""

    async def write(self, data: bytes) -> None:
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except (OSError, asyncssh.Error):
            return  # reading ends too, and `how_it_ended` gives the reason

    def resize(self, columns: int, rows: int) -> None:
        if not self._process.is_closing():
            self._process.change_terminal_size(columns, rows)

    async def how_it_ended(self) -> str | None:
        try:
            async with asyncio.timeout(CLOSED_WITHIN_S):
                await self._process.wait_closed()
        except TimeoutError:
            return None
        if self._process.exit_signal is not None:
            return f"the shell was ended by the signal {self._process.exit_signal[0]}"
        status = self._process.exit_status
        return None if status is None else "the shell has ended" + (f" with status {status}" if status else "")

    def close(self) -> None:
        self._connection.abort()
