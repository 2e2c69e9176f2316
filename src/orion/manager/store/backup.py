"""Makes backups of a running SQLite database, and restores them. PostgreSQL has its own tools.

Safe order of a restore: an uploaded backup is checked and its schema brought up to date beside the database; `accept`
adapts it to what happened since the backup, and renames it for the next start; the manager ends; the next start swaps
it in before anything opens the database. A crash between two steps leaves the old or the new database, complete.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.exc import DatabaseError

from orion.manager.domain.states import ENDED
from orion.manager.store.backup_rows import strange_column
from orion.manager.store.ballast import database_file
from orion.manager.store.database import Store, known_revisions
from orion.manager.store.schema import metadata

UID_GAP = 10_000
"""More uids than can have been assigned since a backup, so that none is assigned twice."""
EPOCH_GAP = 1_000
"""The same for the epochs of a rental: a worker refuses an epoch that it has seen."""
EVENT_GAP = 1_000
"""The same for ids of events: a client that follows them by id must not miss the events after a restore."""
_HEADER = b"SQLite format 3\x00"
_PRESENT = "('ready', 'suspect', 'unknown')"
_LIVING = f"state NOT IN ({', '.join(repr(str(state)) for state in sorted(ENDED))})"


class NotABackup(Exception):
    """The file cannot be restored; the message says why."""


@dataclass(frozen=True)
class KnownRental:
    """The id, name and owner of a rental, by which a person recognises it."""

    id: str
    name: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class Examined:
    """The effects of restoring a staged backup. `accept` takes its `id`."""

    id: str
    last_event_at: float | None
    """UTC seconds; about when the backup was made."""
    rentals: int
    """The number of living rentals in the backup."""
    forgotten: list[KnownRental]
    """Rentals that are alive now and missing from the backup."""
    revived: list[KnownRental]
    """Rentals that are alive in the backup and have ended since."""


class Backups:
    """The backups of a database file. Its methods block: call them in a thread."""

    def __init__(self, database: Path) -> None:
        self.database = database

    @staticmethod
    def of(url: str) -> Backups | None:
        """Return the backups of a database; None if the database is not a file."""
        file = database_file(url)
        return Backups(file) if file else None

    @property
    def accepted(self) -> Path:
        """The path of the backup that the next start swaps in."""
        return self._beside("restore")

    @property
    def replaced(self) -> Path:
        """The path of the database as it was before the last restore."""
        return self._beside("before-restore")

    def copy(self) -> Path:
        """Make a consistent backup in one file, which the caller removes. Other writers do not wait for it (WAL)."""
        target = self._new("backup")
        with closing(_open(self.database)) as connection:
            connection.execute("VACUUM INTO ?", (str(target),))
        return target

    @staticmethod
    def refuse_early(beginning: bytes) -> None:
        """Raise NotABackup if an upload does not begin as a backup, before more of it fills the disk."""
        if not _HEADER.startswith(beginning[: len(_HEADER)]):
            raise NotABackup("it is not an SQLite database")

    def receive(self) -> Path:
        """Return a new empty file for an upload."""
        return self._new("upload")

    def stage(self, upload: Path) -> Examined:
        """Check an upload, bring its schema up to date, and keep it for `accept`; raise NotABackup if that fails."""
        identity = token_hex(8)
        try:
            _check(upload)
            _bring_up_to_date(upload)
            found = self._compare(upload, identity)
        except (sqlite3.DatabaseError, DatabaseError) as error:
            raise NotABackup(f"it cannot be read: {error}") from error
        for older in self._all("staged-*"):
            older.unlink()
        upload.replace(self._beside(f"staged-{identity}"))
        return found

    def accept(self, identity: str, actor: str) -> bool:
        """Make a staged backup the one that the next start swaps in; return False if there is none of this id."""
        name = f"{self.database.name}.staged-{identity}"
        staged = next((file for file in self._all("staged-*") if file.name == name), None)
        if staged is None:
            return False
        with closing(_open(staged)) as connection:  # after an exception, this rolls back
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            _adapt_to_present(connection, self.database, actor)
            connection.execute("COMMIT")
        _flush(staged)
        staged.replace(self.accepted)
        _flush(staged.parent)
        return True

    def swap_in(self) -> bool:
        """Put an accepted backup in the place of the database, and keep the former one; return whether there was one.

        This must be called before anything opens the database.
        """
        for leftover in (*self._all("backup-*"), *self._all("upload-*")):
            leftover.unlink()
        if not self.accepted.exists():
            return False
        self._set_aside()
        self.accepted.replace(self.database)
        _flush(self.database.parent)
        return True

    def _set_aside(self) -> None:
        """Keep the old file by a second name, without its write-ahead log: SQLite would apply that to the new file."""
        with suppress(sqlite3.Error), closing(_open(self.database, must_exist=False)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")  # this writes the log into the file and removes it
        for suffix in ("", "-wal", "-shm"):
            old, kept = Path(f"{self.database}{suffix}"), Path(f"{self.replaced}{suffix}")
            kept.unlink(missing_ok=True)
            if old.exists() and suffix:
                old.replace(kept)  # the database could not be read, so its log is kept as it is
            elif old.exists():
                kept.hardlink_to(old)

    def _compare(self, backup: Path, identity: str) -> Examined:
        there = _living(backup)
        try:
            here, everything_here = _living(self.database), _all_ids(self.database)
        except sqlite3.Error:
            here, everything_here = {}, set(there)  # the database itself is broken
        known, ended_here = _all_ids(backup), everything_here - set(here)
        with closing(_open(backup)) as connection:
            (last_event_at,) = connection.execute("SELECT max(at) FROM events").fetchone()
        forgotten = [rental for rental_id, rental in here.items() if rental_id not in known]
        revived = [rental for rental_id, rental in there.items() if rental_id in ended_here]
        return Examined(
            id=identity, last_event_at=last_event_at, rentals=len(there), forgotten=forgotten, revived=revived
        )

    def _beside(self, suffix: str) -> Path:
        return self.database.with_name(f"{self.database.name}.{suffix}")

    def _new(self, kind: str) -> Path:
        file = self._beside(f"{kind}-{token_hex(8)}")
        file.touch(0o600)
        return file

    def _all(self, pattern: str) -> list[Path]:
        return list(self.database.parent.glob(f"{self.database.name}.{pattern}"))


def _check(file: Path) -> None:
    """Raise NotABackup if the file is not an intact database of a known schema of Orion-Sec."""
    with file.open("rb") as stream:
        if stream.read(len(_HEADER)) != _HEADER:
            raise NotABackup("it is not an SQLite database")
    with closing(_open(file)) as connection:
        connection.execute("PRAGMA trusted_schema = OFF")
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise NotABackup(f"it is damaged: {found}")
        if code := connection.execute("SELECT name FROM sqlite_master WHERE type IN ('trigger', 'view')").fetchone():
            raise NotABackup(f"it holds a trigger or a view, which no backup has: {code[0]}")
        try:
            revisions = [row[0] for row in connection.execute("SELECT version_num FROM alembic_version")]
        except sqlite3.OperationalError as error:
            raise NotABackup("it is not a database of Orion-Sec") from error
        if len(revisions) != 1 or revisions[0] not in known_revisions():
            raise NotABackup(f"its schema {revisions} is unknown here: it may be of a newer version")
        if connection.execute("PRAGMA foreign_key_check").fetchone():
            raise NotABackup("its rows do not fit together")


def _bring_up_to_date(file: Path) -> None:
    """Migrate the file's schema; raise NotABackup if this version does not write such tables or rows."""
    with closing(Store(f"sqlite:///{file}")) as store:
        store.migrate()
    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()
    if differences:
        raise NotABackup(f"its tables are not those of Orion-Sec: {differences[0]}")
    with closing(_open(file)) as connection:
        if column := strange_column(connection):
            raise NotABackup(f"its rows are not those of Orion-Sec: {column} holds what the manager never writes")
        connection.execute("PRAGMA journal_mode = DELETE")


def _adapt_to_present(connection: sqlite3.Connection, database: Path, actor: str) -> None:
    """Adapt a backup to what workers did since: assign no number twice, and have each worker register again.

    A running placement whose key is removed is confirmed by its worker before it is relied on: see
    reconcile._is_missing.
    """
    now = _present(database)
    for name, value in now.counters.items():
        connection.execute("INSERT OR IGNORE INTO counters (name, value) VALUES (?, ?)", (name, value))
        connection.execute("UPDATE counters SET value = max(value, ?) WHERE name = ?", (value, name))
    connection.execute("UPDATE counters SET value = value + ? WHERE name = 'uid'", (UID_GAP,))
    connection.execute(f"UPDATE rentals SET epoch = epoch + ? WHERE {_LIVING}", (EPOCH_GAP,))  # noqa: S608
    # It is unknown which epochs were activated since: recovered snapshots of earlier ones are restored on request only.
    unknown = "let_in_epoch = epoch, began_with = '', lineage = '[]'"
    connection.execute(f"UPDATE rentals SET {unknown} WHERE {_LIVING}")  # noqa: S608
    connection.execute("UPDATE placements SET public_key = '' WHERE state = 'running'")
    # The snapshots of rentals that have ended since are removed: such a rental begins empty, without a wait for them.
    connection.executemany("DELETE FROM copies WHERE rental_id = ?", [(identity,) for identity in now.ended])
    connection.execute("UPDATE workers SET session_id = NULL, verified_session = NULL")
    present = [row[0] for row in connection.execute(f"SELECT id FROM workers WHERE health IN {_PRESENT}")]  # noqa: S608
    connection.execute(f"UPDATE workers SET health = 'joining' WHERE health IN {_PRESENT}")  # noqa: S608
    for identity, revoked_at in now.revoked.items():
        revoke = "UPDATE tokens SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL"
        connection.execute(revoke, (revoked_at, identity))
    at, reason = time.time(), "the platform went back to a backup"
    recorded = [("platform.restored", None), *(("worker.became_joining", worker_id) for worker_id in present)]
    first = max(_last_event(connection), now.last_event) + EVENT_GAP
    rows = [(first + n, at, kind, actor, reason, worker_id, "{}") for n, (kind, worker_id) in enumerate(recorded)]
    columns = "id, at, kind, actor, reason, worker_id, details"
    connection.executemany(f"INSERT INTO events ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)  # noqa: S608


@dataclass(frozen=True, kw_only=True)
class _Present:
    """The rows of the present database that a restore must not undo."""

    counters: dict[str, int]
    revoked: dict[str, float]
    last_event: int
    ended: list[str]


def _present(database: Path) -> _Present:
    """Read the rows; there are none if the database is broken, and the gaps cover that case as well."""
    try:
        with closing(_open(database)) as connection:
            counters = dict(connection.execute("SELECT name, value FROM counters").fetchall())
            revoked = dict(connection.execute("SELECT id, revoked_at FROM tokens WHERE revoked_at IS NOT NULL"))
            ended = [row[0] for row in connection.execute(f"SELECT id FROM rentals WHERE NOT ({_LIVING})")]  # noqa: S608
            return _Present(counters=counters, revoked=revoked, last_event=_last_event(connection), ended=ended)
    except sqlite3.Error:
        return _Present(counters={}, revoked={}, last_event=0, ended=[])


def _last_event(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0])


def _living(file: Path) -> dict[str, KnownRental]:
    """Return the living rentals of a database file, by id."""
    with closing(_open(file)) as connection:
        rows = connection.execute(f"SELECT id, name, owner FROM rentals WHERE {_LIVING} ORDER BY id")  # noqa: S608
        return {row[0]: KnownRental(*row) for row in rows}


def _all_ids(file: Path) -> set[str]:
    with closing(_open(file)) as connection:
        return {row[0] for row in connection.execute("SELECT id FROM rentals")}


def _open(file: Path, must_exist: bool = True) -> sqlite3.Connection:
    uri = f"{file.absolute().as_uri()}?mode={'rw' if must_exist else 'rwc'}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    connection.execute("PRAGMA busy_timeout = 10000")
    return connection


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
