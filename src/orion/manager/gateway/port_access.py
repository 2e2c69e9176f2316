"""Web ports: who may open which, and where it is.

On a host name of its own a browser has its key in a cookie. On the platform's address there are no cookies at all, for
there all rentals and the platform itself share what cookies are kept for: so the key stands in the path, and what is
served there has an origin of its own by the sandbox that the proxy sets (manager_proxy/web_port.conf).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from orion import wire
from orion.manager.authentication import Authentication, visible_owner
from orion.manager.controllers.wall_clock import TrustedClock
from orion.manager.domain.steps import Event
from orion.manager.gateway.port_connections import PUBLIC, PortConnections
from orion.manager.gateway.port_keys import Named, PortKeys, signed_pass
from orion.manager.gateway.running_rental import OVER
from orion.manager.gateway.tickets import LIFETIME_S, Tickets
from orion.manager.refusals import ApiProblem, not_found
from orion.manager.store import rentals, tokens, web_ports
from orion.manager.store.database import Row, Store, record
from orion.manager.store.tokens import Principal


@dataclass(frozen=True)
class PortRequest:
    """What the proxy says of a request: it has checked the form of rental and port."""

    rental_id: str
    port: int
    on_own_host: bool
    cross_site: bool
    """A page from elsewhere has the browser ask, with whatever cookie that has."""


@dataclass(frozen=True)
class Who:
    """Who opens a private port, by a token or in its name."""

    principal: Principal
    ends_at: float | None
    """Unix seconds at which the token or the key ends."""


@dataclass(frozen=True)
class Destination:
    """The worker that a request may be passed on to."""

    address: str
    signed_pass: str
    is_public: bool


@dataclass(frozen=True)
class NamedRental:
    """The rental was asked for by its name, and is to be asked for by its id."""

    rental_id: str


class PortAccess:
    def __init__(
        self,
        *,
        store: Store,
        clock: TrustedClock,
        authentication: Authentication,
        ends: PortConnections,
        tickets: Tickets,
        keys: PortKeys,
    ) -> None:
        self._store = store
        self._clock = clock
        self._authentication = authentication
        self._ends = ends
        self._tickets = tickets
        self._keys = keys

    def number(self) -> int:
        """Return the number of a pass, which is taken before anything that the pass rests on is looked up."""
        return self._ends.number()

    async def lead(
        self, connection: HTTPConnection, asked: PortRequest, offered: Callable[[], Sequence[str]], number: int
    ) -> Destination | NamedRental:
        """Return where the request leads to. Raise ApiProblem where the caller may not open the port.

        `offered` returns the keys that the request brings; it is called only for a port that needs one.
        """
        row = await self._store.read(web_ports.look, asked.rental_id)
        is_public = row is not None and asked.port in row["public_ports"] and row["state"] not in OVER
        who = None if is_public else await self._who(connection, asked, offered)
        if row is None and who is not None:
            row = await self._named(asked.rental_id, who.principal)
            if row is not None:
                return NamedRental(row["id"])
        return self._destination(row, asked, who, number)

    def issue_ticket(self, rental_id: str, port: int, principal: Principal) -> str:
        """Return a new ticket for the port. Raise ApiProblem where there are too many."""
        return self._tickets.issue(_topic(rental_id, port), principal)

    async def redeem_ticket(self, rental_id: str, port: int, ticket: str, where_from: str) -> str:
        """Return the key that a browser gets for its ticket. Raise ApiProblem where the ticket is not good."""
        principal = self._tickets.redeem(ticket, _topic(rental_id, port))
        now = self._clock.wall_of_tokens()
        if principal is None or not await self._store.read(tokens.is_valid, principal, now):
            detail = f"this address was good once, for {LIFETIME_S:.0f} s: `orion open` prints another one"
            raise ApiProblem(401, "no_ticket", detail)
        row = await self._store.read(web_ports.look, rental_id)
        if row is None:
            raise not_found("rental")
        port_opened = Event(
            kind="rental.port_opened",
            actor=principal.name,
            reason="by a ticket",
            owner=row["owner"],
            rental_id=row["id"],
            worker_id=row["worker_id"],
            epoch=row["epoch"],
            details={"port": port, "from": where_from},
        )
        await self._store.write(record, port_opened)
        return self._keys.make(rental_id, port, Named(principal.role, principal.id, principal.mark), now)

    async def _who(self, connection: HTTPConnection, asked: PortRequest, offered: Callable[[], Sequence[str]]) -> Who:
        """Return who asks, of those who could be the owner.

        Raise 401 for anybody else, whether there is such a rental or not.
        """
        if "orion_" in connection.headers.get("authorization", ""):
            principal = await self._authentication.authenticate(connection, "client", "admin")
            return Who(principal, principal.expires_at)
        now = self._clock.wall_of_tokens()
        for key in offered():
            named = self._keys.read(key, asked.rental_id, asked.port, now)
            known = await self._store.read(tokens.named, named.role, named.token_id, now) if named else None
            if named is not None and known is not None and known.mark == named.mark:
                if asked.on_own_host and asked.cross_site:
                    raise ApiProblem(403, "cross_site", "a page from elsewhere asks for this")
                ends = [at for at in (known.expires_at, named.ends_at) if at is not None]
                return Who(known, min(ends))
        detail = (
            f"nothing is open to everybody here: `orion open {asked.rental_id} {asked.port}` opens a port of your own "
            "in a browser, and a program sends its token (Authorization: Bearer TOKEN)"
        )
        raise ApiProblem(401, "private", detail, {"WWW-Authenticate": 'Bearer realm="orion"'})

    async def _named(self, name: str, principal: Principal) -> Row | None:
        """Return the living rental that the principal itself owns under that name."""
        found = await self._store.read(rentals.page, principal.name, name, False, None, 1)
        return found[0] if found else None

    def _destination(self, row: Row | None, asked: PortRequest, who: Who | None, number: int) -> Destination:
        """`who` is None for what is public alone."""
        principal = who.principal if who else None
        if row is None or (principal and visible_owner(principal) not in {None, row["owner"]}):
            raise not_found("rental")
        if row["state"] in OVER:
            raise ApiProblem(404, "ended", f"the rental is {row['state']}")
        if row["state"] != wire.RentalState.ACTIVE or not row["session_id"]:
            why = f" ({row['state']}: {row['explanation']})" if principal else ""
            raise try_later("not_active", f"the rental does not run at present{why}: try again in a moment")
        grant = self._ends.note(who.principal, row["worker_id"]) if who else PUBLIC
        left_s = who.ends_at - self._clock.wall_of_tokens() if who and who.ends_at is not None else None
        signed = signed_pass(row["session_id"], row["id"], row["epoch"], asked.port, grant, number, left_s)
        return Destination(row["address"], signed, is_public=who is None)


def try_later(code: str, detail: str) -> ApiProblem:
    """Return the refusal of what may be possible in a moment."""
    return ApiProblem(503, code, detail, {"Retry-After": "2"})


def _topic(rental_id: str, port: int) -> str:
    return f"{rental_id}:{port}"
