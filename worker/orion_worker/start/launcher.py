"""Running a rental's start command as its renter: what root does for it. The rest is start.py, which root is not.

The command is one argument of a program, never a part of a line that a shell reads as root. What is started has no
terminal, no descriptor and no environment of ours, is in a session of its own, and is nobody's child here: so it
outlives the order, and is stopped, woken and ended with all other processes of its uid.

From the moment in which the program has the renter's uid the renter may stop it, also before it has begun anything. So
root, which holds the rental's lock, waits for its end and for no word of it, and kills it after WITHIN_S.

A mark in /run/orion/started says which run it has had, at which epoch. It is written when the command is on its way:
who is killed between the two has it run twice, which a service that is to come back survives better than never.

How a run ended stands in a file that the renter's program keeps (start.py). It is the renter's word: so it is read as
any file of a renter's, without following a link or waiting, and only for the run that the mark says.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path

from orion_worker.records import RentalRecord
from orion_worker.system.processes import NOT_BEGUN, begin_child, has_ended, kill_group

NOTE = (".orion", "start.run")
"""In the home: see start.py."""
NOTED = re.compile(
    rb"([0-9]+) ([0-9]+@[A-Za-z0-9-]*)\n(?:(status [0-9]{1,3}|signal [0-9]{1,2}) ([0-9]{1,12}\.[0-9])\n)?"
)
MOST_OF_A_NOTE = 200
PROGRAM = Path(__file__).with_name("program.py")
WITHIN_S = 10.0
"""Seconds until it has gone its own way: the renter may have stopped it, or have used up its processes."""


class Launcher:
    """`root` is another directory in tests."""

    def __init__(self, root: Path) -> None:
        self._marks = root / "run/orion/started"
        self._boot = root / "run/orion/boot-id"
        self._homes = root / "home"

    def set_boot_id(self, boot_id: str) -> None:
        """At the start of the container: orders from before it are void."""
        self._boot.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._boot.write_text(boot_id)

    @property
    def boot_id(self) -> str:
        """This life of the container, as the agent has told the manager; empty where no agent runs, as in a test."""
        return _text(self._boot)

    def launch(self, record: RentalRecord, command: str, mark: str) -> dict[str, object]:
        """Run it, unless this run was had; what a report says of it. Call it with the rental's lock."""
        file = self._marks / record.rental_id
        wanted = f"{record.epoch} {mark}"
        if _text(file) == wanted or self._is_of_another_boot(mark):
            return {}
        problem = self._run(record, wanted, command)
        self._marks.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(wanted)
        return {"changed": True, "started": not problem} | ({"start_problem": problem} if problem else {})

    def forget(self, rental_id: str) -> None:
        (self._marks / rental_id).unlink(missing_ok=True)

    def ended(self, record: RentalRecord, now: float) -> dict[str, object] | None:
        """Return how the run that it has had here ended, as a heartbeat has it. None: it goes on, or nothing is known.

        `now`: CLOCK_BOOTTIME. A run that was ended with the program that keeps its output is `unseen`.
        """
        wanted = _text(self._marks / record.rental_id)
        noted = NOTED.fullmatch(self._note(record)) if wanted else None
        if noted is None or b" ".join(noted.group(1, 2)).decode() != wanted or int(noted[1]) != record.epoch:
            return None
        if self._is_of_another_boot(noted[2].decode()):
            return None  # it ended with the container, and is run again unless it was given up
        ago_s = max(0.0, now - float(noted[4])) if noted[4] else 0.0
        how = noted[3].decode() if noted[3] else "unseen"
        return {
            "rental_id": record.rental_id,
            "epoch": record.epoch,
            "run": noted[2].decode(),
            "how": how,
            "ago_s": round(ago_s, 1),
        }

    def _note(self, record: RentalRecord) -> bytes:
        """What its program has noted; empty where that still runs, or it is no plain file of this renter's."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        opened: list[int] = []
        try:
            opened.append(os.open(self._homes / record.username, flags | os.O_DIRECTORY))
            opened.append(os.open(NOTE[0], flags | os.O_DIRECTORY, dir_fd=opened[-1]))
            opened.append(os.open(NOTE[1], flags, dir_fd=opened[-1]))
            found = os.fstat(opened[-1])
            if not stat.S_ISREG(found.st_mode) or found.st_uid != record.uid:
                return b""
            fcntl.flock(opened[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.read(opened[-1], MOST_OF_A_NOTE)
        except OSError:
            return b""
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _is_of_another_boot(self, mark: str) -> bool:
        boot_id = self.boot_id
        return bool(boot_id) and mark.partition("@")[2] != boot_id

    def _run(self, record: RentalRecord, which: str, command: str) -> str:
        """Why it could not be run; empty where it was."""
        try:
            status = self._begin(record, which, command)
        except OSError as error:
            return f"its start command cannot be run: {error.strerror}"
        if status is None:
            return f"its start command was not on its way within {WITHIN_S:.0f} s"
        why = os.strerror(status - NOT_BEGUN) if status > NOT_BEGUN else f"it ended with {status}"
        return f"its start command cannot be run: {why}" if status else ""

    def _begin(self, record: RentalRecord, which: str, command: str) -> int | None:
        """Return with what status the program has gone its own way; None: it did not in time, and was killed."""
        home = os.open(self._homes / record.username, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            child = begin_child(partial(_be_the_program, home, record, which, command))
        finally:
            os.close(home)
        if has_ended(child, WITHIN_S):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kill_group(child)
        return None


def _be_the_program(home: int, record: RentalRecord, which: str, command: str) -> None:
    """In a child: be the renter's program (start.py), in the renter's home."""
    os.fchdir(home)
    silence = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(silence, standard)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        if int(name) > 2:
            with suppress(OSError):  # what listed them is closed by now
                os.close(int(name))
    os.umask(0o022)
    os.setgroups([])
    os.setresgid(record.uid, record.uid, record.uid)
    os.setresuid(record.uid, record.uid, record.uid)
    program = ("/usr/bin/python3", "-I", "-S", str(PROGRAM), which, command)
    os.execve(program[0], program, environment(record))  # noqa: S606 - there is no shell in it


def environment(record: RentalRecord) -> dict[str, str]:
    """Return what a log-in by ssh has in its environment. Nothing of ours."""
    named = dict.fromkeys(("USER", "LOGNAME"), record.username)
    home, path = f"/home/{record.username}", "/usr/local/bin:/usr/bin:/bin:/usr/games"
    named |= {"HOME": home, "SHELL": "/bin/bash", "PATH": path, "LANG": "C.UTF-8"}
    return named | rental_variables(record.rental_id, record.rental_name)


def rental_variables(rental_id: str, rental_name: str) -> dict[str, str]:
    """Return the variables by which a rental's processes know which rental they are in. sshd_config lists them."""
    named = {"ORION_RENTAL": rental_name} if rental_name else {}
    return named | {"ORION_RENTAL_ID": rental_id}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
