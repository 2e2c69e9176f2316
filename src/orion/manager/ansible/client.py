"""The client of the engine: many jobs over one connection to the engine's process."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from orion.manager.ansible.port import Job, Outcome
from orion.manager.ansible.protocol import ExpectMessage, OutcomeMessage, job_message
from orion.manager.channel import MAX_LINE_BYTES, AsyncChannel, Message, decode_as
from orion.manager.messages import HostMessage
from orion.manager.ssh.port import Host, Reach, Reached

MARGIN_S = 10.0
"""Seconds after a job's deadline at which the engine's process counts as hung."""
EXPECT_WITHIN_S = 1.0
"""Seconds that `expect` may take, so that a worker that was reached does not wait for an engine that is down."""
ANSWER_BYTES = 4 * MAX_LINE_BYTES
FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 1.0

RESTARTED = Outcome(ok=False, message="the engine was restarted")

log = logging.getLogger(__name__)


class AnsibleEngine:
    """Implements `port.Engine`. It connects at the first job, and again when the process was restarted.

    A job is always answered within its deadline and `margin_s`.
    """

    def __init__(self, socket_path: Path, margin_s: float = MARGIN_S) -> None:
        self._socket_path = socket_path
        self._margin_s = margin_s
        self._identifiers = count(1)
        self._connecting = asyncio.Lock()
        self._connection: EngineConnection | None = None

    async def run(self, job: Job) -> Outcome:
        identifier = str(next(self._identifiers))
        try:
            line = job_message(identifier, job)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            return Outcome(ok=False, message=f"not a job for the engine: {place}: {first['msg']}")
        try:
            async with asyncio.timeout(job.deadline_s + self._margin_s):
                return await (await self._connected()).ask(identifier, line)
        except TimeoutError:
            return Outcome(ok=False, message="the engine did not answer in time")

    async def expect(self, host: Host) -> None:
        """Ask the engine to open its connection to this worker, because orders will follow. Ignore failures."""
        try:
            async with asyncio.timeout(EXPECT_WITHIN_S):
                await (await self._connected()).send(ExpectMessage(expect=HostMessage.of(host)))
        except (TimeoutError, ValidationError) as error:
            log.warning("the engine was not asked to connect to %s in advance: %s", host.worker_id, error)

    async def close(self) -> None:
        """Close the connection. The engine kills the running jobs, which return RESTARTED."""
        if self._connection:
            await self._connection.close()

    async def _connected(self) -> EngineConnection:
        async with self._connecting:
            pause = FIRST_RETRY_S
            while self._connection is None or self._connection.broken:
                try:
                    self._connection = EngineConnection(await AsyncChannel.connect(self._socket_path, ANSWER_BYTES))
                except OSError as error:
                    log.warning("the engine cannot be reached at %s: %s", self._socket_path, error)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_RETRY_S)
            return self._connection


@dataclass
class ReachedAndExpected:
    """Implements `port.Reach` by another one, and has the engine connect to each worker that was reached."""

    by: Reach
    engine: AnsibleEngine

    async def reach(self, host: Host, timeout_s: float) -> Reached:
        reached = await self.by.reach(host, timeout_s)
        if reached is Reached.YES:
            await self.engine.expect(host)
        return reached


class EngineConnection:
    """One connection to the engine. Answers come in any order; if it breaks, all waiting jobs return RESTARTED."""

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel
        self._pending: dict[str, asyncio.Future[Outcome]] = {}
        self._reading = asyncio.create_task(self._read(), name="engine answers")

    @property
    def broken(self) -> bool:
        return self._reading.done()

    async def ask(self, identifier: str, line: Message) -> Outcome:
        if self.broken:
            return RESTARTED
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._pending[identifier] = answer
        try:
            await self.send(line)
            return await answer
        finally:
            del self._pending[identifier]

    async def send(self, line: Message) -> None:
        with suppress(ConnectionError):  # then reading ends too, and answers the waiting jobs
            await self._channel.send(line)

    async def close(self) -> None:
        self._reading.cancel()
        with suppress(asyncio.CancelledError):
            await self._reading

    async def _read(self) -> None:
        try:
            while (line := await self._channel.receive()) is not None:
                outcome = decode_as(OutcomeMessage, line)
                answer = self._pending.get(outcome.id)
                if answer is None:
                    log.warning("the engine answered a job that has ended: %s", outcome.message)
                elif not answer.done():
                    answer.set_result(Outcome(outcome.ok, outcome.message, outcome.report))
        except (OSError, ValueError) as error:
            log.warning("the connection to the engine broke: %s", error)
        finally:
            self._channel.close()
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_result(RESTARTED)
