"""The tree of all commands, and the exit status of each kind of error."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import IO, Annotated, Any

import typer
from typer.main import get_command

from orion import __version__
from orion.cli import access, admin, config_ssh, feed, output, pool, rental_keys, rentals, shell, snapshots, web_ports
from orion.errors import InvalidInput, OrionError

PIPE_CLOSED = 128 + signal.SIGPIPE  # the exit status of a program that SIGPIPE ends

_EPILOG = """\b
Exit status, for scripts:
  0  done                         4  not logged in, or not allowed
  1  another error                5  the platform cannot be reached
  2  wrong usage                  6  conflict: a name taken, in use, ended
  3  not found                    7  still waiting: accepted, not done yet
`orion ssh` ends with the status of ssh or of the command.

\b
The login is kept in ~/.config/orion (or $XDG_CONFIG_HOME/orion);
ORION_URL with ORION_TOKEN_FILE (and ORION_CA_FILE) replace it.
"""

app = typer.Typer(
    name="orion",
    help="Rent environments that survive their machine.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _everywhere(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; works with any command.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    del as_json  # the --json option of each command reads this value from the context
    if version:
        output.say(f"orion {__version__}")
        raise typer.Exit


def _add(*functions: Callable[..., None]) -> None:
    """Add a command for each function, under the function's name."""
    for function in functions:
        app.command()(function)


_add(access.login, rentals.rent)
app.command(context_settings={"allow_interspersed_args": False})(shell.ssh)
_add(config_ssh.config_ssh, shell.connect, shell.terminal)
app.command("open")(web_ports.open_port)
_add(web_ports.expose, web_ports.ports)
_add(rentals.ls, rentals.show, rentals.start, shell.logs, rentals.thaw, rentals.renew, rentals.migrate, rentals.release)
_add(snapshots.snapshots, snapshots.restore, feed.events)
_add(pool.status, pool.drain, pool.resume, pool.remove, pool.inventory)
app.add_typer(rental_keys.commands, name="keys")
app.add_typer(access.tokens, name="token")
app.add_typer(pool.commands, name="workers")
app.add_typer(admin.commands, name="admin")


@cache
def commands() -> Any:
    """Return the tree of commands for Click. It is built once, as that takes tens of milliseconds."""
    return get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return its exit status."""
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, because an error of the interpreter's own flush at its end cannot be caught
    except (BrokenPipeError, SystemExit):  # Typer and Rich turn the first into the second
        _discard_if_unread(sys.stdout)
        _discard_if_unread(sys.stderr)
        return PIPE_CLOSED
    return status


def _discard_if_unread(stream: IO[str]) -> None:
    """Send the rest of the stream to /dev/null if its reader has ended, as `head` does."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: Sequence[str]) -> int:
    as_json = _wants_json(arguments)
    try:
        return commands().main(list(arguments), prog_name="orion", standalone_mode=False) or 0
    except OrionError as error:
        output.failure(error, as_json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            output.note(str(error))
            return 2
        if not hasattr(error, "format_message"):  # only Typer's errors of usage have this method, in all its versions
            raise
        output.failure(InvalidInput(_usage(error)), as_json)
        return getattr(error, "exit_code", 2)


def _usage(error: Exception) -> str:
    """Return the message of one of Typer's errors of usage, with the command that shows the help."""
    context = getattr(error, "ctx", None)
    message = str(getattr(error, "format_message")())  # noqa: B009 - Exception has none
    return f"{message} See: {context.command_path} --help" if context else message


def _wants_json(arguments: Sequence[str]) -> bool:
    """Return whether the arguments contain --json, without parsing them, so that errors of parsing are JSON, too.

    Arguments after `ssh RENTAL` belong to the command that runs there, and do not count.
    """
    rest, words = list(arguments), 0
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        if argument == "--json":
            return True
        if argument in {"-i", "--identity", "--wait"}:
            rest = rest[1:]
        elif not argument.startswith("-"):
            words += 1
            if words == 2 and "ssh" in arguments[: len(arguments) - len(rest)]:
                return False
    return False
