"""Access to rentals by SSH: the authority of host keys, a rental's keys, certificates for renters, and the relay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Response, WebSocket

from orion import wire
from orion.manager.api import views
from orion.manager.api.contract import Responses, refusals
from orion.manager.api.problems import problem, refuse_conflict, refused
from orion.manager.api.services import Client, client_address, given, provided
from orion.manager.api.visible_rentals import VisibleRentals
from orion.manager.authentication import Authentication
from orion.manager.gateway.relay import WorkerUnreachable
from orion.manager.gateway.running_rental import event_of
from orion.manager.gateway.ssh_sessions import SshSessions
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.ssh.authority import Authority
from orion.manager.store import keys
from orion.manager.store.database import Store, record
from orion.manager.store.tokens import Principal

router = APIRouter(prefix="/api", tags=["rentals"])

_CHANGED: Responses = {202: {"model": wire.Page[wire.Key]}, **refusals(404, 409)}


@dataclass(frozen=True, kw_only=True)
class AccessServices:
    rentals: VisibleRentals
    store: Store
    authority: Authority
    app_address: str
    """The manager's own address, from which all connections of renters reach a worker."""
    wake_reconciler: Callable[[], None]


Shared = Annotated[AccessServices, Depends(given(AccessServices))]


@router.get("/ssh-authority")
async def ssh_authority(_: Client, shared: Shared) -> wire.SshAuthority:
    """Return the key by which ssh verifies the worker of any rental, also after a migration or takeover."""
    key = shared.authority.of_hosts
    return wire.SshAuthority(public_key=key, known_hosts=f"@cert-authority *.orion {key}")


@router.get("/rentals/{rental_id}/keys", responses=refusals(404))
async def list_keys(rental_id: str, principal: Client, shared: Shared) -> wire.Page[wire.Key]:
    """Return all keys that open the rental."""
    return _keys(await shared.rentals.find(rental_id, principal))


@router.post("/rentals/{rental_id}/keys", status_code=201, responses=_CHANGED)
async def add_key(
    rental_id: str, body: wire.AddKeyRequest, principal: Client, shared: Shared, response: Response
) -> wire.Page[wire.Key]:
    """Add a key: 201 when the worker has it, 202 if it does not have it yet after `wait_s`. Repeatable."""
    await shared.rentals.find(rental_id, principal)
    key, comment = wire.one_public_key(body.ssh_public_key), wire.comment_of(body.ssh_public_key)
    refuse_conflict(await shared.store.write(keys.add, rental_id, principal.name, key, comment))
    return await _wait_until_in_place(shared, principal, rental_id, body.wait_s, response, 201)


@router.delete("/rentals/{rental_id}/keys/{key_id}", responses=_CHANGED)
async def remove_key(
    rental_id: str,
    key_id: str,
    principal: Client,
    shared: Shared,
    response: Response,
    wait_s: views.WaitSeconds = wire.DEFAULT_WAIT_S,
) -> wire.Page[wire.Key]:
    """Remove a key, but not the last one: 200 when it opens nothing any more. Open sessions continue."""
    await shared.rentals.find(rental_id, principal)
    code = await shared.store.write(keys.remove, rental_id, principal.name, key_id)
    if code == "no_such_key":
        raise not_found("key of this rental")
    refuse_conflict(code)
    return await _wait_until_in_place(shared, principal, rental_id, wait_s, response, 200)


@router.post("/rentals/{rental_id}/certificate", status_code=201, responses=refusals(404, 409))
async def certificate(
    rental_id: str, body: wire.CertificateRequest, principal: Client, shared: Shared
) -> wire.CertificateReply:
    """Return a certificate for at most an hour, which is void when the rental changes its worker or ends."""
    row = await shared.rentals.find(rental_id, principal)
    if row["state"] != wire.RentalState.ACTIVE:
        raise ApiProblem(409, "not_active", f"the rental is {row['state']}: {row['explanation']}")
    signed, until = shared.authority.user_certificate(
        body.ssh_public_key, rental_id, row["epoch"], principal.name, shared.app_address, body.ttl_s
    )
    details = {"fingerprint": wire.fingerprint(body.ssh_public_key), "seconds": body.ttl_s}
    event = event_of(row, "rental.certificate_issued", principal.name, "asked for", details)
    await shared.store.write(record, event)
    return wire.CertificateReply(certificate=signed, expires_at=datetime.fromtimestamp(until, UTC))


@router.websocket("/rentals/{rental_id}/ssh")
async def relay(
    websocket: WebSocket, rental_id: str, sessions: Annotated[SshSessions, Depends(given(SshSessions))]
) -> None:
    """Relay one SSH connection. Refusals are HTTP problems, sent before the WebSocket is accepted.

    `?wait_s=` is the time in seconds to wait for a rental that is queued, provisioning or migrating.
    """
    try:
        principal = await provided(websocket.scope, Authentication).authenticate(websocket, "client", "admin")
        await sessions.carry(websocket, rental_id, principal, client_address(websocket), _wait_s(websocket))
    except ApiProblem as error:
        await websocket.send_denial_response(refused(error))
    except WorkerUnreachable as error:
        await websocket.send_denial_response(problem(502, "worker_unreachable", str(error)))


def _wait_s(websocket: WebSocket) -> float:
    """Return the seconds to wait. Raise 422 if the query does not name a number of them."""
    try:
        seconds = float(websocket.query_params.get("wait_s", "0"))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= wire.MAX_WAIT_S:
        raise ApiProblem(422, "invalid_request", f"wait_s must be a number from 0 to {wire.MAX_WAIT_S}")
    return seconds


async def _wait_until_in_place(
    shared: AccessServices, principal: Principal, rental_id: str, wait_s: float, response: Response, status: int
) -> wire.Page[wire.Key]:
    """Return the keys when the worker has them, or after `wait_s`; a rental that is not active gets them later."""
    shared.wake_reconciler()
    row = await shared.rentals.wait_for(
        principal, rental_id, wait_s, lambda r: r["key_in_place"] or r["state"] != wire.RentalState.ACTIVE
    )
    response.status_code = status if row["key_in_place"] else 202
    return _keys(row)


def _keys(row: views.Row) -> wire.Page[wire.Key]:
    found = []
    for key in row["public_key"].splitlines():
        identity = wire.key_id(key)
        comment, in_place = row["key_comments"].get(identity, ""), bool(row["key_in_place"])
        about = {"id": identity, "fingerprint": wire.fingerprint(key), "comment": comment, "in_place": in_place}
        found.append(wire.Key(public_key=key, **about))
    return wire.Page(items=found)
