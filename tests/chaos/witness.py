"""A renter's program: a background process that writes lines to the home, and records that it is alive.

    python3 witness.py RENTAL EPOCH HOST JOURNAL

The program starts the process unless it runs already, and ends when the process ends. On another host than HOST it
starts nothing, because ssh follows the rental, which may have migrated since its epoch was read. A line is one write:
its number, the time, the rental, host and epoch, and a checksum. After each line a tick is written to JOURNAL, which is
outside the home and outlives it: a tick proves that its line was written and that its process was alive. Times are
CLOCK_BOOTTIME, which all containers of a machine share. The program uses only the standard library of Python 3.11 or
later.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import time
import zlib

LINES, COMPLAINTS = "lines", "complaints"
APPENDING = os.O_RDWR | os.O_CREAT | os.O_APPEND
EVERY_S = 0.05


def line_of(number: int, at: float, rental: str, host: str, epoch: int) -> str:
    body = f"{number} {at:.6f} {rental} {host} {epoch}"
    return f"{body} {zlib.crc32(body.encode()):08x}\n"


def number_of(line: str, rental: str) -> int | None:
    """Return the number of a complete line of this rental, or None for anything else."""
    body, _, checksum = line.rstrip("\n").rpartition(" ")
    words = body.split(" ")
    whole = len(words) == 5 and checksum == f"{zlib.crc32(body.encode()):08x}"
    return int(words[0]) if whole and words[2] == rental else None


def main(rental: str, epoch: int, host: str, journal: str) -> None:
    if socket.gethostname() != host:
        return
    lock = os.open(".witness", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        if os.fork() == 0:
            _live(rental, epoch, journal)
        os.close(lock)  # the child still has the lock
        lock = os.open(".witness", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_SH)  # waits until the process has ended


def _live(rental: str, epoch: int, journal: str) -> None:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nothing, complaints = os.open("/dev/null", os.O_RDWR), os.open(COMPLAINTS, APPENDING, 0o600)
    for standard, instead in ((0, nothing), (1, nothing), (2, complaints)):
        os.dup2(instead, standard)
    host, pid = socket.gethostname(), os.getpid()
    lines = os.open(LINES, APPENDING, 0o600)
    ticks = os.open(journal, os.O_WRONLY | os.O_APPEND)
    number = _last_number(lines, rental)
    while True:
        number += 1
        os.write(lines, line_of(number, _now(), rental, host, epoch).encode())
        os.write(ticks, f"{_now():.6f} {rental} {host} {epoch} {pid} {number}\n".encode())
        time.sleep(EVERY_S)


def _last_number(lines: int, rental: str) -> int:
    """Return the number of the last line. Remove an incomplete line, which a snapshot may have at its end."""
    content = os.pread(lines, os.fstat(lines).st_size, 0)
    whole, newline, half = content.rpartition(b"\n")
    if half:
        os.ftruncate(lines, len(whole) + len(newline))
    last = whole.rpartition(b"\n")[2].decode(errors="replace")
    return number_of(last, rental) or 0


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
