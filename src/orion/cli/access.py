"""The commands login and token."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from typer import Argument, Option, Typer, prompt

from orion import login as logins
from orion.cli import durations, output
from orion.cli.session import AsJson, Yes, ask, confirm
from orion.client.sdk import Orion
from orion.login import Login
from orion.wire import MAX_TOKEN_TTL_S, MIN_TTL_S

tokens = Typer(no_args_is_help=True, help="Make, list and revoke tokens.")


class TokenRole(StrEnum):
    """The role of a new token, which says what it allows."""

    CLIENT = "client"
    ADMIN = "admin"
    JOIN = "join"


def login(
    url: Annotated[str, Argument(metavar="URL", help="The platform's address, such as http://localhost:8080.")],
    token_file: Annotated[
        Path | None, Option(metavar="FILE", help="A file with the token; - is stdin. Default: orion asks for it.")
    ] = None,
    ca_file: Annotated[
        Path | None, Option(metavar="FILE", help="The platform's certificate in PEM, if it is not trusted otherwise.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Log in to a platform.

    The token is checked first, then kept in a file that only this user can read.
    """
    account = Login(logins.clean_url(url), _token(token_file), str(ca_file) if ca_file else None)
    with Orion(account) as orion, output.progress(f"logging in to {account.url}"):
        next(orion.rentals(limit=1), None)
    kept_in = logins.store(account)
    if account.url.startswith("http://") and not logins.is_this_machine(urlsplit(account.url).hostname or ""):
        risk = "plain http sends the token unencrypted, so others on the network can read it"
        output.note(f"orion: {risk}. Use https instead (port 8443)", "yellow")
    stored = {"url": account.url, "config": str(kept_in)}
    output.result(stored, as_json, f"logged in to {account.url}; the login is kept in {kept_in}")


@tokens.command("create")
def create_token(
    name: Annotated[str, Argument(help="The name of the token's user, who owns all rentals made with it.")],
    role: Annotated[TokenRole, Option(help="What the token allows.")] = TokenRole.CLIENT,
    ttl: Annotated[str | None, Option(metavar="DURATION", help="How long it is valid. Default: until revoked.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token.

    The token is printed once, alone on stdout, and cannot be shown again.
    """
    ttl_s = durations.within(ttl, "--ttl", MIN_TTL_S, MAX_TOKEN_TTL_S) if ttl is not None else None
    made = ask(lambda orion: orion.create_token(name, role.value, ttl_s))
    if not as_json:
        output.note(output.plain(f"token {made.id} of {made.name}, {made.role.value}; it is shown only now:"))
    output.result(made, as_json, made.token)


@tokens.command("ls")
def list_tokens(as_json: AsJson = False) -> None:
    """List the tokens, without their secrets."""
    found = ask(lambda orion: list(orion.tokens()))
    if as_json:
        return output.emit(found)
    rows = [
        [one.id, one.name, one.role.value, *map(output.when, (one.created_at, one.expires_at, one.revoked_at))]
        for one in found
    ]
    return output.table(["ID", "NAME", "ROLE", "MADE", "ENDS", "REVOKED"], rows, wide="NAME")


@tokens.command("revoke")
def revoke_token(
    token: Annotated[str, Argument(help="The token's id, or its name if no other token has it.")],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Revoke a token at once.

    Its rentals continue. Sessions that it opened end.
    """
    found = ask(lambda orion: orion.find_token(token))
    confirm(f"Revoke {found.id} ({found.role.value} of {found.name})?", yes)
    ask(lambda orion: orion.revoke_token(found.id))
    output.result({"revoked": found.id}, as_json, f"{found.id} is revoked.")


def _token(file: Path | None) -> str:
    """Return the token from the file, from stdin, or from a person at the terminal."""
    if file is None and sys.stdin.isatty():
        return logins.clean_token(prompt("Token", hide_input=True, err=True))
    if file is None or str(file) == "-":
        return logins.clean_token(sys.stdin.read())
    return logins.read_token(file)
