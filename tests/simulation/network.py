"""The network between workers, proxy and manager: it loses, delays, repeats and reorders messages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import TYPE_CHECKING, Any

from orion_worker.agent.decisions import Answer

if TYPE_CHECKING:
    from simulation.agents import SimulatedContainer
    from simulation.manager import SimulatedManager
    from simulation.world import Simulation

UNREACHABLE = Answer(status=502, body={"code": "manager_unreachable"}, marked=True)
NO_ANSWER = Answer(status=502, body={"code": "manager_no_answer"})
LATEST_S = 25.0
"""The longest delay of a message; longer than any caller waits for an answer."""

Handler = Callable[["SimulatedManager"], Awaitable[Answer]]


class Network:
    """Carries requests and answers."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self._random = Random(f"network {sim.schedule.seed}")
        self.proxy_away = 0
        """The number of faults for which the proxy is away at present."""
        self.bad = 0

    async def call(self, sender: SimulatedContainer | None, handler: Handler, timeout_s: float) -> Answer:
        """Send a request through the proxy to the manager; `sender` None is a client outside."""
        answer: asyncio.Future[Answer] = self._sim.loop.create_future()
        for delay_s in self._delays_s():
            self._sim.loop.call_later(delay_s, self._arrive, sender, handler, answer)
        giving_up = self._sim.loop.call_later(timeout_s, _settle, answer, Answer(status=0, reason="timed out"))
        try:
            return await answer
        finally:
            giving_up.cancel()

    def _arrive(self, sender: SimulatedContainer | None, handler: Handler, answer: asyncio.Future[Answer]) -> None:
        if sender is not None and sender.cut_off:
            return
        if self.proxy_away:
            _settle(answer, Answer(status=0, reason="connection refused"))
        elif self._sim.manager is None:
            _settle(answer, UNREACHABLE)
        else:
            self._sim.manager.spawn(self._serve(self._sim.manager, sender, handler, answer))

    async def _serve(self, manager: Any, sender: Any, handler: Handler, answer: asyncio.Future[Answer]) -> None:
        found = NO_ANSWER  # the proxy's answer when the manager dies meanwhile
        try:
            found = await handler(manager)
        finally:
            for delay_s in self._delays_s()[:1]:
                self._sim.loop.call_later(delay_s, self._return, sender, answer, found)

    def _return(self, sender: SimulatedContainer | None, answer: asyncio.Future[Answer], found: Answer) -> None:
        if not self.proxy_away and not (sender is not None and sender.cut_off):
            _settle(answer, found)

    def _delays_s(self) -> list[float]:
        """Return the delay of each copy of a message; an empty list means that it is lost."""
        random = self._random
        usual_s = 0.001 + 0.02 * random.random()
        if not self.bad:
            return [usual_s]
        chance = random.random()
        if chance < 0.25:
            return []
        if chance < 0.45:
            return [random.uniform(0.0, LATEST_S)]
        if chance < 0.6:
            return [usual_s, random.uniform(0.0, LATEST_S)]
        return [usual_s]


def _settle(answer: asyncio.Future[Answer], found: Answer) -> None:
    if not answer.done():
        answer.set_result(found)
