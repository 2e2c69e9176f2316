"""Backups of the database, their restore, and what a crash in the middle of a restore leaves."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text
from support.builders import host_key
from support.harness import Harness

from orion.manager.api.admin import AdminServices
from orion.manager.settings import Settings
from orion.manager.store import tokens
from orion.manager.store.backup import EPOCH_GAP, UID_GAP, Backups, NotABackup
from orion.manager.store.backup_rows import _CONDITIONS
from orion.manager.store.database import MIGRATIONS, Store
from orion.manager.store.schema import metadata

RENTAL = (
    "INSERT INTO rentals (id, name, owner, username, uid, state, epoch, public_key, ttl_s, labels, created_at) "
    "VALUES ('{0}', 'name-{0}', 'alice', 'r-{0}', {1}, '{2}', 3, 'key', 60, '{{}}', 1.0)"
)


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


REVISIONS = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()]


def execute(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def value(database: Path, query: str) -> Any:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchone()[0]


def names(database: Path) -> list[str]:
    return sorted(path.name for path in database.parent.iterdir() if path.name.startswith("orion.db"))


@pytest.fixture
def backups(database: Path) -> Backups:
    return Backups(database)


def uploaded(backups: Backups, backup: Path) -> Path:
    """Return an upload of a backup."""
    upload = backups.receive()
    shutil.copy(backup, upload)
    return upload


def test_each_connection_is_durable_and_checked_and_there_is_one_writer(store: Store) -> None:
    async def pragmas() -> list[list[Any]]:
        wanted = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        asked = [store.read(lambda c: [c.execute(text(f"PRAGMA {p}")).scalar() for p in wanted]) for _ in range(8)]
        return [
            *await asyncio.gather(*asked),
            await store.write(lambda c: [c.execute(text(f"PRAGMA {p}")).scalar() for p in wanted]),
        ]

    assert set(map(tuple, asyncio.run(pragmas()))) == {("wal", 2, 1, 10_000)}
    assert store._writer._max_workers == 1


async def test_a_backup_taken_during_writes_is_complete_and_one_file(store: Store, backups: Backups) -> None:
    async def write() -> None:
        for number in range(60):
            await store.write(tokens.create, "admin", f"name-{number}", "client", None)

    writing = asyncio.create_task(write())
    await asyncio.sleep(0)
    taken = [await asyncio.to_thread(backups.copy) for _ in range(3)]
    await writing
    for backup in taken:
        assert value(backup, "PRAGMA integrity_check") == "ok"
        assert value(backup, "SELECT count(*) FROM tokens") == value(backup, "SELECT count(*) FROM events")
        assert backup.stat().st_mode & 0o077 == 0, "only its owner may read it"


async def test_a_backup_holds_no_secret(store: Store, backups: Backups) -> None:
    _, client = await store.write(tokens.create, "admin", "alice", "client", None)
    admin = tokens.make_token("admin", "admin")
    await store.write(tokens.install, "admin", admin)
    content = (await asyncio.to_thread(backups.copy)).read_bytes()
    assert tokens.digest(client).encode() in content
    for secret in (client, admin):
        assert secret.rsplit("_", 1)[1].encode() not in content


def test_a_database_that_is_not_a_file_has_no_backups() -> None:
    assert Backups.of("postgresql://somewhere/orion") is None
    assert Backups.of("sqlite://") is None


def no_sqlite(file: Path) -> None:
    file.write_bytes(b"PK\x03\x04 a zip file")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwritten(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    file.write_bytes(content)


def of_another_program(file: Path) -> None:
    file.unlink()
    execute(file, "CREATE TABLE recipes (id)")


def of_a_newer_version(file: Path) -> None:
    execute(file, "UPDATE alembic_version SET version_num = '9999'")


def with_a_trigger(file: Path) -> None:
    execute(file, "CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM rentals; END")


def with_another_table(file: Path) -> None:
    execute(file, "CREATE TABLE more (id INTEGER)")


def with_rows_that_do_not_fit(file: Path) -> None:
    execute(file, "INSERT INTO idempotency VALUES ('a', 'b', 'c', 'nowhere', 1.0)")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (no_sqlite, "not an SQLite database"),
        (cut_off, "damaged|cannot be read|malformed"),
        (overwritten, "damaged|cannot be read|malformed"),
        (of_another_program, "not a database of Orion-Sec"),
        (of_a_newer_version, "newer version"),
        (with_a_trigger, "no backup has: t"),
        (with_another_table, "tables are not those"),
        (with_rows_that_do_not_fit, "do not fit together"),
    ],
)
def test_a_file_that_is_no_backup_is_refused_and_changes_nothing(
    backups: Backups, spoil: Callable[[Path], None], why: str
) -> None:
    upload = uploaded(backups, backups.database)
    spoil(upload)
    before = backups.database.read_bytes()
    with pytest.raises(NotABackup, match=why):
        backups.stage(upload)
    assert backups.database.read_bytes() == before
    assert not list(backups.database.parent.glob("*staged*"))


WORKER = (
    "INSERT INTO workers (id, hostname, address, host_keys, slots, labels, health, intent, token_hash, boot_id, "
    "agent_version, load, registered_at) VALUES "
    "('w-a', 'h', '10.0.0.9', '[]', 1, '{}', 'ready', 'active', 'x', 'b', '1', '{}', 1.0)"
)
PLACEMENT = (
    "INSERT INTO placements (id, rental_id, worker_id, slot, epoch, state, created_at) "
    "VALUES ('p', 'old', 'w-a', 0, 3, 'running', 1.0)"
)
EVENT = "INSERT INTO events (id, at, kind, actor, reason, details) VALUES (7, 1.0, 'x', 'x', 'x', '{}')"
GOOD_ROWS = (
    RENTAL.format("old", 100_001, "active"),
    *(WORKER, PLACEMENT, EVENT),
    "INSERT INTO copies VALUES ('old', 1, 1, 5.0, 0, 1, '[]', 0)",
    "INSERT INTO counters VALUES ('uid', 100001)",
    "INSERT INTO tokens VALUES ('t', 'n', 'client', 'h', 1.0, NULL, NULL)",
)
STRANGE = {
    "rentals.labels": ["'{'", "'[]'", "x'7b7d'"],
    "rentals.lineage": ["'x'", "'{}'"],
    "rentals.state": ["'bogus'"],
    "rentals.username": ["'root'", "'r-old/../x'"],
    "rentals.epoch": ["'abc'", "9223372036854775807", "-1"],
    "rentals.uid": ["0", "99999999999", "'zzz'"],
    "rentals.name": ["CAST(x'ff' AS TEXT)", "x'ff'"],
    "rentals.expires_at": ["'never'", "9e999"],
    "workers.id": ["'../../etc/x'", "''"],
    "workers.address": ["'-oProxyCommand=x'", "'example.org'"],
    "workers.host_keys": ["'{'", "'7'", "'[7]'", """'["a\\nb"]'"""],
    "workers.health": ["'bogus'"],
    "workers.slots": ["0"],
    "placements.state": ["'bogus'"],
    "placements.standby": ["2"],
    "placements.worker_id": ["'../w'"],
    "copies.skipped": ["'{'"],
    "events.id": ["9223372036854775807"],
    "events.at": ["'zz'"],
    "events.details": ["'{'"],
    "counters.value": ["'x'", "9223372036854775000"],
    "tokens.role": ["'god'"],
}


@pytest.mark.parametrize(
    ("column", "strange"), [(column, strange) for column in STRANGE for strange in STRANGE[column]]
)
def test_rows_that_a_manager_could_not_start_with_are_refused(backups: Backups, column: str, strange: str) -> None:
    table, _, name = column.partition(".")
    upload = uploaded(backups, backups.database)
    execute(upload, *GOOD_ROWS)
    with closing(sqlite3.connect(upload)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE {table} SET {name} = {strange}")  # noqa: S608
    with pytest.raises(NotABackup, match=f"damaged|{column} holds what|cannot be read"):
        backups.stage(upload)
    assert not list(backups.database.parent.glob("*staged*"))


def test_rows_that_a_manager_writes_are_accepted(backups: Backups) -> None:
    upload = uploaded(backups, backups.database)
    execute(upload, *GOOD_ROWS)
    assert backups.stage(upload).rentals == 1


def test_a_plan_says_what_is_forgotten_and_what_is_revived(backups: Backups) -> None:
    execute(
        backups.database, *(RENTAL.format(*row) for row in (("both", 100_001, "active"), ("ends", 100_002, "active")))
    )
    upload = uploaded(backups, backups.copy())
    execute(
        backups.database,
        "UPDATE rentals SET state = 'released' WHERE id = 'ends'",
        RENTAL.format("new", 100_003, "queued"),
    )
    plan = backups.stage(upload)
    assert plan.rentals == 2
    assert [known.id for known in plan.forgotten] == ["new"]
    assert [known.id for known in plan.revived] == ["ends"]


@pytest.fixture
def accepted(backups: Backups) -> Backups:
    """Give an accepted restore of a database with one rental; another rental was made since."""
    execute(backups.database, RENTAL.format("old", 100_001, "active"), "INSERT INTO counters VALUES ('uid', 100001)")
    upload = uploaded(backups, backups.copy())
    execute(
        backups.database,
        RENTAL.format("new", 100_002, "active"),
        "UPDATE counters SET value = 100002",
        "INSERT INTO events (id, at, kind, actor, reason, details) VALUES (77, 1, 'x', 'x', 'x', '{}')",
    )
    assert not backups.accept("../../etc/passwd", "admin")
    assert backups.accept(backups.stage(upload).id, "admin")
    return backups


def test_a_rental_that_ended_since_is_revived_without_its_removed_snapshots(backups: Backups) -> None:
    execute(
        backups.database,
        RENTAL.format("stays", 100_001, "active"),
        RENTAL.format("ends", 100_002, "active"),
        "INSERT INTO copies VALUES ('stays', 1, 1, 5.0, 0, 1, '[]', 0), ('ends', 1, 1, 5.0, 0, 1, '[]', 0)",
    )
    upload = uploaded(backups, backups.copy())
    execute(backups.database, "UPDATE rentals SET state = 'released' WHERE id = 'ends'")
    assert backups.accept(backups.stage(upload).id, "admin")
    assert backups.swap_in()
    assert value(backups.database, "SELECT group_concat(rental_id) FROM copies") == "stays"


def test_a_restore_reuses_no_number(accepted: Backups) -> None:
    assert accepted.swap_in()
    assert value(accepted.database, "SELECT group_concat(id) FROM rentals") == "old"
    assert value(accepted.database, "SELECT value FROM counters WHERE name = 'uid'") == 100_002 + UID_GAP
    assert value(accepted.database, "SELECT epoch FROM rentals") == 3 + EPOCH_GAP
    assert value(accepted.database, "SELECT id FROM events WHERE kind = 'platform.restored'") > 77


def test_the_former_database_is_kept_and_nothing_else_is_left(accepted: Backups) -> None:
    assert accepted.swap_in()
    assert not accepted.swap_in(), "a restore is swapped in once"
    assert value(accepted.replaced, "SELECT count(*) FROM rentals") == 2
    assert names(accepted.database) == ["orion.db", "orion.db.before-restore"]


@pytest.mark.parametrize("step", ["set aside", "replace"])
def test_a_crash_in_the_middle_of_a_swap_leaves_one_of_the_databases(
    accepted: Backups, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Crash(BaseException):
        """A kill of the process."""

    def crash(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        if step == "set aside":
            patch.setattr(Path, "hardlink_to", crash)
        else:
            patch.setattr(Path, "replace", crash)
        with pytest.raises(Crash):
            accepted.swap_in()
    assert value(accepted.database, "SELECT count(*) FROM rentals") == 2, "the database is still the former one"
    assert accepted.swap_in()
    assert value(accepted.database, "SELECT group_concat(id) FROM rentals") == "old"


def test_the_log_of_a_killed_manager_is_not_applied_to_the_restored_database(accepted: Backups, tmp_path: Path) -> None:
    """SQLite would apply an old -wal file to any database of that name."""
    killed = tmp_path / "killed"
    killed.mkdir()
    connection = sqlite3.connect(accepted.database)
    connection.execute(RENTAL.format("last", 100_009, "active"))
    connection.commit()
    for file in ("orion.db", "orion.db-wal", "orion.db-shm"):
        shutil.copy(accepted.database.with_name(file), killed)
    shutil.copy(accepted.accepted, killed)
    connection.close()
    there = Backups(killed / "orion.db")
    assert there.swap_in()
    assert value(there.database, "SELECT group_concat(id) FROM rentals") == "old"
    assert value(there.replaced, "SELECT count(*) FROM rentals") == 3, "the former database has the committed rows"


def test_a_broken_database_can_be_replaced(accepted: Backups) -> None:
    content = bytearray(accepted.database.read_bytes())
    content[100:8192] = b"\xff" * 8092
    accepted.database.write_bytes(content)
    backup = accepted.accepted.rename(accepted.database.with_name("kept-elsewhere"))
    plan = accepted.stage(uploaded(accepted, backup))
    assert plan.forgotten == []
    assert accepted.accept(plan.id, "admin")
    assert accepted.swap_in()
    assert value(accepted.database, "SELECT group_concat(id) FROM rentals") == "old"


async def test_an_administrator_takes_a_backup_and_restores_it(store: Store, database: Path) -> None:
    async with Harness(store, Settings(database_url=f"sqlite:///{database}")) as harness:
        restarts: list[bool] = []
        harness.change_services(AdminServices, restart=lambda: restarts.append(True))
        client, _ = await store.write(tokens.create, "admin", "alice", "client", None)
        await harness.join()
        rental = await harness.rent(ssh_public_key=host_key(9001))
        reply = await harness.as_admin.get("/api/admin/backup")
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/vnd.sqlite3"
        assert int(reply.headers["content-length"]) == len(reply.content)
        assert names(database) == ["orion.db", "orion.db-shm", "orion.db-wal"], "no other file is left"
        await store.write(tokens.revoke, "admin", client["id"])

        refused = await harness.as_admin.post("/api/admin/restore", content=b"something else")
        assert (refused.status_code, refused.json()["code"]) == (422, "not_a_backup")
        plan = await harness.as_admin.post("/api/admin/restore", content=reply.content)
        assert (plan.status_code, plan.json()["rentals"]) == (200, 1)
        assert restarts == []
        assert (await harness.as_admin.post("/api/admin/restore/else")).status_code == 404
        done = await harness.as_admin.post(f"/api/admin/restore/{plan.json()['id']}")
        assert (done.status_code, done.json()) == (202, {"kept_as": "orion.db.before-restore"})
        assert restarts == [True]
    store.close()
    assert Backups(database).swap_in()
    assert value(database, "SELECT id FROM rentals") == rental["id"]
    assert value(database, "SELECT count(*) FROM tokens WHERE name = 'alice' AND revoked_at IS NOT NULL") == 1


async def test_for_postgresql_its_own_tools_are_named(store: Store) -> None:
    async with Harness(store, Settings(database_url="postgresql://somewhere/orion")) as harness:
        reply: httpx.Response = await harness.as_admin.get("/api/admin/backup")
    assert (reply.status_code, reply.json()["code"]) == (409, "not_sqlite")
    assert "pg_dump" in reply.json()["detail"]


async def test_an_upload_that_is_no_backup_is_not_read_to_its_end(store: Store, database: Path) -> None:
    """Such an upload may be larger than the disk."""
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while given < 100:
            given += 1
            yield b"\x1f\x8b" + bytes(1 << 16)

    async with Harness(store, Settings(database_url=f"sqlite:///{database}")) as harness:
        reply = await harness.as_admin.post("/api/admin/restore", content=endless())
    assert (reply.status_code, reply.json()["code"]) == (422, "not_a_backup")
    assert given < 10
    assert not list(database.parent.glob("*upload*"))


def test_each_condition_is_of_a_column_that_exists() -> None:
    columns = {f"{table.name}.{column.name}" for table in metadata.sorted_tables for column in table.columns}
    assert columns >= _CONDITIONS.keys()
