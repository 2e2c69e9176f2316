"""The services of routers, and the principals of their calls.

Each router declares a dataclass of what it uses; app.py makes one, and each route gets it as a dependency:

    Shared = Annotated[KeyServices, Depends(given(KeyServices))]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from fastapi import Depends
from starlette.requests import HTTPConnection
from starlette.types import Scope

from orion.manager.authentication import Authentication
from orion.manager.store.tokens import Principal

T = TypeVar("T")
Services = dict[type[Any], Any]
"""The services of all routers, each by its class; the application's state has them as `services`."""


def provided(scope: Scope, kind: type[T]) -> T:
    """Return the services of this class that the application was given."""
    found: T = scope["app"].state.services[kind]
    return found


def given(kind: type[T]) -> Callable[[HTTPConnection], Awaitable[T]]:
    """Return the dependency that gives a route the services of this class."""

    async def find(connection: HTTPConnection) -> T:
        return provided(connection.scope, kind)

    return find


def client_address(connection: HTTPConnection) -> str:
    """Return the peer that the proxy saw; the proxy overwrites what a client sends."""
    return connection.headers.get("x-real-ip", "")


def is_from_another_origin(connection: HTTPConnection) -> bool:
    """Return whether a page from another address than the proxy's, port included, asks; programs send no Origin."""
    origin, host = connection.headers.get("origin"), connection.headers.get("x-forwarded-host", "")
    try:
        return origin is not None and (not host or urlsplit(origin).netloc.lower() != host.lower())
    except ValueError:
        return True


def _principal(*roles: str) -> Callable[[HTTPConnection], Awaitable[Principal]]:
    """Return the dependency that gives a route the principal of its call, which must have one of these roles."""

    async def authenticate(connection: HTTPConnection) -> Principal:
        return await provided(connection.scope, Authentication).authenticate(connection, *roles)

    return authenticate


Client = Annotated[Principal, Depends(_principal("client", "admin"))]
Admin = Annotated[Principal, Depends(_principal("admin"))]
CallerHome = Annotated[Principal, Depends(_principal("join", "worker"))]
CallingWorker = Annotated[Principal, Depends(_principal("worker"))]
