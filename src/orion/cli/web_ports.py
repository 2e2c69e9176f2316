"""open, expose, ports: what a rental's processes serve, in a browser."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from orion.cli import output
from orion.cli.session import AsJson, RentalName, platform
from orion.errors import InvalidInput, LocalFault
from orion.wire import MAX_PORT, MIN_PORT

Port = Annotated[
    int,
    typer.Argument(
        min=MIN_PORT, max=MAX_PORT, help="The port that a program in the rental listens on.", show_default=False
    ),
]
ByPath = Annotated[
    bool,
    typer.Option(
        "--path",
        help="Give the address below the platform's own: for where a name such as 8000-ID.localhost leads nowhere.",
    ),
]


def open_port(
    rental: RentalName,
    port: Port,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in this machine's browser.")] = False,
    by_path: ByPath = False,
    as_json: AsJson = False,
) -> None:
    """Print the address of a web port, for a browser.

    The address is good once, for a minute; the browser that opens it may go on for eight hours.
    """
    with platform(f"looking for {rental}") as (orion, _tell):
        rental_id = orion.find_rental(rental).id
        ticket = orion.web_port_ticket(rental_id, port)
        url = orion.opening_url(rental_id, ticket, own_host=not by_path)
    if as_json:
        output.emit({"url": url})
    else:
        if by_path or ticket.host is None:
            output.note(f"orion: {_below_a_path(rental, port, has_host=ticket.host is not None)}", "yellow")
        output.say(output.plain(url))
    if browser and not webbrowser.open(url):
        raise LocalFault("no browser was found on this machine: open the address in one yourself, within a minute")


def _below_a_path(rental: str, port: int, has_host: bool) -> str:
    """Return what does not work at an address below the platform's own, and what does: see docs/operations.md."""
    other_way = "leave --path away" if has_host else "an operator sets ORION_APPS_DOMAIN"
    forward = f"ssh -L {port}:127.0.0.1:{port} {output.plain(rental)}.orion"
    return (
        "below the platform's own address a page is in a sandbox, without cookies and storage: Jupyter stays blank "
        f"there and Vite's scripts are blocked. All of it works after {forward} (once orion config-ssh was run) at "
        f"http://127.0.0.1:{port}/; or {other_way}"
    )


def expose(
    rental: RentalName,
    port: Port,
    public: Annotated[
        bool | None, typer.Option("--public/--private", help="To everybody, or to its owner alone again.")
    ] = None,
    by_path: ByPath = False,
    as_json: AsJson = False,
) -> None:
    """Make a web port public, or private again.

    A public port is open to everybody who reaches the platform.
    """
    if public is None:
        raise InvalidInput("say --public or --private")
    with platform() as (orion, _tell):
        exposed = orion.expose(orion.find_rental(rental).id, port, public)
        url = orion.port_url(exposed, own_host=not by_path)
    if as_json:
        return output.emit({**exposed.model_dump(), "url": url})
    if exposed.public:
        return output.say(f"Anybody may open {output.plain(url)}")
    return output.say(f"Its owner alone may open it now: orion open {output.plain(rental)} {port}")


def ports(rental: RentalName, by_path: ByPath = False, as_json: AsJson = False) -> None:
    """List a rental's public web ports."""
    with platform() as (orion, _tell):
        found = orion.public_ports(orion.find_rental(rental).id)
        urls = [orion.port_url(one, own_host=not by_path) for one in found]
    if as_json:
        return output.emit(found)
    if not found:
        return output.note(f"its owner alone may open what it serves: orion open {output.plain(rental)} PORT")
    rows = [[str(one.port), output.plain(url)] for one, url in zip(found, urls, strict=True)]
    return output.table(["PORT", "ADDRESS"], rows, wide="ADDRESS")
