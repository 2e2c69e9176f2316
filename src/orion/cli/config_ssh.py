"""The command config-ssh, which adds one line to ~/.ssh/config, so that tools that use ssh reach rentals by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated

from typer import Option

from orion import login
from orion.cli import keys, output, staying
from orion.cli.session import AsJson
from orion.errors import LocalFault, OrionError
from orion.ssh_client import hosts

REMARK = (
    b"# By orion config-ssh, for your rentals (NAME.orion); orion config-ssh --remove takes these two lines away.\n"
)


def config_ssh(
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    remove: Annotated[bool, Option("--remove", help="Undo what this command wrote.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make your rentals reachable as NAME.orion.

    ssh, scp, rsync, VS Code and Ansible then find them. The command adds one line at the beginning of ~/.ssh/config,
    which includes a file beside the login. It may be repeated.
    """
    file = (Path.home() / ".ssh" / "config").resolve()  # so that a link is not replaced
    before = _content(file)
    after = without(before) if remove else with_include(before)
    if not dry_run:
        made_by_us = remove and _made_by_us().exists()
        if remove:
            _made_by_us().unlink(missing_ok=True)
            hosts.remove()
        else:
            _check_home()
            account = login.load()
            keys.public_key(None)
            hosts.learn(account)
            hosts.check_by_ssh(hosts.include_line())
            if not file.exists():
                _made_by_us().touch(mode=0o600)
        if made_by_us and not after:
            file.unlink(missing_ok=True)
        elif after != before:
            _replace(file, after)
    _report(file, before, after, dry_run, as_json)
    if not as_json and not remove and not dry_run:
        output.say("To log in to a rental, run: ssh NAME.orion")
        if not staying.is_usable(os.environ.get("SHELL", "/bin/sh")):
            output.note("ssh needs a shell in $SHELL, and yours cannot run commands: run SHELL=/bin/sh ssh NAME.orion")


def with_include(before: bytes) -> bytes:
    """Return ssh's configuration with our two lines first: after a Host line they would apply to that host only."""
    return before if before.startswith(_our_lines()) else _our_lines() + without(before)


def without(before: bytes) -> bytes:
    """Return ssh's configuration without our two lines, wherever they are."""
    return before.replace(_our_lines(), b"")


def _our_lines() -> bytes:
    return REMARK + hosts.include_line().encode()


def refresh() -> None:
    """Update ssh's configuration after a rent or a release, if there is one. Print a note if that fails."""
    if not hosts.is_configured():
        return
    try:
        hosts.learn(login.load())
    except (OrionError, OSError) as error:
        output.note(f"orion: the list of your rentals for ssh was not updated ({error}); run: orion config-ssh")


def _made_by_us() -> Path:
    """Return the file whose presence says that we made ~/.ssh/config, so that --remove deletes it if it is empty."""
    return hosts.folder() / "made-config"


def _check_home() -> None:
    """Raise LocalFault if this is another user's home: files that its owner cannot read would break that user's ssh."""
    home = Path.home()
    if home.exists() and home.stat().st_uid != os.geteuid():
        raise LocalFault(f"{home} is another user's home: run this command as that user, or set HOME to your own home")


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise LocalFault(f"cannot read {file}: {error.strerror}") from error


def _replace(file: Path, content: bytes) -> None:
    """Replace the file in one step and keep its mode; a new file gets mode 0600. Raise LocalFault."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        login.write_private(file, content, file.stat().st_mode & 0o7777 if file.exists() else 0o600)
    except OSError as error:
        raise LocalFault(f"cannot write {file}: {error.strerror}") from error


def _report(file: Path, before: bytes, after: bytes, dry_run: bool, as_json: bool) -> None:
    if as_json or before == after or not dry_run:
        text = f"{file} needs no change." if before == after else f"{file} was changed."
        return output.result({"file": str(file), "changed": before != after, "dry_run": dry_run}, as_json, text)
    old, new = (content.decode(errors="replace").splitlines() for content in (before, after))
    for line in difflib.unified_diff(old, new, str(file), f"{file} (new)", n=1, lineterm=""):
        output.say(output.plain(line))
    return None
