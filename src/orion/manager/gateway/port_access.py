"""Authorization of requests to web ports, and the worker that each one goes to.

On a port's own host name, the browser has its key in a cookie. On the platform's address no cookies are used, because
all rentals would share them: there the key is in the path, and the proxy's sandbox gives each page an origin of its own
(manager_proxy/web_port.conf).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from starlette.requests import HTTPConnection

from orion import wire
from orion.manager.authentication import Authentication, visible_owner
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.gateway.port_connections import PUBLIC, PortConnections
from orion.manager.gateway.port_keys import PortKeys, TokenReference, signed_pass
from orion.manager.gateway.running_rental import OVER, event_of
from orion.manager.gateway.tickets import LIFETIME_S, Tickets
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.store import rentals, tokens, web_ports
from orion.manager.store.database import Row, Store, record
from orion.manager.store.tokens import Principal


@dataclass(frozen=True, kw_only=True)
class PortRequest:
    """A request as the proxy describes it; the proxy has checked the form of rental and port."""

    rental_id: str
    port: int
    on_own_host: bool
    cross_site: bool
    """Whether a page of another origin makes the request; then the browser's cookie proves nothing."""


@dataclass(frozen=True)
class Destination:
    """The worker that a request may be passed on to."""

    address: str
    signed_pass: str
    is_public: bool


@dataclass(kw_only=True)
class PortAccess:
    store: Store
    clock: TrustedClock
    authentication: Authentication
    connections: PortConnections
    tickets: Tickets
    keys: PortKeys

    async def find_destination(
        self, connection: HTTPConnection, request: PortRequest, offered: Callable[[], Sequence[str]]
    ) -> Destination | str:
        """Return the destination of the request, or the rental's id if the request has its name in the place of it.

        `offered` returns the keys that the request has; it is called only for a private port. Raise ApiProblem if the
        caller may not open the port.
        """
        number = self.connections.number()  # before the rows are read: see gateway/port_connections.py
        row = await self.store.read(web_ports.look, request.rental_id)
        is_public = row is not None and request.port in row["public_ports"] and row["state"] not in OVER
        caller = None if is_public else await self._authenticated(connection, request, offered)
        if row is None and caller is not None:
            named = await self.store.read(rentals.page, caller.name, request.rental_id, False, None, 1)
            if named:
                return str(named[0]["id"])
        return self._destination(row, request, caller, number)

    def issue_ticket(self, rental_id: str, port: int, principal: Principal) -> str:
        """Return a new ticket for the port. Raise ApiProblem if there are too many."""
        return self.tickets.issue(_topic(rental_id, port), principal)

    async def redeem_ticket(self, rental_id: str, port: int, ticket: str, address: str) -> str:
        """Return the key that a browser gets for its ticket. Raise ApiProblem if the ticket is not valid."""
        principal = self.tickets.redeem(ticket, _topic(rental_id, port))
        now = self.clock.wall_of_tokens()
        if principal is None or not await self.store.read(tokens.is_valid, principal, now):
            detail = f"this address was valid once, for {LIFETIME_S:.0f} s: `orion open` prints another one"
            raise ApiProblem(401, "no_ticket", detail)
        row = await self.store.read(web_ports.look, rental_id)
        if row is None:
            raise not_found("rental")
        details = {"port": port, "from": address}
        await self.store.write(record, event_of(row, "rental.port_opened", principal.name, "by a ticket", details))
        return self.keys.make(
            rental_id, port, TokenReference(role=principal.role, token_id=principal.id, mark=principal.mark), now
        )

    async def _authenticated(
        self, connection: HTTPConnection, request: PortRequest, offered: Callable[[], Sequence[str]]
    ) -> Principal:
        """Return the caller by its token or by a key of it, and when that ends.

        Raise 401 if it has none, whether the rental exists or not.
        """
        if "orion_" in connection.headers.get("authorization", ""):
            return await self.authentication.authenticate(connection, "client", "admin")
        now = self.clock.wall_of_tokens()
        for key in offered():
            named = self.keys.read(key, request.rental_id, request.port, now)
            known = await self.store.read(tokens.named, named.role, named.token_id, now) if named else None
            if named is not None and known is not None and known.mark == named.mark:
                if request.on_own_host and request.cross_site:
                    raise ApiProblem(403, "cross_site", "a page of another origin may not make this request")
                ends_at = named.ends_at if known.expires_at is None else min(known.expires_at, named.ends_at)
                return replace(known, expires_at=ends_at)
        detail = (
            f"this port is not public: `orion open {request.rental_id} {request.port}` opens a port of your own "
            "rental in a browser, and a program sends its token (Authorization: Bearer TOKEN)"
        )
        raise ApiProblem(401, "private", detail, headers={"WWW-Authenticate": 'Bearer realm="orion"'})

    def _destination(self, row: Row | None, request: PortRequest, caller: Principal | None, number: int) -> Destination:
        """Return the worker, with a pass for it. `caller` is None for a public port. Raise ApiProblem."""
        if row is None or (caller and visible_owner(caller) not in {None, row["owner"]}):
            raise not_found("rental")
        if row["state"] in OVER:
            raise ApiProblem(404, "ended", f"the rental is {row['state']}")
        if row["state"] != wire.RentalState.ACTIVE or not row["session_id"]:
            why = f" ({row['state']}: {row['explanation']})" if caller else ""
            raise try_later("not_active", f"the rental does not run at present{why}: try again in a moment")
        grant = self.connections.note(caller, row["worker_id"]) if caller else PUBLIC
        left_s = caller.expires_at - self.clock.wall_of_tokens() if caller and caller.expires_at is not None else None
        signed = signed_pass(row["session_id"], row["id"], row["epoch"], request.port, grant, number, left_s)
        return Destination(row["address"], signed, is_public=caller is None)


def try_later(code: str, detail: str) -> ApiProblem:
    """Return the refusal of a request that may succeed in a moment."""
    return ApiProblem(503, code, detail, headers={"Retry-After": "2"})


def _topic(rental_id: str, port: int) -> str:
    return f"{rental_id}:{port}"
