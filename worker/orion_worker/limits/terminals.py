"""A guard that keeps the renters of one worker from taking all the terminals of its machine.

The renters of a worker together may open MOST_HELD terminals. The kernel has a fixed number for all containers of a
machine (kernel.pty.max less kernel.pty.reserve: 3072), and opens one in 20 microseconds. Docker gives each container a
/dev/pts without a limit (`max=`), which root cannot set later without CAP_SYS_ADMIN.

A new terminal gets the lowest number that is free in its /dev/pts, and inotify reports each new name there. So a number
beyond MOST_HELD shows that as many are held here, even by a renter that closed the master, which is what is seen there.
Then the guard shuts /dev/pts/ptmx to all but root, as whom sshd opens the terminals of log-ins; it ends the renters
that show many; and it opens ptmx again as soon as fewer than MOST_HELD are held.

A renter that hides its terminals cannot be found, because only the renter can look into its processes. Then the other
renters of this worker get terminals by ssh alone, until these are closed. If MOST_HIDDEN are held, which other
containers of the machine need, the guard ends everything of all renters of this worker.
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from orion_worker.system import processes
from orion_worker.system.files import closing

PTS = Path("/dev/pts")
PTMX = "ptmx"
"""The name of the file that is opened to get a new terminal."""
MOST_HELD = 256
"""Terminals that the renters of a worker may hold together."""
MOST_SHOWN = 64
"""Terminals beyond which a renter that shows them is ended, while more than MOST_HELD are held."""
MOST_HIDDEN = 1024
"""Terminals at which all renters are ended: a third of those that all containers have together."""
AGAIN_S = 1.0
"""Seconds between two looks while ptmx is shut."""
BETWEEN_LOOKS_S = 0.005
"""Seconds between two looks, so that the agent is not kept busy; 250 terminals can be opened meanwhile."""
FAULT_S = 60.0
_IN_CREATE, _IN_Q_OVERFLOW = 0x100, 0x4000
_ASK_NUMBER = 0x80045430
"""TIOCGPTN, ioctl_tty(2)."""
_EVENT = struct.Struct("iIII")


class TerminalGuard:
    """The guard. `end` ends all processes of the renters with these uids; `free` is `free_numbers`, or a test's."""

    def __init__(
        self,
        *,
        end: Callable[[list[int]], object],
        say: Callable[[str], None],
        place: Path = PTS,
        free: Callable[[int, int], int] | None = None,
    ) -> None:
        self._end = end
        self._say = say
        self._place = place
        self._free = free or free_numbers
        self._open_to_all = stat.S_IMODE((place / PTMX).stat().st_mode)
        self._highest = -1
        """The highest number that was given since ptmx was shut; -1: ptmx is open."""

    @property
    def is_shut(self) -> bool:
        """Return whether renters can open no terminal of their own."""
        return self._highest >= 0

    def look(self, highest: int) -> None:
        """Shut ptmx, end renters or open ptmx again. `highest`: the highest new number since the last look, or -1."""
        if highest >= MOST_HELD and not self.is_shut:
            (self._place / PTMX).chmod(0o600)
            self._say(f"{highest + 1} terminals are held here: renters get no more but by ssh")
        if highest >= MOST_HELD or self.is_shut:
            self._highest = max(highest, self._highest)
        if not self.is_shut:
            return
        many = [uid for uid, shown in shown_by(self._place).items() if shown > MOST_SHOWN]
        if many:
            self._end_all(many)
        held = self._held()
        if held >= MOST_HIDDEN:
            self._end_all(sorted(processes.uids_from(processes.FIRST_UID)))
            held = self._held()
        if held < MOST_HELD:
            self._highest = -1
            (self._place / PTMX).chmod(self._open_to_all)
            self._say("terminals are to be had again")

    def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                with suppress(TimeoutError):
                    self._watch()
            except Exception as fault:
                self._say(f"the terminals: {fault!r}; looking again in {FAULT_S:.0f} s")
                time.sleep(FAULT_S)

    def _watch(self) -> None:
        with closing(watch_directory(self._place)) as watch:
            while True:
                ready = select.select([watch], [], [], AGAIN_S if self.is_shut else None)[0]
                self.look(highest_of(os.read(watch, 1 << 16)) if ready else -1)
                time.sleep(BETWEEN_LOOKS_S)

    def _held(self) -> int:
        """Return how many of the numbers up to the highest one are held. Below MOST_HELD the count is not exact."""
        numbers = self._highest + 1
        return numbers - self._free(self._highest, numbers - MOST_HELD + 1)

    def _end_all(self, uids: list[int]) -> None:
        self._say(f"too many terminals: everything is ended that runs as {', '.join(map(str, uids))}")
        self._end(uids)


def shown_by(place: Path) -> Counter[int]:
    """Return how many terminals each renter shows, by uid."""
    found: Counter[int] = Counter()
    for terminal in place.iterdir():
        with suppress(FileNotFoundError):
            uid = terminal.lstat().st_uid
            if processes.is_renter(uid):
                found[uid] += 1
    return found


def free_numbers(highest: int, enough: int) -> int:
    """Return how many numbers up to the highest are free, counting up to `enough`. Root opens them for that moment."""
    held: list[int] = []
    number = -1
    try:
        while len(held) < enough and number < highest:
            held.append(os.open(PTS / PTMX, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
            number = struct.unpack("i", fcntl.ioctl(held[-1], _ASK_NUMBER, bytes(4)))[0]
    except OSError:
        pass  # the machine has no more, and the renters that hold them are being looked for
    finally:
        for each in held:
            os.close(each)
    return len(held) - (number > highest)


def watch_directory(place: Path) -> int:
    """Return a descriptor that reports each new name in a directory (inotify(7)). Raise OSError if there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_CLOEXEC)
    if watch < 0 or libc.inotify_add_watch(watch, bytes(place), _IN_CREATE) < 0:
        number = ctypes.get_errno()
        if watch >= 0:
            os.close(watch)
        raise OSError(number, os.strerror(number))
    return int(watch)


def highest_of(events: bytes) -> int:
    """Return the highest number among the new names of inotify events; MOST_HELD if events were lost; -1: none."""
    return max(_numbers(events), default=-1)


def _numbers(events: bytes) -> Iterator[int]:
    at = 0
    while at < len(events):
        _, what, _, length = _EVENT.unpack_from(events, at)
        name = events[at + _EVENT.size :][:length].rstrip(b"\0")
        at += _EVENT.size + length
        if what & _IN_Q_OVERFLOW:
            yield MOST_HELD
        elif name.isdigit():
            yield int(name)
