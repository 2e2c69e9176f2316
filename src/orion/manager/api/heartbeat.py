"""The heartbeat's hot path: a middleware that answers well-formed heartbeats from the pool index and the leases.

It accepts only what pydantic would accept as well (tests/manager/test_api_heartbeat.py). All other requests go to the
FastAPI route in api/workers.py, which documents and refuses them.
"""

from __future__ import annotations

import hashlib
import hmac
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orion import wire
from orion.manager.api.call_home import CallHome, CallRefused
from orion.manager.api.problems import refused
from orion.manager.api.services import provided
from orion.manager.domain.clocks import Clocks
from orion.manager.domain.leases import Heartbeat, Leases
from orion.manager.domain.model import CommandEnd, Item
from orion.manager.domain.pool_index import PoolIndex
from orion.manager.refusals import ApiProblem, unauthorized
from orion.wire import FURTHER_FIELDS, MAX_SLOTS

CONFIRM_S = 0.5
"""Seconds until the next heartbeat of a worker that has yet to confirm a lease shorter than its present one."""
PATH = "/api/heartbeat"
MAX_ITEMS = 10_000
_TOKEN = re.compile(rb"(?i:bearer) +(orion_worker_([a-z0-9-]{1,64})_[A-Za-z0-9]{43}) *")
_SAYS_JSON = (b"content-type", b"application/json")
_JSON = {b"application/json", b"application/json; charset=utf-8"}

NonNegative = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Load(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The same as wire.Load."""

    cpu: Annotated[float, msgspec.Meta(ge=0, le=4096)] = 0.0
    memory_used_bytes: NonNegative = 0
    memory_limit_bytes: NonNegative = 0
    processes: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0


class InventoryItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The same as wire.InventoryItem. Patterns end in \\Z because `$` matches before a final newline in msgspec."""

    rental_id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}\Z")]
    username: Annotated[str, msgspec.Meta(pattern=r"^r-[a-z0-9]{1,30}\Z")]
    uid: Annotated[int, msgspec.Meta(ge=100_000, lt=2**31)]
    epoch: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    state: Literal["locked", "running", "frozen"]


class StartEnd(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The same as wire.StartEnd."""

    rental_id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}\Z")]
    epoch: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    run: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,16}@[A-Za-z0-9-]{0,64}\Z")]
    how: Annotated[str, msgspec.Meta(pattern=r"^(status [0-9]{1,3}|signal [0-9]{1,2}|unseen)\Z")]
    ago_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0


class HeartbeatRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The same as wire.HeartbeatRequest."""

    session_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9-]{8,64}\Z")]
    seq: NonNegative
    load: Load = Load()
    inventory: Annotated[list[InventoryItem], msgspec.Meta(max_length=MAX_ITEMS)] = []
    lease_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    start_ends: Annotated[list[StartEnd], msgspec.Meta(max_length=MAX_SLOTS)] = []
    vacating: bool = False
    leaving: bool = False


_decode = msgspec.json.Decoder(HeartbeatRequest).decode
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True)
class HeartbeatServices:
    clocks: Clocks
    pool_index: PoolIndex
    leases: Leases
    call_home: CallHome
    wall: Callable[[], float]
    wake_health: Callable[[], None]
    wake_reconciler: Callable[[], None]


@dataclass(frozen=True)
class HeartbeatRoute:
    """The middleware; it passes on every request that is not a well-formed heartbeat."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, shared = await _whole_body(receive), provided(scope, HeartbeatServices)
        try:
            worker_id, is_json, address = _caller(shared, scope)
            beat = _decoded(body) if worker_id and is_json else None
            reply = answer(shared, worker_id, beat, address) if worker_id and beat else None
        except ApiProblem as refusal:
            await refused(refusal)(scope, receive, send)
            return
        if reply is None:
            await self.app(scope, _replayed(body, receive), send)
            return
        # Two messages cost less than a Response object.
        headers = [(b"content-length", b"%d" % len(reply)), _SAYS_JSON]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": reply})


async def _whole_body(receive: Receive) -> bytes:
    """Return the body, or its first part if the client disconnected; that part is not valid JSON."""
    message = await receive()
    body: bytes = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    return body


def items_of(inventory: Iterable[InventoryItem | wire.InventoryItem]) -> tuple[Item, ...]:
    return tuple(Item(rental_id=i.rental_id, username=i.username, uid=i.uid, epoch=i.epoch) for i in inventory)


def answer(shared: HeartbeatServices, worker_id: str, body: HeartbeatRequest, address: str) -> bytes:
    """Renew the worker's lease and return the encoded reply. Raise ApiProblem if its session is not current."""
    wall = shared.wall()
    ends = tuple(
        CommandEnd(rental_id=e.rental_id, epoch=e.epoch, run=e.run, how=e.how, at=wall - e.ago_s)
        for e in body.start_ends
    )
    beat = Heartbeat(
        session_id=body.session_id,
        seq=body.seq,
        inventory=items_of(body.inventory),
        exiting=body.leaving,
        lease_s=body.lease_s,
        evacuating=body.vacating,
        start_ends=ends,
    )
    try:
        found = shared.call_home.heartbeat(worker_id, beat, address)
    except CallRefused as refusal:
        raise ApiProblem(409, refusal.code, str(refusal)) from refusal
    shared.leases.note(worker_id, wall, msgspec.structs.asdict(body.load))
    if body.leaving:
        shared.wake_health()
    if body.vacating:
        shared.wake_reconciler()
    clocks = shared.clocks
    jitter = random.uniform(0.9, 1.05)  # noqa: S311  it spreads load, and is no secret
    next_s = CONFIRM_S if body.lease_s > clocks.freeze_after_s else round(clocks.heartbeat_s * jitter, 3)
    return _encode(
        {
            "lease_s": clocks.freeze_after_s,
            "door_answer_s": clocks.door_answer_s,
            "next_heartbeat_s": next_s,
            "placements": [{"rental_id": item.rental_id, "epoch": item.epoch, "want": want} for item, want in found],
            "takes": FURTHER_FIELDS,
        }
    )


def _decoded(body: bytes) -> HeartbeatRequest | None:
    try:
        return _decode(body)
    except (msgspec.DecodeError, ValueError):
        return None


def _caller(shared: HeartbeatServices, scope: Scope) -> tuple[str | None, bool, str]:
    """Return the worker's id by its token, whether the content type is JSON, and the peer that the proxy saw."""
    worker_id, is_json, address = None, False, ""
    for name, value in scope["headers"]:
        if name == b"authorization":
            worker_id = _worker_of(shared, value)
        elif name == b"content-type":
            is_json = value in _JSON
        elif name == b"x-real-ip":
            address = value.decode("latin-1")
    return worker_id, is_json, address


def _worker_of(shared: HeartbeatServices, header: bytes) -> str | None:
    """Return the worker's id, or None if the token has not the form of a worker's. Raise 401 if it is not valid."""
    match = _TOKEN.fullmatch(header)
    if match is None:
        return None
    worker_id = match[2].decode()
    known = shared.pool_index.worker(worker_id)
    kept = known.token_hash if known else ""
    if not hmac.compare_digest(kept, hashlib.sha256(match[1]).hexdigest()):
        raise unauthorized()
    return worker_id


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body again, for the route behind."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
