"""A renter's bank in PostgreSQL. Its data directory, when restored, must start by crash recovery.

    python3 postgres.py start FOLDER JOURNAL WORDS  write the faults to JOURNAL, and work in the background
    python3 postgres.py check FOLDER                print the faults as JSON; the exit status is 1 if there are any

Transactions move units between accounts, like those of support/bank.py. The program uses only the standard library of
Python 3.11 or later.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCOUNTS, BALANCE = 20_000, 1_000
TOTAL = ACCOUNTS * BALANCE
TABLES = f"""
CREATE TABLE accounts (number int PRIMARY KEY, balance int NOT NULL) WITH (fillfactor = 80);
INSERT INTO accounts SELECT one, {BALANCE} FROM generate_series(1, {ACCOUNTS}) AS one;
"""
TRANSFER = f"""
\\set giver random(1, {ACCOUNTS})
\\set taker random(1, {ACCOUNTS})
\\set units random(1, 9)
BEGIN;
UPDATE accounts SET balance = balance - :units WHERE number = :giver;
UPDATE accounts SET balance = balance + :units WHERE number = :taker;
COMMIT;
"""
SUM = "SELECT count(*) || ' accounts hold ' || sum(balance) FROM accounts"
BY_INDEX = f"SET enable_seqscan = off; SET enable_bitmapscan = off; {SUM} WHERE number > 0"
RIGHT = f"{ACCOUNTS} accounts hold {TOTAL}"
EACH_S = "40"
"""Transactions a second: few, because other programs share the machine."""
UP_WITHIN_S = 60.0
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "8",
    "shared_buffers": "4MB",
    "max_wal_size": "16MB",
    "min_wal_size": "4MB",
    "checkpoint_timeout": "30s",
    "dynamic_shared_memory_type": "mmap",
    "shared_memory_type": "mmap",
    "autovacuum_naptime": "5s",
}


class PostgresFault(Exception):
    """The restored files are not a working database."""


def programs() -> Path:
    return max(Path("/usr/lib/postgresql").glob("*/bin"))


def faults(folder: Path) -> list[str]:
    """Return the faults of a data directory in which no program works. The check recovers the database."""
    try:
        with serving(folder):
            return _wrong(folder)
    except PostgresFault as fault:
        return [f"PostgreSQL: {fault}"]


def start(folder: Path, journal: str, words: str) -> None:
    """Write the faults to the journal and work on in a new process, unless a process works there already."""
    lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if not folder.exists():
            create(folder)
        _note(journal, words, faults(folder))
        with serving(folder):
            work(folder)


def create(folder: Path) -> None:
    """Create a bank atomically."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    options = ("--username=bank", "--auth=trust", "--no-locale", "--encoding=UTF8", "--wal-segsize=1")
    _run("initdb", "--pgdata", str(new), *options)
    with serving(new):
        _run("psql", *_at(new), "--quiet", "--set=ON_ERROR_STOP=1", stdin=TABLES)
    new.rename(folder)


def work(folder: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(TRANSFER)
        script.flush()
        limits = ("--no-vacuum", "--client=2", f"--rate={EACH_S}", "--time=86400")
        _run("pgbench", *_at(folder), *limits, f"--file={script.name}")


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """Run a server on this directory, and shut it down properly. Raise PostgresFault if it does not start.

    postmaster.pid is removed first: the lock proves that no server runs, and another process may have the pid.
    """
    (folder / "postmaster.pid").unlink(missing_ok=True)
    settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
    command = [programs() / "postgres", "-D", folder, "-k", folder, *settings]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + UP_WITHIN_S
            while not _answers(folder):
                if server.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise PostgresFault(f"it did not start: {said.read().decode(errors='replace').strip()[-600:]}")
                time.sleep(0.1)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()


def _answers(folder: Path) -> bool:
    asked = [programs() / "psql", *_at(folder), "-c", "SELECT 1"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def _wrong(folder: Path) -> list[str]:
    found = []
    for query in (SUM, BY_INDEX):
        result = _run("psql", *_at(folder), "--quiet", "--tuples-only", "--no-align", "-c", query).strip()
        if result != RIGHT:
            found.append(f"PostgreSQL: {result}, not {TOTAL}")
    return found


def _at(folder: Path) -> tuple[str, ...]:
    return (f"--host={folder}", "--username=bank", "postgres")


def _run(program: str, *arguments: str, stdin: str = "") -> str:
    command = [str(programs() / program), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PostgresFault(f"{program}: {done.stderr.strip()[-600:]}")
    return done.stdout


def _note(journal: str, words: str, found: list[str]) -> None:
    line = {"words": words, "at": time.clock_gettime(time.CLOCK_BOOTTIME), "faults": found}
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{json.dumps(line)}\n".encode())
    os.close(descriptor)


def main(command: str, folder: str, *more: str) -> int:
    place = Path(folder).absolute()
    if command == "start":
        start(place, *more)
        return 0
    found = faults(place)
    print(json.dumps(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
