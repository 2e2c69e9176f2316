"""The database: one writer, atomic transactions, a schema that enforces invariants, and the news of commits."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, func, insert, inspect, select, text
from sqlalchemy.event import listen
from sqlalchemy.exc import IntegrityError

from orion.manager.domain.steps import Event
from orion.manager.store import events, state
from orion.manager.store.database import News, Store, record
from orion.manager.store.schema import counters, metadata, placements, rentals, workers


def a_rental(number: int = 1, **change: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": f"rental{number}",
        "name": f"name-{number}",
        "owner": "alice",
        "username": f"r-rental{number}",
        "uid": 100_000 + number,
        "state": "queued",
        "epoch": 0,
        "public_key": "",
        "ttl_s": 60,
        "labels": {},
        "created_at": 1.0,
    }
    return fields | change


def a_placement(number: int, **change: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": f"p-{number}",
        "rental_id": "rental1",
        "worker_id": f"w-{number}",
        "slot": 0,
        "epoch": number,
        "state": "running",
        "created_at": 1.0,
    }
    return fields | change


async def put(store: Store, table: Any, *rows: dict[str, Any]) -> None:
    def insert_all(connection: Connection) -> None:
        for row in rows:
            connection.execute(insert(table), row)

    await store.write(insert_all)


async def number_of(store: Store, table: Any) -> int:
    return await store.read(lambda c: int(c.execute(select(func.count()).select_from(table)).scalar_one()))


def test_the_migrations_make_exactly_the_schema(database: Path) -> None:
    engine = create_engine(f"sqlite:///{database}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_the_migrations_make_what_alembic_does_not_compare(database: Path, tmp_path: Path) -> None:
    """Alembic does not compare checks and the conditions of partial indexes."""

    def refusals(path: Path) -> dict[str, object]:
        engine = create_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            if path != database:
                metadata.create_all(connection)
            query = text("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
            found: dict[str, object] = {
                n: " ".join(sql.replace('"', "").split()) for n, sql in connection.execute(query)
            }
            inspector = inspect(connection)
            found |= {
                t: inspector.get_check_constraints(t) for t in inspector.get_table_names() if t in metadata.tables
            }
        engine.dispose()
        return found

    assert refusals(database) == refusals(tmp_path / "from_metadata.db")


def test_migrating_again_changes_nothing(database: Path, store: Store) -> None:
    store.migrate()
    test_the_migrations_make_exactly_the_schema(database)


def test_what_is_committed_survives_a_crash_of_the_machine(store: Store) -> None:
    """In WAL mode only FULL makes a commit durable, see SQLite's documentation of `synchronous`."""
    pragmas = asyncio.run(
        store.read(lambda c: [c.execute(text(f"PRAGMA {p}")).scalar() for p in ("journal_mode", "synchronous")])
    )
    assert pragmas == ["wal", 2]


async def test_a_transaction_that_raises_writes_no_rows_and_publishes_no_news(store: Store) -> None:
    def half(connection: Connection) -> None:
        connection.execute(insert(rentals), a_rental())
        record(
            connection,
            Event(kind="rental.queued", actor="alice", reason="asked for", owner="alice", rental_id="rental1"),
        )
        raise RuntimeError("in the middle")

    with store.news.listen(News.EVERYTHING) as changed:
        with pytest.raises(RuntimeError):
            await store.write(half)
        assert not changed.is_set()
    assert await number_of(store, rentals) == 0
    assert await store.read(events.last) == 0


async def test_the_news_of_a_failed_transaction_are_not_published_with_the_next(store: Store) -> None:
    def failing(connection: Connection) -> None:
        record(
            connection,
            Event(kind="rental.queued", actor="alice", reason="asked for", owner="alice", rental_id="rental1"),
        )
        raise RuntimeError

    with store.news.listen("rental1") as changed:
        with pytest.raises(RuntimeError):
            await store.write(failing)
        await store.write(
            lambda c: record(
                c, Event(kind="rental.queued", actor="alice", reason="x", owner="alice", rental_id="rental2")
            )
        )
        assert not changed.is_set()


async def test_a_commit_wakes_the_listeners_of_its_rental_and_of_everything_and_no_others(store: Store) -> None:
    news = store.news
    with news.listen("rental1") as one, news.listen("rental2") as two, news.listen(News.EVERYTHING) as everything:
        await store.write(
            lambda c: record(
                c, Event(kind="rental.queued", actor="alice", reason="x", owner="alice", rental_id="rental1")
            )
        )
        assert (one.is_set(), two.is_set(), everything.is_set()) == (True, False, True)
    assert not news._listeners, "a listener that left is removed"


async def test_writes_at_the_same_time_all_land(store: Store) -> None:
    def add_one(connection: Connection) -> None:
        value = connection.execute(select(counters.c.value)).scalar()
        if value is None:
            connection.execute(insert(counters), {"name": "n", "value": 1})
        else:
            connection.execute(counters.update().values(value=value + 1))

    await asyncio.gather(*(store.write(add_one) for _ in range(50)))
    assert await store.read(lambda c: c.execute(select(counters.c.value)).scalar()) == 50


async def test_reads_go_on_during_a_write(store: Store) -> None:
    reading, done = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(connection: Connection) -> None:
        connection.execute(insert(rentals), a_rental())
        loop.call_soon_threadsafe(reading.set)
        asyncio.run_coroutine_threadsafe(done.wait(), loop).result(5)

    writing = asyncio.create_task(store.write(slow))
    await reading.wait()
    assert await number_of(store, rentals) == 0, "uncommitted rows are invisible"
    done.set()
    await writing
    assert await number_of(store, rentals) == 1


async def test_a_rental_never_has_two_live_placements(store: Store) -> None:
    await put(store, rentals, a_rental())
    await put(store, placements, a_placement(1, state="preparing"))
    with pytest.raises(IntegrityError, match="rental_id"):
        await put(store, placements, a_placement(2, state="reserved"))
    await put(store, placements, a_placement(2, state="lost"))


@pytest.mark.parametrize("state", ["reserved", "preparing", "running", "stopping", "stopped", "failed"])
async def test_no_two_placements_are_in_one_slot(store: Store, state: str) -> None:
    await put(store, rentals, a_rental(), a_rental(2))
    await put(store, placements, a_placement(1, state=state))
    with pytest.raises(IntegrityError, match="slot"):
        await put(store, placements, a_placement(2, worker_id="w-1", rental_id="rental2"))


@pytest.mark.parametrize("state", ["lost", "purged"])
async def test_a_lost_or_purged_placement_gives_its_slot_up(store: Store, state: str) -> None:
    await put(store, rentals, a_rental(), a_rental(2))
    await put(store, placements, a_placement(1, state=state))
    await put(store, placements, a_placement(2, worker_id="w-1", rental_id="rental2"))
    assert await number_of(store, placements) == 2


async def test_an_epoch_of_a_rental_is_used_once(store: Store) -> None:
    await put(store, rentals, a_rental())
    await put(store, placements, a_placement(1, state="purged"))
    with pytest.raises(IntegrityError, match="epoch"):
        await put(store, placements, a_placement(2, epoch=1))


@pytest.mark.parametrize(
    ("change", "why"), [({"uid": 99_999}, "uid"), ({"username": "r-rental1"}, "username"), ({"uid": 100_001}, "uid")]
)
async def test_a_number_or_account_that_is_not_a_rental_s_own_is_refused(
    store: Store, change: dict[str, Any], why: str
) -> None:
    await put(store, rentals, a_rental(1, state="released"))
    with pytest.raises(IntegrityError, match=why):
        await put(store, rentals, a_rental(2, **change))


async def test_a_placement_belongs_to_an_existing_rental(store: Store) -> None:
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        await put(store, placements, a_placement(1))


async def test_a_worker_has_at_least_one_slot(store: Store) -> None:
    row = dict.fromkeys(("hostname", "address", "health", "intent", "token_hash", "boot_id", "agent_version"), "")
    rest = {"id": "w", "host_keys": [], "labels": {}, "load": {}, "registered_at": 1.0}
    with pytest.raises(IntegrityError, match="slots"):
        await put(store, workers, row | rest | {"slots": 0})


async def test_a_commit_is_published_though_its_writer_no_longer_waits(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        begun.set()
        go_on.wait(60)
        record(connection, Event(kind="rental.queued", actor="alice", reason="asked for", rental_id="rental1"))

    with store.news.listen("rental1") as changed:
        writing = asyncio.create_task(store.write(slow))
        await asyncio.to_thread(begun.wait, 60)
        writing.cancel()
        go_on.set()
        await asyncio.wait_for(changed.wait(), 60)
    assert writing.cancelled()


async def test_rentals_in_migration_are_found_without_reading_all_that_run(store: Store) -> None:
    def plan(connection: Connection) -> str:
        executed: list[str] = []
        listen(connection, "before_cursor_execute", lambda _c, _cursor, statement, *_: executed.append(statement))
        state.load_part(connection, (), ())
        [about_migrations] = [statement for statement in executed if "AND standby" in statement]
        return str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {about_migrations}").all())

    assert "uq_placements_standby" in await store.read(plan)
    assert "SCAN rentals" not in await store.read(plan)
