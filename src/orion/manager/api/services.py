"""The services of routers: each router declares a dataclass of what it uses, and gets it as a dependency.

@dataclass(frozen=True, kw_only=True)
class KeyServices:                      # in the router's module; app.py makes one
    store: Store

Shared = Annotated[KeyServices, Depends(given(KeyServices))]

@router.get("/keys")
async def keys(principal: Client, shared: Shared) -> ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

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


async def _client(connection: HTTPConnection) -> Principal:
    return await provided(connection.scope, Authentication).authenticate(connection, "client", "admin")


async def _admin(connection: HTTPConnection) -> Principal:
    return await provided(connection.scope, Authentication).authenticate(connection, "admin")


async def _caller_home(connection: HTTPConnection) -> Principal:
    return await provided(connection.scope, Authentication).authenticate(connection, "join", "worker")


async def _worker(connection: HTTPConnection) -> Principal:
    return await provided(connection.scope, Authentication).authenticate(connection, "worker")


Client = Annotated[Principal, Depends(_client)]
Admin = Annotated[Principal, Depends(_admin)]
CallerHome = Annotated[Principal, Depends(_caller_home)]
CallingWorker = Annotated[Principal, Depends(_worker)]
