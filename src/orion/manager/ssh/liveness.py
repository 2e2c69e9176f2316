"""One SSH connection to each worker, held for what its end tells: a container that is killed says so by its kernel.

What ends a connection, and what may be made of it:

* The container was killed. Its kernel closes the connection (FIN or RST), and nothing answers there any more: attempts
  to connect stay without an answer, after perhaps a refusal by what was just being taken down. That is the proof.
* sshd, or its process for this connection, was killed or restarted (a renter who eats all memory can bring that about).
  It is closed as well, but the port goes on answering, if only by refusals, and the watch is held again.
* The network was cut (docker network disconnect, a firewall that drops). Nothing comes at all: no end, no proof; the
  lease decides. A firewall that rejects answers with refusals: no proof either. Nor is an end of our own making: no
  keep-alive runs here, and nothing is ever sent first, so no one else's kernel has anything to answer with RST.
* A process was stopped (SIGSTOP, docker pause). Its kernel goes on taking connections: no end, no proof.
* The manager itself is cut off or late. Its own attempts fail at home or come too late: that is not silence of others,
  and the time begins anew.
* The connection was closed and *then* the network was cut: it looks like a death, and the worker lives. Its agent has
  seen the same end (orion_worker/rpc/liveness.py). If a call that it sent 0.25 s later, or later still, was
  acknowledged, the manager has heard it since the end, which voids the proof (domain/health.py). If none was, all its
  rentals stand still 1 s after the end, half a second before the proof is complete.
* Another machine answers at the address, with another host key: the one that was watched has lost it. It may be alive
  and cut off all the same, so this too counts only after a real end, and after the same time.
* The same machine answers with another boot id: its container was restarted. What ran there is dead, its files are not:
  it registers by itself, and keeps its rentals. That is no reason to move them.

So it is wrong about a death only where a worker is closed, cut off, and unable to stop its processes in half a second.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import asyncssh

from orion.manager.ssh.port import End, Host, Sign
from orion.manager.ssh.reach import SshReach

COMMAND = "orion-watched"
"""On the worker: orion_worker/rpc/liveness.py."""
LAST_MESSAGE = b"end\n"
MAX_BOOT_ID_BYTES = 100
"""A boot id. No more is ever read of a worker, which may be anybody's by now."""
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 1.5
"""Unanswered for so long after the end: dead. More than the agent's LIVENESS_GRACE_S (orion_worker/agent/decisions.py),
by what it takes to stop a renter's processes."""
ATTEMPT_EVERY_S = 0.25
LATE_S = 0.25
"""If a pause took so much longer than planned, it was the manager that was silent."""
PROBE_AT_MOST_S = 15.0
CHANNEL_S = 0.1
LAST_MESSAGE_TIMEOUT_S = 2.0
SILENCE_ERRORS = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH})
"""Nobody has that address, or nobody answers there. All other errors but a refusal are our own."""
CLOSED_BY_PEER = (asyncssh.DisconnectError, ConnectionResetError, BrokenPipeError)
MAX_HANDSHAKES = 4
"""Handshakes at a time: each takes some 5 ms of the processor that the heartbeats are answered by."""

OnSign = Callable[[Sign], None]


@dataclass
class Silence:
    """Whether nothing has answered for long enough. Times are monotonic seconds; pure."""

    since: float
    attempts: int = 0

    def begun(self) -> None:
        self.attempts += 1

    def broken(self, now: float) -> None:
        """An acceptance or a refusal, or something that says nothing about the other end: it begins anew."""
        self.since, self.attempts = now, 0

    def pause_s(self, now: float) -> float:
        """Until the next attempt, or until silence alone may prove it, whatever comes first: nobody waits longer."""
        left_s = self.since + SILENCE_S - now
        return left_s if 0 < left_s < ATTEMPT_EVERY_S else ATTEMPT_EVERY_S

    def proves(self, now: float) -> bool:
        return now - self.since >= SILENCE_S and self.attempts >= SILENCE_S / ATTEMPT_EVERY_S - 2


def breaks_silence(outcome: OSError | None) -> bool:
    """Whether the outcome of an attempt to connect speaks against silence; None: it was taken."""
    return outcome is None or outcome.errno not in SILENCE_ERRORS


def closed_by_peer(ended: Exception | None) -> bool:
    """Whether the other end's kernel said so; None: we did. What our own kernel gave up on (ETIMEDOUT) says nothing."""
    return isinstance(ended, CLOSED_BY_PEER)


@dataclass(eq=False)
class _Channel:
    """One connection, its channel to the agent, and how it ends."""

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
    """Implements `port.Watch`."""

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
        """What ended it; None: we did, because the program at the other end ended, or said more than it has to."""
        speaking = asyncio.ensure_future(channel.process.stdout.read(1))
        try:
            await asyncio.wait((channel.lost, speaking), return_when=asyncio.FIRST_COMPLETED)
            # When the connection ends, its channels do in the same moment.
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
        """What is at its address now: the same again, another one, or nobody.

        Attempts go on while a handshake is under way: what took a connection may have been about to end (seen).
        """
        silence, attempts = Silence(closed_at), set[asyncio.Task[bool]]()
        handshake: asyncio.Task[_Channel | End] | None = None
        try:
            while time.monotonic() - closed_at < PROBE_AT_MOST_S:
                attempts.add(asyncio.create_task(_attempt(host, silence)))
                silence.begun()
                began = time.monotonic()
                await asyncio.sleep(silence.pause_s(began))
                if time.monotonic() - began > ATTEMPT_EVERY_S + LATE_S:
                    silence.broken(time.monotonic())
                taken = any(task.done() and task.result() for task in attempts)
                attempts = {task for task in attempts if not task.done()}
                if taken and handshake is None:
                    handshake = asyncio.create_task(self._connect(host))
                if handshake is not None and handshake.done():
                    found, handshake = handshake.result(), None
                    if isinstance(found, _Channel):
                        return found
                    if found is End.REPLACED:
                        await asyncio.sleep(max(0.0, closed_at + SILENCE_S - time.monotonic()))
                        return found
                if silence.proves(time.monotonic()):
                    return End.GONE
            return End.NOT_HELD
        finally:
            left = [*attempts, *([handshake] if handshake else [])]
            for task in left:
                task.cancel()
            for result in await asyncio.gather(*left, return_exceptions=True):
                if isinstance(result, _Channel):
                    result.connection.abort()

    async def _connect(self, host: Host) -> _Channel | End:
        async with self._handshakes:
            client = _Client()
            channel: _Channel | None = None
            connection: asyncssh.SSHClientConnection | None = None
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    connection = await self.reach.connect(host, lambda: client)
                    process = await connection.create_process(COMMAND, encoding=None, stderr=asyncssh.DEVNULL)
                    boot_id = (await process.stdout.read(MAX_BOOT_ID_BYTES)).decode(errors="replace").strip()
                channel = _Channel(connection, process, boot_id, client.lost)
            except asyncssh.HostKeyNotVerifiable:
                return End.REPLACED
            except (OSError, asyncssh.Error, ValueError):
                return End.NOT_HELD
            finally:
                if channel is None and connection is not None:
                    connection.abort()
            return channel


async def _attempt(host: Host, silence: Silence) -> bool:
    """One connection that is closed again at once; whether it was taken. What it met is told to `silence`."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as place:
        place.setblocking(False)
        outcome: OSError | None = None
        try:
            await loop.sock_connect(place, (host.address, host.port))
        except OSError as error:
            outcome = error
        if breaks_silence(outcome):
            silence.broken(time.monotonic())
        return outcome is None


async def _close_with_last_message(channel: _Channel | End) -> None:
    """With the last word, so that the agent does not take it for an end that proves something."""
    if isinstance(channel, _Channel):
        # The program ends when the agent has heard it. To close the connection before that would be the last word.
        with suppress(OSError, asyncssh.Error, TimeoutError):
            async with asyncio.timeout(LAST_MESSAGE_TIMEOUT_S):
                channel.process.stdin.write(LAST_MESSAGE)
                channel.process.stdin.write_eof()
                await channel.process.wait_closed()
        channel.connection.abort()
