"""A token that expires or is revoked, for tests of the connections that it has opened."""

from __future__ import annotations

from support.harness import Harness

from orion.manager.store import tokens

SOON_S = 0.3
"""The lifetime in seconds of a token that expires, and the interval at which connections check it."""


class Short:
    """A token, and the way in which it ends."""

    def __init__(self, harness: Harness, ends_by_itself: bool) -> None:
        self._harness = harness
        self.ends_by_itself = ends_by_itself
        self.token = ""

    @property
    def reason(self) -> str:
        """Return the reason that a connection gives when the token ends it."""
        if self.ends_by_itself:
            return "the time of the token by which it was opened is over"
        return "the token by which it was opened has been revoked"

    async def begins(self, name: str = "short", role: str = "admin") -> str:
        ends_at = self._harness.clock.wall() + SOON_S if self.ends_by_itself else None
        _, self.token = await self._harness.store.write(tokens.create, "admin", name, role, ends_at)
        return self.token

    async def ends(self, name: str = "short") -> None:
        if self.ends_by_itself:
            self._harness.clock.now += SOON_S
        else:
            await self._harness.revoke(name)
