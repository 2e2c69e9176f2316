"""What the routes share, made by the composition root and found on the application's state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from orion.manager.api.call_home import CallHome
from orion.manager.api.event_streams import EventStreams
from orion.manager.api.metrics import Metrics
from orion.manager.authentication import Authentication
from orion.manager.domain.copies import Generation
from orion.manager.domain.leases import Leases
from orion.manager.domain.overdue import Overdue
from orion.manager.domain.roster import Roster
from orion.manager.engine.authority import Authority
from orion.manager.engine.port import Reach
from orion.manager.gateway.openings import Openings
from orion.manager.gateway.port_access import PortAccess
from orion.manager.gateway.ssh_sessions import SshSessions
from orion.manager.gateway.terminal_sessions import TerminalSessions
from orion.manager.gateway.tickets import Terminals
from orion.manager.loops.clock import TrustedClock
from orion.manager.settings import Settings
from orion.manager.store.database import Row, Store
from orion.manager.store.tokens import Principal


@dataclass
class Services:
    settings: Settings
    store: Store
    roster: Roster
    leases: Leases
    call_home: CallHome
    reach: Reach
    authorized_keys: tuple[str, ...]
    """The manager's own public keys, which a worker lets in as root."""
    monotonic: Callable[[], float]
    wall: Callable[[], float]
    brake: Callable[[], str | None]
    """Why the brake is on; None while it is off."""
    wake_reconciler: Callable[[], None]
    wake_health: Callable[[], None]
    overdue: Callable[[], Awaitable[list[Overdue]]]
    """What has waited too long."""
    engine_log: Callable[[str], Awaitable[list[Row]]]
    """What the engine did for a rental, oldest first."""
    metrics: Metrics
    copy_now: Callable[[str, Generation | None], Awaitable[str]]
    """Copies a rental's files at once, and keeps an older copy; why that was not done, empty when it was."""
    thaw: Callable[[str, str], Awaitable[str]]
    """Has a rental go on that is over its limits, for an actor; why that could not be, empty when it does."""
    move: Callable[[str, str, str], Awaitable[None]]
    """Begins a planned move of a rental, from a worker, for somebody. Raises moves.NotMoved."""
    copies_paused: Callable[[], str | None]
    why_old: Callable[[str, float], str]
    """Why the last copy of an active rental, begun at that time (Unix seconds), is old; empty where it is not."""
    clock: TrustedClock
    authentication: Authentication
    openings: Openings
    event_streams: EventStreams
    authority: Authority
    terminals: Terminals
    ssh_sessions: SshSessions
    terminal_sessions: TerminalSessions
    port_access: PortAccess
    restart: Callable[[], None]
    """End, to be started again with what is then on the disk."""
    copying: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One backup or restore at a time: each needs room beside the database."""


def services(connection: HTTPConnection) -> Services:
    found: Services = connection.app.state.services
    return found


Shared = Annotated[Services, Depends(services)]


def client_address(connection: HTTPConnection) -> str:
    """The peer that the proxy saw; the proxy overwrites what a client sends."""
    return connection.headers.get("x-real-ip", "")


async def _client(connection: HTTPConnection, shared: Shared) -> Principal:
    return await shared.authentication.authenticate(connection, "client", "admin")


async def _admin(connection: HTTPConnection, shared: Shared) -> Principal:
    return await shared.authentication.authenticate(connection, "admin")


async def _caller_home(connection: HTTPConnection, shared: Shared) -> Principal:
    return await shared.authentication.authenticate(connection, "join", "worker")


async def _worker(connection: HTTPConnection, shared: Shared) -> Principal:
    return await shared.authentication.authenticate(connection, "worker")


Client = Annotated[Principal, Depends(_client)]
Admin = Annotated[Principal, Depends(_admin)]
CallerHome = Annotated[Principal, Depends(_caller_home)]
CallingWorker = Annotated[Principal, Depends(_worker)]
