"""config-ssh: one line in ~/.ssh/config, after which any tool that uses ssh reaches rentals by their names."""

from __future__ import annotations

import difflib
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from orion import login, ssh_rentals
from orion.cli import keys, output, staying
from orion.cli.session import AsJson
from orion.errors import LocalFault, OrionError

REMARK = (
    b"# By orion config-ssh, for your rentals (NAME.orion); orion config-ssh --remove takes these two lines away.\n"
)


def config_ssh(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take away what this command has written.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make your rentals reachable as NAME.orion.

    ssh, scp, rsync, VS Code and Ansible then reach them. One line is put before everything else in ~/.ssh/config, and
    what that includes is kept beside the login. The command may be repeated.
    """
    file = _ssh_config()
    before = _content(file)
    after = without(before) if remove else with_include(before)
    if not dry_run:
        if remove:
            made_here = _made_here().exists()
            _made_here().unlink(missing_ok=True)
            ssh_rentals.remove()
        else:
            made_here = False
            _check_home()
            account = login.load()
            keys.public_key(None)
            ssh_rentals.learn(account)
            ssh_rentals.check_by_ssh(include_line().decode())
            if not file.exists():
                _made_here().touch(mode=0o600)
        if made_here and not after:
            file.unlink(missing_ok=True)
        elif after != before:
            _replace(file, after)
    _report(file, before, after, dry_run, as_json)
    if not as_json and not remove and not dry_run:
        output.say("Get in with: ssh NAME.orion")
        if not staying.is_usable(os.environ.get("SHELL", "/bin/sh")):
            output.note("ssh starts its ProxyCommand by $SHELL, which is no shell here: SHELL=/bin/sh ssh NAME.orion")


def include_line() -> bytes:
    return ssh_rentals.include_line().encode()


def with_include(before: bytes) -> bytes:
    """Before everything else: after a Host or Match line it would count for those hosts alone."""
    if before.startswith(REMARK + include_line()):
        return before
    return REMARK + include_line() + without(before)


def without(before: bytes) -> bytes:
    """Exactly what there was before, wherever our two lines have been moved to."""
    return before.replace(REMARK + include_line(), b"")


def refresh() -> None:
    """Where ssh is configured: after something was rented or released. That stands already, so a failure is said."""
    if not ssh_rentals.is_configured():
        return
    try:
        ssh_rentals.learn(login.load())
    except (OrionError, OSError) as error:
        output.note(f"orion: ssh does not know of it yet ({error}); try: orion config-ssh")


def _made_here() -> Path:
    """Return the mark of a ~/.ssh/config that was not there before us, and goes with us if nobody has used it."""
    return ssh_rentals.folder() / "made-config"


def _check_home() -> None:
    """Raise LocalFault in the home of another user: files that ssh may not read would end all of that user's ssh."""
    home = Path.home()
    if home.exists() and home.stat().st_uid != os.geteuid():
        raise LocalFault(f"{home} is another user's home: run this as that user, or set HOME to your own")


def _ssh_config() -> Path:
    """What is really there: a link leads to where somebody keeps it."""
    return (Path.home() / ".ssh" / "config").resolve()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise LocalFault(f"cannot read {file}: {error.strerror}") from error


def _replace(file: Path, content: bytes) -> None:
    """In one step, with the rights that the file has; 0600 if it is new."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = file.stat().st_mode & 0o7777 if file.exists() else 0o600
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".config.")
        try:
            with os.fdopen(handle, "wb") as new:
                new.write(content)
                new.flush()
                os.fchmod(handle, mode)
                os.fsync(handle)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise LocalFault(f"cannot write {file}: {error.strerror}") from error


def _report(file: Path, before: bytes, after: bytes, dry_run: bool, as_json: bool) -> None:
    if as_json:
        return output.emit({"file": str(file), "changed": before != after, "dry_run": dry_run})
    if before == after:
        return output.say(f"{file} is as it should be.")
    if not dry_run:
        return output.say(f"{file} was changed.")
    lines = difflib.unified_diff(_lines(before), _lines(after), str(file), f"{file} (would be)", n=1, lineterm="")
    for line in lines:
        output.say(output.plain(line))
    return None


def _lines(content: bytes) -> list[str]:
    return content.decode(errors="replace").splitlines()
