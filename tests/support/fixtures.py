"""Fixtures: a store on a real SQLite file for each test, copied from one with the newest schema, and the harness."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from sqlalchemy import Engine, create_engine
from support.harness import Harness
from support.way_in import Sshds

from orion.manager.gateway import ssh_sessions
from orion.manager.store.database import Store


@pytest.fixture(scope="session", autouse=True)
def _plain_log() -> None:
    """Log exceptions plainly: the default renderer draws boxes around them, which takes seconds."""
    plain = [structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()]
    structlog.configure(processors=plain)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "migrated.db"
    store = Store(f"sqlite:///{path}")
    store.migrate()
    store.close()
    return path


@pytest.fixture
def database(migrated_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(migrated_database, tmp_path / "orion.db"))


@pytest.fixture(scope="session")
def statements() -> Engine:
    """Return an engine that never connects, whose cache of compiled statements all tests share."""
    return create_engine("sqlite://", query_cache_size=5000)


@pytest.fixture
def store(database: Path, statements: Engine) -> Iterator[Store]:
    store = Store(f"sqlite:///{database}")
    store._engine.dialect = store._engine.pool._dialect = statements.dialect
    store._engine._compiled_cache = statements._compiled_cache
    yield store
    store.close()


@pytest.fixture
async def harness(store: Store) -> AsyncIterator[Harness]:
    """Give the whole manager on virtual time, its rounds driven by the test, with a fake world of workers."""
    async with Harness(store) as harness:
        yield harness


@pytest.fixture
def sshds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshds]:
    """Give the sockets that the gateway connects to in place of workers."""
    made = Sshds()
    monkeypatch.setattr(ssh_sessions, "connect", made.connect)
    yield made
    made.close()
