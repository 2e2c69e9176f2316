"""Databases of former releases, as they are out there: tests/unit/schemas has one of each schema that was released."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from orion.manager.store.database import MIGRATIONS, Store
from orion.manager.store.schema import metadata

DUMPS = sorted((Path(__file__).parent / "schemas").glob("*.sql"))
TABLES = ("workers", "rentals", "placements", "counters", "tokens", "events", "idempotency")

each_release = pytest.mark.parametrize("dump", DUMPS, ids=lambda dump: dump.stem)


def config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def released(dump: Path, database: Path) -> Path:
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(dump.read_text())
    return database


def rows(database: Path) -> dict[str, list[dict[str, object]]]:
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        return {table: [dict(row) for row in connection.execute(f"SELECT * FROM {table}")] for table in TABLES}  # noqa: S608


def shape(database: Path) -> set[tuple[str, str]]:
    with closing(sqlite3.connect(database)) as connection:
        found = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'sqlite_sequence'"
        )
        # A table that was made anew has its constraints in any order.
        return {(name, " ".join(sorted(line.strip(" \t,") for line in sql.splitlines()))) for name, sql in found}


def test_each_schema_that_a_later_one_follows_is_here() -> None:
    newest, *released_ones = (script.revision for script in ScriptDirectory.from_config(config()).walk_revisions())
    assert {dump.stem for dump in DUMPS} | {newest} == {newest, *released_ones}


@each_release
def test_migrations_go_up_from_every_released_schema_and_keep_what_is_there(dump: Path, tmp_path: Path) -> None:
    database = released(dump, tmp_path / "orion.db")
    before = rows(database)
    assert all(before.values())
    store = Store(f"sqlite:///{database}")
    store.migrate()
    store.close()
    with (engine := create_engine(f"sqlite:///{database}")).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    after = rows(database)
    for table in TABLES:
        assert [old.items() <= new.items() for old, new in zip(before[table], after[table], strict=True)] == [True]


@each_release
def test_what_a_migration_makes_is_as_it_was_released(dump: Path, tmp_path: Path) -> None:
    """A migration that was changed afterwards would leave two shapes of the same version out there."""
    engine = create_engine(f"sqlite:///{tmp_path / 'made.db'}")
    made = config()
    with engine.begin() as connection:
        made.attributes["connection"] = connection
        command.upgrade(made, dump.stem)
    engine.dispose()
    assert shape(tmp_path / "made.db") == shape(released(dump, tmp_path / "released.db"))
