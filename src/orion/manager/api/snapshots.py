"""The copies of a rental's files: which there are, and beginning again with one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends

from orion import wire
from orion.manager.api import views
from orion.manager.api.contract import refusals
from orion.manager.api.services import Client, given
from orion.manager.api.visible_rentals import VisibleRentals
from orion.manager.domain.snapshots import EMPTY, SnapshotId
from orion.manager.gateway.token_lifetime import TokenUses
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.store import snapshots
from orion.manager.store.database import Store

router = APIRouter(prefix="/api", tags=["rentals"])

COPY_WITHIN_S = 40.0
"""Less than the proxy waits for an answer."""
_REFUSALS = {
    "ended": "the rental is ending or has ended",
    "no_such_snapshot": "that copy has made room for later ones meanwhile: orion snapshots lists those that are kept",
    "not_active_yet": "the rental was never active, so there is nothing to restore",
}


@dataclass(frozen=True, kw_only=True)
class SnapshotServices:
    rentals: VisibleRentals
    store: Store
    token_uses: TokenUses
    copy_now: Callable[[str, SnapshotId | None], Awaitable[str]]
    """Copies a rental's files at once, and keeps an older copy; returns why that was not done, empty when it was."""
    wake_reconciler: Callable[[], None]


Shared = Annotated[SnapshotServices, Depends(given(SnapshotServices))]


@router.get("/rentals/{rental_id}/snapshots", responses=refusals(404))
async def list_snapshots(rental_id: str, principal: Client, shared: Shared) -> wire.Page[wire.Snapshot]:
    """The complete copies of its files that are kept, oldest first: all of them, for they are few."""
    await shared.rentals.find(rental_id, principal)
    found = await shared.store.read(snapshots.snapshots_of, rental_id)
    return wire.Page(items=[views.snapshot(copy) for copy in found])


@router.post("/rentals/{rental_id}/restore", status_code=202, responses=refusals(404, 409))
async def restore(rental_id: str, body: wire.RestoreRequest, principal: Client, shared: Shared) -> wire.Rental:
    """Stop it, and have it begin again with this copy of its files, or without any.

    What is there now is copied first, so that there is a way back; `discard` forgoes that. One that waits for a place
    begins there with what was asked for last.
    """
    row = await shared.rentals.find(rental_id, principal)
    source = EMPTY if body.empty else str(body.generation)
    known = await shared.store.read(snapshots.snapshots_of, rental_id)
    if source != EMPTY and source not in {str(copy.generation) for copy in known}:
        raise not_found("snapshot")
    if row["state"] == wire.RentalState.ACTIVE and not body.discard:
        async with shared.token_uses.by(principal) as opening:
            await _copy_first(shared, rental_id, SnapshotId.parse(source))
            opening.check()
    refused = await shared.store.write(snapshots.begin_restore, rental_id, principal.name, source)
    if refused:
        raise ApiProblem(409, refused, _REFUSALS[refused])
    shared.wake_reconciler()
    return views.rental(await shared.rentals.find(rental_id, principal))


async def _copy_first(shared: SnapshotServices, rental_id: str, spare: SnapshotId | None) -> None:
    try:
        async with asyncio.timeout(COPY_WITHIN_S):
            problem = await shared.copy_now(rental_id, spare)
    except TimeoutError:
        problem = f"that takes longer than {COPY_WITHIN_S:.0f} s"
    if problem:
        detail = f"the files as they are now cannot be copied first: {problem}. To lose them: orion restore --discard"
        raise ApiProblem(409, "not_copied", detail)
