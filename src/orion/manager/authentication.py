"""Finds the principal of a request by its token. Routes and gateway both use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from orion.manager.refusals import ApiProblem, unauthorized
from orion.manager.store import tokens
from orion.manager.store.database import Store
from orion.manager.store.tokens import Principal


@dataclass(frozen=True)
class Authentication:
    """Finds the principals of requests in the table of tokens."""

    store: Store
    wall: Callable[[], float]
    """The Unix time in seconds by which tokens expire."""

    async def authenticate(self, connection: HTTPConnection, *roles: str) -> Principal:
        """Return the principal. Raise ApiProblem: 401 for anything but a valid token, 403 for one of another role."""
        principal = await self.identify(connection)
        if principal.role not in roles:
            detail = f"this takes a token of the role {' or '.join(roles)}, and yours is of the role {principal.role}"
            raise ApiProblem(403, "forbidden", detail)
        return principal

    async def identify(self, connection: HTTPConnection) -> Principal:
        """Return the principal of any role. Raise ApiProblem 401 for anything but a valid token."""
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise unauthorized("no token was sent: it belongs into the header 'Authorization: Bearer TOKEN'")
        principal = await self.store.read(tokens.authenticate, token.strip(), self.wall())
        if principal is None:
            raise unauthorized(await self.store.read(tokens.why_refused, token.strip()))
        return principal


def visible_owner(principal: Principal) -> str | None:
    """Return the owner whose rentals and events the principal sees; None: those of all owners."""
    return None if principal.role == "admin" else principal.name
