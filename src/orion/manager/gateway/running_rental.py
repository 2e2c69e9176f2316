"""The wait for a rental to run, and conversions of its row for the relay, the terminals and the web ports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orion import wire
from orion.manager.ansible.port import Action, Job
from orion.manager.authentication import visible_owner
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.states import ENDED
from orion.manager.domain.steps import Event
from orion.manager.gateway.sessions import Session
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.ssh.port import Host
from orion.manager.store import rentals
from orion.manager.store.database import Row, Store
from orion.manager.store.tokens import Principal
from orion.rental_order import RentalOrder

OVER = frozenset({*ENDED, wire.RentalState.RELEASING})
"""The states of a rental that will never be active again."""


@dataclass(frozen=True)
class RunningRentals:
    store: Store
    clock: TrustedClock
    monotonic: Callable[[], float]

    async def wait_for(self, principal: Principal, deadline: float, session: Session) -> Row:
        """Return the session's rental with its worker as soon as it is active and not quiesced (`held` in its row).

        Raise ApiProblem if it is not active at `deadline` (monotonic seconds) or never will be, or if the session's
        token is over.
        """
        with self.store.news.listen(session.rental_id) as changed:
            session.token_use.wakes(changed)
            while True:
                changed.clear()
                session.token_use.check()
                session.before_lookup()
                row = await self.store.read(
                    rentals.one, session.rental_id, visible_owner(principal), self.clock.wall_of_removals()
                )
                if row is None:
                    raise not_found("rental")
                left_s = deadline - self.monotonic()
                if row["state"] == wire.RentalState.ACTIVE and not row["held"]:
                    if not session.over.done():
                        session.owner, session.worker_id, session.epoch = row["owner"], row["worker_id"], row["epoch"]
                        return row
                    continue  # a placement ended while the row was read, so the row may be old
                if row["state"] in OVER or left_s <= 0:
                    raise _not_active(row)
                with suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await changed.wait()


def job_of(row: Row) -> Job:
    """Return the job that certifies the rental's worker; it has the worker's host."""
    host = Host(worker_id=row["worker_id"], address=row["address"], host_keys=tuple(row["host_keys"]))
    order = RentalOrder(rental_id=row["id"], username=row["username"], uid=row["uid"], epoch=row["epoch"])
    return Job(action=Action.CERTIFY, host=host, order=order, owner=row["owner"])


def event_of(row: Mapping[str, Any], kind: str, actor: str, reason: str, details: Mapping[str, Any]) -> Event:
    """Return an event of the rental's present placement."""
    placement = {"rental_id": row["id"], "worker_id": row["worker_id"], "epoch": row["epoch"]}
    return Event(kind=kind, actor=actor, reason=reason, owner=row["owner"], details=details, **placement)


def remarks(row: Row) -> str:
    """Return one line about the rental's files for its owner to read at a log-in; an empty string if there is none."""
    found = [row["home_warning"]] if row["home_warning"] and not row["copy_problem"] else []
    if row["salvage"]:
        restore = f"orion restore {row['name']} --from {row['salvage'].id}"
        found.append(f"a lost worker had newer files, which are kept as a recovered snapshot: {restore}")
    return f"{row['name']}: {'; '.join(found)}" if found else ""


def _not_active(row: Row) -> ApiProblem:
    """Return the refusal of a rental that is not active, with Retry-After if it may become so."""
    again = {} if row["state"] in OVER else {"Retry-After": "5"}
    if row["state"] == wire.RentalState.ACTIVE:
        return ApiProblem(
            409, "not_active", "the rental is migrating and stopped for a moment: try again", headers=again
        )
    return ApiProblem(409, "not_active", f"the rental is {row['state']}: {row['explanation']}", headers=again)
