"""Access to the database: one writer thread, several reader threads, and news of each commit.

No coroutine here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, Result, create_engine, event, insert, update
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError

from orion import __version__
from orion.manager.domain.pool_index import Changes
from orion.manager.domain.steps import Event
from orion.manager.store import pool_index
from orion.manager.store.ballast import Ballast
from orion.manager.store.pool_index import Touched
from orion.manager.store.schema import counters, events

MIGRATIONS = Path(__file__).parent / "migrations"

P = ParamSpec("P")
T = TypeVar("T")
Row = dict[str, Any]
_Transacted = tuple[T, list[Event], Changes | None]


class NewerSchema(Exception):
    """The database has a schema of a newer version of Orion-Sec."""


class News:
    """Wakes tasks that wait for commits: for those about one rental, or for any."""

    EVERYTHING = "*"

    def __init__(self) -> None:
        self._listeners: dict[str, set[asyncio.Event]] = defaultdict(set)
        self.committed: Counter[str] = Counter()
        """The number of committed events since the start, by kind."""
        self._followers: list[Callable[[list[Event]], None]] = []

    def follow(self, follower: Callable[[list[Event]], None]) -> None:
        """Call the follower with the events of each commit, in order, before the writing task continues."""
        self._followers.append(follower)

    @contextmanager
    def listen(self, topic: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set after each commit about `topic` (a rental's id, or EVERYTHING)."""
        changed = asyncio.Event()
        self._listeners[topic].add(changed)
        try:
            yield changed
        finally:
            self._listeners[topic].discard(changed)
            if not self._listeners[topic]:
                del self._listeners[topic]

    def publish(self, committed: list[Event]) -> None:
        if not committed:
            return
        self.committed.update(e.kind for e in committed)
        for follower in self._followers:
            follower(committed)
        for topic in {self.EVERYTHING} | {e.rental_id for e in committed if e.rental_id}:
            for changed in self._listeners.get(topic, ()):
                changed.set()


class Store:
    """Runs functions that take a connection, each in its own transaction: `await store.write(rentals.create, ...)`."""

    def __init__(self, url: str, ballast: Ballast | None = None) -> None:
        """`ballast`: the file that is deleted when the disk is full."""
        self.url = url
        self.news = News()
        self._follower: Callable[[Changes], None] | None = None
        self._engine = _connect(url)
        self._ballast = ballast
        self._writer = ThreadPoolExecutor(1, "store-writer")
        self._readers = ThreadPoolExecutor(4, "store-reader")

    def migrate(self) -> None:
        """Bring the schema up to date; raise NewerSchema if a newer version made it. This blocks."""
        config = _migrations()
        with self._engine.begin() as connection:
            if unknown := set(MigrationContext.configure(connection).get_current_heads()) - known_revisions():
                raise NewerSchema(
                    f"the database has the schema {', '.join(sorted(unknown))}, which this version of Orion-Sec "
                    f"({__version__}) does not know: a newer version has made it. Nothing in it was changed. "
                    "Start that version again: see docs/operations.md"
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    async def follow(self, follower: Callable[[Changes], None]) -> None:
        """Call the follower in the event loop with the whole pool, then with the changes of each commit, in order.

        A `write` returns after the follower was called with its changes.
        """
        self._follower = follower
        await self.write(_touch_everything)

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function in the writer thread; commit when it returns, roll back when it raises."""
        loop = asyncio.get_running_loop()
        transaction = loop.run_in_executor(self._writer, self._transact, function, args, kwargs)
        # The commit is published even if the waiting task is cancelled because its client disconnected.
        transaction.add_done_callback(self._publish)
        return (await asyncio.shield(transaction))[0]

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, function, args, kwargs)

    def close(self) -> None:
        self._writer.shutdown()
        self._readers.shutdown()
        self._engine.dispose()

    def _publish(self, transaction: asyncio.Future[_Transacted[Any]]) -> None:
        if transaction.cancelled() or transaction.exception() is not None:
            return
        _, committed, changes = transaction.result()
        if changes is not None and self._follower is not None:
            self._follower(changes)
        self.news.publish(committed)

    def _transact(self, function: Callable[..., T], args: Any, kwargs: Any) -> _Transacted[T]:
        if self._ballast:
            self._ballast.allocate()
        try:
            return self._transact_once(function, args, kwargs)
        except OperationalError as error:
            if self._ballast is None or not self._ballast.release(error):
                raise
        return self._transact_once(function, args, kwargs)

    def _transact_once(self, function: Callable[..., T], args: Any, kwargs: Any) -> _Transacted[T]:
        with self._engine.begin() as connection:
            # Made new for each transaction: the pooled connection still has those of a transaction that failed.
            committed = connection.info["recorded"] = []
            rows_touched = connection.info["touched"] = Touched()
            result = function(connection, *args, **kwargs)
            changes = pool_index.changes(connection, rows_touched) if self._follower and rows_touched else None
        return result, committed, changes

    def _read(self, function: Callable[..., T], args: Any, kwargs: Any) -> T:
        with self._engine.connect() as connection:
            return function(connection, *args, **kwargs)


def known_revisions() -> set[str]:
    """Return the versions of the schema that this program knows."""
    return {script.revision for script in ScriptDirectory.from_config(_migrations()).walk_revisions()}


def record(connection: Connection, *recorded: Event) -> None:
    """Write events in the transaction of the changes that they describe."""
    if recorded:
        at = time.time()
        rows = [vars(item) | {"at": at, "details": dict(item.details)} for item in recorded]
        connection.execute(insert(events), rows)
        connection.info["recorded"].extend(recorded)


def touched(connection: Connection) -> Touched:
    """Return the ids of changed rows, to which each writer adds those that it changes: see store/pool_index.py."""
    found: Touched = connection.info["touched"]
    return found


def _touch_everything(connection: Connection) -> None:
    touched(connection).everything = True


def rows(result: Result[Any]) -> list[Row]:
    """Return the rows of a result as dictionaries, by column name."""
    return [dict(row) for row in result.mappings()]


def first(result: Result[Any]) -> Row | None:
    found = result.mappings().first()
    return dict(found) if found is not None else None


def set_counter(connection: Connection, name: str, value: int) -> None:
    if connection.execute(update(counters).where(counters.c.name == name).values(value=value)).rowcount == 0:
        connection.execute(insert(counters), {"name": name, "value": value})


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _connect(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _record: object) -> None:
    # The driver must not begin transactions by itself, or savepoints and IMMEDIATE do not work (SQLAlchemy's
    # documentation of its SQLite dialect, "Serializable isolation / Savepoints").
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")
