"""A database with a large pool: workers with tokens of the benchmark, each with one active rental."""

from __future__ import annotations

import hashlib
import string
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from sqlalchemy import Table, create_engine, insert

from orion.manager.store.database import Store
from orion.manager.store.schema import counters, events, placements, rentals, workers
from orion.manager.store.tokens import digest

BATCH = 5000
FIRST_UID = 100_000
LIFETIME_S = 86_400
A_PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMJmT9oQyXJXw1cMyxGBLCFfEDPrgh2TyT2PnTrEFpGq"
_LETTERS = string.ascii_letters + string.digits


def worker_id(number: int) -> str:
    return f"w-{number:08d}"


def rental_id(number: int) -> str:
    return f"r{number:09d}"


def session(number: int) -> str:
    return f"session-{number:08d}"


def token(seed: str, number: int) -> str:
    """Return a worker's token, the same for the same seed: the sender of the heartbeats computes it too."""
    value = int.from_bytes(hashlib.sha512(f"{seed} {number}".encode()).digest())
    return f"orion_worker_{worker_id(number)}_{''.join(_LETTERS[value // 62**place % 62] for place in range(43))}"


def item(number: int) -> dict[str, Any]:
    """Return the one item of this worker's inventory."""
    uid = FIRST_UID + number
    return {"rental_id": rental_id(number), "username": _username(number), "uid": uid, "epoch": 1, "state": "running"}


def fill(url: str, seed: str, number: int, slots: int, address: str, spare: int = 0) -> None:
    """Write ready workers with one active rental each, and one more worker with `spare` free slots unless that is 0.

    All workers have the address of the load, because the manager refuses heartbeats from other addresses. The manager's
    own migrations make the schema.
    """
    store = Store(url)
    store.migrate()
    store.close()
    engine = create_engine(url)
    now = time.time()
    with engine.begin() as connection:
        wanted: list[tuple[Table, Iterator[dict[str, Any]]]] = [
            (workers, (_worker(one, seed, slots, address, now) for one in range(number))),
            (rentals, (_rental(one, now) for one in range(number))),
            (placements, (_placement(one, now) for one in range(number))),
            (events, (event for one in range(number) for event in _events(one, now))),
        ]
        for table, rows in wanted:
            while some := list(islice(rows, BATCH)):
                connection.execute(insert(table), some)
        if spare:
            connection.execute(insert(workers), _worker(number, seed, spare, address, now))
        connection.execute(insert(counters), {"name": "uid", "value": FIRST_UID + number})
    engine.dispose()


def _worker(number: int, seed: str, slots: int, address: str, now: float) -> dict[str, Any]:
    return {
        "id": worker_id(number),
        "hostname": f"{number:012x}",
        "address": address,
        "host_keys": [f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{number:043d}"],
        "slots": slots,
        "labels": {},
        "health": "ready",
        "intent": "active",
        "token_hash": digest(token(seed, number)),
        "session_id": session(number),
        "verified_session": session(number),
        "boot_id": f"boot-{number:08d}",
        "agent_version": "0.1",
        "load": {},
        "registered_at": now,
        "last_heartbeat_at": now,
    }


def _rental(number: int, now: float) -> dict[str, Any]:
    return {
        "id": rental_id(number),
        "name": f"name-{number}",
        "owner": f"owner-{number % 100}",
        "username": _username(number),
        "uid": FIRST_UID + number,
        "state": "active",
        "epoch": 1,
        "public_key": _key(number),
        "ttl_s": LIFETIME_S,
        "labels": {},
        "created_at": now,
        "activated_at": now,
        "expires_at": now + LIFETIME_S,
    }


def _placement(number: int, now: float) -> dict[str, Any]:
    return {
        "id": f"p-{number:012d}",
        "rental_id": rental_id(number),
        "worker_id": worker_id(number),
        "slot": 0,
        "epoch": 1,
        "state": "running",
        "public_key": _key(number),
        "created_at": now,
    }


def _events(number: int, now: float) -> Iterator[dict[str, Any]]:
    same = {"at": now, "actor": "bench", "reason": "filled in", "details": {}, "worker_id": worker_id(number)}
    yield same | {"kind": "worker.registered", "owner": None, "rental_id": None, "epoch": None}
    fields = {"owner": f"owner-{number % 100}", "rental_id": rental_id(number), "epoch": 1}
    for kind in ("rental.queued", "rental.placed", "rental.activated"):
        yield same | fields | {"kind": kind}


def _username(number: int) -> str:
    return f"r-{rental_id(number)}"


def _key(number: int) -> str:
    return f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB{number:042d}"
