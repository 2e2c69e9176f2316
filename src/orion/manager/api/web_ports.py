"""The routes of web ports: those for renters, and those for the proxy, which asks before it passes a request on."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import partial
from http.cookies import CookieError, SimpleCookie
from typing import Annotated
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import HTMLResponse, Response

from orion import wire
from orion.manager.api.contract import refusals
from orion.manager.api.problems import TITLES, refuse_conflict, refused
from orion.manager.api.services import Client, client_address, given, is_from_another_origin
from orion.manager.api.visible_rentals import VisibleRentals
from orion.manager.gateway.port_access import PortAccess, PortRequest, try_later
from orion.manager.gateway.port_keys import LIFETIME_S as KEY_LIFETIME_S
from orion.manager.gateway.running_rental import OVER
from orion.manager.gateway.tickets import LIFETIME_S
from orion.manager.refusals import ApiProblem
from orion.manager.store import web_ports
from orion.manager.store.database import Store

COOKIE = "orion_port"
LARGEST_FORM_BYTES = 1000
_HEADERS_PASSED_ON = ("Location", "WWW-Authenticate", "Retry-After")
_FAILURES = {
    "": ("try_again", "the request could not be served a moment ago, and now it could: try again"),
    "not_connected": ("worker_unreachable", "the proxy cannot connect to the rental's worker: try again in a moment"),
    "no_answer": ("worker_unreachable", "the worker took the request and gave no answer: look before you repeat it"),
    "unreadable": ("answer_unreadable", "the proxy cannot read the answer's headers: they are malformed or too large"),
}
"""The code and detail for the client, by the failure that the proxy reports (manager_proxy/web_maps.conf)."""

router = APIRouter(prefix="/api", tags=["rentals"])
inside = APIRouter(prefix="/web", include_in_schema=False)
"""The router for the proxy's own subrequests; no path from outside leads to it."""

Port = Annotated[int, Path(ge=wire.MIN_PORT, le=wire.MAX_PORT)]


@dataclass(frozen=True, kw_only=True)
class WebPortServices:
    rentals: VisibleRentals
    store: Store
    access: PortAccess
    apps_domain: str
    """The domain below which each port has its own host name; empty if there is none."""


Shared = Annotated[WebPortServices, Depends(given(WebPortServices))]


@router.get("/rentals/{rental_id}/ports", responses=refusals(404))
async def list_ports(rental_id: str, principal: Client, shared: Shared, request: Request) -> wire.Page[wire.WebPort]:
    """Return the public ports. All other ports from 1024 on may be opened by the owner alone."""
    row = await shared.rentals.find(rental_id, principal)
    return wire.Page(items=[_web_port(shared, request, rental_id, port, True) for port in row["public_ports"]])


@router.put("/rentals/{rental_id}/ports/{port}", responses=refusals(404, 409))
async def expose(
    rental_id: str, port: Port, body: wire.ExposeRequest, principal: Client, shared: Shared, request: Request
) -> wire.WebPort:
    """Make a port public, or private again, which ends the connections of others. Repeatable."""
    await shared.rentals.find(rental_id, principal)
    refuse_conflict(await shared.store.write(web_ports.expose, rental_id, principal.name, port, body.public))
    return _web_port(shared, request, rental_id, port, body.public)


@router.post("/rentals/{rental_id}/ports/{port}/ticket", status_code=201, responses=refusals(404, 409))
async def ticket(rental_id: str, port: Port, principal: Client, shared: Shared, request: Request) -> wire.WebPortTicket:
    """Return a ticket by which a browser opens the port: valid once, for a minute. It yields a key for eight hours."""
    row = await shared.rentals.find(rental_id, principal)
    if row["state"] in OVER:
        raise ApiProblem(409, "ended", f"the rental is {row['state']}")
    issued = shared.access.issue_ticket(rental_id, port, principal)
    known = _web_port(shared, request, rental_id, port, port in row["public_ports"])
    return wire.WebPortTicket(**known.model_dump(), ticket=issued, expires_in_s=LIFETIME_S)


@inside.get("/way")
async def way(request: Request, shared: Shared) -> Response:
    """Return 204 with the worker that serves the request, or 403 with the refusal that the proxy shows.

    If an allowed request could not be served, the proxy asks again with `X-Orion-Explain`, and shows that refusal.
    `/way` is the released name of this route between proxy and manager.
    """
    explains = "x-orion-explain" in request.headers
    try:
        wanted = _port_request(request)
        found = await shared.access.find_destination(request, wanted, partial(_offered, request, wanted))
        if isinstance(found, str):
            rest = request.headers.get("x-orion-rest", "").removeprefix("/")
            location = _outer_path(request, found, wanted.port) + rest
            return _for_the_proxy(Response(status_code=307, headers={"Location": location}))
        if explains:
            raise _unserved(request.headers.get("x-orion-seen", ""))
    except ApiProblem as refusal:
        return _refused(request, refusal) if explains else _for_the_proxy(_refused(request, refusal))
    policy = "" if found.is_public else "same-origin"
    headers = {"X-Orion-Worker": found.address, "X-Orion-Pass": found.signed_pass, "X-Orion-Resource-Policy": policy}
    return Response(status_code=204, headers=headers)


@inside.post("/open")
async def open_port(request: Request, shared: Shared) -> Response:
    """Redeem a browser's ticket, and redirect it with a key."""
    try:
        wanted, ticket = await _form(request)
        key = await shared.access.redeem_ticket(wanted.rental_id, wanted.port, ticket, client_address(request))
    except ApiProblem as refusal:
        return _refused(request, refusal)
    if not wanted.on_own_host:
        opened = f"{_outer_path(request, wanted.rental_id, wanted.port)}~{key}/"
        return Response(status_code=303, headers={"Location": opened})
    redirect = Response(status_code=303, headers={"Location": "/"})
    secure = request.headers.get("x-forwarded-proto") == "https"
    redirect.set_cookie(COOKIE, key, max_age=int(KEY_LIFETIME_S), httponly=True, samesite="lax", secure=secure)
    return redirect


def _port_request(request: Request) -> PortRequest:
    port = request.headers.get("x-orion-port", "")
    if not (port.isascii() and port.isdigit() and wire.MIN_PORT <= int(port) <= wire.MAX_PORT):
        raise ApiProblem(404, "not_found", f"a web port is a number from {wire.MIN_PORT} to {wire.MAX_PORT}")
    own = request.headers.get("x-orion-own-host") == "1"
    return PortRequest(
        rental_id=request.headers.get("x-orion-rental", ""),
        port=int(port),
        on_own_host=own,
        cross_site=_is_cross_site(request),
    )


def _outer_path(request: Request, rental_id: str, port: int) -> str:
    """Return the port's path, below that of a trusted outer proxy if there is one; manager_proxy has checked it."""
    return request.headers.get("x-forwarded-prefix", "") + _path(rental_id, port)


def _unserved(seen: str) -> ApiProblem:
    """Return the refusal of a request that was allowed and that the proxy could not serve."""
    code, detail = _FAILURES.get(seen, _FAILURES[""])
    return ApiProblem(502, code, detail) if code == "answer_unreadable" else try_later(code, detail)


def _refused(request: Request, refusal: ApiProblem) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        return refused(refusal)
    title = TITLES.get(refusal.status, "Error")
    body = f"<!doctype html>\n<title>{title}</title>\n<h1>{title}</h1>\n<p>{html.escape(refusal.detail)}</p>\n"
    return HTMLResponse(body, refusal.status, refusal.headers)


def _for_the_proxy(shown: Response) -> Response:
    """Return a 403 that has this response in its headers, as Nginx passes on nothing else of a refused subrequest."""
    headers = {name: shown.headers[name] for name in _HEADERS_PASSED_ON if name in shown.headers}
    headers["X-Orion-Refused-Status"] = str(shown.status_code)
    headers["X-Orion-Refused-As"] = "html" if shown.headers.get("content-type", "").startswith("text/html") else "json"
    headers["X-Orion-Refused-Text"] = quote(bytes(shown.body))
    return Response(status_code=403, headers=headers)


async def _form(request: Request) -> tuple[PortRequest, str]:
    """Return the rental and port that a form names, and its ticket. Raise ApiProblem if the form is malformed."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_FORM_BYTES:
            raise ApiProblem(413, "body_too_large", f"a ticket's form has at most {LARGEST_FORM_BYTES} bytes")
    fields = parse_qs(body.decode("latin-1"), max_num_fields=8)
    rental_id, port, ticket = (fields.get(name, [""])[0] for name in ("rental", "port", "ticket"))
    if not (port.isascii() and port.isdigit() and len(port) <= 5):
        raise ApiProblem(422, "invalid_request", "port must be a number")
    own = request.headers.get("x-orion-own-host") == "1"
    if own and (rental_id, port) != (request.headers.get("x-orion-rental"), request.headers.get("x-orion-port")):
        raise ApiProblem(422, "invalid_request", "the ticket is for another host name")
    return PortRequest(rental_id=rental_id, port=int(port), on_own_host=own, cross_site=False), ticket


def _offered(request: Request, wanted: PortRequest) -> list[str]:
    """Return the keys that the request has: in cookies on a port's own host, else in the path."""
    return _cookies(request) if wanted.on_own_host else [request.headers.get("x-orion-key", "")]


def _cookies(request: Request) -> list[str]:
    """Return the first five cookies of that name, because another host of the same site may have set an invalid one."""
    found = []
    for pair in request.headers.get("cookie", "").split(";"):
        try:
            found += [one.value for one in SimpleCookie(pair.strip()).values() if one.key == COOKIE]
        except CookieError:
            continue
    return found[:5]


def _is_cross_site(request: Request) -> bool:
    """Return whether a page of another origin makes the request, other than by a link that is followed.

    Rentals share a domain, so to a browser their pages are of the same site, and it sends the cookie. For browsers that
    do not send these headers, the cookie's SameSite and Cross-Origin-Resource-Policy have to suffice.
    """
    headers = request.headers
    if is_from_another_origin(request):
        return True
    if headers.get("sec-fetch-site", "none") in {"same-origin", "none"}:
        return False
    follows = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return not (follows and headers.get("x-orion-method") in {"GET", "HEAD"})


def _web_port(shared: WebPortServices, request: Request, rental_id: str, port: int, public: bool) -> wire.WebPort:
    domain = shared.apps_domain
    if not domain and _is_this_machine(request.headers.get("x-forwarded-host", "")):
        domain = "localhost"
    host = f"{port}-{rental_id}.{domain}" if domain else None
    return wire.WebPort(port=port, public=public, path=_path(rental_id, port), host=host)


def _is_this_machine(host: str) -> bool:
    """Return whether the host is this machine; browsers resolve all names below localhost to it themselves."""
    try:
        return urlsplit(f"//{host}").hostname in {"localhost", "127.0.0.1", "::1"}
    except ValueError:
        return False


def _path(rental_id: str, port: int) -> str:
    return f"/r/{rental_id}/{port}/"
