"""No renter takes the terminals of a machine: a worker's renters together open MOST of them, and then no more.

The kernel gives a fixed number to all containers of a machine (kernel.pty.max less kernel.pty.reserve: 3072), and takes
20 microseconds for one. Docker mounts each container a /dev/pts of its own, but without a limit (`max=`), which root
cannot set afterwards without CAP_SYS_ADMIN. No limit of processes or files is low enough.

A new terminal gets the lowest number that is free in its /dev/pts, and the kernel tells who watches that directory of
each. So a number beyond MOST says that as many are held here, also by who closed the side that is seen there (a
terminal whose master is closed lasts as long as its slave is open). Then /dev/pts/ptmx is shut to all but root, for
whom sshd opens those of log-ins; who shows many is ended; and it is opened again as soon as less than MOST are held.

Who hides what it holds cannot be found: its processes can be looked into by nobody but itself. Then the others of this
worker have no terminals but by ssh, until it lets go. If it was so fast that it hides FAR, which others of the machine
need, everything of all renters of this worker is ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import stat
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from orion_worker.system import processes
from orion_worker.system.processes import FIRST_UID

PLACE = Path("/dev/pts")
DOOR = "ptmx"
"""What is opened to get a new one."""
MOST = 256
FEW = 64
"""Whoever shows more than that is ended while more than MOST are held."""
FAR = 1024
"""A third of what all containers have together."""
AGAIN_S = 1.0
BETWEEN_LOOKS_S = 0.005
"""A renter that opens and closes them all the time does not keep the agent busy; in that time 250 can be opened."""
FAULT_S = 60.0
_IN_CREATE, _IN_Q_OVERFLOW = 0x100, 0x4000
_ASK_NUMBER = 0x80045430
"""TIOCGPTN, ioctl_tty(2)."""
_EVENT = struct.Struct("iIII")


class Terminals:
    """`end`: ends all that runs of the renters with these uids. `free`: how many numbers are free (`free_numbers`)."""

    def __init__(
        self,
        end: Callable[[list[int]], object],
        say: Callable[[str], None],
        place: Path = PLACE,
        free: Callable[[int, int], int] | None = None,
    ) -> None:
        self._end = end
        self._say = say
        self._place = place
        self._free = free or free_numbers
        self._open_to_all = stat.S_IMODE((place / DOOR).stat().st_mode)
        self._highest = -1
        """The highest number that was given since it was shut; -1: it is open."""

    @property
    def is_shut(self) -> bool:
        return self._highest >= 0

    def look(self, highest: int) -> None:
        """`highest`: the highest number that was given since the last look; -1: none was."""
        if highest >= MOST and not self.is_shut:
            (self._place / DOOR).chmod(0o600)
            self._say(f"{highest + 1} terminals are held here: renters get no more but by ssh")
        if highest >= MOST or self.is_shut:
            self._highest = max(highest, self._highest)
        if not self.is_shut:
            return
        many = [uid for uid, shown in shown_by(self._place).items() if shown > FEW]
        if many:
            self._end_all(many)
        held = self._held()
        if held >= FAR:
            self._end_all(sorted(processes.uids_from(FIRST_UID)))
            held = self._held()
        if held < MOST:
            self._highest = -1
            (self._place / DOOR).chmod(self._open_to_all)
            self._say("terminals are to be had again")

    def run(self) -> None:
        """For ever."""
        while True:
            try:
                with suppress(TimeoutError):
                    self._watch()
            except Exception as fault:
                self._say(f"the terminals: {fault!r}; looking again in {FAULT_S:.0f} s")
                time.sleep(FAULT_S)

    def _watch(self) -> None:
        watch = watched(self._place)
        try:
            while True:
                told = select.select([watch], [], [], AGAIN_S if self.is_shut else None)[0]
                self.look(highest_of(os.read(watch, 1 << 16)) if told else -1)
                time.sleep(BETWEEN_LOOKS_S)
        finally:
            os.close(watch)

    def _held(self) -> int:
        """How many are held of the numbers up to the highest that was given; less than MOST is not told apart."""
        numbers = self._highest + 1
        return numbers - self._free(self._highest, numbers - MOST + 1)

    def _end_all(self, uids: list[int]) -> None:
        self._say(f"too many terminals: everything is ended that runs as {', '.join(map(str, uids))}")
        self._end(uids)


def shown_by(place: Path) -> Counter[int]:
    """Return how many terminals each renter shows, by uid."""
    found: Counter[int] = Counter()
    for terminal in place.iterdir():
        with suppress(FileNotFoundError):
            uid = terminal.lstat().st_uid
            if FIRST_UID <= uid < processes.FIRST_SENDER:
                found[uid] += 1
    return found


def free_numbers(highest: int, enough: int) -> int:
    """Return how many numbers up to the highest are free, up to `enough`. Root has them for that moment."""
    held: list[int] = []
    number = -1
    try:
        while len(held) < enough and number < highest:
            held.append(os.open(PLACE / DOOR, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
            number = struct.unpack("i", fcntl.ioctl(held[-1], _ASK_NUMBER, bytes(4)))[0]
    except OSError:
        pass  # the machine has no more: who holds them is among those that are looked for
    finally:
        for each in held:
            os.close(each)
    return len(held) - (number > highest)


def watched(place: Path) -> int:
    """Return a descriptor that tells of each new name in a directory (inotify(7)). Raise OSError if there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_CLOEXEC)
    if watch < 0 or libc.inotify_add_watch(watch, bytes(place), _IN_CREATE) < 0:
        number = ctypes.get_errno()
        if watch >= 0:
            os.close(watch)
        raise OSError(number, os.strerror(number))
    return int(watch)


def highest_of(told: bytes) -> int:
    """Return the highest number among new names, as inotify tells them; MOST if it could not tell all; -1: none."""
    return max((number for number in _numbers(told)), default=-1)


def _numbers(told: bytes) -> Iterable[int]:
    at = 0
    while at < len(told):
        _, what, _, length = _EVENT.unpack_from(told, at)
        name = told[at + _EVENT.size :][:length].rstrip(b"\0")
        at += _EVENT.size + length
        if what & _IN_Q_OVERFLOW:
            yield MOST
        elif name.isdigit():
            yield int(name)
