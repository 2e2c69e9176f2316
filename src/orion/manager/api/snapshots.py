"""The routes of a rental's snapshots: list them, and restore one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends

from orion import wire
from orion.manager.api import views
from orion.manager.api.contract import refusals
from orion.manager.api.problems import refuse_conflict
from orion.manager.api.services import Client, given
from orion.manager.api.visible_rentals import VisibleRentals
from orion.manager.domain.snapshots import EMPTY, SnapshotId
from orion.manager.gateway.token_lifetime import TokenUses
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.store import snapshots
from orion.manager.store.database import Store

router = APIRouter(prefix="/api", tags=["rentals"])

SNAPSHOT_WITHIN_S = 40.0
"""Seconds for the snapshot before a restore; fewer than the proxy waits for a reply."""


@dataclass(frozen=True, kw_only=True)
class SnapshotServices:
    rentals: VisibleRentals
    store: Store
    token_uses: TokenUses
    snapshot_now: Callable[[str, SnapshotId | None], Awaitable[str]]
    """Takes a snapshot of a rental at once, and spares an older one; returns why it could not, or an empty string."""
    wake_reconciler: Callable[[], None]


Shared = Annotated[SnapshotServices, Depends(given(SnapshotServices))]


@router.get("/rentals/{rental_id}/snapshots", responses=refusals(404))
async def list_snapshots(rental_id: str, principal: Client, shared: Shared) -> wire.Page[wire.Snapshot]:
    """Return all kept snapshots of the rental, oldest first."""
    await shared.rentals.find(rental_id, principal)
    found = await shared.store.read(snapshots.snapshots_of, rental_id)
    return wire.Page(items=[views.snapshot(one) for one in found])


@router.post("/rentals/{rental_id}/restore", status_code=202, responses=refusals(404, 409))
async def restore(rental_id: str, body: wire.RestoreRequest, principal: Client, shared: Shared) -> wire.Rental:
    """Stop the rental and start it again with the files of this snapshot, or with an empty home.

    A snapshot of the present files is taken first, unless `discard` is set. A queued rental starts with the snapshot
    that was asked for last.
    """
    row = await shared.rentals.find(rental_id, principal)
    source = EMPTY if body.empty else str(body.generation)
    known = await shared.store.read(snapshots.snapshots_of, rental_id)
    if source != EMPTY and source not in {str(one.id) for one in known}:
        raise not_found("snapshot")
    if row["state"] == wire.RentalState.ACTIVE and not body.discard:
        async with shared.token_uses.by(principal) as use:
            await _snapshot_first(shared, rental_id, SnapshotId.parse(source))
            use.check()
    refuse_conflict(await shared.store.write(snapshots.begin_restore, rental_id, principal.name, source))
    shared.wake_reconciler()
    return views.rental(await shared.rentals.find(rental_id, principal))


async def _snapshot_first(shared: SnapshotServices, rental_id: str, spare: SnapshotId | None) -> None:
    try:
        async with asyncio.timeout(SNAPSHOT_WITHIN_S):
            problem = await shared.snapshot_now(rental_id, spare)
    except TimeoutError:
        problem = f"it takes longer than {SNAPSHOT_WITHIN_S:.0f} s"
    if problem:
        detail = (
            f"a snapshot of the present files cannot be taken first: {problem}. To restore without it and lose them: "
            "orion restore --discard"
        )
        raise ApiProblem(409, "not_copied", detail)
