"""Running a rental's start command as its renter: what root does for it. The rest is start.py, which root is not.

The command is one argument of a program, never a part of a line that a shell reads as root. What is started has no
terminal, no descriptor and no environment of ours, is in a session of its own, and is nobody's child here: so it
outlives the order, and is stopped, woken and ended with all other processes of its uid.

A mark in /run/orion/started says which run it has had, at which epoch. It is written when the command is on its way:
who is killed between the two has it run twice, which a service that is to come back survives better than never.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from ledger import Record

LONGEST = 1000
MARK = re.compile(r"[0-9]{1,16}@[A-Za-z0-9-]{0,64}")
PROGRAM = Path(__file__).with_name("start.py")
WITHIN_S = 10.0
"""Until it has gone its own way: the renter may have stopped it, or have used up its processes."""


def is_command(text: object) -> bool:
    """One line, as the manager has checked it too."""
    return isinstance(text, str) and len(text) <= LONGEST and text.isprintable() and bool(text.strip())


class Launcher:
    """`root` is another directory in tests."""

    def __init__(self, root: Path) -> None:
        self._marks = root / "run/orion/started"
        self._boot = root / "run/orion/boot-id"
        self._homes = root / "home"

    def begin(self, boot_id: str) -> None:
        """At the start of the container: orders from before it are void."""
        self._boot.parent.mkdir(parents=True, exist_ok=True)
        self._boot.write_text(boot_id)

    def launch(self, record: Record, command: str, mark: str) -> dict[str, object]:
        """Run it, unless this run was had; what a report says of it. Call it with the rental's lock."""
        file = self._marks / record.rental_id
        wanted = f"{record.epoch} {mark}"
        if _text(file) == wanted or self._is_of_another_boot(mark):
            return {}
        problem = self._run(record, command)
        self._marks.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(wanted)
        return {"changed": True, "started": not problem} | ({"start_problem": problem} if problem else {})

    def forget(self, rental_id: str) -> None:
        (self._marks / rental_id).unlink(missing_ok=True)

    def _is_of_another_boot(self, mark: str) -> bool:
        boot_id = _text(self._boot)
        return bool(boot_id) and mark.partition("@")[2] != boot_id

    def _run(self, record: Record, command: str) -> str:
        """Why it could not be run; empty where it was."""
        home = self._homes / record.username
        try:
            done = subprocess.run(
                ["/usr/bin/python3", "-I", "-S", str(PROGRAM), command],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd=home, env=environment(record), umask=0o022,
                user=record.uid, group=record.uid, extra_groups=[], start_new_session=True,
                timeout=WITHIN_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"its start command was not on its way within {WITHIN_S:.0f} s"
        except OSError as error:
            return f"its start command cannot be run: {error.strerror}"
        return f"its start command cannot be run: it ended with {done.returncode}" if done.returncode else ""


def environment(record: Record) -> dict[str, str]:
    """Return what a log-in by ssh has in its environment. Nothing of ours."""
    named = dict.fromkeys(("USER", "LOGNAME"), record.username)
    home, path = f"/home/{record.username}", "/usr/local/bin:/usr/bin:/bin:/usr/games"
    named |= {"HOME": home, "SHELL": "/bin/bash", "PATH": path, "LANG": "C.UTF-8"}
    return named | told_of_itself(record.rental_id, record.rental_name)


def told_of_itself(rental_id: str, rental_name: str) -> dict[str, str]:
    """Return the variables by which a rental's processes know which rental they are in. sshd_config lists them."""
    named = {"ORION_RENTAL": rental_name} if rental_name else {}
    return named | {"ORION_RENTAL_ID": rental_id}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
