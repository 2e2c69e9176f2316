#!/usr/bin/python3 -ES
"""Starts a command, as often as the agent asks, where nobody may write to a file below /proc. sshd is that command.

    confined.py COMMAND...      each byte on stdin starts it; its process number and then its status are lines on stdout

A renter could write oom_score_adj of its own processes, the score by which the kernel chooses whom it ends when memory
is used up. Root can set a minimum for it only with CAP_SYS_RESOURCE, which not every engine can give. Landlock
(landlock(7)) needs no privilege: it names what may be written, which is each directory of the root but /proc, and
counts for ever for all that is started from here. So the score that sshd begins with is the one below which no renter
gets. The agent is no child of this program, and writes scores as it needs to (scores.py).

sshd cannot change a score either, as it would for itself and back for its sessions: so it keeps that of the renters.

All lives of sshd have the same domain of Landlock, because this program starts each of them. From one domain nobody
looks into the processes of another: neither a renter with a debugger, nor who copies its home (snapshot.mapped_inodes).
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_ENOUGH = 2
"""The version of Landlock that lets files be moved between directories; Linux 5.19."""
_PATH_BENEATH = 1
_WRITE_FILE, _REFER = 1 << 1, 1 << 13
_NO_NEW_PRIVILEGES = 38


def writable(root: Path) -> list[str]:
    """Return the directories in which files may be written: all of the root but /proc. A link leads to one of them.

    Message queues are opened by no path, in a file system of which /dev/mqueue is the root: so that is named itself.
    """
    with os.scandir(root) as entries:
        found = sorted(each.path for each in entries if each.name != "proc" and each.is_dir(follow_symlinks=False))
    queues = root / "dev/mqueue"
    return [*found, str(queues)] if queues.is_dir() else found


def confine(root: Path = Path("/")) -> str:
    """Give up writing below /proc, for this process and all that it starts. Return why it cannot; empty: it is done."""
    try:
        version = _call(_CREATE_RULESET, None, 0, _ASK_VERSION)
        if version < _ENOUGH:
            return f"Landlock of this kernel has version {version}, and {_ENOUGH} is needed (Linux 5.19)"
        rules = _call(_CREATE_RULESET, struct.pack("=Q", _WRITE_FILE | _REFER), 8, 0)
        _allow(rules, str(root), _REFER)
        for folder in writable(root):
            _allow(rules, folder, _WRITE_FILE)
        if _library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return "new privileges cannot be given up"
        _call(_RESTRICT_SELF, rules, 0)
        os.close(rules)
    except OSError as error:
        return f"the kernel or the engine has no Landlock for it ({error.strerror})"
    return ""


def _allow(rules: int, folder: str, access: int) -> None:
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", access, place), 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Ask the kernel; Python has no function for these. Raise OSError where it refuses."""
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(_library.syscall(ctypes.c_long(number), *wide))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _run(command: list[str]) -> int:
    """Start the command and say its number. Return its status, below zero for a signal."""
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
    """Until the agent ends."""
    problem = confine()
    if problem:
        said = "orion-agent: a renter can have the kernel end others before itself when memory is used up"
        print(f"{said}: {problem}", file=sys.stderr)  # noqa: T201 - the container's log
    while os.read(0, 1):
        status = _run(sys.argv[1:])
        os.write(1, f"{status}\n".encode())


_library = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main()
