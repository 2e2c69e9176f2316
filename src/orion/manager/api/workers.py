"""The routes of workers, which register and send heartbeats, and of operators, who list, drain and remove them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Query, Request

from orion import wire
from orion.manager.api import views
from orion.manager.api.call_home import CallHome, CallRefused
from orion.manager.api.contract import refusals
from orion.manager.api.heartbeat import HeartbeatRequest, HeartbeatServices, answer, items_of
from orion.manager.api.services import Admin, CallerHome, CallingWorker, client_address, given
from orion.manager.domain.leases import Leases
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.domain.scheduler import counted
from orion.manager.domain.states import LIVE, Health, Intent
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.settings import Settings
from orion.manager.store import state, workers
from orion.manager.store.database import Store
from orion.manager.store.port import Registration

router = APIRouter(prefix="/api", tags=["workers"])


@dataclass(frozen=True, kw_only=True)
class WorkerServices:
    settings: Settings
    store: Store
    pool_index: PoolIndex
    leases: Leases
    call_home: CallHome
    authorized_keys: tuple[str, ...]
    """The manager's own public keys, which may log in to a worker as root."""
    wake_health: Callable[[], None]
    wake_reconciler: Callable[[], None]


Shared = Annotated[WorkerServices, Depends(given(WorkerServices))]
HeartbeatShared = Annotated[HeartbeatServices, Depends(given(HeartbeatServices))]


@router.post("/register", status_code=201, responses=refusals(409))
async def register(
    body: wire.RegisterRequest, principal: CallerHome, request: Request, shared: Shared
) -> wire.RegisterReply:
    """Register a worker, by its own token if it has one, else by the join token."""
    address = client_address(request)
    if not shared.settings.may_be_a_worker(address):
        detail = f"a worker must register from an address in {shared.settings.subnet}, not from {address}"
        raise ApiProblem(403, "address_not_in_pool", detail)
    same = body.model_dump(include={"hostname", "slots", "labels", "boot_id", "agent_version"})
    claim = Registration(address=address, host_keys=tuple(body.ssh_host_keys), **same)
    own_id = principal.id if principal.role == "worker" else None
    try:
        registered, orders = await shared.call_home.register(own_id, claim, items_of(body.inventory))
    except CallRefused as refusal:
        raise ApiProblem(409, refusal.code, str(refusal)) from refusal
    shared.wake_health()
    shared.wake_reconciler()
    clocks = shared.settings.clocks
    return wire.RegisterReply(
        worker_id=registered.worker_id,
        worker_token=registered.token or request.headers["authorization"].split(" ", 1)[1].strip(),
        session_id=registered.session_id,
        heartbeat_interval_s=clocks.heartbeat_s,
        lease_s=clocks.freeze_after_s,
        door_answer_s=clocks.door_answer_s,
        authorized_keys=list(shared.authorized_keys),
        placements=[wire.PlacementOrder(rental_id=i.rental_id, epoch=i.epoch, want=wire.Want(w)) for i, w in orders],
    )


@router.post("/heartbeat", responses=refusals(409))
async def heartbeat(
    request: Request, body: wire.HeartbeatRequest, principal: CallingWorker, shared: HeartbeatShared
) -> wire.HeartbeatReply:
    """Renew the worker's lease, if its session is current.

    Well-formed heartbeats are answered by the middleware in api/heartbeat.py and do not come here.
    """
    beat = msgspec.convert(body.model_dump(), HeartbeatRequest)
    reply = answer(shared, principal.id, beat, client_address(request))
    return wire.HeartbeatReply.model_validate_json(reply)


@router.get("/workers")
async def list_workers(
    _: Admin, shared: Shared, after: views.After = None, limit: views.Limit = 100
) -> wire.Page[wire.Worker]:
    rows = await shared.store.read(workers.page, after, limit + 1)
    return views.page(rows, limit, lambda row: _view(row, shared))


@router.get("/workers/{worker_id}", responses=refusals(404))
async def show(worker_id: str, _: Admin, shared: Shared) -> wire.Worker:
    return _view(await shared.store.read(workers.one, worker_id), shared)


@router.post("/workers/{worker_id}/drain", responses=refusals(404))
async def drain(worker_id: str, admin: Admin, shared: Shared) -> wire.Worker:
    """Place no new rentals on the worker and migrate its rentals; it is `drained` when none is left. Repeatable."""
    row = await shared.store.write(workers.set_intent, admin.name, worker_id, Intent.DRAINING)
    shared.wake_reconciler()
    return _view(row, shared)


@router.post("/workers/drain", responses=refusals(404))
async def drain_together(body: wire.DrainRequest, admin: Admin, shared: Shared) -> wire.Page[wire.Worker]:
    """Drain several workers at once, so that no rental migrates to one that is drained next. Repeatable."""
    rows = await shared.store.write(workers.drain_together, admin.name, body.worker_ids)
    shared.wake_reconciler()
    return wire.Page(items=[_view(row, shared) for row in rows], next=None)


@router.post("/workers/{worker_id}/resume", responses=refusals(404))
async def resume(
    worker_id: str,
    admin: Admin,
    shared: Shared,
    give_up: Annotated[bool, Query(description="Purge rentals on it that the database has never placed there")] = False,
) -> wire.Worker:
    """End a drain or a quarantine; the worker is checked again before it is ready. Repeatable."""
    lease = shared.leases.get(worker_id)
    if give_up and lease and lease.inventory:
        await shared.store.write(workers.give_up, admin.name, worker_id, lease.inventory)
    row = await shared.store.write(workers.set_intent, admin.name, worker_id, Intent.ACTIVE)
    shared.leases.forgive(worker_id)
    shared.wake_health()
    shared.wake_reconciler()
    return _view(row, shared)


@router.delete("/workers/{worker_id}", status_code=204, responses=refusals(404, 409))
async def remove(worker_id: str, admin: Admin, shared: Shared) -> None:
    """Forget a worker that is down or has no rental. If it still runs, it registers again as a new worker."""
    refusal = await shared.store.write(workers.remove, admin.name, worker_id)
    if refusal == "not_found":
        raise not_found("worker")
    if refusal:
        detail = "the worker has rentals: migrate them with: orion drain WORKER; or stop it, and wait until it is down"
        raise ApiProblem(409, refusal, detail)
    shared.leases.end(worker_id)
    shared.wake_reconciler()


@router.post("/workers/{worker_id}/gone", responses=refusals(404, 409))
async def gone(worker_id: str, admin: Admin, shared: Shared) -> wire.Worker:
    """Declare a worker down at once, because an operator knows that its container does not exist any more. Repeatable.

    The operator has to know it from the container engine: a worker that is only cut off would run its rentals until its
    lease ends, beside those that are taken over.
    """
    known = (await shared.store.read(state.load_workers, [worker_id])).get(worker_id)
    if known is None:
        raise not_found("worker")
    if known.health is not Health.DOWN:
        if await shared.call_home.is_reachable(known):
            detail = f"the worker answers at {known.address} with its own host key: stop it, or drain it"
            raise ApiProblem(409, "worker_answers", detail)
        shared.leases.declare_gone(worker_id)
        await shared.store.write(workers.declared_gone, admin.name, worker_id)
        shared.wake_health()
    return _view(await shared.store.read(workers.one, worker_id), shared)


@router.post("/workers/prune")
async def prune(admin: Admin, shared: Shared) -> wire.Pruned:
    """Forget all workers that are down and hold nothing that is still needed. The manager does so itself after 1 h."""
    done = await shared.store.write(workers.prune, admin.name)
    for worker_id in done.forgotten:
        shared.leases.end(worker_id)
    shared.wake_reconciler()
    kept = [wire.Kept(id=worker_id, why=why) for worker_id, why in done.kept.items()]
    return wire.Pruned(forgotten=list(done.forgotten), kept=kept)


def _view(row: views.Row | None, shared: WorkerServices) -> wire.Worker:
    """Return the worker's reply, with the load and time of its last heartbeat. Raise 404 for no row."""
    if row is None:
        raise not_found("worker")
    noted = shared.leases.noted(row["id"])
    shown = {**row, "explanation": _displaced(row, shared) or row["explanation"] or _why_it_drains(row, shared)}
    return views.worker({**shown, "last_heartbeat_at": noted[0], "load": noted[1]} if noted else shown)


def _displaced(row: views.Row, shared: WorkerServices) -> str:
    other = shared.leases.displaced_by(row["id"])
    if not other or row["health"] == Health.DOWN:
        return ""
    return (
        f"worker {other} has its address now: its container is gone, or has no network. It is down when its lease has "
        f"passed; if the container is gone, declare it down at once: orion workers gone {row['id']}"
    )


def _why_it_drains(row: views.Row, shared: WorkerServices) -> str:
    """Return what a drain still waits for, or an empty string."""
    left = sum(placed.state in LIVE for placed in shared.pool_index.placements_on(row["id"]))
    if row["intent"] != Intent.DRAINING or not left:
        return ""
    what = f"{left} rental{'s are' if left > 1 else ' is'} to be migrated"
    exiting = shared.leases.exiting()
    if shared.pool_index.room.best(1, without=exiting):
        return what
    return f"{what}, and no worker can take one: {counted(shared.pool_index.refusals((), exiting))}"
