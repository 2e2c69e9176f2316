"""The commands open, expose and ports, which show a rental's web servers in a browser."""

from __future__ import annotations

import webbrowser
from typing import Annotated

from typer import Argument, Option

from orion.cli import output
from orion.cli.session import AsJson, RentalName, platform
from orion.errors import InvalidInput, LocalFault
from orion.wire import MAX_PORT, MIN_PORT

Port = Annotated[int, Argument(min=MIN_PORT, max=MAX_PORT, help="The port on which a program in the rental listens.")]
ByPath = Annotated[
    bool, Option("--path", help="Print an address below the platform's own, if names such as 8000-ID.localhost fail.")
]


def open_port(
    rental: RentalName,
    port: Port,
    browser: Annotated[bool, Option("--browser", help="Open the address in this machine's browser.")] = False,
    by_path: ByPath = False,
    as_json: AsJson = False,
) -> None:
    """Print an address that opens a web port.

    The address works once, within a minute. The browser that opens it keeps access for eight hours.
    """
    with platform(f"looking for {rental}") as (orion, _tell):
        rental_id = orion.find_rental(rental).id
        ticket = orion.web_port_ticket(rental_id, port)
        url = orion.opening_url(rental_id, ticket, own_host=not by_path)
    if not as_json and (by_path or ticket.host is None):
        output.note(f"orion: {_below_a_path(rental, port, has_host=ticket.host is not None)}", "yellow")
    output.result({"url": url}, as_json, url)
    if browser and not webbrowser.open(url):
        raise LocalFault("no browser was found on this machine: open the address in a browser within a minute")


def _below_a_path(rental: str, port: int, has_host: bool) -> str:
    """Return a note on the limits of an address below the platform's own, and how to avoid them."""
    alternative = "leave out --path" if has_host else "ask the operator to set ORION_APPS_DOMAIN"
    forward = f"ssh -L {port}:127.0.0.1:{port} {output.plain(rental)}.orion"
    return (
        "below the platform's own address the browser keeps a page in a sandbox without cookies and storage: Jupyter "
        f"stays blank and Vite's scripts are blocked. To avoid this, run orion config-ssh once and {forward}, then "
        f"open http://127.0.0.1:{port}/; or {alternative}"
    )


def expose(
    rental: RentalName,
    port: Port,
    public: Annotated[bool | None, Option("--public/--private", help="Open to everybody, or to the owner.")] = None,
    by_path: ByPath = False,
    as_json: AsJson = False,
) -> None:
    """Make a web port public, or private again.

    A public port is open to everybody who reaches the platform.
    """
    if public is None:
        raise InvalidInput("give --public or --private")
    with platform() as (orion, _tell):
        exposed = orion.expose(orion.find_rental(rental).id, port, public)
        url = orion.port_url(exposed, own_host=not by_path)
    private = f"Only the rental's owner may open it now, with: orion open {rental} {port}"
    text = f"Anybody may open {url}" if exposed.public else private
    output.result({**exposed.model_dump(), "url": url}, as_json, text)


def ports(rental: RentalName, by_path: ByPath = False, as_json: AsJson = False) -> None:
    """List a rental's public web ports."""
    with platform() as (orion, _tell):
        found = orion.public_ports(orion.find_rental(rental).id)
        urls = [orion.port_url(one, own_host=not by_path) for one in found]
    if as_json:
        return output.emit(found)
    if not found:
        return output.note(f"no port is public. The owner may open one with: orion open {output.plain(rental)} PORT")
    rows = [[str(one.port), url] for one, url in zip(found, urls, strict=True)]
    return output.table(["PORT", "ADDRESS"], rows, wide="ADDRESS")
