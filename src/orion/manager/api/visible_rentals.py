"""Reading of rentals for a principal, who sees only its own, and waiting until a rental has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from orion import wire
from orion.manager.api import views
from orion.manager.authentication import visible_owner
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.gateway.token_lifetime import TokenUses
from orion.manager.refusals import not_found
from orion.manager.store import rentals
from orion.manager.store.database import Store
from orion.manager.store.tokens import Principal


@dataclass(frozen=True, kw_only=True)
class VisibleRentals:
    store: Store
    clock: TrustedClock
    monotonic: Callable[[], float]
    token_uses: TokenUses
    why_old: Callable[[str, float], str]
    """Returns why the newest snapshot of an active rental, begun at that Unix time, is old; empty if it is not."""

    async def find(self, rental_id: str, principal: Principal) -> views.Row:
        """Return the rental. Raise the same 404 if it does not exist and if the principal may not see it."""
        return await self._read(rental_id, visible_owner(principal))

    async def wait_for(
        self, principal: Principal, rental_id: str, wait_s: float, done: Callable[[views.Row], bool]
    ) -> views.Row:
        """Return the rental when `done` is true of it, or as it is after `wait_s`. Commits wake this; it never polls.

        Raise 401 as soon as the principal's token is over.
        """
        deadline = self.monotonic() + wait_s
        with self.store.news.listen(rental_id) as changed:
            row = await self._read(rental_id, None)
            if done(row) or wait_s <= 0:
                return row
            async with self.token_uses.by(principal) as use:
                use.wakes(changed)
                while True:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(deadline - self.monotonic()):
                            await changed.wait()
                    changed.clear()
                    use.check()
                    row = await self._read(rental_id, None)
                    if done(row) or self.monotonic() >= deadline:
                        return row

    def with_snapshot_problem(self, row: views.Row) -> views.Row:
        """Return the rental with the reason why its newest snapshot is old, unless it has another problem."""
        if row["state"] != wire.RentalState.ACTIVE or row["copy_problem"]:
            return row
        since = row["last_safe_copy_at"] or row["created_at"]
        return {**row, "copy_problem": self.why_old(row["id"], since)}

    async def _read(self, rental_id: str, owner: str | None) -> views.Row:
        row = await self.store.read(rentals.one, rental_id, owner, self.clock.wall_of_removals())
        if row is None:
            raise not_found("rental")
        return self.with_snapshot_problem(row)
