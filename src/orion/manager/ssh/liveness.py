"""The liveness connection: one SSH connection to each worker, whose end may prove that its container was killed.

What ends the connection, and what follows:

* The container was killed. Its kernel closes the connection (FIN or RST), and nothing answers at its address any more,
  after perhaps one refusal during the teardown. That is the proof of death.
* sshd, or its process for this connection, was killed or restarted (a renter who uses all memory can cause that). The
  port still answers, if only by refusals, and a new connection is made.
* The network was cut. Nothing arrives, so there is no end and no proof, and the lease decides. The refusals of a
  firewall are no proof either. The manager never causes such an end itself: it sends no keep-alive and never sends
  first, so no other kernel has anything to answer with RST.
* A process was stopped (SIGSTOP, docker pause). Its kernel still accepts connections: no end, no proof.
* The manager itself is cut off or late, so its attempts fail locally or come too late. Then the time starts again.
* The connection was closed and *then* the network was cut. That looks like a death, but the worker lives. Its agent has
  seen the same end (orion_worker/rpc/liveness.py). If a call that it sent at least 0.25 s later was acknowledged, the
  manager has heard it since the end, which voids the proof (domain/health.py). If no call was, all its rentals are
  frozen 1 s after the end, half a second before the proof is complete.
* Another machine answers at the address, with another host key. The worker may be alive and cut off, so this counts as
  a proof only after a real end, and after the same time.
* The same machine answers with another boot id: its container was restarted. Its processes are dead, but its files are
  there. It registers by itself and keeps its rentals, so nothing is taken over.

So the proof is wrong only if a worker's connection is closed, its network is cut, and it cannot stop its processes
within half a second.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import asyncssh

from orion.manager.ssh.port import End, Host, Sign
from orion.manager.ssh.reach import SshReach

COMMAND = "orion-watched"
"""The program on the worker: orion_worker/rpc/liveness.py."""
LAST_MESSAGE = b"end\n"
MAX_BOOT_ID_BYTES = 100
"""Bytes of a boot id that are read at most, because another machine may answer at the address."""
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 1.5
"""Seconds without an answer after the end that prove a death: the agent's LIVENESS_GRACE_S
(orion_worker/agent/decisions.py), and the time that it takes to stop a renter's processes."""
ATTEMPT_EVERY_S = 0.25
LATE_S = 0.25
"""Seconds by which a pause may be longer than planned. After a longer pause, the manager was late."""
PROBE_AT_MOST_S = 15.0
CHANNEL_S = 0.1
LAST_MESSAGE_TIMEOUT_S = 2.0
SILENCE_ERRORS = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH})
"""The errors that mean silence. All other errors, except a refusal, are local ones."""
CLOSED_BY_PEER = (asyncssh.DisconnectError, ConnectionResetError, BrokenPipeError)
MAX_HANDSHAKES = 4
"""Handshakes at a time. Each takes some 5 ms of the processor that also answers heartbeats."""

OnSign = Callable[[Sign], None]


@dataclass
class Silence:
    """How long a worker has not answered. It reads no clock; times are monotonic seconds."""

    since: float
    attempts: int = 0

    def begun(self) -> None:
        self.attempts += 1

    def broken(self, now: float) -> None:
        """Start again, after an acceptance, a refusal, or a local error."""
        self.since, self.attempts = now, 0

    def pause_s(self, now: float) -> float:
        """Return the seconds until the next attempt, or until the silence is long enough, whichever comes first."""
        left_s = self.since + SILENCE_S - now
        return left_s if 0 < left_s < ATTEMPT_EVERY_S else ATTEMPT_EVERY_S

    def proves(self, now: float) -> bool:
        return now - self.since >= SILENCE_S and self.attempts >= SILENCE_S / ATTEMPT_EVERY_S - 2


def breaks_silence(outcome: OSError | None) -> bool:
    """Return whether the outcome of an attempt to connect is not silence. None means that it was accepted."""
    return outcome is None or outcome.errno not in SILENCE_ERRORS


def closed_by_peer(ended: Exception | None) -> bool:
    """Return whether the worker's kernel closed the connection. None means that the manager did.

    A time-out of the manager's kernel (ETIMEDOUT) proves nothing.
    """
    return isinstance(ended, CLOSED_BY_PEER)


@dataclass(eq=False, kw_only=True)
class _Channel:
    """A connection, its channel to the agent, and the future of its end."""

    connection: asyncssh.SSHClientConnection
    process: asyncssh.SSHClientProcess[bytes]
    boot_id: str
    lost: asyncio.Future[Exception | None]


class _Client(asyncssh.SSHClient):
    def __init__(self) -> None:
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(exc)


@dataclass
class SshLiveness:
    """The real `port.Liveness`."""

    reach: SshReach
    _handshakes: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_HANDSHAKES))

    async def hold(self, host: Host, boot_id: str, on_sign: OnSign) -> End:
        channel = await self._connect(host)
        if not isinstance(channel, _Channel) or channel.boot_id != boot_id:
            await _close_with_last_message(channel)
            return End.NOT_HELD
        while True:
            on_sign(Sign.HELD)
            ended = await self._until_closed(channel)
            if not closed_by_peer(ended):
                return End.NOT_HELD
            on_sign(Sign.CLOSED)
            found = await self._probe(host, time.monotonic())
            if isinstance(found, End):
                return found
            if found.boot_id != boot_id:
                await _close_with_last_message(found)
                return End.NOT_HELD
            channel = found

    async def _until_closed(self, channel: _Channel) -> Exception | None:
        """Return what ended the connection; None if the manager ended it, because the program ended or sent more."""
        speaking = asyncio.ensure_future(channel.process.stdout.read(1))
        try:
            await asyncio.wait((channel.lost, speaking), return_when=asyncio.FIRST_COMPLETED)
            # The channels of a connection end at the same moment as the connection.
            await asyncio.wait((channel.lost,), timeout=CHANNEL_S)
        except asyncio.CancelledError:
            await _close_with_last_message(channel)
            raise
        finally:
            speaking.cancel()
        if not channel.lost.done():
            channel.connection.abort()
            return None
        return channel.lost.result()

    async def _probe(self, host: Host, closed_at: float) -> _Channel | End:
        """Return what is at the worker's address now: a new channel to it, or how its liveness connection ended.

        Attempts continue during a handshake, because an sshd that is about to end may still accept a connection.
        """
        silence, attempts = Silence(closed_at), set[asyncio.Task[bool]]()
        handshake: asyncio.Task[_Channel | End] | None = None
        try:
            while time.monotonic() - closed_at < PROBE_AT_MOST_S:
                attempts.add(asyncio.create_task(_attempt(host, silence)))
                await _pause(silence)
                ended = {task for task in attempts if task.done()}
                attempts -= ended
                if handshake is None and any(task.result() for task in ended):
                    handshake = asyncio.create_task(self._connect(host))
                if handshake and handshake.done():
                    found, handshake = handshake.result(), None
                    if found is End.REPLACED:
                        await asyncio.sleep(max(0.0, closed_at + SILENCE_S - time.monotonic()))
                    if found is not End.NOT_HELD:
                        return found
                if silence.proves(time.monotonic()):
                    return End.GONE
            return End.NOT_HELD
        finally:
            await _cancel(*attempts, *([handshake] if handshake else []))

    async def _connect(self, host: Host) -> _Channel | End:
        """Return a new channel to the worker, or why there is none: End.REPLACED or End.NOT_HELD."""
        client = _Client()
        try:
            async with self._handshakes, asyncio.timeout(CONNECT_TIMEOUT_S):
                connection = await self.reach.connect(host, lambda: client)
                try:
                    process = await connection.create_process(COMMAND, encoding=None, stderr=asyncssh.DEVNULL)
                    boot_id = (await process.stdout.read(MAX_BOOT_ID_BYTES)).decode(errors="replace").strip()
                except BaseException:
                    connection.abort()
                    raise
                return _Channel(connection=connection, process=process, boot_id=boot_id, lost=client.lost)
        except asyncssh.HostKeyNotVerifiable:
            return End.REPLACED
        except (OSError, asyncssh.Error, ValueError):
            return End.NOT_HELD


async def _pause(silence: Silence) -> None:
    """Wait until the next attempt, and restart the silence if the manager wakes late."""
    silence.begun()
    began = time.monotonic()
    await asyncio.sleep(silence.pause_s(began))
    if time.monotonic() - began > ATTEMPT_EVERY_S + LATE_S:
        silence.broken(time.monotonic())


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel these tasks, and abort the connection if one of them has made a channel."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, _Channel):
            result.connection.abort()


async def _attempt(host: Host, silence: Silence) -> bool:
    """Open a connection and close it at once; return whether it was accepted, and record the outcome in `silence`."""
    outcome: OSError | None = None
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (host.address, host.port))
        except OSError as error:
            outcome = error
    if breaks_silence(outcome):
        silence.broken(time.monotonic())
    return outcome is None


async def _close_with_last_message(channel: _Channel | End) -> None:
    """Send the last message and close, so that the agent does not take the end for a failure."""
    if isinstance(channel, _Channel):
        # The program ends when the agent has read the message. The connection must stay open until then.
        with suppress(OSError, asyncssh.Error, TimeoutError):
            async with asyncio.timeout(LAST_MESSAGE_TIMEOUT_S):
                channel.process.stdin.write(LAST_MESSAGE)
                channel.process.stdin.write_eof()
                await channel.process.wait_closed()
        channel.connection.abort()
