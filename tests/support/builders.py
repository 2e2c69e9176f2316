"""Makers of workers, rentals, placements and secrets, with defaults for values that a test does not set."""

from __future__ import annotations

from typing import Any

import asyncssh

from orion.manager.domain.model import Placement, Rental, Worker
from orion.manager.domain.states import Health, Intent, PlacementState, RentalState
from orion.manager.domain.world import World
from orion.manager.settings import Secrets
from orion.manager.store.tokens import make_token

SESSION = "session-1"


def private_key() -> str:
    key: Any = asyncssh.generate_private_key("ssh-ed25519")
    return str(key.export_private_key("openssh").decode())


AUTHORITIES = (private_key(), private_key())
"""The certificate authorities of hosts and of users."""


def host_key(number: int) -> str:
    return f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA{number:042d}"


def new_secrets(proxy_secret: str) -> Secrets:
    return Secrets(
        admin_token=make_token("admin", "admin"),
        join_token=make_token("join", "join"),
        proxy_secret=proxy_secret,
        ssh_private_key="",
        ssh_public_key=host_key(1),
        host_authority=AUTHORITIES[0],
        user_authority=AUTHORITIES[1],
    )


def new_worker(number: int = 1, **change: Any) -> Worker:
    """Return a ready worker with one slot, verified in its session."""
    fields: dict[str, Any] = {
        "id": f"w-{number:04d}",
        "hostname": f"host-{number}",
        "address": f"172.20.{128 + number // 200}.{1 + number % 200}",
        "host_keys": (host_key(number),),
        "slots": 1,
        "health": Health.READY,
        "intent": Intent.ACTIVE,
        "session_id": SESSION,
        "boot_id": "boot-0001",
        "agent_version": "0.1.0+boot",
        "verified_session": SESSION,
    }
    return Worker(**fields | change)


def new_rental(number: int = 1, **change: Any) -> Rental:
    """Return a rental that was just queued."""
    fields: dict[str, Any] = {
        "id": f"rental{number:04d}",
        "name": f"name-{number}",
        "owner": "alice",
        "username": f"r-rental{number:04d}",
        "uid": 100_000 + number,
        "state": RentalState.QUEUED,
        "epoch": 0,
        "public_key": host_key(9000 + number),
        "ttl_s": 3600,
        "created_at": 1000.0 + number,
    }
    return Rental(**fields | change)


def active_rental(number: int = 1, epoch: int = 1, **change: Any) -> Rental:
    times = {"activated_at": 2000.0, "expires_at": 5600.0}
    return new_rental(number, **{"state": RentalState.ACTIVE, "epoch": epoch} | times | change)


def new_placement(rental: Rental, worker: Worker, state: PlacementState, **change: Any) -> Placement:
    """Return the rental's latest placement, on the worker's first slot, with the rental's key in place."""
    fields: dict[str, Any] = {
        "id": f"p-{rental.id}-{rental.epoch}",
        "rental_id": rental.id,
        "worker_id": worker.id,
        "slot": 0,
        "epoch": rental.epoch,
        "state": state,
        "public_key": rental.public_key,
    }
    return Placement(**fields | change)


def new_world(*rows: Worker | Rental | Placement) -> World:
    world = World(workers={}, rentals={}, placements={})
    for row in rows:
        table: dict[str, Any] = {Worker: world.workers, Rental: world.rentals, Placement: world.placements}[type(row)]
        table[row.id] = row
    return world
