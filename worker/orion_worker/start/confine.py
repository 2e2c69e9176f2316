#!/usr/bin/python3 -ES
"""A program that starts a command each time the agent asks, without the right to write below /proc. It starts sshd.

    confine.py COMMAND...       each byte on stdin starts it; its process number and then its status are lines on stdout

A renter could write oom_score_adj of its own processes, the score by which the kernel chooses the process that it ends
when memory is used up. Root can set a minimum for it only with CAP_SYS_RESOURCE, which not every engine can give.
Landlock (landlock(7)) needs no privilege: this program allows itself, and for ever all that it starts, to write to each
directory of the root but /proc. So no process of a renter gets a score below the one that sshd begins with, and keeps.
The agent is no child of this program, and writes scores as it needs to (limits/scores.py).

All runs of sshd have the same domain of Landlock, because this program starts each of them. No process of one domain
can look into those of another: with a domain for each run, a renter could not debug its own earlier processes, and a
snapshot could not see which files they have mapped (snapshots/scan.mapped_inodes).
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_NEEDED_VERSION = 2
"""The first version of Landlock that allows moving files between directories; Linux 5.19."""
_PATH_BENEATH = 1
_WRITE_FILE, _REFER = 1 << 1, 1 << 13
_NO_NEW_PRIVILEGES = 38


def writable(root: Path) -> list[str]:
    """Return the directories in which files may be written: all of the root but /proc. A link leads to one of them.

    /dev/mqueue is in the list because message queues are opened in its file system by name, not by a path below /dev.
    """
    with os.scandir(root) as entries:
        found = sorted(each.path for each in entries if each.name != "proc" and each.is_dir(follow_symlinks=False))
    queues = root / "dev/mqueue"
    return [*found, str(queues)] if queues.is_dir() else found


def confine(root: Path = Path("/")) -> str:
    """Give up writing below /proc, for this process and all that it starts. Return why that failed, else nothing."""
    try:
        version = _call(_CREATE_RULESET, None, 0, _ASK_VERSION)
        if version < _NEEDED_VERSION:
            return f"Landlock of this kernel has version {version}, and {_NEEDED_VERSION} is needed (Linux 5.19)"
        rules = _call(_CREATE_RULESET, struct.pack("=Q", _WRITE_FILE | _REFER), 8, 0)
        _allow(rules, str(root), _REFER)
        for folder in writable(root):
            _allow(rules, folder, _WRITE_FILE)
        if _library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return "new privileges cannot be given up"
        _call(_RESTRICT_SELF, rules, 0)
        os.close(rules)
    except OSError as error:
        return f"the kernel or the engine does not allow Landlock ({error.strerror})"
    return ""


def _allow(rules: int, folder: str, access: int) -> None:
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", access, place), 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call that Python has no function for, and return its result. Raise OSError if it fails."""
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(_library.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _run(command: list[str]) -> int:
    """Start the command, write its process number and return its exit status, below zero for a signal."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            os.execvp(command[0], command)  # noqa: S606 - the agent's own command
        finally:
            os._exit(127)
    os.write(1, f"{child}\n".encode())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Confine this process, then start the command each time the agent asks, until the agent ends."""
    problem = confine()
    if problem:
        risk = "orion-agent: a renter can have the kernel end others before itself when memory is used up"
        print(f"{risk}: {problem}", file=sys.stderr)  # noqa: T201 - the container's log
    while os.read(0, 1):
        status = _run(sys.argv[1:])
        os.write(1, f"{status}\n".encode())


_library = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main()
