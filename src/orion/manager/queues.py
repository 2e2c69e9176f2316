"""The places of a queue, shared as domain/fair_share.py says. Whoever waits gets one in order of arrival, if it may."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orion.manager.domain.fair_share import Claim, may_take


class FairQueue:
    def __init__(self, places: int) -> None:
        """`places`: how many may be taken at a time, one at least."""
        self._places = places
        self._taken: Counter[Claim] = Counter()
        self._waiting: list[tuple[Claim, asyncio.Future[None]]] = []

    @property
    def free(self) -> int:
        """Return how many places are not taken."""
        return self._places - self._taken.total()

    def may(self, claim: Claim) -> bool:
        """Return whether `take` would take a place."""
        return may_take(claim, self._taken, self._places)

    def take(self, claim: Claim) -> bool:
        """Take a place; return False, and take none, where this claim may have none now."""
        if not self.may(claim):
            return False
        self._taken[claim] += 1
        return True

    def give_back(self, claim: Claim) -> None:
        """Let whoever waits have the place."""
        self._taken[claim] -= 1
        self._taken += Counter()
        waiting, self._waiting = self._waiting, []
        for other, turn in waiting:
            if not turn.done() and self.take(other):
                turn.set_result(None)
            elif not turn.done():
                self._waiting.append((other, turn))

    @asynccontextmanager
    async def place(self, claim: Claim) -> AsyncIterator[None]:
        """Have a place for the length of a block; wait until this claim may have one."""
        if not self.take(claim):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((claim, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self.give_back(claim)  # its turn came as it was given up
                raise
        try:
            yield
        finally:
            self.give_back(claim)
