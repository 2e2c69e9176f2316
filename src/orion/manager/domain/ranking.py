"""The workers in the order in which rentals are placed on them, updated one change at a time."""

from __future__ import annotations

import heapq
from collections.abc import Container

Rank = tuple[float, int, str]
"""The order of workers in `scheduler.choose`: share of slots in use, number in use, id. The least is first."""


class Ranking:
    """A heap that skips stale entries, and drops them when they are most of it. A change costs O(log n)."""

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        self._heap: list[tuple[Rank, str]] = []

    def put(self, identity: str, rank: Rank | None) -> None:
        """Set the rank of a worker; None: it can take no rental."""
        if rank is None:
            self._ranks.pop(identity, None)
        elif self._ranks.get(identity) != rank:
            self._ranks[identity] = rank
            heapq.heappush(self._heap, (rank, identity))
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [(rank, identity) for identity, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def best(self, number: int, without: Container[str] = ()) -> list[str]:
        """Return the ids of the first `number` workers that are not in `without`."""
        found: list[str] = []
        taken: list[tuple[Rank, str]] = []
        while self._heap and len(found) < number:
            entry = heapq.heappop(self._heap)
            rank, identity = entry
            if self._ranks.get(identity) != rank or (taken and taken[-1] == entry):
                continue
            taken.append(entry)
            if identity not in without:
                found.append(identity)
        for entry in taken:
            heapq.heappush(self._heap, entry)
        return found

    def __len__(self) -> int:
        return len(self._ranks)
