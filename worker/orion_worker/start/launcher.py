"""The part of running a rental's start command that root does. start/program.py does the rest as the renter.

The command is one argument of a program, never a part of a line that a shell reads as root. The program has no
terminal, descriptor or environment of root's. It has a session of its own and no parent here, so it outlives the order,
and is stopped, resumed and ended with all other processes of its uid.

The renter may stop the program as soon as it has the renter's uid. So root, which holds the rental's lock, waits only
until the program has detached itself, and kills it after WITHIN_S.

A mark in /run/orion/started holds the epoch and the last run. It is written after that: if this process is killed in
between, the command is run twice, which for a service is better than not at all.

The renter's program notes in a file how a run ended. The renter can write that file, so it is read without following a
link and without waiting, and it counts only for the run that the mark names.
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
from orion_worker.system.files import closing, text_of
from orion_worker.system.processes import NOT_BEGUN, begin_child, has_ended, kill_group
from orion_worker.system.trees import OPEN_FOLDER

NOTE = (".orion", "start.run")
"""The directory and the name, in a home, of the note that start/program.py writes."""
NOTE_FORM = re.compile(
    rb"([0-9]+) ([0-9]+@[A-Za-z0-9-]*)\n(?:(status [0-9]{1,3}|signal [0-9]{1,2}) ([0-9]{1,12}\.[0-9])\n)?"
)
"""Epoch, run, and, once the run has ended, how it ended and when (seconds of CLOCK_BOOTTIME)."""
MAX_NOTE_BYTES = 200
PROGRAM = Path(__file__).with_name("program.py")
WITHIN_S = 10.0
"""Seconds within which the program must detach itself. The renter may stop it, or have used up its processes."""


class Launcher:
    """The start commands of this worker's rentals, and how they ended; `root` is another directory in tests."""

    def __init__(self, root: Path) -> None:
        self._marks = root / "run/orion/started"
        self._boot = root / "run/orion/boot-id"
        self._homes = root / "home"

    def set_boot_id(self, boot_id: str) -> None:
        """Store the boot id at the start of the container: orders for an earlier one are void."""
        self._boot.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._boot.write_text(boot_id)

    @property
    def boot_id(self) -> str:
        """Return the id of this run of the container, which the manager has too; empty where no agent runs (tests)."""
        return text_of(self._boot)

    def launch(self, record: RentalRecord, command: str, mark: str) -> dict[str, object]:
        """Run the command unless this run was begun already; return its part of the report.

        The caller holds the rental's lock.
        """
        file = self._marks / record.rental_id
        wanted = f"{record.epoch} {mark}"
        if text_of(file) == wanted or self._is_of_another_boot(mark):
            return {}
        problem = self._run(record, wanted, command)
        self._marks.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(wanted)
        return {"changed": True, "started": not problem} | ({"start_problem": problem} if problem else {})

    def forget(self, rental_id: str) -> None:
        (self._marks / rental_id).unlink(missing_ok=True)

    def ended(self, record: RentalRecord, now: float) -> dict[str, object] | None:
        """Return how the last start command ended, in the form of a heartbeat; None while it runs, or if unknown.

        `now`: CLOCK_BOOTTIME. `how` is `unseen` if the program that keeps its output ended before it noted the end.
        """
        wanted = text_of(self._marks / record.rental_id)
        noted = NOTE_FORM.fullmatch(self._note(record)) if wanted else None
        if noted is None or b" ".join(noted.group(1, 2)).decode() != wanted or int(noted[1]) != record.epoch:
            return None
        if self._is_of_another_boot(noted[2].decode()):
            return None  # that run ended with the container, and the manager orders another one if it wants one
        ago_s = max(0.0, now - float(noted[4])) if noted[4] else 0.0
        how = noted[3].decode() if noted[3] else "unseen"
        end = {"run": noted[2].decode(), "how": how, "ago_s": round(ago_s, 1)}
        return {"rental_id": record.rental_id, "epoch": record.epoch, **end}

    def _note(self, record: RentalRecord) -> bytes:
        """Return the note of the renter's program; nothing while the program runs, which holds the note's lock.

        Return nothing as well if the note is no plain file of this renter's.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with (
            suppress(OSError),
            closing(os.open(self._homes / record.username, flags | os.O_DIRECTORY)) as home,
            closing(os.open(NOTE[0], flags | os.O_DIRECTORY, dir_fd=home)) as folder,
            closing(os.open(NOTE[1], flags, dir_fd=folder)) as note,
        ):
            found = os.fstat(note)
            if stat.S_ISREG(found.st_mode) and found.st_uid == record.uid:
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return os.read(note, MAX_NOTE_BYTES)
        return b""

    def _is_of_another_boot(self, mark: str) -> bool:
        boot_id = self.boot_id
        return bool(boot_id) and mark.partition("@")[2] != boot_id

    def _run(self, record: RentalRecord, which: str, command: str) -> str:
        """Start the program; return why the command could not be run, empty where it was."""
        try:
            status = self._begin(record, which, command)
        except OSError as error:
            return f"its start command cannot be run: {error.strerror}"
        if status is None:
            return f"its start command did not begin within {WITHIN_S:.0f} s"
        why = os.strerror(status - NOT_BEGUN) if status > NOT_BEGUN else f"it ended with {status}"
        return f"its start command cannot be run: {why}" if status else ""

    def _begin(self, record: RentalRecord, which: str, command: str) -> int | None:
        """Return the exit status with which the program detached itself; None if it did not in time and was killed."""
        with closing(os.open(self._homes / record.username, OPEN_FOLDER)) as home:
            child = begin_child(partial(_become_program, home, record, which, command))
        if has_ended(child, WITHIN_S):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kill_group(child)
        return None


def _become_program(home: int, record: RentalRecord, which: str, command: str) -> None:
    """Become start/program.py as the renter, in the renter's home. Called in a child."""
    os.fchdir(home)
    silence = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(silence, standard)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - only the names are used
        if int(name) > 2:
            with suppress(OSError):  # the descriptor of the listing itself is closed by now
                os.close(int(name))
    os.umask(0o022)
    os.setgroups([])
    os.setresgid(record.uid, record.uid, record.uid)
    os.setresuid(record.uid, record.uid, record.uid)
    program = ("/usr/bin/python3", "-I", "-S", str(PROGRAM), which, command)
    os.execve(program[0], program, environment(record))  # noqa: S606 - there is no shell in it


def environment(record: RentalRecord) -> dict[str, str]:
    """Return the environment that a log-in by SSH has, without any variable of this process."""
    named = {"USER": record.username, "LOGNAME": record.username, "HOME": f"/home/{record.username}"}
    named |= {"SHELL": "/bin/bash", "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/games", "LANG": "C.UTF-8"}
    return named | rental_variables(record.rental_id, record.rental_name)


def rental_variables(rental_id: str, rental_name: str) -> dict[str, str]:
    """Return the variables that tell a rental's processes which rental they are in. sshd_config lists them."""
    named = {"ORION_RENTAL": rental_name} if rental_name else {}
    return named | {"ORION_RENTAL_ID": rental_id}
