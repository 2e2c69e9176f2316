"""Databases of former releases: tests/unit/schemas has one of each released schema."""

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
from structlog.testing import capture_logs

from orion.manager import main
from orion.manager.settings import Settings
from orion.manager.store.database import MIGRATIONS, NewerSchema, Store, known_revisions
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
        # A table that was recreated has its constraints in another order.
        return {(name, " ".join(sorted(line.strip(" \t,") for line in sql.splitlines()))) for name, sql in found}


def test_each_schema_that_a_later_one_follows_is_here() -> None:
    newest, *released_ones = (script.revision for script in ScriptDirectory.from_config(config()).walk_revisions())
    assert {dump.stem for dump in DUMPS} | {newest} == {newest, *released_ones}


@each_release
def test_migrations_upgrade_every_released_schema_and_keep_its_rows(dump: Path, tmp_path: Path) -> None:
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


def of_a_newer_version(database: Path) -> Path:
    store = Store(f"sqlite:///{database}")
    store.migrate()
    store.close()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    return database


def test_a_schema_of_a_newer_version_is_refused_with_a_reason_and_not_changed(tmp_path: Path) -> None:
    database = of_a_newer_version(tmp_path / "orion.db")
    before = shape(database)
    store = Store(f"sqlite:///{database}")
    with pytest.raises(
        NewerSchema, match=r"schema 9999, which this version .* does not know.*Start that version again"
    ):
        store.migrate()
    store.close()
    assert shape(database) == before
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]


def test_a_manager_waits_for_a_database_that_it_understands_instead_of_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = of_a_newer_version(tmp_path / "orion.db")
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == main.LOOKS_PER_WORD + 1:  # an operator has repaired it
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("DELETE FROM alembic_version")
                connection.execute("INSERT INTO alembic_version VALUES (?)", (sorted(known_revisions())[-1],))
                connection.commit()

    monkeypatch.setattr(main.time, "sleep", sleep)
    with capture_logs() as logged:
        main._open_store_in_time(Settings(database_url=f"sqlite:///{database}", ballast_bytes=0)).close()
    assert pauses == [main.LOOK_AGAIN_S] * (main.LOOKS_PER_WORD + 1)
    waits = [line["why"] for line in logged if "it waits for a database" in line["event"]]
    assert len(waits) == 2, "one line in five minutes"
    assert "schema 9999" in waits[0]


@each_release
def test_a_released_schema_migration_still_makes_the_same_schema(dump: Path, tmp_path: Path) -> None:
    """A migration that was changed after its release would leave two schemas with one version."""
    engine = create_engine(f"sqlite:///{tmp_path / 'made.db'}")
    made = config()
    with engine.begin() as connection:
        made.attributes["connection"] = connection
        command.upgrade(made, dump.stem)
    engine.dispose()
    assert shape(tmp_path / "made.db") == shape(released(dump, tmp_path / "released.db"))
