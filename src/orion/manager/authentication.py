"""Authentication: find the principal of a request's token, and what it may see. Routes and gateway both use it."""

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
    store: Store
    wall: Callable[[], float]
    """Unix time in seconds, by the clock that tokens end by."""

    async def authenticate(self, connection: HTTPConnection, *roles: str) -> Principal:
        """Return who asks. Raise 401 for anything but a valid token, 403 for one of another role."""
        principal = await self.identify(connection)
        if principal.role not in roles:
            may = " or ".join(roles)
            raise ApiProblem(
                403, "forbidden", f"this takes a token of the role {may}, and yours is of the role {principal.role}"
            )
        return principal

    async def identify(self, connection: HTTPConnection) -> Principal:
        """Return whose token was sent, of whatever role. Raise 401 for anything but a valid one."""
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise unauthorized("no token was sent: it belongs into the header 'Authorization: Bearer TOKEN'")
        principal = await self.store.read(tokens.authenticate, token.strip(), self.wall())
        if principal is None:
            raise unauthorized(await self.store.read(tokens.why_refused, token.strip()))
        return principal


def visible_owner(principal: Principal) -> str | None:
    """Return the owner whose rentals and events the principal sees; None: everybody's."""
    return None if principal.role == "admin" else principal.name
