"""A renter's program that writes files, while another process notes when it could not run.

    python3 inside_rental.py fill MEGABYTES FILES        fill a home with this number of files
    python3 inside_rental.py work MEGABYTES RATE SECONDS rewrite files of 1 MB, RATE of them in a second; print the gaps

A gap is a time in which no process of this rental ran: [beginning (CLOCK_REALTIME), length], in seconds.
Standard library only, Python 3.11 or later.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

FOLDER = Path("files")
MEGABYTE = 1_000_000
LOOK_EVERY_S = 0.002
GAP_S = 0.01
"""Seconds from which a gap counts; shorter ones come from the scheduler."""
FILES_IN_A_FOLDER = 1000


def fill(megabytes: int, files: int) -> None:
    each = megabytes * MEGABYTE // files
    for number in range(files):
        folder = FOLDER / str(number // FILES_IN_A_FOLDER)
        if number % FILES_IN_A_FOLDER == 0:
            folder.mkdir(parents=True)
        (folder / str(number)).write_bytes(os.urandom(each))


def work(megabytes: int, rate: float, seconds: float) -> list[tuple[float, float]]:
    """Return the gaps of this number of seconds, while another process writes."""
    writer = os.fork()
    if writer == 0:
        _write(megabytes, rate)
    try:
        return _gaps(time.monotonic() + seconds)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def _write(files: int, rate: float) -> None:
    """Rewrite files in place and at random, as a database does; never return."""
    chance, due = random.Random(), time.monotonic()
    while True:
        number = chance.randrange(files)
        descriptor = os.open(FOLDER / str(number // FILES_IN_A_FOLDER) / str(number), os.O_WRONLY)
        os.pwrite(descriptor, os.urandom(MEGABYTE), 0)
        os.close(descriptor)
        due = max(due + 1 / rate, time.monotonic() - 1)  # it does not catch up on more than a second
        time.sleep(max(0.0, due - time.monotonic()))


def _gaps(until: float) -> list[tuple[float, float]]:
    gaps = []
    last = time.monotonic()
    while last < until:
        time.sleep(LOOK_EVERY_S)
        now = time.monotonic()
        if now - last > GAP_S:
            gaps.append((round(time.time() - (now - last), 4), round(now - last, 4)))
        last = now
    return gaps


def main(command: str, *figures: str) -> None:
    if command == "fill":
        megabytes, files = (int(figure) for figure in figures)
        fill(megabytes, files)
    else:
        size, rate, seconds = (float(figure) for figure in figures)
        print(json.dumps(work(int(size), rate, seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
