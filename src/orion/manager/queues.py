"""A queue for a limited number of places, which owners share by the rules of domain/fair_share.py."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orion.manager.domain.fair_share import Claim, may_take


class FairQueue:
    """The places, the claims that have them, and the claims that wait."""

    def __init__(self, places: int) -> None:
        """Take the number of places, at least one."""
        self._places = places
        self._taken: Counter[Claim] = Counter()
        self._waiting: list[tuple[Claim, asyncio.Future[None]]] = []

    @property
    def free(self) -> int:
        return self._places - self._taken.total()

    def may(self, claim: Claim) -> bool:
        """Return whether `take` would succeed."""
        return may_take(claim, self._taken, self._places)

    def take(self, claim: Claim) -> bool:
        """Take a place; return False, and take none, if this claim may have none now."""
        if not self.may(claim):
            return False
        self._taken[claim] += 1
        return True

    def give_back(self, claim: Claim) -> None:
        """Free the place, and let waiting claims that may now have one take places."""
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
        """Wait for a place, and keep it during the block."""
        if not self.take(claim):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((claim, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self.give_back(claim)  # the claim got a place while its task was being cancelled
                raise
        try:
            yield
        finally:
            self.give_back(claim)
