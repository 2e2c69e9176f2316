"""A renter's program that notices restored files in a state that never existed: a bank in SQLite, and three counters.

    python3 bank.py run FOLDER [STEPS]          work in FOLDER until STEPS are done, or for ever
    python3 bank.py start FOLDER JOURNAL WORDS  write what is wrong with FOLDER to JOURNAL, work on in the background
    python3 bank.py check FOLDER                print what is wrong as JSON; ends with 1 if anything is

A step is one transaction in WAL mode, synced to the disk, which moves units between 20,000 accounts and counts itself.
Then its number goes to the file `A` (in place, synced), to `m` (a new file, synced, renamed) and to `zz_B` (as `A`).
So at every instant, and after a power cut at any instant: the sum is the same as ever, and
steps in the database >= A >= m >= zz_B >= steps in the database - 1.

Standard library only, Python 3.11 or later.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

ACCOUNTS = 20_000
BALANCE = 1_000
TOTAL = ACCOUNTS * BALANCE
TRANSFERS = 20
"""Transfers in one transaction; enough to change a good part of the database's pages."""
CHECKPOINT_PAGES = 100
"""Pages of the log after which it is written to the database: every few steps."""
REST_S = 0.005
"""Seconds between two steps: several of these programs share a machine with what they test."""
DATABASE, LOG, COUNTERS = "bank.db", "bank.db-wal", ("A", "m", "zz_B")
_NUMBER = re.compile(rb"\d{12}\n")


def create(folder: Path) -> None:
    """Make a bank atomically: it gets its name when it is complete."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    with closing(_open(new)) as database:
        database.execute("CREATE TABLE accounts (number INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
        database.execute("CREATE TABLE steps (done INTEGER NOT NULL)")
        database.executemany("INSERT INTO accounts VALUES (?, ?)", ((one, BALANCE) for one in range(ACCOUNTS)))
        database.execute("INSERT INTO steps VALUES (0)")
        database.commit()
    _count(new, 0)
    new.rename(folder)


def work(folder: Path, steps: int | None = None, rest_s: float = REST_S) -> None:
    """Do `steps` steps; None: go on until the process is ended."""
    if not folder.exists():
        create(folder)
    chance = random.Random()  # noqa: S311 - it hides nothing
    with closing(_open(folder)) as database:
        (done,) = database.execute("SELECT done FROM steps").fetchone()
        _count(folder, done)
        last = None if steps is None else done + steps
        while last is None or done < last:
            done += 1
            _transfer(database, chance, done)
            _count(folder, done)
            time.sleep(rest_s)


def faults(folder: Path) -> list[str]:
    """Return the faults of a bank in which no process works, without changing it."""
    if not folder.exists():
        return ["there is no bank"]
    found: list[str] = []
    counted = dict(_counted(folder, found))
    done = _look_into(folder, found)
    if done is None or len(counted) < len(COUNTERS):
        return found
    chain = [("the database", done), *counted.items()]
    for (before, larger), (name, smaller) in pairwise(chain):
        if smaller > larger:
            found.append(f"{name} is at step {smaller}, ahead of {before} at {larger}, which is written first")
    if (behind := done - counted[COUNTERS[-1]]) > 1:
        found.append(f"{COUNTERS[-1]} is {behind} steps behind the database, which waits for it")
    return found


def _open(folder: Path) -> sqlite3.Connection:
    database = sqlite3.connect(folder / DATABASE, timeout=30)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    return database


def _transfer(database: sqlite3.Connection, chance: random.Random, step: int) -> None:
    with database:
        for _ in range(TRANSFERS):
            giver, taker, units = chance.randrange(ACCOUNTS), chance.randrange(ACCOUNTS), chance.randint(1, 9)
            database.execute("UPDATE accounts SET balance = balance - ? WHERE number = ?", (units, giver))
            database.execute("UPDATE accounts SET balance = balance + ? WHERE number = ?", (units, taker))
        database.execute("UPDATE steps SET done = ?", (step,))


def _count(folder: Path, step: int) -> None:
    first, middle, last = COUNTERS
    _write(folder / first, step)
    _write(folder / f".{middle}", step)
    (folder / f".{middle}").rename(folder / middle)
    _write(folder / last, step)


def _write(file: Path, step: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, b"%012d\n" % step, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _counted(folder: Path, found: list[str]) -> Iterator[tuple[str, int]]:
    for name in COUNTERS:
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            found.append(f"{name} is not there")
            continue
        if _NUMBER.fullmatch(content):
            yield name, int(content)
        else:
            found.append(f"{name} holds {content[:40]!r}, which was never written")


def _look_into(folder: Path, found: list[str]) -> int | None:
    """Return the number of steps in the database after its own recovery, which happens in a copy of its files."""
    with tempfile.TemporaryDirectory(prefix="bank-") as place:
        for name in (DATABASE, LOG):
            if (folder / name).exists():
                shutil.copy(folder / name, place)
        try:
            with closing(sqlite3.connect(Path(place) / DATABASE)) as database:
                (whole,) = database.execute("PRAGMA integrity_check").fetchone()
                if whole != "ok":
                    found.append(f"integrity_check says {whole.splitlines()[0]!r}")
                number, total = database.execute("SELECT count(*), sum(balance) FROM accounts").fetchone()
                if (number, total) != (ACCOUNTS, TOTAL):
                    found.append(f"{number} accounts hold {total} of {TOTAL} units in {ACCOUNTS}")
                return int(database.execute("SELECT done FROM steps").fetchone()[0])
        except sqlite3.Error as error:
            found.append(f"the database cannot be read: {error}")
            return None


def start(folder: Path, journal: str, words: str) -> None:
    """Check the bank and work on it in a new process, unless a process works there already.

    The process holds a lock file that contains its pid. A line of the journal is JSON: `words`, which identify the
    rental and the worker, the faults and the time (CLOCK_BOOTTIME).
    """
    lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if not folder.exists():
        create(folder)
    line = {"words": words, "at": time.clock_gettime(time.CLOCK_BOOTTIME), "faults": faults(folder)}
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{json.dumps(line)}\n".encode())
    os.close(descriptor)
    if os.fork() == 0:
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        nothing = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        work(folder)


def main(command: str, folder: str, *more: str) -> int:
    place = Path(folder).absolute()
    if command == "check":
        found = faults(place)
        print(json.dumps(found))  # noqa: T201 - it is a program
        return 1 if found else 0
    if command == "start":
        start(place, *more)
    else:
        work(place, *(int(steps) for steps in more))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
